"""rand_augment: the operations of RandAugment (Cubuk et al. 2020) on uint8 images, as torchvision's RandAugment has them.

Which operation and which sign are drawn with an image's view (`views.Change`); how strong it is follows from the magnitude.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .views import Change

OPS = (
    "identity",
    "auto_contrast",
    "equalize",
    "rotate",
    "solarize",
    "color",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
FILL = 128.0  # grey of what a moved image uncovers
FULL = 30  # the largest magnitude
# largest strength: degrees; share of the distance to grey, mean, black or blur; slope; share of the image's side
REACH = {
    "rotate": 30.0,
    "color": 0.9,
    "contrast": 0.9,
    "brightness": 0.9,
    "sharpness": 0.9,
    "shear_x": 0.3,
    "shear_y": 0.3,
    "translate_x": 150 / 331,
    "translate_y": 150 / 331,
}


@cache
def _level(none: float, full: float, magnitude: int) -> float:
    """torchvision's own number, in fp32: another last bit moves what is cut to whole numbers."""
    return float(torch.linspace(none, full, FULL + 1)[magnitude])


@cache
def strength(change: Change, magnitude: int, size: int) -> float:
    """What an operation is done with: degrees (rotate), slope (shear), whole pixels (translate), kept bits (posterize), the
    threshold (solarize), the image's own weight against its variant (color, contrast, brightness, sharpness); else 0."""
    name = OPS[change.op]
    if name == "posterize":
        return float(8 - round(4 * magnitude / FULL))
    if name == "solarize":
        return 255 * _level(1.0, 0.0, magnitude)
    if name not in REACH:
        return 0.0
    sign = -1 if change.negative else 1
    if name.startswith("translate"):
        return float(int(sign * _level(0.0, REACH[name] * size, magnitude)))
    value = sign * _level(0.0, REACH[name], magnitude)
    return value if name in ("rotate", "shear_x", "shear_y") else 1 + value


def apply(image: Tensor, changes: Sequence[Change], magnitude: int) -> Tensor:
    """image (3, S, S) uint8 after `changes`, one after the other, each as strong as `magnitude` of 30 says."""
    from torchvision.transforms.v2 import functional as F

    for change in changes:
        name, by = OPS[change.op], strength(change, magnitude, image.shape[-1])
        if name == "auto_contrast":
            image = F.autocontrast(image)
        elif name == "equalize":
            image = F.equalize(image)
        elif name == "rotate":
            image = F.rotate(image, by, fill=[FILL])
        elif name == "solarize":
            image = F.solarize(image, by)
        elif name == "color":
            image = F.adjust_saturation(image, by)
        elif name == "posterize":
            image = F.posterize(image, int(by))
        elif name == "contrast":
            image = F.adjust_contrast(image, by)
        elif name == "brightness":
            image = F.adjust_brightness(image, by)
        elif name == "sharpness":
            image = F.adjust_sharpness(image, by)
        elif name.startswith("shear"):
            degrees = math.degrees(math.atan(by))  # from the upper left corner, as in AutoAugment's code
            shear = [degrees, 0.0] if name == "shear_x" else [0.0, degrees]
            image = F.affine(image, 0.0, [0, 0], 1.0, shear, fill=[FILL], center=[0.0, 0.0])
        elif name.startswith("translate"):
            offset = [int(by), 0] if name == "translate_x" else [0, int(by)]
            image = F.affine(image, 0.0, offset, 1.0, [0.0, 0.0], fill=[FILL])
    return image


@cache
def source_of(change: Change, magnitude: int, size: int) -> tuple[float, ...]:
    """Where the pixels of a moved image come from: (a, b, c, d, e, f), x' = a x + b y + c, y' = d x + e y + f, in pixels from the
    upper left corner of the image; the identity for an operation that moves nothing."""
    name, by = OPS[change.op], strength(change, magnitude, size)
    if name == "rotate":
        cos, sin, half = math.cos(math.radians(by)), math.sin(math.radians(by)), size / 2
        return cos, -sin, half - half * (cos - sin), sin, cos, half - half * (sin + cos)
    if name == "shear_x":
        return 1.0, by, 0.0, 0.0, 1.0, 0.0
    if name == "shear_y":
        return 1.0, 0.0, 0.0, by, 1.0, 0.0
    dx = -by if name == "translate_x" else 0.0
    dy = -by if name == "translate_y" else 0.0
    return 1.0, 0.0, dx, 0.0, 1.0, dy
