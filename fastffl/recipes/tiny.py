"""Recipes that need no data: digits (real, shipped with the package) and synthetic."""

from ..methods.ffl import FFL
from ..recipe import Data, Nets, Optim, Recipe, Sched
from . import recipe


@recipe
def digits() -> Recipe:
    return Recipe(
        name="digits",
        summary="Two different peers learn real 8x8 handwritten digits in under a minute on a CPU; what `make demo` runs.",
        source="our own",
        expect=">= 98.5 % on every peer and on fused, last epoch",
        data=Data(name="digits", batch_size=64, eval_batch_size=450),
        nets=Nets(names=("resnet8", "wrn16_2")),
        method=FFL.Config(),
        optim=Optim(lr=0.1, weight_decay=5e-4, clip=1.0),
        sched=Sched(name="cosine", epochs=30, warmup_epochs=1),
    )


@recipe
def synthetic() -> Recipe:
    return Recipe(
        name="synthetic",
        summary="Random images of CIFAR's shape: for timing and for trying things out.",
        source="our own",
        data=Data(name="synthetic", batch_size=64),
        nets=Nets(names=("resnet20", "resnet20")),
        method=FFL.Config(),
        sched=Sched(name="cosine", epochs=2),
    )
