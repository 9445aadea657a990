"""dali: image files decoded by NVIDIA DALI, and on the GPU also resized and augmented by it.

DALI is given bytes and geometry by sample id; none of its readers is used, since one bad JPEG costs those a whole batch
without a word. Its errors don't say which image they are about either, so images that fail are found by decoding the batch's
images one by one, and what DALI can't read, Pillow tries.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, TimeoutError
from contextlib import suppress
from functools import cache, partial
from io import BytesIO
from itertools import islice
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ..errors import DataError
from .dali_graph import amount, graph
from .decoder import Decoded, Job
from .headers import header
from .manifest import Manifest
from .portable import STALL, fetch, seen, why
from .rand_augment import OPS, apply, source_of
from .source import Place
from .views import Change, Training, View

DEPTH = 3  # batches that DALI works at while one is used
CHUNK = 16  # images that one thread reads in a row
_NOTHING = Change(OPS.index("identity"), False)


class _Sample(NamedTuple):
    """An image on its way: its bytes and view for DALI, or else pixels that Pillow decoded, or else what is wrong with it."""

    data: bytes
    view: View | None
    pixels: Tensor | None = None
    wrong: str = ""


class _Batch(NamedTuple):
    job: Job
    samples: list[_Sample]

    @property
    def size(self) -> int:
        return self.job.view.size


@cache
def _placeholder() -> bytes:
    """A JPEG of 8 x 8 pixels, decoded in the place of what DALI is not given."""
    from PIL import Image

    out = BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    return out.getvalue()


class _Threads:
    """Threads that do jobs in order. They don't keep the process from ending while a disk does not answer."""

    def __init__(self, count: int):
        self._count = count
        self._todo: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        for _ in range(count):
            Thread(target=self._work, args=(self._todo,), daemon=True).start()

    @staticmethod
    def _work(todo: "SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]") -> None:
        while (item := todo.get()) is not None:
            future, job = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._todo.put((future, job))
        return future

    def close(self) -> None:
        for _ in range(self._count):
            self._todo.put(None)


def _chunks(n: int) -> list[range]:
    return [range(k, min(k + CHUNK, n)) for k in range(0, n, CHUNK)]


class _Setting(NamedTuple):
    """What the pipelines of a Dali have in common. whole: DALI does all, else it decodes and `shaping` does the rest."""

    device: torch.device
    threads: int
    magnitude: int
    whole: bool
    shaping: _Threads


