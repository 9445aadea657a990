"""folder: any tree of class folders, or tar shards. Which images, in which order, with which labels; decoders make the pixels."""

import importlib.util
import math
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..errors import DataError, printable
from ..recipe import Data
from ..values import UNLABELLED, Batch
from .decoder import Decoder, Job
from .finish import Finish
from .manifest import Manifest, splits
from .portable import Portable, fetch, why
from .rng import mix, order
from .source import Place, held_split, portions, several, view_seed
from .synthetic import SHAPES
from .views import Evaluation, Training, train_size

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROBES = 8  # files that must all be unreadable before a data set is taken to be gone


def has_dali() -> bool:
    """Whether NVIDIA's DALI is installed; it is not imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package of NVIDIA's at all
        return False


def decoder(cfg: Data, manifest: Manifest, place: Place) -> Decoder:
    """Who decodes the files of a manifest, as cfg.loader says."""
    cuda = place.device.type == "cuda"
    if cfg.loader == "dali" and not has_dali():
        raise DataError("data.loader dali: DALI is not installed; pip install 'fastffl[gpu]' (with CUDA 12: 'fastffl[gpu-cu12]')")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's: those that share this machine's cores
    workers = max(0, cores // ranks - 1) if cfg.workers is None else cfg.workers
    if cfg.loader == "dali" or (cfg.loader == "auto" and cuda and has_dali()):
        from .dali import Dali

        return Dali(manifest, place, max(1, workers), cfg.rand_magnitude)
    return Portable(manifest, place, workers)


def opened(cfg: Data) -> tuple[dict[str, Manifest], bool]:
    """The manifests of a folder's splits and whether it has a val of its own. DataError says what was looked for."""
    try:
        found = splits(cfg.root, cfg.checked)
    except DataError as error:
        if cfg.name == "folder":
            raise
        fix = "or --set data.loader=synthetic --set run.max_steps=3 to try it without images"
        if cfg.root is None:
            raise DataError(
                f"{cfg.name} needs images and none were named: expected DIR/train/CLASS/IMAGE.JPEG and "
                f"DIR/val/CLASS/IMAGE.JPEG (or tar shards); type fastffl train {cfg.name} --data DIR, {fix}"
            ) from None
        raise DataError(f"{cfg.name}: {error}; type --data DIR with another folder, {fix}") from None
    held = {"val": found.val} if found.val else {}
    return {"train": found.train, "test": found.test, **held}, bool(found.val)


