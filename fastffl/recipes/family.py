"""Recipes of FFL's siblings: each in its own published setting as far as that is known, and all of them in one common setting."""

from functools import partial

from .. import methods
from ..methods.afd import AFD
from ..methods.cl_ilr import CLILR
from ..methods.dualnet import DualNet
from ..methods.feed import FEED
from ..methods.ffsd import FFSD
from ..methods.kd import KD
from ..methods.kdcl import KDCL
from ..methods.mcl_okd import MCLOKD
from ..methods.mfef import MFEF
from ..methods.oem_kd import OEMKD
from ..methods.okddip import OKDDip
from ..methods.pcl import PCL
from ..recipe import Data, MethodConfig, Nets, Optim, Recipe, Sched
from . import recipe, register

NOT = "not reproduced"
COSINE = Sched(name="cosine", epochs=300, ramp_epochs=80)
STEPS = Sched(name="step", epochs=300, milestones=(150, 225), ramp_epochs=80)
ZERO = Data(name="cifar100", pad_mode="zero")  # 128 a batch, as all of them but where it says so
STRONG = Optim(lr=0.1, weight_decay=5e-4)


def _of(
    name: str, method: MethodConfig, nets: tuple[str, ...], summary: str, source: str, expect: str = "", **more: object
) -> Recipe:
    made = {"data": ZERO, "optim": STRONG, "sched": STEPS, **more}
    expect = f"{expect}; {NOT}" if expect else f"nothing published is known; {NOT}"
    nets_ = Nets(names=nets)
    return Recipe(name=name, summary=summary, source=source, expect=expect, nets=nets_, method=method, **made)


@recipe
def kd_cifar100_resnet110_resnet32() -> Recipe:
    return _of(
        "kd-cifar100-resnet110-resnet32",
        KD.Config(first="resnet110", eps=1e-7),
        ("resnet32",),
        "Offline distillation: a ResNet-110 is trained first and teaches a ResNet-32.",
        "github DefangChen/OKDDip-AAAI2020, its KD baseline; its ResNet-110 has bottlenecks, ours basic blocks",
    )


@recipe
def cl_ilr_cifar100_resnet32() -> Recipe:
    return _of(
        "cl-ilr-cifar100-resnet32",
        CLILR.Config(),
        ("resnet32",) * 4,
        "Collaborative learning, four heads on a tree of ResNet-32.",
        "github winycg/MCL-OKD, its CL-ILR: cosine from 0.1, decay 5e-4",
        "published: 25.40 error, mean of the first three heads 24.03",
        sched=COSINE,
    )


@recipe
def okddip_cifar100_resnet32() -> Recipe:
    return _of(
        "okddip-cifar100-resnet32",
        OKDDip.Config(eps=1e-7),
        ("resnet32",) * 4,
        "OKDDip, three auxiliary peers and a leader, ResNet-32 on a shared stem.",
        "github DefangChen/OKDDip-AAAI2020: 300 epochs, x0.1 at 150 and 225, decay 5e-4, T 3, ramp 80",
        "published: about 25.40 error (recalled)",
    )


@recipe
def dualnet_cifar100_resnet32() -> Recipe:
    return _of(
        "dualnet-cifar100-resnet32",
        DualNet.Config(schedule="iterative"),
        ("resnet32",) * 2,
        "DualNet, trained in turn: one net alone, the second beside it, then the joint classifier.",
        "losses and first two runs of github ustc-vim/dualnet (NIN); nets and schedule as FFL's own, by whom it was compared",
        "published by FFL: average of classifiers 27.49 +- 0.31, nets 34.91 +- 1.23 error",
        data=Data(name="cifar100"),
        optim=Optim(lr=0.1, weight_decay=1e-4),
    )


@recipe
def ffsd_cifar100_resnet32() -> Recipe:
    return _of(
        "ffsd-cifar100-resnet32",
        FFSD.Config(ramp=True),
        ("resnet32",) * 3,
        "FFSD, two students and the leader, separate ResNet-32.",
        "github SJLeo/FFSD: reflected borders, 300 epochs (there 299), x0.1 at 150 and 225, decay 1e-4, five of warm-up",
        "published: leader 74.92, 74.82, 74.82 % top-1 (best epochs of three runs)",
        data=Data(name="cifar100"),
        sched=Sched(name="step", epochs=300, milestones=(150, 225), ramp_epochs=5),
        optim=Optim(lr=0.1, weight_decay=1e-4),
    )


