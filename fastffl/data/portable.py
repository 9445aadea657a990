"""portable: image files decoded by Pillow and cut, resized and changed by torchvision v2, in worker processes. The reference.

A whole batch is one worker's work, written into memory that all processes share from the start. Handing over memory batch by
batch, as a DataLoader does with tensors, blocks for ever where the worker that should hand over is stopped (seen one time in
ten). Resizing is torchvision's for uint8 tensors: on
the window of 120 ImageNet photographs it took 0.34 ms an image where Pillow's own took 0.65, and they differ by at most 1.

Decoding stays on the CPU where there is CUDA too. torchvision's nvJPEG decoder takes a list of JPEGs and nothing else, other
pixels come out than of Pillow, and one bad file raises for the whole list without saying which; for the GPU there is DALI.
"""

import atexit
import math
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..errors import DataError
from .decoder import Decoded, Job, close_streams, closed_at_exit
from .manifest import Manifest
from .source import Place
from .views import View

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")  # no others: Pillow runs a program for some (EPS)
MAX_PIXELS = 100_000_000  # decoded that is 300 MB
PAUSES = (0.1, 0.5, 2.0)  # seconds before files are read again that could not be
FOR_GOOD = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
POLL = 2.0  # seconds between two looks at whether the workers live
AHEAD = 2  # batches that every worker works ahead
TORCH_SIGNALS = "torch.utils.data._utils.signal_handling"  # the module of torch's handler of SIGCHLD
STALL = 120.0  # seconds without a batch after which the workers are taken to hang


def decode(data: bytes) -> "Image":
    """The RGB pixels of an image file as they are stored: no EXIF rotation, transparency dropped, 16-bit grey scaled to 8.

    ValueError or one of the many errors of Pillow where that can't be done.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, which we do not read; sizes are judged here
        if not data:
            raise ValueError("it is empty")
        try:
            opened = Image.open(BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            raise ValueError(f"its header claims more than {MAX_PIXELS // 10**6} million pixels") from None
        except Image.UnidentifiedImageError:
            raise ValueError(f"it is no image of a known kind ({', '.join(FORMATS)})") from None
        with opened as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise ValueError(f"its header claims {size} pixels, more than {MAX_PIXELS // 10**6} million")
            if image.mode == "RGB":
                image.load()
                return image  # convert() would copy it
            if image.mode == "F" or image.mode.startswith("I"):  # grey of 16 or more bits; convert() would clip it to white
                grey = np.asarray(image)
                if grey.dtype.kind not in "iu" or grey.min() < 0 or grey.max() > 0xFFFF:
                    raise ValueError("its values have more than 16 bits; expected 8 or 16")
                return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")


def why(error: Exception) -> str:
    """What went wrong with a file, on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def fetch(manifest: Manifest, ids: Sequence[int], note: Callable[[int], None] = lambda id: None) -> list[bytes | OSError]:
    """The bytes of each file, or the error that reading it ended with.

    What can't be read is tried again after PAUSES, since a network share comes back; a file that is gone only where no other
    could be read. `note` is told each id before it is read.
    """

    def read(id: int) -> bytes | OSError:
        note(id)
        try:
            return manifest.read(id)
        except OSError as error:
            return error

    found = [read(id) for id in ids]
    for pause in PAUSES:
        some = any(isinstance(f, bytes) for f in found)
        again = [k for k, f in enumerate(found) if isinstance(f, OSError) and not (some and isinstance(f, FOR_GOOD))]
        if not again:
            break
        time.sleep(pause)
        for k in again:
            found[k] = read(ids[k])
    return found


def shown(window: Tensor, view: View, magnitude: int) -> Tensor:
    """(3, size, size) uint8: the window (height, width, 3) uint8 of an image as `view` shows it."""
    from torchvision.transforms.v2 import functional as F

    x = F.resize(window.permute(2, 0, 1), [view.rows, view.columns], antialias=True)
    x = x[:, view.down : view.down + view.size, view.right : view.right + view.size]
    if view.flip:
        x = x.flip(2)
    if view.changes:
        from .rand_augment import apply

        x = apply(x, view.changes, magnitude)
    return x


def show(image: "Image", view: View, magnitude: int) -> Tensor:
    """(3, size, size) uint8: what `view` shows of an image."""
    box = (view.left, view.top, view.left + view.width, view.top + view.height)
    return shown(torch.from_numpy(np.array(image.crop(box))), view, magnitude)


def seen(data: bytes | OSError, job: Job, k: int) -> tuple[Tensor | None, str]:
    """What image k of a job shows, (3, size, size) uint8, given its file; None and the reason where it can't be read."""
    if isinstance(data, OSError):
        return None, why(data)
    try:
        image = decode(data)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... on damaged files
        return None, why(error)
    return show(image, job.view(job.ids[k], image.height, image.width), job.view.cfg.rand_magnitude), ""


def one(manifest: Manifest, job: Job, k: int) -> tuple[Tensor | None, str]:
    """Image k of a job, (3, size, size) uint8; None and the reason where it can't be read."""
    return seen(fetch(manifest, job.ids[k : k + 1])[0], job, k)


def whole(
    manifest: Manifest, job: Job, pixels: Tensor | None = None, note: Callable[[int], None] = lambda id: None
) -> tuple[Tensor, dict[int, str]]:
    """A job's pixels, (B, size, size, 3) uint8, and the places in it of the images that can't be read, with the reason.

    `pixels` is where to write them; None: new memory.
    """
    if pixels is None:
        pixels = torch.empty(_shape(job), dtype=torch.uint8)
    bad = {}
    for k, data in enumerate(fetch(manifest, job.ids, note)):
        note(job.ids[k])
        x, reason = seen(data, job, k)
        if x is None:
            bad[k] = reason
            pixels[k] = 0
        else:
            pixels[k] = x.permute(1, 2, 0)
    return pixels, bad


