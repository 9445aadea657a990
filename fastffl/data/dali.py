"""dali: image files decoded by NVIDIA DALI, and on the GPU also resized and augmented by it.

DALI is given bytes and geometry by sample id; none of its readers is used, since one bad JPEG costs those a whole batch
without a word. Its errors don't say which image they are about either, so images that fail are found by decoding the batch's
images one by one, and what DALI can't read, Pillow tries.
"""

import atexit
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, TimeoutError, wait
from contextlib import suppress
from functools import cache, partial
from io import BytesIO
from itertools import islice
from queue import Empty, SimpleQueue
from threading import Thread, current_thread
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet, finalize

import numpy as np
import torch
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from ..errors import DataError
from .dali_graph import amount, graph
from .decoder import Decoded, Job, close_streams, closed_at_exit
from .headers import header
from .manifest import Manifest
from .portable import STALL, fetch, seen, shown, why
from .rand_augment import OPS, source_of
from .source import Place
from .views import Change, Training, View

DEPTH = 3  # batches that DALI works at while one is used
CHUNK = 16  # images that one thread reads in a row
LAST = 5.0  # seconds that what a thread is at may still take when threads are ended; more takes only a disk that does not answer
_NOTHING = Change(OPS.index("identity"), False)


class _Sample(NamedTuple):
    """An image on its way: its bytes and view for DALI, or else pixels that Pillow decoded, or else what is wrong with it."""

    data: bytes
    view: View | None
    pixels: Tensor | None = None
    wrong: str = ""


class _Batch(NamedTuple):
    job: Job | None  # None: one that warms up
    samples: list[_Sample]
    size: int


def _said(error: RuntimeError) -> str:
    """DALI's own words, without where in our code the operator was made."""
    return why(error).rpartition("encountered: ")[2].removesuffix(" Current pipeline object is no longer valid.")[:300]


class _Failed(Exception):
    """DALI could not make a batch; the pipeline is of no more use."""


@cache
def _placeholder() -> bytes:
    """A JPEG of 8 x 8 pixels, decoded in the place of what DALI is not given."""
    from PIL import Image

    out = BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    return out.getvalue()


