"""resident: a whole data set as uint8 on the device, augmented a batch at a time: pad, random crop, flip, normalise, mix."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastffl_kernels._dispatch import triton_path
from fastffl_kernels.augment import augment

from ..errors import DataError
from ..recipe import Data
from ..values import UNLABELLED, Batch
from .finish import Finish, blend
from .rng import below, order, signed, uniform_bits
from .source import Place, held_split, portions, several, view_seed


@dataclass(frozen=True)
class Arrays:
    """A data set in memory: images uint8 (N, channels, S, S), labels int64 (N,)."""

    name: str
    classes: tuple[str, ...]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 4
    pad_mode: str = "reflect"
    flip: bool = True


def check(arrays: Arrays) -> None:
    """DataError unless images, labels and class names fit each other."""
    for split, (x, y) in (("train", arrays.train), ("test", arrays.test)):
        what = f"{arrays.name} {split}"
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[2] != x.shape[3]:
            raise DataError(f"{what} images are {x.dtype} {tuple(x.shape)}; expected uint8 squares (N, channels, S, S)")
        if y.shape != x.shape[:1]:
            raise DataError(f"{what} has {x.shape[0]} images and {y.shape[0]} labels")
        if not len(y):
            raise DataError(f"{what} is empty")
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= len(arrays.classes):
            bad = low if low < 0 else high
            raise DataError(f"{what} has label {bad}, outside the {len(arrays.classes)} classes 0..{len(arrays.classes) - 1}")
    if arrays.train[0].shape[1:] != arrays.test[0].shape[1:]:
        raise DataError(f"{arrays.name} train and test images differ in shape")


def crop_flip(x: Tensor, at: Tensor, top: Tensor, left: Tensor, flip: Tensor, side: int) -> Tensor:
    """Cut one window of `side` x `side` from each image x[at], mirrored where `flip`.

    x (N, D, P, P) uint8, contiguous or channels_last; at, top, left (B,) int64, flip (B,) bool -> (B, D, side, side) uint8
    in the layout of x. One copy of the images, one gather of the pixels.
    """
    n, d, p, _ = x.shape
    span = torch.arange(side, device=x.device)
    columns = torch.where(flip[:, None], side - 1 - span, span) + left[:, None]
    pixels = ((top[:, None] + span) * p)[:, :, None] + columns[:, None, :]
    flat = pixels.view(len(at), -1)
    if x.is_contiguous():
        cut = x.view(n, d, p * p).index_select(0, at).gather(2, flat[:, None].expand(-1, d, -1))
        return cut.view(-1, d, side, side)
    nhwc = x.permute(0, 2, 3, 1)
    assert nhwc.is_contiguous()
    cut = nhwc.reshape(n, p * p, d).index_select(0, at).gather(1, flat[:, :, None].expand(-1, -1, d))
    return cut.view(-1, side, side, d).permute(0, 3, 1, 2)


class Resident:
    """A Source over arrays that fit the device. Memory: images padded once, uint8, plus the test set."""

    def __init__(self, arrays: Arrays, cfg: Data, place: Place):
        check(arrays)
        self.name, self.classes = arrays.name, arrays.classes
        x, y = arrays.train
        self.channels, self.size = x.shape[1], x.shape[2]
        self.pad = arrays.pad if cfg.pad is None else cfg.pad
        self.flip = arrays.flip if cfg.flip is None else cfg.flip
        pad_mode = cfg.pad_mode or arrays.pad_mode
        if pad_mode == "reflect" and self.pad >= self.size:
            raise DataError(f"data.pad {self.pad} can't reflect images of {self.size} pixels; use --set data.pad_mode=zero")
        if "synthetic" not in (cfg.loader, cfg.name):
            for key, value in (("rand_augment", cfg.rand_augment), ("start_size", cfg.start_size)):
                if value:
                    raise DataError(f"data.{key} {value} is for image files, and {self.name} lies in memory; leave it out")
        if cfg.size not in (None, self.size):
            raise DataError(f"data.size {cfg.size}: {self.name} images are {self.size} pixels; leave data.size out")
        self.mean, self.std = cfg.mean or arrays.mean, cfg.std or arrays.std
        if not len(self.mean) == len(self.std) == self.channels:
            raise DataError(
                f"data.mean and data.std have {len(self.mean)} and {len(self.std)} values for {self.channels} channels"
            )
        used, held = portions(y, cfg.train_fraction, cfg.val_fraction)
        self.cfg, self.place = cfg, place
        self.bad: dict[int, str] = {}
        self.say: Callable[[str], None] = print
        clock = tuple(torch.zeros((), dtype=torch.int64, device=place.device) for _ in range(2))
        self._clock = (0, 0), clock  # seed and epoch of the last batch, here and on the device

        def put(images: Tensor, pad: int = 0) -> Tensor:
            if pad and pad_mode == "reflect":
                span = torch.arange(-pad, self.size + pad).abs()
                span = self.size - 1 - (self.size - 1 - span).abs()
                images = images[:, :, span[:, None], span]
            elif pad:
                images = F.pad(images, (pad,) * 4)
            return images.to(place.device).contiguous(memory_format=place.memory_format)

        self._x = {"train": put(x if len(used) == len(x) else x[used], self.pad), "test": put(arrays.test[0])}
        self._y = {"train": y[used].to(place.device), "test": arrays.test[1].to(place.device)}
        if len(held):
            self._x["val"], self._y["val"] = put(x[held]), y[held].to(place.device)
        self._finish = Finish(self.mean, self.std, place)

    def samples(self, split: str) -> int:
        return len(self._y[held_split(split, "val" in self._y)])

    @property
    def labels(self) -> Tensor:
        return self._y["train"]

    def train(self, batch_size: int, seed: int, epoch: int, start: int = 0, views: int = 1) -> Iterator[Batch]:
        several(views, self.cfg)
        x, y = self._x["train"], self._y["train"]
        ids = order(seed, epoch, len(y))
        shares = (self.place.batches(i, batch_size, start) for i in (ids, ids.to(x.device)))
        for here, at in zip(*shares, strict=True):
            if here[0] >= 0:
                batch = self.augment(x, at, y[at], seed, epoch)
            else:  # nothing is left for this rank: an image without a label
                batch = self.augment(x, -1 - at, torch.full_like(at, UNLABELLED), seed, epoch)
                batch = batch._replace(id=torch.full_like(at, -1))
            kept = torch.where(at < 0, -1 - at, at)
            more = [self.augment(x, kept, batch.y, view_seed(seed, v), epoch).x for v in range(1, views)]
            yield batch._replace(x=torch.cat([batch.x, *more])) if more else batch

    def augment(self, x: Tensor, at: Tensor, y: Tensor, seed: int, epoch: int) -> Batch:
        """One training batch: the images `at`, cropped, flipped and mixed by what (seed, epoch, id) says. One kernel on a GPU."""
        mixup, cutmix = self.cfg.mixup, self.cfg.cutmix
        if triton_path("augment", x):
            if self._clock[0] != (seed, epoch):
                for word, scalar in zip((seed, epoch), self._clock[1], strict=True):
                    scalar.fill_(signed(word))  # in place: a captured graph reads these tensors
                self._clock = (seed, epoch), self._clock[1]
            last = self.place.memory_format == torch.channels_last
            made = augment(
                *(x, at, *self._clock[1]),
                size=self.size,
                mean=self.mean,
                std=self.std,
                flip=self.flip,
                dtype=self.place.dtype,
                mixup=mixup,
                cutmix=cutmix,
                channels_last=last,
            )
            return Batch(made.x[0], y, at) if made.mix is None else Batch(made.x[0], y, at, y.flip(0), made.mix)
        span = 2 * self.pad + 1
        top = below(uniform_bits(seed, epoch, at, 0), span)
        left = below(uniform_bits(seed, epoch, at, 1), span)
        flip = uniform_bits(seed, epoch, at, 2) < 2**31 if self.flip else torch.zeros_like(at, dtype=torch.bool)
        images = self._finish.normal(crop_flip(x, at, top, left, flip, self.size))
        if not (mixup or cutmix):
            return Batch(images.to(self.place.dtype), y, at)
        images, share = blend(images, seed, epoch, at[0], mixup, cutmix)
        return Batch(images.to(self.place.dtype), y, at, y.flip(0), share)

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Every sample of this rank's share of `split` once, in order, not augmented and without padding."""
        split = held_split(split, "val" in self._y)
        x, y = self._x[split], self._y[split]
        if split == "train":
            p = self.pad
            x = x[:, :, p : p + self.size, p : p + self.size]
        for at in self.place.share(torch.arange(len(y), device=y.device)).split(batch_size):
            images = x[at].contiguous(memory_format=self.place.memory_format)
            yield Batch(self._finish.normal(images).to(self.place.dtype), y[at], at)