class _Pipe:
    """One DALI pipeline: `feed` starts a batch, `take` waits for the oldest. RuntimeError from `take` ends its life."""

    def __init__(self, setting: _Setting, most: int, changes: int):
        self.most, self.changes, self.sound = most, changes, True
        self._setting = setting
        self._running: deque[tuple[Sequence[_Sample], int]] = deque()
        device, on_gpu = setting.device, setting.device.type == "cuda"
        self._pipe = graph(
            setting.whole,
            changes,
            on_gpu,
            batch_size=most,
            num_threads=setting.threads,
            device_id=(torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None,
            prefetch_queue_depth=DEPTH,
            exec_dynamic=True,
        )
        self._pipe.build()
        for _ in range(DEPTH):  # the first schedule_run starts as many, each later one starts one
            self._give([_Sample(b"", None)], 8)
        self._pipe.schedule_run()
        self.drain()

    def feed(self, samples: Sequence[_Sample], size: int) -> None:
        """Start a batch."""
        self.sound = False
        self._give(samples, size)
        self._pipe.schedule_run()
        self.sound = True

    def _give(self, samples: Sequence[_Sample], size: int) -> None:
        self._running.append((samples, size))  # DALI reads the bytes in place
        give = self._pipe.feed_input
        blank = View(0, 0, 8, 8, size, size, 0, 0, size)
        views = [s.view or blank for s in samples]
        give("file", [np.frombuffer(s.data if s.view else _placeholder(), np.uint8) for s in samples])
        give("corner", np.array([(v.top, v.left) for v in views], np.int32))
        give("extent", np.array([(v.height, v.width) for v in views], np.int32))
        if not self._setting.whole:
            return
        # to a negative number of columns: mirrored
        give("rows_columns", np.array([(v.rows, -v.columns if v.flip else v.columns) for v in views], np.float32))
        right = [v.columns - v.size - v.right if v.flip else v.right for v in views]
        give("square", np.array([(v.down, r) for v, r in zip(views, right, strict=True)], np.int32))
        give("sides", np.full((len(views), 2), size, np.int32))
        for k in range(self.changes):
            changes = [v.changes[k] if v.changes else _NOTHING for v in views]
            give(f"op{k}", np.array([c.op for c in changes], np.int32))
            give(f"by{k}", np.array([amount(c, self._setting.magnitude, size) for c in changes], np.float32))
            source = np.array([source_of(c, self._setting.magnitude, size) for c in changes], np.float32)
            give(f"source{k}", source.reshape(-1, 2, 3))

    def take(self) -> Tensor:
        """(B, size, size, 3) uint8 of the oldest batch, in torch's memory, on the current stream."""
        self.sound = False
        samples, size = self._running[0]
        device = self._setting.device
        x = torch.empty(len(samples), size, size, 3, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        made = self._pipe.share_outputs(cuda_stream=stream)[0]
        if self._setting.whole:
            feed_ndarray(made.as_tensor(), x, cuda_stream=stream)
        else:

            def shape(places: range) -> None:
                for k in places:
                    if view := samples[k].view:
                        x[k] = shown(torch.from_numpy(np.asarray(made.at(k))), view, self._setting.magnitude)

            for future in [self._setting.shaping.submit(partial(shape, part)) for part in _chunks(len(samples))]:
                future.result()
        self._pipe.release_outputs()  # after the copy, in the stream's order
        self._running.popleft()
        self.sound = True
        return x

    def drain(self) -> None:
        """Wait for what was started and forget it."""
        while self._running:
            self._pipe.share_outputs()
            self._pipe.release_outputs()
            self._running.popleft()


def shown(window: Tensor, view: View, magnitude: int) -> Tensor:
    """(size, size, 3) uint8: the window (height, width, 3) uint8 of an image as `view` shows it, by torchvision."""
    x = F.resize(window.permute(2, 0, 1), [view.rows, view.columns], antialias=True)
    x = x[:, view.down : view.down + view.size, view.right : view.right + view.size]
    x = apply(x.flip(2) if view.flip else x, view.changes, magnitude)
    return x.permute(1, 2, 0)


class _Reading:
    """A job whose files are being read."""

    def __init__(self, dali: "Dali", job: Job):
        self.job, self._dali = job, dali
        self._at: dict[int, int] = {}  # the id that each thread is at, by its first place in the batch
        self.futures = [dali._readers.submit(partial(self._read, part)) for part in _chunks(len(job.ids))]

    def _read(self, places: range) -> list[_Sample]:
        ids = self.job.ids[places.start : places.stop]
        files = fetch(self._dali.manifest, ids, partial(self._at.__setitem__, places.start))
        del self._at[places.start]
        return [self._sample(data, k) for k, data in zip(places, files, strict=True)]

    def _sample(self, data: bytes | OSError, k: int) -> _Sample:
        if isinstance(data, OSError):
            return _Sample(b"", None, wrong=why(data))
        try:
            found = header(data)
        except ValueError as error:
            return _Sample(b"", None, wrong=str(error))
        if not found.plain:
            return portably(data, self.job, k)
        return _Sample(data, self.job.view(self.job.ids[k], found.height, found.width))

    def done(self) -> bool:
        return all(f.done() for f in self.futures)

    def samples(self) -> list[_Sample]:
        """Of the whole job. DataError where a file could not be read for STALL seconds."""
        try:
            return [s for f in self.futures for s in f.result(STALL)]
        except TimeoutError:
            names = ", ".join(self._dali.manifest.path(id) for id in list(self._at.values())[:4]) or "other batches' files"
            raise DataError(
                f"no batch of images came for {STALL:g} seconds; being read: {names}; see whether its disk answers"
            ) from None


def portably(data: bytes, job: Job, k: int) -> _Sample:
    """Image k of a job by Pillow."""
    pixels, wrong = seen(data, job, k)
    return _Sample(b"", None, pixels, wrong)


class Dali:
    """A Decoder on NVIDIA DALI: on the GPU where `place` is one, else on the CPU.

    An image shows the same pixels whatever else is in its batch. What DALI can't read, Pillow decodes; what Pillow can't read
    either is bad.

    threads    that decode on the CPU, and as many that read files
    magnitude  of RandAugment, where the jobs' views have changes
    whole      DALI also resizes and augments; None: on the GPU. Its resizing of one image on one CPU core took 1.9 ms where
               torchvision's took 0.3, so there it only decodes, and the pixels are the same as Portable's

    portable   images decoded by Pillow so far
    failures   batches so far that DALI failed on, after each of which it was set up anew
    """

    def __init__(self, manifest: Manifest, place: Place, threads: int, magnitude: int, whole: bool | None = None):
        self.manifest, self.portable, self.failures = manifest, 0, 0
        self._device, threads = place.device, max(1, threads)
        self._whole = place.device.type == "cuda" if whole is None else whole
        self._readers, self._shaping = _Threads(threads), _Threads(threads)
        self._setting = _Setting(self._device, threads, magnitude, self._whole, self._shaping)
        self._idle: list[_Pipe] = []

    def close(self) -> None:
        self._idle.clear()
        self._readers.close()
        self._shaping.close()

    def decode(self, jobs: Sequence[Job]) -> Iterator[Decoded]:
        """One Decoded per job, in order. DataError where files can't be read for minutes, or where DALI fails on good images."""
        left = iter(jobs)
        reading: deque[_Reading] = deque()
        fed: deque[_Batch] = deque()
        pipe = self._pipe(max((len(job.ids) for job in jobs), default=1), max(map(_changes, jobs), default=0))
        try:
            while True:
                reading.extend(_Reading(self, job) for job in islice(left, DEPTH + 1 - len(reading)))
                while reading and len(fed) < DEPTH and (not fed or reading[0].done()):
                    fed.append(_Batch(reading[0].job, reading[0].samples()))
                    reading.popleft()
                    pipe.feed(fed[-1].samples, fed[-1].size)
                if not fed:
                    return
                try:
                    x = pipe.take()
                    batch = fed.popleft()
                except RuntimeError as error:
                    self.failures += 1
                    pipe = self._new(pipe.most, pipe.changes)
                    x, batch = self._one_by_one(fed.popleft(), pipe.changes, error)
                    for waiting in fed:
                        pipe.feed(waiting.samples, waiting.size)
                yield self._finished(x, batch)
        finally:
            for work in reading:
                for future in work.futures:
                    future.cancel()
            if pipe.sound:
                with suppress(RuntimeError):  # about a batch that nobody asked for; the pipeline ends with it
                    pipe.drain()
                    self._idle.append(pipe)

    def _pipe(self, most: int, changes: int) -> _Pipe:
        """One that no iterator uses."""
        for pipe in self._idle:
            if pipe.changes == changes:
                self._idle.remove(pipe)
                return pipe if pipe.most >= most else self._new(most, changes)
        return self._new(most, changes)

    def _new(self, most: int, changes: int) -> _Pipe:
        try:
            return _Pipe(self._setting, most, changes)
        except RuntimeError as error:
            raise DataError(
                f"DALI can't decode images on {self._device} ({why(error)}); --set data.loader=torchvision does without it"
            ) from error

    def _one_by_one(self, batch: _Batch, changes: int, error: RuntimeError) -> tuple[Tensor, _Batch]:
        """The pixels of a batch that DALI failed on, (B, size, size, 3), and the batch with what its images turned out to be."""
        single: _Pipe | None = None
        x = torch.zeros(len(batch.samples), batch.size, batch.size, 3, dtype=torch.uint8, device=self._device)
        samples = list(batch.samples)
        for k, sample in enumerate(batch.samples):
            if sample.view is None:
                continue
            single = single or self._new(1, changes)
            try:
                single.feed([sample], batch.size)
                x[k] = single.take()[0]
            except RuntimeError:
                samples[k], single = portably(sample.data, batch.job, k), None
        if samples == batch.samples:
            raise DataError(
                f"DALI failed on a batch of images that it decodes one by one ({why(error)}); if memory ran out, use a smaller "
                "data.batch_size, else --set data.loader=torchvision"
            ) from error
        return x, _Batch(batch.job, samples)

    def _finished(self, x: Tensor, batch: _Batch) -> Decoded:
        bad = {}
        for k, sample in enumerate(batch.samples):
            if sample.pixels is not None:
                x[k] = sample.pixels.permute(1, 2, 0).to(x.device)
                self.portable += 1
            elif sample.wrong:
                x[k] = 0
                bad[k] = sample.wrong
        return Decoded(x.permute(0, 3, 1, 2), bad)


def _changes(job: Job) -> int:
    return job.view.cfg.rand_augment if isinstance(job.view, Training) else 0
