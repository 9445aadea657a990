"""How the ops allocate, launch and count. Every output comes from `empty`, every kernel goes through `launch`."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Norm(NamedTuple):
    """The parameters of one BatchNorm, (C,) each; the running statistics are updated in place, as nn.BatchNorm2d does."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float = 0.1
    eps: float = 1e-5


class KernelUnavailable(RuntimeError):
    """A kernel can't be compiled or loaded on this machine."""


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]


# custom op -> kernel launches of one call, where the number is fixed. Operation counts on meta tensors are made from it.
LAUNCHES: dict[str, int] = {}
_recorders: list[list[Launch]] = []


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The kernels launched inside the block, in order."""
    seen: list[Launch] = []
    _recorders.append(seen)
    try:
        yield seen
    finally:
        _recorders.remove(seen)


class Noted(NamedTuple):
    """A launch that was not made: enough of it to compile its kernel."""

    kernel: Any
    grid: tuple[int, ...]
    device: torch.device
    args: tuple[Any, ...]
    named: dict[str, Any]


_noting: list[list[Noted]] = []


@contextmanager
def noted() -> Iterator[list[Noted]]:
    """Inside the block kernels are noted and not run: what they were to write stays uninitialised. See `compile_all`."""
    seen: list[Noted] = []
    _noting.append(seen)
    try:
        yield seen
    finally:
        _noting.remove(seen)


def _like(arg: Any) -> Any:
    """What a kernel is compiled by: a tensor's type and alignment; its memory is not kept."""
    from triton.runtime.jit import MockTensor

    if isinstance(arg, (tuple, list)):
        return type(arg)(_like(a) for a in arg)
    if not isinstance(arg, Tensor):
        return arg
    like, address = MockTensor(arg.dtype), arg.data_ptr()
    like.data_ptr = lambda: address
    return like


def compile_all(launches: list[Noted], threads: int) -> None:
    """Compile the kernels of noted launches, each once, in threads: a first step has about 35, most of a second each.

    A kernel that can't be compiled is left to its launch, which says why.
    """
    from triton import AsyncCompileMode

    with ThreadPoolExecutor(threads) as executor, AsyncCompileMode(executor, ignore_errors=True):
        for kernel, grid, device, args, named in launches:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                kernel.warmup(*args, grid=grid, **named)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor. Tests replace this function to put guard bands round every output."""
    return torch.empty(shape, dtype=dtype, device=device)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    *args: Any,
    warps: int,
    stages: int = 2,
    maxnreg: int | None = None,
    **named: Any,
) -> None:
    """Run `kernel` over `grid` on the current stream of `device`; an empty grid runs nothing.

    fp fusion is set explicitly because Triton 3.10 changes its default; maxnreg is the number of registers a thread may take.
    """
    if 0 in grid:
        return
    for seen in _recorders:
        seen.append(Launch(kernel.__name__, grid))
    named |= {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if maxnreg is not None:
        named["maxnreg"] = maxnreg
    if _noting:
        _noting[-1].append(Noted(kernel, grid, device, _like(args), {k: _like(v) for k, v in named.items()}))
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            kernel[grid](*args, **named)
        except _compile_errors() as error:
            what = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
            raise KernelUnavailable(f"the kernel {kernel.__name__} can't be compiled for {device} ({what})") from error


@cache
def _compile_errors() -> tuple[type[BaseException], ...]:
    """What Triton raises before a kernel has run: code it can't compile, too few registers or too little shared memory."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return CompilationError, OutOfResources, PTXASError


# Arrival counters: int32 zeros that every kernel leaves at zero again. Two launches in flight must not share one, so eager
# calls take turns over a ring far longer than any queue of launches, and a captured call keeps its counters for good.
RING, CAPTURED = 1 << 14, 1 << 18
_counters: dict[torch.device, tuple[Tensor, Tensor]] = {}
_next: dict[torch.device, list[int]] = {}


def counters(device: torch.device, n: int = 1) -> Tensor:
    """(n,) int32 zeros on `device` for the programs of one launch to count themselves; the last one resets them.

    n at most RING. Within a CUDA graph capture each call gets counters of its own; when those are used up, or where the first
    call on a device is inside a capture, a fresh zeroed tensor, whose memset then belongs to the graph.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if device not in _counters:
        if capturing:
            return torch.zeros(n, dtype=torch.int32, device=device)
        _counters[device] = tuple(torch.zeros(k, dtype=torch.int32, device=device) for k in (RING, CAPTURED))  # type: ignore[assignment]
        _next[device] = [0, 0]
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # once: other streams may use them next
    which, size = (1, CAPTURED) if capturing else (0, RING)
    taken = 4 * divup(n, 4)  # 16 bytes: at another alignment Triton compiles the kernel anew, in a capture too
    at = _next[device][which]
    if at + taken > size:
        if capturing:
            return torch.zeros(n, dtype=torch.int32, device=device)
        at = 0
    _next[device][which] = at + taken
    return _counters[device][which][at : at + n]


def divup(a: int, b: int) -> int:
    return -(-a // b)


def power2(n: int) -> int:
    """The smallest power of two >= max(n, 1)."""
    return 1 << max(n - 1, 0).bit_length()
