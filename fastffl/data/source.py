"""Where batches come from: the Source protocol, and the rule that picks one for a recipe."""

import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from pydantic import ValidationError
from torch import Tensor

from ..errors import DataError, nearest
from ..recipe import Data
from ..values import Batch
from .rng import mix

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Place:
    """Where batches are to lie, and which share of each is wanted: that of rank `rank` of `ranks`."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memory_format: torch.memory_format = torch.contiguous_format
    dtype: torch.dtype = torch.float32  # of the images
    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", "0")))  # torchrun's
    ranks: int = field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", "1")))

    def batches(self, ids: Tensor, batch_size: int, start: int = 0) -> list[Tensor]:
        """This rank's share of every training batch from number `start` on, ids (N,) in the order of the epoch.

        The shares of a batch differ by at most one sample. A batch smaller than the number of ranks leaves some nothing to
        do; they get its first sample as -1 - id, to be given without a label, so that all ranks take the same steps.
        """
        parts = []
        for batch in list(ids.split(batch_size))[start:]:
            mine = batch.tensor_split(self.ranks)[self.rank]
            parts.append(mine if len(mine) else -1 - batch[:1])
        return parts

    def share(self, ids: Tensor) -> Tensor:
        """This rank's share of an evaluation: every id on exactly one rank."""
        return ids.tensor_split(self.ranks)[self.rank]


class Source(Protocol):
    """Images of one data set, already on the device and normalised.

    Exact accounting: over all ranks `train` gives every training sample once per epoch (the last batch is short), `evaluate`
    every sample of its split once. Order and augmentation are pure functions of (seed, epoch, sample id), so `start` batches
    can be skipped at no cost and without a trace. `batch_size` of `train` is that of all ranks together, every rank gets the
    same number of batches; `batch_size` of `evaluate` is a rank's own.

    views: a batch's x holds so many augmentations of its images, (views B, ...), one after the other; the first is the one
    that there is without the others. Only methods that need several ask for them, of a Source that takes the argument.

    place What it was opened for; a Source without it gives whole batches, which is right for one process
    labels  (N,) int64 of every training image by id, -1 where it is not used; only some methods need it
    bad   training images that could not be read so far, by id, with the reason; they come with label UNLABELLED
    say   told about each of them once, a line for people; the trainer sets it
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bad: dict[int, str]
    say: Callable[[str], None]

    def samples(self, split: str) -> int: ...

    def train(self, batch_size: int, seed: int, epoch: int, start: int = 0, views: int = 1) -> Iterator[Batch]: ...

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]: ...


def ids(images: Source) -> int:
    """How many ids the training images have, 0 where the source does not say."""
    labels = getattr(images, "labels", None)
    return 0 if labels is None else len(labels)


def held_split(split: str, has_val: bool) -> str:
    """`val` is the test set where no validation images are held out."""
    if split not in SPLITS:
        raise DataError(f"no split is called {split!r}; expected {', '.join(SPLITS)}")
    return "test" if split == "val" and not has_val else split


def view_seed(seed: int, view: int) -> int:
    """The seed by which view number `view` of the images is drawn."""
    return mix(seed, view, 0x71E5) if view else seed


def several(views: int, cfg: Data) -> None:
    """DataError where several views are asked for of images that are mixed."""
    if views > 1 and (cfg.mixup or cfg.cutmix):
        raise DataError(
            "data.mixup and data.cutmix mix one view of the images, and the peers of this method see a view each; "
            "leave both at 0, or choose another method"
        )


def takes_views(images: Source) -> bool:
    """Whether a Source's train has the argument `views`; one made for methods with a single view need not."""
    named = inspect.signature(images.train).parameters.values()
    return any(p.name == "views" or p.kind is inspect.Parameter.VAR_KEYWORD for p in named)


def portions(labels: Tensor, train_fraction: float, val_fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of the used training samples and of those held out, the same shares of every class, (n,) int64 each.

    Which samples these are depends on nothing but the labels: it is part of the data, not of a run's seed.
    """
    train, val = [], []
    present, counts = labels.unique(sorted=True, return_counts=True)
    by_class = labels.argsort(stable=True).split(counts.tolist())  # one sort: looking for each of 1,000 classes takes seconds
    for c, ids in zip(present.tolist(), by_class, strict=True):
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(c))]
        held = min(round(val_fraction * len(ids)), len(ids) - 1)  # every class keeps an image to learn from
        used = max(1, round(train_fraction * (len(ids) - held)))
        val.append(ids[:held])
        train.append(ids[held : held + used])
    return torch.cat(train).sort().values, torch.cat(val).sort().values


def _described(name: str, options: dict[str, Any]) -> Data:
    """A data section from a name or folder and options."""
    names = get_args(Data.model_fields["name"].annotation)
    if name not in names:
        if not Path(name).is_dir():
            raise DataError(f"no data set and no folder is called {name!r}{nearest(name, names)}")
        options = {"root": name, **options}
        name = "folder"
    try:
        return Data(name=name, **options)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"source({name!r}): {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def source(cfg: Data | str, place: Place | None = None, **options: Any) -> Source:
    """The source a recipe's data section describes, or a data set by name or folder with that section's options.

        source("digits")      source("cifar100", root="data")      source("./parts", size=160)

    DataError says what was looked for, where, and what helps.
    """
    from . import archives, digits, folder, resident, synthetic

    if isinstance(cfg, str):
        cfg = _described(cfg, options)
    elif options:
        raise TypeError(f"options {sorted(options)} go with a data set's name, not with a Data section")

    place = place or Place()
    if cfg.name == "synthetic" or cfg.loader == "synthetic":
        return resident.Resident(synthetic.arrays(cfg), cfg, place)
    if cfg.name == "custom":
        raise DataError("this run was trained from Python on a Source of its own; evaluate it there, with fastffl.evaluate")
    if cfg.name == "digits":
        return resident.Resident(digits.arrays(), cfg, place)
    if cfg.name in ("folder", "imagenet", "imagenette"):
        return folder.Folder(cfg, place)
    return resident.Resident(archives.cifar(cfg.name, cfg.root), cfg, place)
