"""views: what happens to one image file, as a pure function of (seed, epoch, id) and its size. No pixels here.

Every loader gets its geometry from here, so that all show the same part of an image: which window of it is cut out, what that
is resized to, which square of the result is kept, whether it is mirrored, and what RandAugment does to it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from fastffl_kernels._draws import FIRST, SECOND, START

from ..recipe import Data
from .rng import mix

REACH = 8  # a longer image than this many times its shorter side loses its ends before an evaluation's resize
STEP = 32  # pixels between the sides of progressive resizing: the stride of most nets
_WORD = 0xFFFFFFFFFFFFFFFF


class Change(NamedTuple):
    """One operation of RandAugment: its number in `rand_augment.OPS`, and whether it goes the negative way."""

    op: int
    negative: bool


class View(NamedTuple):
    """A window of the stored image, resized to rows x columns, of which the square of `size` pixels at (down, right) is kept."""

    top: int
    left: int
    height: int
    width: int
    rows: int
    columns: int
    down: int
    right: int
    size: int
    flip: bool = False
    changes: tuple[Change, ...] = ()


class Draws:
    """Random numbers of one sample of one epoch (splitmix64)."""

    __slots__ = ("_state",)

    def __init__(self, seed: int, epoch: int, id: int):
        self._state = mix(seed, epoch, id, 0x1A6E)

    def bits(self) -> int:
        """32 random bits."""
        self._state = (self._state + START) & _WORD
        h = (self._state ^ (self._state >> 30)) * FIRST & _WORD
        h = (h ^ (h >> 27)) * SECOND & _WORD
        return (h ^ (h >> 31)) >> 32

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.bits() / 2**32

    def below(self, n: int) -> int:
        """0 .. n - 1."""
        return self.bits() * n >> 32


def train_size(cfg: Data, size: int, epoch: int) -> int:
    """Side of the training images in `epoch`: progressive resizing rises from cfg.start_size to `size` in steps of 32."""
    if cfg.start_size is None or epoch >= cfg.grow_epochs:
        return size
    side = cfg.start_size + (size - cfg.start_size) * epoch / cfg.grow_epochs
    return min(size, max(cfg.start_size, round(side / STEP) * STEP))


@dataclass(frozen=True)
class Training:
    """view(id, height, width) of a training image: a random resized crop (Szegedy et al. 2015; as torchvision has it, ten tries,
    then the middle), mirrored one time in two unless cfg.flip is false, cfg.rand_augment changes out of `operations`."""

    cfg: Data
    size: int
    seed: int
    epoch: int
    operations: int = 0

    def __call__(self, id: int, height: int, width: int) -> View:
        cfg, size, draw = self.cfg, self.size, Draws(self.seed, self.epoch, id)
        flip = draw.bits() < 2**31 and cfg.flip is not False
        changes = tuple(Change(draw.below(self.operations), draw.bits() < 2**31) for _ in range(cfg.rand_augment))
        low, high = math.log(cfg.ratio[0]), math.log(cfg.ratio[1])
        for _ in range(10):
            area = height * width * draw.uniform(*cfg.scale)
            ratio = math.exp(draw.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top, left = draw.below(height - h + 1), draw.below(width - w + 1)
                return View(top, left, h, w, size, size, 0, 0, size, flip, changes)
        w, h = width, height
        if width / height < cfg.ratio[0]:
            h = max(1, min(height, round(width / cfg.ratio[0])))
        elif width / height > cfg.ratio[1]:
            w = max(1, min(width, round(height * cfg.ratio[1])))
        return View((height - h) // 2, (width - w) // 2, h, w, size, size, 0, 0, size, flip, changes)


@dataclass(frozen=True)
class Evaluation:
    """view(id, height, width) of an evaluated image: the shorter side resized to size / cfg.crop, 256 for 224, and the middle
    kept (as torchvision's Resize and CenterCrop)."""

    cfg: Data
    size: int

    def __call__(self, id: int, height: int, width: int) -> View:
        size = self.size
        short = max(size, int(size / self.cfg.crop + 1e-6))
        reach = REACH * min(height, width)
        h, w = min(height, reach), min(width, reach)
        rows, columns = (short, max(short, int(short * w / h))) if h <= w else (max(short, int(short * h / w)), short)
        down, right = round((rows - size) / 2), round((columns - size) / 2)
        return View((height - h) // 2, (width - w) // 2, h, w, rows, columns, down, right, size)