class Folder:
    """A Source over image files. A batch's `id` is the file's place in its split's manifest."""

    def __init__(self, cfg: Data, place: Place):
        self._manifests, has_val = opened(cfg)
        self.excluded = sum(m.excluded for m in self._manifests.values())  # left out, as a check found them unusable
        train = self._manifests["train"]
        self.name: str = cfg.name
        self.classes, self.channels = train.classes, 3
        self.size = cfg.size or SHAPES[cfg.name][1]
        self.mean, self.std = cfg.mean or IMAGENET_MEAN, cfg.std or IMAGENET_STD
        if not len(self.mean) == len(self.std) == 3:
            raise DataError(f"data.mean and data.std have {len(self.mean)} and {len(self.std)} values for 3 channels")
        if cfg.val_fraction and has_val:
            raise DataError(f"data.val_fraction {cfg.val_fraction:g}: {cfg.root} has a val folder of its own; leave it at 0")
        if cfg.start_size is not None and not cfg.grow_epochs:
            raise DataError(f"data.start_size {cfg.start_size} needs the epochs in which images grow: --set data.grow_epochs=N")
        if cfg.start_size is not None and cfg.start_size > self.size:
            raise DataError(f"data.start_size {cfg.start_size} is above the size {self.size} that it should grow to")
        self.cfg, self.place = cfg, place
        self.bad: dict[int, str] = {}
        self.say: Callable[[str], None] = print
        self._labels = {split: torch.tensor(m.labels) for split, m in self._manifests.items()}
        used, held = portions(self._labels["train"], cfg.train_fraction, cfg.val_fraction)
        self._ids = {"train": used, **{s: torch.arange(len(m.labels)) for s, m in self._manifests.items() if s != "train"}}
        if len(held):
            self._manifests["val"], self._labels["val"], self._ids["val"] = train, self._labels["train"], held
        self._decoders: dict[str, Decoder] = {}
        self._finish = Finish(self.mean, self.std, place)
        self._operations = 0
        if cfg.rand_augment:
            from .rand_augment import OPS

            self._operations = len(OPS)

    def samples(self, split: str) -> int:
        return len(self._ids[held_split(split, "val" in self._ids)])

    def close(self) -> None:
        """End the decoders; the next epoch makes new ones."""
        for made in self._decoders.values():
            made.close()
        self._decoders.clear()

    def _decoder(self, split: str) -> Decoder:
        if split not in self._decoders:
            self._decoders[split] = decoder(self.cfg, self._manifests[split], self.place)
        return self._decoders[split]

    @property
    def labels(self) -> Tensor:
        known, used = self._labels["train"], self._ids["train"]
        return torch.full_like(known, -1).index_copy(0, used, known[used])

    def train(self, batch_size: int, seed: int, epoch: int, start: int = 0, views: int = 1) -> Iterator[Batch]:
        several(views, self.cfg)
        cfg, ids = self.cfg, self._ids["train"]
        side = train_size(cfg, self.size, epoch)
        seeds = [view_seed(seed, v) for v in range(views)]
        shown = [Training(cfg, side, s, epoch, self._operations) for s in seeds]
        parts = self.place.batches(ids[order(seed, epoch, len(ids))], batch_size, start)
        jobs = [Job(tuple(torch.where(part < 0, -1 - part, part).tolist()), view) for part in parts for view in shown]
        decoded = iter(self._decoder("train").decode(jobs))
        for number, (part, job) in enumerate(zip(parts, jobs[::views], strict=True), start):
            x, bad = next(decoded)
            for _ in range(1, views):  # every view is decoded anew
                again, worse = next(decoded)
                x, bad = torch.cat([x, again]), {**worse, **bad}
            if bad:
                self._lost({job.ids[k]: why for k, why in bad.items() if part[k] >= 0}, all_of_it=len(bad) == len(part))
            y = torch.where(part < 0, UNLABELLED, self._labels["train"][list(job.ids)])
            y[list(bad)] = UNLABELLED
            x, share = self._finish(x, mix(seed, epoch, number), cfg.mixup, cfg.cutmix)
            if bad:
                x.unflatten(0, (views, -1))[:, list(bad)] = 0
            batch = self._put(x, y, part.clamp(min=-1))
            yield batch if share is None else batch._replace(y2=batch.y.flip(0), mix=share)

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        split = held_split(split, "val" in self._ids)
        manifest, view = self._manifests[split], Evaluation(self.cfg, self.size)
        parts = self.place.share(self._ids[split]).split(batch_size)
        jobs = [Job(tuple(part.tolist()), view) for part in parts]
        for part, (x, bad) in zip(parts, self._decoder(split).decode(jobs), strict=True):
            if bad:  # accuracy is of every image or of none
                k, reason = next(iter(bad.items()))
                path = printable(manifest.path(int(part[k])))
                raise DataError(
                    f"{path} can't be decoded: {printable(reason)}; replace or remove it ({self._check} finds all such)"
                )
            yield self._put(self._finish(x)[0], self._labels[split][part], part)

    def _put(self, x: Tensor, y: Tensor, id: Tensor) -> Batch:
        device = self.place.device
        return Batch(x, y.to(device, non_blocking=True), id.to(device, non_blocking=True))

    @property
    def _check(self) -> str:
        return f"fastffl data check {printable(str(self.cfg.root))}"

    def _lost(self, found: dict[int, str], all_of_it: bool) -> None:
        """Name the bad training images that are new. DataError where they are too many, or no file can be read any more."""
        manifest, total = self._manifests["train"], self.samples("train")
        if all_of_it:
            probes = range(0, len(manifest.labels), -(-len(manifest.labels) // PROBES))
            errors = [error for error in fetch(manifest, probes) if isinstance(error, OSError)]
            if len(errors) == len(probes):
                text = f"none of {len(probes)} images of {self.cfg.root} can be read any more"
                raise DataError(f"{text} ({why(errors[0])}); see whether it is mounted")
        for id, reason in found.items():
            if id in self.bad:
                continue
            self.bad[id] = reason
            text = f"{printable(manifest.path(id))} can't be decoded: {printable(reason)}"
            if len(self.bad) > math.ceil(self.cfg.max_bad * total):
                raise DataError(
                    f"{text}; with it {len(self.bad)} of {total} training images are lost, more than data.max_bad "
                    f"{self.cfg.max_bad:g} allows; {self._check} finds all of them and leaves them out"
                )
            self.say(f"{text}; it counts for nothing in training; {self._check} finds all such")
