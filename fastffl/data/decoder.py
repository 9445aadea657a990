"""What stands between a Source of image files and the libraries that decode them."""

import os
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple, Protocol
from weakref import WeakSet

from torch import Tensor

from .views import Evaluation, Training


class Job(NamedTuple):
    """One batch to be decoded: places in the manifest, and what happens to each image."""

    ids: tuple[int, ...]
    view: Training | Evaluation


class Decoded(NamedTuple):
    """x (B, 3, size, size) uint8, channels_last in memory, on the place's device; `bad`: images that can't be read, by their
    place in the batch, with the reason. Their pixels are 0."""

    x: Tensor
    bad: dict[int, str]


class Decoder(Protocol):
    """`decode(jobs)` gives one Decoded per Job, in order, and works ahead of what was asked for.

    A bad image never costs another one, and no batch is lost, repeated or reordered. An iterator that is closed early leaves no
    thread, process or queue behind that a later one would meet. `close` ends the decoder for good.
    """

    def decode(self, jobs: Sequence[Job]) -> Iterator[Decoded]: ...

    def close(self) -> None: ...


_STREAMS: WeakSet[Generator[Decoded]] = WeakSet()
os.register_at_fork(after_in_child=_STREAMS.clear)  # they and their workers are the parent's, who goes on


def closed_at_exit(stream: Generator[Decoded]) -> Iterator[Decoded]:
    """The iterator, which `close_streams` closes if somebody still holds it then."""
    _STREAMS.add(stream)
    return stream


def close_streams() -> None:
    """To be registered with atexit by whoever makes iterators, once all is imported whose own end must come after theirs."""
    for stream in list(_STREAMS):
        stream.close()
