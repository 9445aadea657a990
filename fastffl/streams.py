"""CUDA streams: the only place that makes them, changes between them and hands work from one to another.

Training runs on one stream of its own (`apart`), so that eager steps, captures and replays agree about it. Work leaves that
stream in two places, the peers' branches (`Branches`) and the next batch (`ahead`), and comes back by `hand_over`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


_made: dict[tuple[torch.device, Any], Any] = {}  # for good: torch gives out 32 streams in turn, then the first ones again


class Streams:
    """The streams of one CUDA device. Tests put a recorder in its place."""

    def __init__(self, device: torch.device):
        self.device = device

    def current(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def side(self, name: Any) -> Any:
        """The side stream of that name, made when first asked for."""
        if (self.device, name) not in _made:
            _made[self.device, name] = torch.cuda.Stream(self.device)
        return _made[self.device, name]

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)


class _Tamper:
    """What a test does to hand-overs: delay(stream) before each, and one, number `without`, left out."""

    def __init__(self, delay: Callable[[Any], None] | None, without: int | None):
        self.delay, self.without, self.count = delay, without, 0


_tamper: _Tamper | None = None


@contextmanager
def tampered(delay: Callable[[Any], None] | None = None, without: int | None = None) -> Iterator[_Tamper]:
    """For tests. Within the block `delay(source)` is called before each hand-over, which must not change any result, and
    hand-over number `without` (0-based, in host order) waits for nothing, which must. Gives an object that counts them."""
    global _tamper
    assert _tamper is None
    _tamper = _Tamper(delay, without)
    try:
        yield _tamper
    finally:
        _tamper = None


def hand_over(source: Any, target: Any, tensors: Sequence[Tensor] = ()) -> None:
    """`target` goes on only after all that `source` was given so far. Every order between two streams is made here.

    tensors   what was made for `source` and is read by `target`: their memory is not used again before that is done
    """
    skip = False
    if _tamper is not None:
        if _tamper.delay:
            _tamper.delay(source)
        skip = _tamper.count == _tamper.without
        _tamper.count += 1
    if not skip:
        target.wait_event(source.record_event())
    for t in tensors:
        if t.is_cuda:
            t.record_stream(target)


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """On CUDA the block runs on a stream of its own, ordered behind what came before and before what comes after it."""
    if device.type != "cuda":
        yield
        return
    streams = Streams(device)
    outer, mine = streams.current(), streams.side("training")
    hand_over(outer, mine)
    try:
        with torch.cuda.device(device), streams.use(mine):
            yield
    finally:
        hand_over(mine, outer)


class Branches:
    """Jobs that need nothing of each other, side by side where `on`: the first on the current stream, each other on its own.

    Their backward follows by itself: autograd runs a node on its forward's stream and makes the waits between streams.
    """

    def __init__(self, streams: Streams):
        self.streams, self.on = streams, False

    def run(self, jobs: Sequence[Callable[[], T]], given: Sequence[Tensor], tensors: Callable[[T], Sequence[Tensor]]) -> list[T]:
        """[job() for job in jobs]. given: what all of them read; tensors: those in a job's result."""
        if not self.on or len(jobs) == 1:
            return [job() for job in jobs]
        here = self.streams.current()
        side = [self.streams.side(k) for k in range(1, len(jobs))]
        for stream in side:  # before the first job, or the others would wait for it
            hand_over(here, stream, given)
        made = []
        for job, stream in zip(jobs, [None, *side], strict=True):
            with nullcontext() if stream is None else self.streams.use(stream):
                made.append(job())
        for result, stream in zip(made[1:], side, strict=True):
            hand_over(stream, here, tensors(result))
        return made


def ahead(batches: Iterator[T], streams: Streams | None, put: Callable[[T], T]) -> Iterator[T]:
    """put(batch) of each batch, the next one made on a side stream while this one is used. None: one after the other.

    The side stream waits until the batch before last was used up: memory is that of three batches however far the host is
    ahead, and the host waits for nothing.
    """
    if streams is None:
        yield from map(put, batches)
        return
    side = streams.side("data")
    hand_over(streams.current(), side)

    def fetch() -> T | None:
        with streams.use(side):
            batch = next(batches, None)
            return None if batch is None else put(batch)

    following = fetch()
    used: T | None = None  # held until the side stream waits for its use
    while following is not None:
        current = following
        hand_over(side, streams.current())
        hand_over(streams.current(), side)  # what used the batch before
        del used
        following = fetch()
        yield current
        used = current
