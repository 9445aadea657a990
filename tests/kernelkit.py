"""What the kernel tests share: guard bands, odd layouts, error bounds, operation counts.

The interpreter is a check of logic only: it sees no race and no out-of-bounds access, hence the guard bands.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastffl_kernels import _launch

GUARD = 256
EPS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def _canary(dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point:
        return float("nan")
    return 0x5A if dtype == torch.uint8 else -77 if dtype != torch.bool else 1


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


class Guards:
    """Tensors inside larger buffers of canaries; `check` fails if any byte outside the tensors changed."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []  # buffer, bool mask of what belongs to the tensor, first bytes

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu", shift: int = 0) -> Tensor:
        """An output: GUARD + shift canaries before it and GUARD behind it; full of canaries itself, so that what is never
        written shows as NaN."""
        n = 1
        for s in shape:
            n *= s
        whole = torch.full((n + 2 * GUARD + shift,), _canary(dtype), dtype=dtype, device=device)
        own = torch.zeros(whole.shape, dtype=torch.bool)
        own[GUARD + shift : GUARD + shift + n] = True
        self.kept.append((whole, own, _bits(whole).clone()))
        return whole[GUARD + shift : GUARD + shift + n].view(shape)

    def put(self, x: Tensor, shift: int = 0) -> Tensor:
        """A copy of an input with the same shape and order of strides, among canaries."""
        order = sorted(range(x.ndim), key=lambda d: (-x.stride(d), d))
        copy = self.empty(tuple(x.shape[d] for d in order), x.dtype, x.device, shift)
        back = [order.index(d) for d in range(x.ndim)]
        made = copy.permute(back) if x.ndim else copy
        made.copy_(x)
        whole, own, _ = self.kept[-1]
        self.kept[-1] = (whole, own, _bits(whole).clone())
        return made.requires_grad_(x.requires_grad)

    def check(self) -> None:
        for whole, own, before in self.kept:
            same = (_bits(whole) == before).view(len(whole), -1).all(1).cpu()
            touched = (~same & ~own).nonzero().flatten()
            assert not len(touched), f"wrote outside a tensor of {int(own.sum())} elements, at {(touched - GUARD).tolist()[:8]}"


@contextlib.contextmanager
def guarded() -> Iterator[Guards]:
    """Inside the block every output the ops allocate is guarded too; all bands are checked at its end."""
    guards = Guards()
    patch = pytest.MonkeyPatch()
    patch.setattr(_launch, "empty", lambda shape, dtype, device: guards.empty(tuple(shape), dtype, device))
    try:
        yield guards
    finally:
        patch.undo()
    guards.check()


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values laid out otherwise: transposed, inside a larger tensor, stepped, misaligned by one element, and for
    maps channels_last."""
    made = {"contiguous": x.contiguous()}
    wide = x.new_zeros([s + 3 for s in x.shape])
    inner = wide[tuple(slice(1, 1 + s) for s in x.shape)]
    made["inside"] = inner.copy_(x)
    made["stepped"] = x.new_zeros([2 * s for s in x.shape])[tuple(slice(0, 2 * s, 2) for s in x.shape)].copy_(x)
    made["shifted"] = x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)
    if x.ndim >= 2:
        made["transposed"] = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if x.ndim == 4:
        made["channels_last"] = x.contiguous(memory_format=torch.channels_last)
    return made


def rounded_error(got: Tensor, want: Tensor, scale: float | None = None) -> float:
    """Largest |got - want| in units of eps x scale, want in float64; scale: the largest |want| unless given."""
    want = want.double()
    top = float(want.abs().max()) if scale is None and want.numel() else scale or 0.0
    if not want.numel():
        return 0.0
    nan = got.isnan() != want.isnan()
    if bool(nan.any()):
        return float("inf")
    off = (got.double() - want).abs().nan_to_num(0.0).max()
    return float(off) / (EPS[got.dtype] * max(top, 1e-30))


FREE = (
    *("empty", "empty_like", "empty_strided", "new_empty", "view", "_unsafe_view", "reshape", "as_strided", "detach", "detach_"),
    *("permute", "transpose", "t", "expand", "select", "slice", "unsqueeze", "squeeze", "alias", "narrow", "split", "unbind"),
    *("resolve_conj", "resolve_neg", "lift_fresh", "is_nonzero", "result_type", "set_", "view_as", "_reshape_alias", "chunk"),
)


def device_work(call: Callable[[], Any]) -> tuple[list[str], list[str]]:
    """What a call would launch on a device: (our kernels, torch operations that compute or copy)."""
    from torch.profiler import ProfilerActivity, profile

    with _launch.recorded() as ours, profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        call()
    inner = [e for e in seen.events() if e.name.startswith("aten::")]
    leaves = [e for e in inner if not any(c.name.startswith("aten::") for c in e.cpu_children)]
    return [k.kernel for k in ours], [e.name for e in leaves if e.name.removeprefix("aten::") not in FREE]


def saved_bytes(call: Callable[[], Any]) -> int:
    """Bytes a forward keeps for its backward, each storage once, parameters (leaves that require grad) not counted."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not (x.is_leaf and x.requires_grad):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call()
    del out
    return sum(kept.values())


def draws(seed: int, n: int) -> Iterator[random.Random]:
    """n generators, each a pure function of (seed, its number), so that a failing case can be drawn alone."""
    for k in range(n):
        yield random.Random(f"{seed}/{k}")
