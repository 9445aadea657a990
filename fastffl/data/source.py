"""Where batches come from: the Source protocol, and the rule that picks one for a recipe."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from pydantic import ValidationError
from torch import Tensor

from ..errors import DataError, nearest
from ..recipe import Data
from ..values import Batch

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Place:
    """Where batches are to lie."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memory_format: torch.memory_format = torch.contiguous_format
    dtype: torch.dtype = torch.float32  # of images that are made on the device; others come as fp32


class Source(Protocol):
    """Images of one data set, already on the device and normalised.

    Exact accounting: `train` gives every training sample once per epoch (the last batch is short), `evaluate` every
    sample of its split once. Order and augmentation are pure functions of (seed, epoch, sample id), so `start` batches
    can be skipped at no cost and without a trace.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def samples(self, split: str) -> int: ...

    def train(self, batch_size: int, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]: ...

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]: ...


def held_split(split: str, has_val: bool) -> str:
    """`val` is the test set where no validation images are held out."""
    if split not in SPLITS:
        raise DataError(f"no split is called {split!r}; expected {', '.join(SPLITS)}")
    return "test" if split == "val" and not has_val else split


def portions(labels: Tensor, train_fraction: float, val_fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of the used training samples and of those held out, the same shares of every class, (n,) int64 each.

    Which samples these are depends on nothing but the labels: it is part of the data, not of a run's seed.
    """
    train, val = [], []
    for c in labels.unique(sorted=True).tolist():
        ids = (labels == c).nonzero()[:, 0]
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
    if cfg.name == "folder":
        return folder.Folder(cfg, place)
    return resident.Resident(archives.cifar(cfg.name, cfg.root), cfg, place)
