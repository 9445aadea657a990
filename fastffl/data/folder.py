"""folder: any tree of class folders, decoded by Pillow and augmented by torchvision v2 in worker processes.

Training: RandomResizedCrop and flip. Evaluation: the shorter side resized to size * 256/224, centre crop.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from ..recipe import Data
from ..values import Batch
from .manifest import Manifest, splits
from .rng import mix, order
from .source import Place, held_split, portions

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Images(Dataset[tuple[Tensor, int, int, str]]):
    """Decoded and transformed images of a manifest; a sample that can't be read carries the reason instead of pixels.

    With `epoch` given, each sample's randomness is a function of (seed, epoch, id), whoever decodes it.
    """

    def __init__(self, manifest: Manifest, ids: Tensor, transform: Any, size: int, seed: int = 0, epoch: int | None = None):
        self.manifest, self.ids, self.transform, self.size, self.seed, self.epoch = (
            manifest,
            ids,
            transform,
            size,
            seed,
            epoch,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, k: int) -> tuple[Tensor, int, int, str]:
        from PIL import Image

        at = int(self.ids[k])
        label = self.manifest.labels[at]
        try:
            with Image.open(self.manifest.root / self.manifest.files[at]) as image:
                rgb = image.convert("RGB")
        except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... on damaged files
            return torch.zeros(3, self.size, self.size), label, at, str(error) or type(error).__name__
        if self.epoch is None:
            return self.transform(rgb), label, at, ""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(self.seed, self.epoch, at))
            return self.transform(rgb), label, at, ""


class Folder:
    """A Source over image files."""

    def __init__(self, cfg: Data, place: Place):
        from torchvision.transforms import v2

        train, test = splits(cfg.root)
        self.name, self.classes, self.channels = "folder", train.classes, 3
        self.size = cfg.size or 224
        self.mean, self.std = cfg.mean or IMAGENET_MEAN, cfg.std or IMAGENET_STD
        self._cfg, self._place = cfg, place
        finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(self.mean), list(self.std))]
        flip = [v2.RandomHorizontalFlip()] if cfg.flip else []
        self._augment = v2.Compose([v2.RandomResizedCrop(self.size, antialias=True), *flip, *finish])
        self._plain = v2.Compose([v2.Resize(self.size * 256 // 224, antialias=True), v2.CenterCrop(self.size), *finish])
        used, held = portions(torch.tensor(train.labels), cfg.train_fraction, cfg.val_fraction)
        self._sets = {"train": (train, used), "test": (test, torch.arange(len(test.files)))}
        if len(held):
            self._sets["val"] = (train, held)

    def samples(self, split: str) -> int:
        return len(self._sets[held_split(split, "val" in self._sets)][1])

    def train(self, batch_size: int, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        manifest, ids = self._sets["train"]
        images = Images(manifest, ids, self._augment, self.size, seed, epoch)
        batches = [b.tolist() for b in order(seed, epoch, len(ids)).split(batch_size)][start:]
        return self._batches(images, batches)

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        manifest, ids = self._sets[held_split(split, "val" in self._sets)]
        images = Images(manifest, ids, self._plain, self.size)
        return self._batches(images, [b.tolist() for b in torch.arange(len(ids)).split(batch_size)])

    def _batches(self, images: Images, batches: list[list[int]]) -> Iterator[Batch]:
        workers = self._cfg.workers
        if workers is None:
            workers = max(0, len(os.sched_getaffinity(0)) - 1) if hasattr(os, "sched_getaffinity") else 0
        cuda = self._place.device.type == "cuda"
        loader = DataLoader(
            images,
            batch_sampler=batches,
            num_workers=min(workers, len(batches)),
            pin_memory=cuda,
            generator=torch.Generator(),  # its own: making an iterator must not draw from the run's random numbers
        )
        for x, y, at, why in loader:
            for k, reason in zip(at.tolist(), why, strict=True):
                if reason:
                    path = images.manifest.root / images.manifest.files[k]
                    raise DataError(f"{path} can't be decoded: {reason}; replace or remove the file")
            x = x.to(self._place.device, memory_format=self._place.memory_format, non_blocking=cuda)
            yield Batch(x, y.to(self._place.device, non_blocking=cuda), at.to(self._place.device, non_blocking=cuda))
