"""ImageNet recipes: the papers' setting, ResNet-50, two different nets; and Imagenette, ten of its classes."""

from ..methods.ffl import FFL
from ..recipe import Data, Nets, Optim, Recipe, Sched
from . import recipe

RESNET34 = (
    "published, ResNet-34, error top-1 / top-5 (FFL slides): vanilla 26.69 / 8.58, one peer (FFL-S) 25.58 +- 0.06 / "
    "7.95 +- 0.06, fused (FFL) 23.91 / 7.17, there probably of three peers; not reproduced"
)


@recipe
def imagenet() -> Recipe:
    return Recipe(
        name="imagenet",
        summary="FFL, two ResNet-34, ImageNet-1k. Shared: conv1, bn1 and layer1 to layer3; each peer has its own layer4 and fc.",
        source=(
            "the field's ImageNet setting, which the FFL slides do not spell out: RandomResizedCrop 224 and flip, centre 224 of "
            "256, SGD 0.1 for a batch of 256, x0.1 at epochs 30 and 60 of 90, T 3; how its distillation is ramped up is unknown, "
            "here 80/300 of the epochs as on CIFAR"
        ),
        expect=RESNET34,
        data=Data(name="imagenet", batch_size=256, size=224),
        nets=Nets(names=("resnet34", "resnet34")),
        method=FFL.Config(),
        optim=Optim(lr=0.1, lr_batch=256, momentum=0.9, nesterov=True, weight_decay=1e-4),
        sched=Sched(name="step", epochs=90, milestones=(30, 60), gamma=0.1),
    )


@recipe
def imagenet_resnet50() -> Recipe:
    return Recipe(
        name="imagenet-resnet50",
        summary="FFL, two ResNet-50, ImageNet-1k. Shared: conv1, bn1 and layer1 to layer3; each peer has its own layer4 and fc.",
        source="our own: the setting of `imagenet` with 5 epochs of warm-up",
        expect="no FFL figure is published for it; ResNet-50 alone 23.47 top-1 error (CL-ILR paper, recalled); not reproduced",
        data=Data(name="imagenet", batch_size=256, size=224),
        nets=Nets(names=("resnet50", "resnet50")),
        method=FFL.Config(),
        optim=Optim(lr=0.1, lr_batch=256, momentum=0.9, nesterov=True, weight_decay=1e-4),
        sched=Sched(name="step", epochs=90, milestones=(30, 60), gamma=0.1, warmup_epochs=5),
    )


@recipe
def imagenet_resnet34_mobilenetv3() -> Recipe:
    return Recipe(
        name="imagenet-resnet34-mobilenetv3",
        summary="FFL, two different separate nets, ImageNet-1k: ResNet-34 and MobileNetV3-Large, the small one to take home.",
        source="our own: cosine and no decay of norms and biases, as both families are trained today",
        expect="no FFL figure is published for this pair; not reproduced",
        data=Data(name="imagenet", batch_size=256, size=224),
        nets=Nets(names=("resnet34", "mobilenetv3_large_100")),
        method=FFL.Config(),
        optim=Optim(lr=0.1, lr_batch=256, weight_decay=5e-5, decay_norm_bias=False, clip=5.0),
        sched=Sched(name="cosine", epochs=90, warmup_epochs=5),
    )


@recipe
def imagenette() -> Recipe:
    return Recipe(
        name="imagenette",
        summary="FFL, two ResNet-18 on a shared stem, Imagenette: ten classes of ImageNet, 160 pixels, from any of its editions.",
        source="our own",
        expect="no FFL figure is published for it; not reproduced",
        data=Data(name="imagenette", batch_size=64, eval_batch_size=64, size=160, scale=(0.35, 1.0)),
        nets=Nets(names=("resnet18", "resnet18")),
        method=FFL.Config(),
        optim=Optim(lr=0.05, lr_batch=64, weight_decay=1e-4, decay_norm_bias=False, clip=5.0),
        sched=Sched(name="cosine", epochs=40, warmup_epochs=1),
    )