_Todo = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class _Threads:
    """Threads that do jobs in order. They don't keep the process from ending while a disk does not answer.

    They are ended before the interpreter is: one that was then in torch or DALI without the interpreter's lock would abort the
    process ("terminate called without an active exception"), since Python ends such a thread inside C++ that must not be left.
    """

    live: ClassVar["WeakSet[_Threads]"] = WeakSet()

    def __init__(self, count: int):
        self._todo: _Todo = SimpleQueue()
        self._threads = [Thread(target=self._work, args=(self._todo,), daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()
        finalize(self, self._end, self._todo, self._threads).atexit = False  # for one that nobody closed
        self.live.add(self)

    @staticmethod
    def _work(todo: _Todo) -> None:
        while (item := todo.get()) is not None:
            future, job = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)
            del item, future, job  # a thread that waits keeps no pipeline

    @staticmethod
    def _end(todo: _Todo, threads: list[Thread]) -> None:
        with suppress(Empty):
            while item := todo.get_nowait():
                item[0].cancel()
        for _ in threads:
            todo.put(None)
        until = time.monotonic() + LAST
        for thread in threads:
            if thread is not current_thread():
                thread.join(max(0.0, until - time.monotonic()))

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        if self not in self.live:
            raise RuntimeError("this decoder was closed")
        future: Future[Any] = Future()
        self._todo.put((future, job))
        return future

    def close(self) -> None:
        """What waits is cancelled, what is being done is waited for, LAST seconds at most."""
        self.live.discard(self)
        self._end(self._todo, self._threads)


@atexit.register  # after DALI's own, so before it: threads read what its pipelines hold
def _end_threads() -> None:
    for threads in list(_Threads.live):
        threads.close()


atexit.register(close_streams)  # before them: an iterator waits for its pipeline


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
    """One DALI pipeline: `feed` starts a batch, `take` waits for the oldest of those `running`.

    sound   it holds nothing half done; never again where that was interrupted
    """

    def __init__(self, setting: _Setting, most: int, changes: int):
        self.most, self.changes, self.sound = most, changes, False
        self.running: deque[_Batch] = deque()
        self._setting = setting
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
            self._give(_Batch(None, [_Sample(b"", None)], 8))
        self._pipe.schedule_run()
        self.sound = True
        self.drain()

    def feed(self, batch: _Batch) -> None:
        """Start a batch."""
        self.sound = False
        self._give(batch)
        self._pipe.schedule_run()
        self.sound = True

    def _give(self, batch: _Batch) -> None:
        self.running.append(batch)  # DALI reads the bytes in place
        give, size, magnitude = self._pipe.feed_input, batch.size, self._setting.magnitude
        blank = View(0, 0, 8, 8, size, size, 0, 0, size)
        views = [s.view or blank for s in batch.samples]
        give("file", [np.frombuffer(s.data if s.view else _placeholder(), np.uint8) for s in batch.samples])
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
            give(f"by{k}", np.array([amount(c, magnitude, size) for c in changes], np.float32))
            source = np.array([source_of(c, magnitude, size) for c in changes], np.float32)
            give(f"source{k}", source.reshape(-1, 2, 3))

    def take(self) -> tuple[Tensor, _Batch]:
        """The oldest batch, and its pixels (B, size, size, 3) uint8 in torch's memory, on the current stream. _Failed."""
        self.sound = False
        batch, device = self.running[0], self._setting.device
        x = torch.empty(len(batch.samples), batch.size, batch.size, 3, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        try:
            made = self._pipe.share_outputs(cuda_stream=stream)[0]
        except RuntimeError as error:
            raise _Failed(_said(error)) from error
        if self._setting.whole:
            feed_ndarray(made.as_tensor(), x, cuda_stream=stream)
        else:
            magnitude = self._setting.magnitude

            def shape(places: range) -> None:
                for k in places:
                    if view := batch.samples[k].view:
                        window = torch.from_numpy(np.asarray(made.at(k)))
                        x[k] = shown(window, view, magnitude).permute(1, 2, 0)

            parts = [self._setting.shaping.submit(partial(shape, part)) for part in _chunks(len(batch.samples))]
            wait(parts)  # all of them, before what they read goes
            for part in parts:
                part.result()
        self._pipe.release_outputs()  # after the copy, in the stream's order
        self.running.popleft()
        self.sound = True
        return x, batch

    def drain(self) -> None:
        """Wait for what was started and forget it. RuntimeError where DALI fails on it."""
        while self.sound and self.running:
            self.sound = False
            self._pipe.share_outputs()
            self._pipe.release_outputs()
            self.running.popleft()
            self.sound = True


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
            return _portably(data, self.job, k)
        return _Sample(data, self.job.view(self.job.ids[k], found.height, found.width))

    def done(self) -> bool:
        return all(f.done() for f in self.futures)

    def batch(self) -> _Batch:
        """The whole job. DataError where a file could not be read for STALL seconds."""
        try:
            return _Batch(self.job, [s for f in self.futures for s in f.result(STALL)], self.job.view.size)
        except TimeoutError:
            names = ", ".join(self._dali.manifest.path(id) for id in list(self._at.values())[:4]) or "other batches' files"
            raise DataError(
                f"no batch of images came for {STALL:g} seconds; being read: {names}; see whether its disk answers"
            ) from None


def _portably(data: bytes, job: Job, k: int) -> _Sample:
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
        threads, whole = max(1, threads), place.device.type == "cuda" if whole is None else whole
        self._readers = _Threads(threads)
        self._setting = _Setting(place.device, threads, magnitude, whole, _Threads(threads))
        self._idle: list[_Pipe] = []

    def close(self) -> None:
        self._readers.close()
        self._setting.shaping.close()
        self._idle.clear()  # after the threads, which may hold the last reference to one: it ends here, not in one of them

    def decode(self, jobs: Sequence[Job]) -> Iterator[Decoded]:
        """One Decoded per job, in order. DataError where files can't be read for minutes, or where DALI fails on good images."""
        return closed_at_exit(self._decode(jobs))

    def _decode(self, jobs: Sequence[Job]) -> Generator[Decoded]:
        left = iter(jobs)
        reading: deque[_Reading] = deque()
        pipe = self._free(max((len(job.ids) for job in jobs), default=1), max(map(_changes, jobs), default=0))
        try:
            while True:
                reading.extend(_Reading(self, job) for job in islice(left, DEPTH + 1 - len(reading)))
                while reading and len(pipe.running) < DEPTH and (not pipe.running or reading[0].done()):
                    pipe.feed(reading[0].batch())
                    reading.popleft()
                if not pipe.running:
                    return
                try:
                    x, batch = pipe.take()
                except _Failed as error:
                    self.failures += 1
                    failed, *waiting = pipe.running
                    pipe = self._new(pipe.most, pipe.changes)
                    x, batch = self._one_by_one(failed, pipe.changes, error)
                    for again in waiting:
                        pipe.feed(again)
                yield self._finished(x, batch)
        finally:
            for work in reading:
                for future in work.futures:
                    future.cancel()
            with suppress(RuntimeError):  # about a batch that nobody asked for; the pipeline ends with it
                pipe.drain()
            if pipe.sound:
                self._idle.append(pipe)

    def _free(self, most: int, changes: int) -> _Pipe:
        """A pipeline that no iterator uses, for batches of up to `most`."""
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
                f"DALI can't decode images on {self._setting.device} ({_said(error)}); --set data.loader=torchvision does without"
            ) from error

    def _one_by_one(self, batch: _Batch, changes: int, error: _Failed) -> tuple[Tensor, _Batch]:
        """A batch that DALI failed on: its pixels, (B, size, size, 3), and what its images turned out to be."""
        assert batch.job is not None
        single: _Pipe | None = None
        x = torch.zeros(len(batch.samples), batch.size, batch.size, 3, dtype=torch.uint8, device=self._setting.device)
        samples, found = list(batch.samples), False
        for k, sample in enumerate(samples):
            if sample.view is None:
                continue
            single = single or self._new(1, changes)
            single.feed(_Batch(batch.job, [sample], batch.size))
            try:
                x[k] = single.take()[0][0]
            except _Failed:
                samples[k], single, found = _portably(sample.data, batch.job, k), None, True
        if not found:
            raise DataError(
                f"DALI failed on a batch of images that it decodes one by one ({error}); if memory ran out, use a smaller "
                "data.batch_size, else --set data.loader=torchvision"
            ) from error
        return x, batch._replace(samples=samples)

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