@recipe
def kdcl_cifar100_resnet32_wrn16_2() -> Recipe:
    return _of(
        "kdcl-cifar100-resnet32-wrn16-2",
        KDCL.Config(),
        ("resnet32", "wrn16_2"),
        "KDCL, MinLogit target, two different nets that see an augmentation each.",
        "its own recipe was not found: the field's 300 epochs",
    )


@recipe
def afd_cifar100_resnet32() -> Recipe:
    return _of(
        "afd-cifar100-resnet32",
        AFD.Config(),
        ("resnet32",) * 2,
        "AFD, two separate ResNet-32 and their discriminators.",
        "its own recipe was not found: that of the same authors' FFL code",
        "published: 74.03 % top-1, alone 69.38 (notes on the paper)",
        data=Data(name="cifar100"),
        optim=Optim(lr=0.1, weight_decay=1e-4),
    )


@recipe
def pcl_cifar100_resnet32() -> Recipe:
    return _of(
        "pcl-cifar100-resnet32",
        PCL.Config(),
        ("resnet32",) * 3,
        "PCL, three ResNet-32 on a shared stem, an augmentation each.",
        "an unofficial code, equal to OKDDip's settings",
        "published: 74.14 +- 0.16 % top-1",
    )


@recipe
def mcl_okd_cifar100_resnet32() -> Recipe:
    return _of(
        "mcl-okd-cifar100-resnet32",
        MCLOKD.Config(),
        ("resnet32",) * 4,
        "MCL-OKD, four branches of ResNet-32, 256 negatives.",
        "github winycg/MCL-OKD: batch 64, cosine from 0.05, decay 5e-4",
        "published: main branch 24.52, mean 22.00 error",
        data=Data(name="cifar100", batch_size=64, pad_mode="zero"),
        optim=Optim(lr=0.05, weight_decay=5e-4),
        sched=Sched(name="cosine", epochs=300, ramp_epochs=0),
    )


@recipe
def oem_kd_cifar100_resnet32() -> Recipe:
    return _of(
        "oem-kd-cifar100-resnet32",
        OEMKD.Config(),
        ("resnet32", "resnet32@0.8", "resnet32@0.6", "resnet32@0.4", "resnet32@0.2"),
        "OEM-KD, five widths of ResNet-32 on its first convolution.",
        "paper, section 4: 450 epochs, x0.1 at half and three quarters; batch and decay are not printed",
        "published: 70.97, 68.24, 65.67, 61.17, 42.17 % top-1 (mean of five runs)",
        optim=Optim(lr=0.1, weight_decay=1e-4),
        sched=Sched(name="step", epochs=450, milestones=(0.5, 0.75)),
    )


@recipe
def mfef_cifar100_resnet32() -> Recipe:
    return _of(
        "mfef-cifar100-resnet32",
        MFEF.Config(),
        ("resnet32",) * 2,
        "MFEF, reconstructed from its abstract: two separate ResNet-32.",
        "our own: FFL's schedule with decay 5e-4",
    )


@recipe
def feed_cifar100_resnet32() -> Recipe:
    return _of(
        "feed-cifar100-resnet32",
        FEED.Config(count=5),
        ("resnet32",),
        "FEED in parallel: five ResNet-32 are trained first and teach a sixth.",
        "its own recipe was not found: 200 epochs, x0.1 at 100 and 150, decay 5e-4",
        sched=Sched(name="step", epochs=200, milestones=(100, 150)),
    )


@recipe
def feed_sequential_cifar100_resnet32() -> Recipe:
    made = feed_cifar100_resnet32()
    return made.model_copy(
        update={
            "name": "feed-sequential-cifar100-resnet32",
            "summary": "FEED in sequence: ResNet-32 after ResNet-32, each taught by the one before it.",
            "method": FEED.Config(schedule="sequential", count=3),
        }
    )


COMPARE = "compare-cifar100-resnet32-"


def compared(method: str) -> Recipe:
    """The common setting: three ResNet-32 as the method arranges them, one schedule, data and seed for all."""
    nets, config = methods.load(method).arranged(("resnet32",) * 3)
    shown = f"{len(nets)} x ResNet-32" if len({*nets}) == 1 else ", ".join(nets)
    return _of(
        COMPARE + method,
        config,
        nets,
        f"One setting for all methods: {method}, {shown}, CIFAR-100.",
        "the setting of the PCL paper's re-runs (OKDDip's code): batch 128, decay 5e-4, x0.1 at 150 and 225 of 300 epochs",
        "compare with the other compare-cifar100-resnet32-* only",
    )


for _name in methods.own():
    register(COMPARE + _name, partial(compared, _name), twin=False)
