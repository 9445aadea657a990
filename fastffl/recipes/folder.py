"""The recipe of `fastffl train DIR`: any tree of class folders."""

from ..methods.ffl import FFL
from ..recipe import Data, Nets, Optim, Recipe, Sched
from . import recipe


@recipe
def folder() -> Recipe:
    return Recipe(
        name="folder",
        summary="Your own images: DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE, or DIR/CLASS/IMAGE with a tenth held out.",
        source="our own",
        data=Data(name="folder", batch_size=64, eval_batch_size=64, size=224),
        nets=Nets(names=("resnet34", "mobilenetv3_large_100")),
        method=FFL.Config(),
        optim=Optim(lr=0.05, weight_decay=1e-4, decay_norm_bias=False, clip=5.0),
        sched=Sched(name="cosine", epochs=30, warmup_epochs=1),
    )
