"""Streams that record: a stand-in for CUDA's, which finds every read of a tensor that nothing orders behind its writing.

Each stream has a vector clock. An operation ticks its stream's clock; a waited event joins the clock it was recorded with.
A tensor remembers by which stream, and when, it was last written and read; whoever touches it must know of that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Event:
    def __init__(self, clock: dict[str, int]):
        self.clock = clock


class FakeStream:
    def __init__(self, name: str):
        self.name, self.clock = name, {name: 0}

    def record_event(self) -> Event:
        return Event(dict(self.clock))

    def wait_event(self, event: Event) -> None:
        for name, at in event.clock.items():
            self.clock[name] = max(self.clock.get(name, 0), at)


class Recorder:
    """In the place of `Streams`; `races` names each operation that touched what it had to wait for."""

    def __init__(self) -> None:
        self.main = FakeStream("main")
        self._now, self._side = self.main, {}  # type: ignore[var-annotated]

    def current(self) -> FakeStream:
        return self._now

    def side(self, name: Any) -> FakeStream:
        return self._side.setdefault(name, FakeStream(str(name)))

    @contextmanager
    def use(self, stream: FakeStream) -> Iterator[None]:
        before, self._now = self._now, stream
        try:
            yield
        finally:
            self._now = before


class Races(TorchDispatchMode):
    """Within the block every operation is checked. Memory is told by its storage, kept alive so that none is used twice."""

    def __init__(self, streams: Recorder):
        super().__init__()
        self.streams = streams
        self.found: list[str] = []
        self.ops: dict[str, int] = {}  # operations a stream did
        self._touched: dict[int, dict[tuple[int, int, str, bool], int]] = {}  # storage -> bytes from, to, by whom, written
        self._kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        stream = self.streams.current()
        stream.clock[stream.name] += 1
        self.ops[stream.name] = self.ops.get(stream.name, 0) + 1
        mutated = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | (kwargs or {})
        read = [t for n, v in given.items() if n not in mutated for t in tree_leaves(v) if isinstance(t, Tensor)]
        written = [t for n, v in given.items() if n in mutated for t in tree_leaves(v) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for t in (*read, *written)}
        fresh = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in storages]
        for t in read:
            self._touch(func, t, stream, write=False)
        for t in (*written, *fresh):
            self._touch(func, t, stream, write=True)
        return out

    def _touch(self, func: Any, t: Tensor, stream: FakeStream, write: bool) -> None:
        if not t.numel():
            return
        storage, low = t.untyped_storage(), t.storage_offset() * t.element_size()
        high = low + (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()
        self._kept.append(storage)
        touched = self._touched.setdefault(storage._cdata, {})
        for (a, b, name, was_write), at in touched.items():
            if a < high and low < b and (write or was_write) and stream.clock.get(name, 0) < at:
                did = "wrote" if was_write else "read"
                self.found.append(f"{func} on {stream.name} {'writes' if write else 'reads'} what {name} {did} at {at}")
        touched[low, high, stream.name, write] = stream.clock[stream.name]
