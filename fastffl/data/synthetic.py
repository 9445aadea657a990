"""synthetic: random images with a faint pattern per class; for timing, tests and trying a recipe without its data."""

import torch
from torch import Tensor

from ..recipe import Data
from .resident import Arrays

SHAPES = {
    "digits": (1, 8, 10),
    "cifar10": (3, 32, 10),
    "cifar100": (3, 32, 100),
    "folder": (3, 224, 10),
    "imagenet": (3, 224, 1000),
    "imagenette": (3, 160, 10),
    "synthetic": (3, 32, 10),
}
COARSE = 32  # pixels of a class's pattern at most, a side; larger images show it enlarged
PART = 2**22  # values drawn at a time


def arrays(cfg: Data) -> Arrays:
    """uint8 images of the shape and class count of the data set they stand for; the same on every call and on every rank.

    cfg.samples training images and a quarter as many test images, the classes in turn. Images of COARSE pixels or less are
    cropped from a padded edge as CIFAR's are, larger ones are shown as they are.
    """
    channels, side, count = SHAPES[cfg.name]
    side, count = cfg.size or side, cfg.classes or count
    generator = torch.Generator().manual_seed(0)
    coarse = min(side, COARSE)
    pattern = torch.randint(0, 256, (count, channels, coarse, coarse), dtype=torch.uint8, generator=generator)
    span = torch.arange(side) * coarse // side

    def draw(n: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(n) % count
        x = torch.empty(n, channels, side, side, dtype=torch.uint8)
        for at in torch.arange(n).split(max(1, PART // (channels * side * side))):
            noise = torch.randint(0, 256, (len(at), channels, side, side), dtype=torch.uint8, generator=generator)
            mine = pattern[y[at]][:, :, span[:, None], span]
            x[at] = ((noise.to(torch.int16) * 3 + mine) // 4).to(torch.uint8)
        return x, y

    train, test = draw(cfg.samples), draw(max(1, cfg.samples // 4))
    width = len(str(count - 1))
    half = (0.5,) * channels
    names = tuple(f"c{c:0{width}}" for c in range(count))
    return Arrays("synthetic", names, train, test, half, (0.25,) * channels, pad=4 if side <= COARSE else 0)
