"""folder: any tree of class folders, decoded by Pillow and augmented by torchvision v2 in worker processes.

Training: RandomResizedCrop and flip. Evaluation: the shorter side resized to size * 256/224, centre crop.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from ..recipe import Data
from ..values import Batch
from .manifest import Manifest, splits
from .rng import mix, order
from .source import Place, held_split, portions

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")  # no others: Pillow runs a program for some (EPS)
MAX_PIXELS = 100_000_000  # decoded that is 300 MB
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def decode(path: Path) -> "Image":
    """The RGB pixels of an image file as they are stored: no EXIF rotation, transparency dropped, 16-bit grey scaled to 8.

    ValueError or one of the many errors of Pillow where that can't be done.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, which we do not read; sizes are judged here
        try:
            opened = Image.open(path, formats=FORMATS)
        except Image.DecompressionBombError:
            raise ValueError(f"its header claims more than {MAX_PIXELS // 10**6} million pixels") from None
        except Image.UnidentifiedImageError:
            raise ValueError(f"it is no image of a known kind ({', '.join(FORMATS)})") from None
        with opened as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise ValueError(f"its header claims {size} pixels, more than {MAX_PIXELS // 10**6} million")
            if image.mode == "F" or image.mode.startswith("I"):  # grey of 16 or more bits; convert() would clip it to white
                grey = np.asarray(image)
                if grey.dtype.kind not in "iu" or grey.min() < 0 or grey.max() > 0xFFFF:
                    raise ValueError("its values have more than 16 bits; expected 8 or 16")
                return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")


def middle(image: "Image") -> "Image":
    """A very long image without its ends, which the centre crop would drop after enlarging them to gigabytes."""
    w, h = image.size
    reach = 8 * min(w, h)
    if max(w, h) <= reach:
        return image
    left, top = max(0, (w - reach) // 2), max(0, (h - reach) // 2)
    return image.crop((left, top, min(w, left + reach), min(h, top + reach)))


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
        at = int(self.ids[k])
        label = self.manifest.labels[at]
        try:
            rgb = decode(self.manifest.root / self.manifest.files[at])
        except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... on damaged files
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            return torch.zeros(3, self.size, self.size), label, at, why
        if self.epoch is None:
            return self.transform(middle(rgb)), label, at, ""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(self.seed, self.epoch, at))
            return self.transform(rgb), label, at, ""


def _guarded(loader: DataLoader[Any]) -> Iterator[Any]:
    """What the loader gives; DataError where one of its processes dies, which torch tells as a RuntimeError."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that decodes images died ({str(error).splitlines()[0]}); if memory ran out, use --set data.workers=0"
        ) from None


class Folder:
    """A Source over image files."""

    def __init__(self, cfg: Data, place: Place):
        from torchvision.transforms import v2

        found = splits(cfg.root)
        train, test = found.train, found.test
        self.name, self.classes, self.channels = "folder", train.classes, 3
        self.size = cfg.size or 224
        self.mean, self.std = cfg.mean or IMAGENET_MEAN, cfg.std or IMAGENET_STD
        if not len(self.mean) == len(self.std) == 3:
            raise DataError(f"data.mean and data.std have {len(self.mean)} and {len(self.std)} values for 3 channels")
        if cfg.val_fraction and found.val:
            raise DataError(f"data.val_fraction {cfg.val_fraction:g}: {cfg.root} has a val folder of its own; leave it at 0")
        self.cfg, self._place = cfg, place
        self.bad: dict[int, str] = {}
        self.say: Callable[[str], None] = print
        finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(self.mean), list(self.std))]
        flip = [v2.RandomHorizontalFlip()] if cfg.flip is not False else []
        self._augment = v2.Compose([v2.RandomResizedCrop(self.size, antialias=True), *flip, *finish])
        self._plain = v2.Compose([v2.Resize(self.size * 256 // 224, antialias=True), v2.CenterCrop(self.size), *finish])
        used, held = portions(torch.tensor(train.labels), cfg.train_fraction, cfg.val_fraction)
        self._sets = {"train": (train, used), "test": (test, torch.arange(len(test.files)))}
        if found.val:
            self._sets["val"] = (found.val, torch.arange(len(found.val.files)))
        elif len(held):
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
        workers = self.cfg.workers
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
        for x, y, at, why in _guarded(loader):
            for k, reason in zip(at.tolist(), why, strict=True):
                if reason:
                    path = images.manifest.root / images.manifest.files[k]
                    raise DataError(f"{path} can't be decoded: {reason}; replace or remove the file")
            x = x.to(self._place.device, memory_format=self._place.memory_format, non_blocking=cuda)
            yield Batch(x, y.to(self._place.device, non_blocking=cuda), at.to(self._place.device, non_blocking=cuda))