def _shape(job: Job) -> tuple[int, int, int, int]:
    return len(job.ids), job.view.size, job.view.size, 3


class _Jobs(Dataset[dict[int, str]]):
    """The jobs of one iterator; item k writes the pixels of job k to `slot(k)` and gives what is bad of it.

    at   (workers, 2) int64 in shared memory: every worker's process, and the image it is at
    """

    def __init__(self, manifest: Manifest, jobs: Sequence[Job], workers: int):
        self.manifest, self.jobs = manifest, jobs
        self.at = torch.full((workers, 2), -1).share_memory_()
        # a DataLoader asks for batch k + AHEAD x workers once it has batch k, so one slot more is never written while it is read
        room = max(math.prod(_shape(job)) for job in jobs)
        self._slots = torch.empty(min(len(jobs), AHEAD * workers + 1), room, dtype=torch.uint8).share_memory_()

    def slot(self, k: int) -> Tensor:
        """The pixels of job k, (B, size, size, 3) uint8, until batch k + 1 is asked for."""
        shape = _shape(self.jobs[k])
        return self._slots[k % len(self._slots), : math.prod(shape)].view(shape)

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, k: int) -> dict[int, str]:
        worker = get_worker_info()
        assert worker is not None

        def note(id: int) -> None:
            self.at[worker.id, 1] = id

        _, bad = whole(self.manifest, self.jobs[k], self.slot(k), note)
        note(-1)
        return bad


def _begin(worker: int, at: Tensor) -> None:
    """In a new worker: a signal to all processes of a run is for its trainer, which saves and ends its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    at[worker, 0] = os.getpid()


# after multiprocessing's, so before it: that sends workers the SIGTERM which they leave to the trainer, and waits for ever
atexit.register(close_streams)


def _as_it_is(made: Any) -> Any:
    return made


class Portable:
    """A Decoder that runs anywhere.

    workers   processes that decode; 0: this one. One that dies ends the iterator within seconds, one that hangs after STALL,
              by a DataError that names what it was at
    """

    def __init__(self, manifest: Manifest, place: Place, workers: int):
        self.manifest, self._place, self._workers = manifest, place, workers

    def close(self) -> None:
        """Nothing is kept from one iterator to the next."""

    def decode(self, jobs: Sequence[Job]) -> Iterator[Decoded]:
        return closed_at_exit(self._decode(jobs))

    def _decode(self, jobs: Sequence[Job]) -> Generator[Decoded]:
        device = self._place.device
        for x, bad in self._by_workers(jobs) if self._workers and jobs else (whole(self.manifest, job) for job in jobs):
            if device.type == "cuda":
                x = torch.empty_like(x, pin_memory=True).copy_(x).to(device, non_blocking=True)
            elif self._workers:
                x = x.clone()
            yield Decoded(x.permute(0, 3, 1, 2), bad)

    def _by_workers(self, jobs: Sequence[Job]) -> Iterator[tuple[Tensor, dict[int, str]]]:
        workers = min(self._workers, len(jobs))
        dataset = _Jobs(self.manifest, jobs, workers)
        at = dataset.at
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=AHEAD,
            collate_fn=_as_it_is,
            timeout=POLL,
            worker_init_fn=partial(_begin, at=at),
            generator=torch.Generator(),  # its own: making an iterator must not draw from the run's random numbers
        )
        before = signal.getsignal(signal.SIGCHLD)
        batches = iter(loader)
        if threading.current_thread() is threading.main_thread() and before is not None:
            # torch's raises wherever the trainer is when a worker dies; we look every POLL. It may also stand from before, put
            # there by another's loader in this process, which looks every 5 s by itself
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if getattr(before, "__module__", "") == TORCH_SIGNALS else before)
        waited, k = 0.0, 0
        try:
            while True:
                try:
                    bad = next(batches)
                except StopIteration:
                    return
                except RuntimeError as error:
                    text = str(error).splitlines()[0]
                    if text.startswith("DataLoader timed out"):
                        waited += POLL
                        if waited < STALL:
                            continue
                        raise DataError(
                            f"no batch of images came for {STALL:g} seconds; being read: {self._being_read(at)}; see whether "
                            "its disk answers"
                        ) from None
                    if not text.startswith("DataLoader worker"):
                        raise
                    raise DataError(
                        f"a process that decodes images died ({text}); being read: {self._being_read(at)}; if memory ran out, "
                        "use --set data.workers=0"
                    ) from None
                yield dataset.slot(k), bad
                waited, k = 0.0, k + 1
        finally:
            self._end(at, stuck=waited >= STALL)
            del batches  # ends the workers
            self._end(at, stuck=True)

    def _being_read(self, at: Tensor) -> str:
        ids = [int(id) for id in at[:, 1] if id >= 0]
        return ", ".join(self.manifest.path(id) for id in ids[:4]) + (", ..." if len(ids) > 4 else "") if ids else "nothing"

    def _end(self, at: Tensor, stuck: bool) -> None:
        """Kill the workers, where they are stuck: they leave SIGTERM to the trainer, and a stopped one would not see it."""
        pids = set(at[:, 0].tolist()) if stuck else ()
        for process in multiprocessing.active_children():
            if process.pid in pids:
                process.kill()
                process.join()
