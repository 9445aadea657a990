"""Where a step goes: milliseconds of its parts, launches, bytes kept for backward."""

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from . import timing

Call = Callable[[], Any]


def waited(call: Call, device: torch.device) -> Call:
    """The call, and the device's end of it."""
    if device.type != "cuda":
        return call

    def both() -> None:
        call()
        torch.cuda.synchronize(device)

    return both


def parts(calls: dict[str, Call], clock: timing.Clock, rounds: int) -> dict[str, float]:
    """ms of each part: differences of successively longer calls, medians of interleaved rounds. On CUDA as graphs."""

    def ignoring(call: Call) -> Callable[[Any], Any]:
        return lambda _: call()

    ready = {name: clock.prepare(ignoring(call), [None]) for name, call in calls.items()}
    times = clock.interleave(ready, rounds, cold=False)
    made, before = {}, 0.0
    for name in calls:
        until = 1e3 * statistics.median(times[name])
        made[name], before = until - before, until
    return made


class OpCount(TorchDispatchMode):
    """Counts the dispatcher's operations that compute: no views, no empty tensors, no detach."""

    FREE = ("aten::detach", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func._schema.name not in self.FREE
        return func(*args, **(kwargs or {}))


def launches(call: Call, device: torch.device, repeats: int = 3) -> int:
    """Kernels, copies and fills of one call on CUDA, as the profiler saw them; operations of the dispatcher elsewhere."""
    if device.type != "cuda":
        with OpCount() as counted:
            call()
        return counted.count
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text(errors="replace"), strict=False)["traceEvents"]
    return round(sum(e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for e in events) / repeats)


@contextmanager
def kept_for_backward(*known: Tensor) -> Iterator[Callable[[], int]]:
    """Gives a function: bytes of all storages autograd saved in the block, each once, those of `known` tensors not counted."""
    mine = {t.untyped_storage().data_ptr() for t in known}
    found: dict[int, tuple[int, Tensor]] = {}  # the tensor is held, so that its address stays its own

    def pack(t: Tensor) -> Tensor:
        at = t.untyped_storage()
        if at.data_ptr() not in mine:
            found[at.data_ptr()] = at.nbytes(), t.detach()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        yield lambda: sum(size for size, _ in found.values())
