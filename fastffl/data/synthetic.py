"""synthetic: random images with a faint pattern per class; for timing, tests and trying a recipe without its data."""

import torch

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


def arrays(cfg: Data) -> Arrays:
    """uint8 images of the shape and class count of the data set they stand for; the same on every call."""
    channels, side, count = SHAPES[cfg.name]
    side, count = cfg.size or side, cfg.classes or count
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(0, 256, (count, channels, side, side), generator=generator)

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.arange(n) % count
        noise = torch.randint(0, 256, (n, channels, side, side), generator=generator)
        return ((noise * 3 + pattern[y]) // 4).to(torch.uint8), y

    train, test = draw(max(cfg.samples, count)), draw(max(cfg.samples // 4, count))
    width = len(str(count - 1))
    half = (0.5,) * channels
    return Arrays("synthetic", tuple(f"c{c:0{width}}" for c in range(count)), train, test, half, (0.25,) * channels)
