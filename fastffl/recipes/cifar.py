"""CIFAR recipes: ours for everyday use, and those of the papers with their code's settings."""

from ..methods.dml import DML
from ..methods.ffl import FFL
from ..methods.one import ONE
from ..recipe import Data, Nets, Optim, Recipe, Sched
from . import recipe

CIFAR10_STATS = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}


@recipe
def cifar10() -> Recipe:
    return Recipe(
        name="cifar10",
        summary="FFL, two ResNet-32 on a shared stem, CIFAR-10.",
        source="FFL's CIFAR-100 setting",
        expect="published: fused 5.78 +- 0.13, peers 6.06 +- 0.15 error (FFL slides); not reproduced",
        data=Data(name="cifar10"),
        nets=Nets(names=("resnet32", "resnet32")),
        method=FFL.Config(),
    )


@recipe
def cifar100() -> Recipe:
    return Recipe(
        name="cifar100",
        summary="FFL, two ResNet-32 on a shared stem, CIFAR-100.",
        source="FFL's setting with 300 epochs and one weight decay",
        expect="published: fused 25.56 +- 0.32, peers 27.06 +- 0.34 error (FFL slides); not reproduced",
        data=Data(name="cifar100"),
        nets=Nets(names=("resnet32", "resnet32")),
        method=FFL.Config(),
    )


@recipe
def ffl_cifar100_resnet32() -> Recipe:
    return Recipe(
        name="ffl-cifar100-resnet32",
        summary="The official FFL code's run, quirks included: 301 epochs, fusion decay 1e-5, 1e-7 on the teachers.",
        source="github Jangho-Kim/FFL-pytorch: train_FFL.py, utils.py",
        expect="published: fused 25.56 +- 0.32, peers 27.06 +- 0.34 error (FFL slides); not reproduced",
        data=Data(name="cifar100", batch_size=128, eval_batch_size=500, pad=4, pad_mode="reflect"),
        nets=Nets(names=("resnet32", "resnet32"), share_stem=True),
        method=FFL.Config(T=3.0, eps=1e-7, weight_decay=1e-5),
        optim=Optim(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, decay_norm_bias=True),
        sched=Sched(name="step", epochs=301, milestones=(150, 225), gamma=0.1, ramp_epochs=80),
    )


def _pair(name: str, method: FFL.Config | DML.Config, summary: str, expect: str) -> Recipe:
    return Recipe(
        name=name,
        summary=summary,
        source="FFL slides, table of heterogeneous nets; schedule of the official code",
        expect=expect,
        data=Data(name="cifar100"),
        nets=Nets(names=("resnet32", "wrn16_2")),
        method=method,
        sched=Sched(ramp_epochs=80),
    )


@recipe
def ffl_cifar100_resnet32_wrn16_2() -> Recipe:
    return _pair(
        "ffl-cifar100-resnet32-wrn16-2",
        FFL.Config(),
        "FFL, two different separate nets: ResNet-32 and WRN-16-2.",
        "published: ResNet-32 27.06 +- 0.26, WRN-16-2 25.93 +- 0.30 error (FFL slides); not reproduced",
    )


@recipe
def dml_cifar100_resnet32_wrn16_2() -> Recipe:
    return _pair(
        "dml-cifar100-resnet32-wrn16-2",
        DML.Config(),
        "Deep Mutual Learning of the same pair, T = 1.",
        "published: ResNet-32 28.31 +- 0.28, WRN-16-2 26.45 +- 0.30 error (FFL slides; their T is not known); not reproduced",
    )


@recipe
def dml_cifar100_resnet32() -> Recipe:
    return Recipe(
        name="dml-cifar100-resnet32",
        summary="Deep Mutual Learning, two separate ResNet-32, the paper's own schedule.",
        source="DML paper (recalled): 200 epochs, batch 64, rate x0.1 every 60 epochs, reflect pad; weight decay ours",
        expect="published: 71.19 and 70.75 % top-1 (recalled, check the paper); not reproduced",
        data=Data(name="cifar100", batch_size=64),
        nets=Nets(names=("resnet32", "resnet32")),
        method=DML.Config(T=1.0),
        optim=Optim(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
        sched=Sched(name="step", epochs=200, milestones=(60, 120, 180)),
    )


@recipe
def one_cifar100_resnet32() -> Recipe:
    return Recipe(
        name="one-cifar100-resnet32",
        summary="ONE, three ResNet-32 branches on a shared stem, as its code's script has it.",
        source="github Lan1991Xu/ONE_NeurIPS2018: script, no Nesterov, milestones 151/225, CIFAR-10 statistics, zero pad",
        expect="published: branch 26.61 +- 0.06 error (recalled, best epoch); not reproduced",
        data=Data(name="cifar100", batch_size=128, eval_batch_size=500, pad_mode="zero", **CIFAR10_STATS),
        nets=Nets(names=("resnet32", "resnet32", "resnet32"), share_stem=True),
        method=ONE.Config(eps=1e-7),
        optim=Optim(lr=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4),
        sched=Sched(name="step", epochs=300, milestones=(151, 225), ramp_epochs=80),
    )
