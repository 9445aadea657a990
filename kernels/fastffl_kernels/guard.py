"""guard: all that a training step decides between backward and update, from device scalars, in one launch.

    ok = every term, the loss and the gradient's norm are finite, and there were fewer than `limit` bad steps in a row
    factor = 1 / scale x min(1, clip / (norm / scale + 1e-6))        d = min(decay, (1 + n) / (10 + n)) at update n

The streak of non-finite steps and whom to blame are decided with the loss scale as the step used it; then the scale, the
meters and the count move on. Letters: H cross-entropies, E edges, N nodes, n elements of gradient.
Bytes: 4 n where the norm is taken here, else under a kilobyte.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _launch
from ._dispatch import register, run

FLOOR, EVERY = 1.0, 2000  # the fp16 loss scale never falls below the one and doubles after as many good steps as the other


class GuardState(NamedTuple):
    """What steps leave to the next one, on the device, updated in place. None: no loss scale, no moving average."""

    streak: Tensor  # () int64, non-finite steps in a row
    skipped: Tensor  # () int64, all steps that changed nothing
    bad: Tensor  # (H + E + 1,) bool, terms (ce, kl, gradient) that were not finite at the streak's first step
    loss_sum: Tensor  # () fp64, loss x rows over good steps
    term_sum: Tensor  # (H + E,) fp64
    top1: Tensor  # (N,) int64
    rows: Tensor  # () int64
    scale: Tensor | None = None  # () fp32, the loss scale
    good: Tensor | None = None  # () int64, good steps since the scale last grew or fell
    count: Tensor | None = None  # type: ignore[assignment]  # () fp32, updates of the average; hides tuple.count


class Verdict(NamedTuple):
    """What the update of this step needs."""

    ok: Tensor  # () bool
    found_inf: Tensor  # () fp32, 1 where not ok
    factor: Tensor | None  # () fp32 that multiplies the gradient; None without loss scale and clipping
    blend: Tensor | None  # () fp32, (1 - d) ok; None without a moving average


def guard_reference(
    loss: Tensor,
    ce: Tensor,
    kl: Tensor,
    top1: Tensor,
    rows: Tensor,
    state: GuardState,
    *,
    grads: Tensor | None = None,
    norm: Tensor | None = None,
    clip: float | None = None,
    decay: float = 0.0,
    limit: int = 10,
) -> Verdict:
    """The op in plain torch: the CPU path and the oracle of the tests."""
    if norm is None:
        assert grads is not None
        norm = torch.linalg.vector_norm(grads)
    streak, scale, good, count = state.streak, state.scale, state.good, state.count
    terms = torch.cat([ce, kl])
    finite, finite_norm = torch.isfinite(terms), torch.isfinite(norm)
    finite_loss = finite.all() & torch.isfinite(loss)
    halted = streak >= limit
    ok = finite_loss & finite_norm & ~halted
    blame = ~finite_loss | ~finite_norm
    if scale is not None:  # an overflow of the gradient alone is the loss scale's business, until that can't fall
        blame = ~finite_loss | (~finite_norm & (scale <= FLOOR))
    first = blame & (streak == 0)
    state.bad.copy_(torch.where(first, torch.cat([~finite, (~finite_norm)[None]]), state.bad))
    state.skipped.add_(~finite_loss | ~finite_norm | halted)
    streak.copy_(torch.where(halted, streak, torch.where(blame, streak + 1, 0)))
    factor = None if scale is None else 1 / scale
    if clip is not None:
        true_norm = norm if factor is None else norm * factor
        shrink = (clip / (true_norm + 1e-6)).clamp(max=1.0)
        factor = shrink if factor is None else factor * shrink
    if factor is not None:
        factor = torch.where(ok, factor, 0)
    if scale is not None and good is not None:
        full = good + 1 >= EVERY
        grown = torch.where(full, scale * 2, scale)
        moved = torch.where(ok, grown, (scale / 2).clamp(min=FLOOR))
        scale.copy_(torch.where(halted, scale, moved))
        good.copy_(torch.where(halted, good, torch.where(ok & ~full, good + 1, 0)))
    blend = None
    if count is not None:
        d = torch.minimum((1 + count) / (10 + count), torch.full_like(count, decay))
        blend = (1 - d) * ok
        count.add_(ok)
    state.term_sum.add_(torch.where(ok, terms * rows, 0))
    state.loss_sum.add_(torch.where(ok, loss * rows, 0))
    state.top1.add_(top1 * ok)
    state.rows.add_(rows * ok)
    return Verdict(ok, (~ok).float(), factor, blend)


@torch.library.custom_op(
    "fastffl::guard",
    mutates_args=("streak", "skipped", "bad", "loss_sum", "term_sum", "top1_sum", "rows_sum", "scale", "good", "count"),
)
def _guard(
    loss: Tensor,
    ce: Tensor,
    kl: Tensor,
    top1: Tensor,
    rows: Tensor,
    grads: Tensor | None,
    norm: Tensor | None,
    streak: Tensor,
    skipped: Tensor,
    bad: Tensor,
    loss_sum: Tensor,
    term_sum: Tensor,
    top1_sum: Tensor,
    rows_sum: Tensor,
    scale: Tensor | None,
    good: Tensor | None,
    count: Tensor | None,
    clip: float | None,
    decay: float,
    limit: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ok, found_inf, factor and blend; the last two are 1 where nobody asked for them."""
    from .jit import guard as jit

    device, n = loss.device, 0 if grads is None else grads.numel()
    parts, per = jit.plan(n)
    ok = _launch.empty((), torch.bool, device)
    found_inf, factor, blend = (_launch.empty((), torch.float32, device) for _ in range(3))
    partial = None if grads is None else _launch.empty((parts,), torch.float32, device)
    counter = None if grads is None else _launch.counters(device)
    _launch.launch(
        *(jit.guard_kernel, (parts,), device, loss, ce, kl, top1, rows, grads, norm, partial, counter),
        *(streak, skipped, bad.view(torch.uint8), loss_sum, term_sum, top1_sum, rows_sum, scale, good, count),
        *(ok.view(torch.uint8), found_inf, factor, blend, clip, decay, limit, n, per, parts, FLOOR, EVERY),
        *(len(ce), len(kl), len(top1), jit.terms(len(ce), len(kl), len(top1)), jit.BLOCK, jit.PROGRAMS),
        warps=jit.WARPS,
    )
    return ok, found_inf, factor, blend


@_guard.register_fake
def _(loss, *rest):  # type: ignore[no-untyped-def]
    scalar = lambda dtype: loss.new_empty((), dtype=dtype)  # noqa: E731
    return scalar(torch.bool), *(scalar(torch.float32) for _ in range(3))


_launch.LAUNCHES["fastffl::guard"] = 1


def _triton(
    loss: Tensor,
    ce: Tensor,
    kl: Tensor,
    top1: Tensor,
    rows: Tensor,
    state: GuardState,
    *,
    grads: Tensor | None,
    norm: Tensor | None,
    clip: float | None,
    decay: float,
    limit: int,
) -> Verdict:
    ok, found_inf, factor, blend = _guard(loss, ce, kl, top1, rows, grads, norm, *state, clip, decay, limit)
    asked = clip is not None or state.scale is not None
    return Verdict(ok, found_inf, factor if asked else None, None if state.count is None else blend)


register("guard", _triton)


def bytes_moved(n: int) -> int:
    """Bytes of gradient that are read; the rest is under a kilobyte."""
    return 4 * n


@torch.no_grad()
def guard(
    loss: Tensor,
    ce: Tensor,
    kl: Tensor,
    top1: Tensor,
    rows: Tensor,
    state: GuardState,
    *,
    grads: Tensor | None = None,
    norm: Tensor | None = None,
    clip: float | None = None,
    decay: float = 0.0,
    limit: int = 10,
) -> Verdict:
    """The verdict on one step; `state` moves on in place. Nothing is read by the host.

    loss          () fp32, without the loss scale
    ce, kl        (H,) and (E,) fp32: cross-entropy and divergence terms
    top1, rows    (N,) and () int64: the batch's counts
    grads         (n,) fp32, contiguous: gradients as backward left them (scaled), whose L2 norm is taken here; squares that
                  overflow fp32 make it infinite, as in torch. Partial sums are added in a fixed order: the same bits each time
    norm          () fp32: that norm, where it is known already. Exactly one of both
    clip          largest norm of the unscaled gradient; None: no clipping
    decay         of the moving average, for `blend`
    limit         non-finite steps in a row after which no step is ok any more

    Loss, terms and norm of float64 go to the reference.

    The fp16 loss scale halves on a bad step, doubles after EVERY good ones and stays at least FLOOR; a halted run leaves it.
    Where a step is not ok, `factor` is 0: who multiplies by it all the same leaves zeros as they are. ValueError says what was
    wrong with shapes, dtypes or devices.
    """
    if (grads is None) == (norm is None):
        raise ValueError(f"grads and norm are {'both None' if grads is None else 'both given'}; expected exactly one of them")
    if (state.scale is None) != (state.good is None):
        raise ValueError("scale and good belong together: got only one of them")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip}; expected a positive norm or None")
    terms, device = ce.numel() + kl.numel(), loss.device
    f32, i64 = torch.float32, torch.int64
    wide = torch.float64 if loss.dtype == torch.float64 else f32
    checks: tuple[tuple[str, Tensor | None, torch.dtype, tuple[int, ...]], ...] = (
        *(("loss", loss, wide, ()), ("ce", ce, wide, (ce.numel(),)), ("kl", kl, wide, (kl.numel(),))),
        *(("top1", top1, i64, (top1.numel(),)), ("rows", rows, i64, ()), ("norm", norm, wide, ())),
        *(("grads", grads, f32, (0 if grads is None else grads.numel(),)), ("state.streak", state.streak, i64, ())),
        *(("state.skipped", state.skipped, i64, ()), ("state.bad", state.bad, torch.bool, (terms + 1,))),
        *(("state.loss_sum", state.loss_sum, torch.float64, ()), ("state.term_sum", state.term_sum, torch.float64, (terms,))),
        *(("state.top1", state.top1, i64, (top1.numel(),)), ("state.rows", state.rows, i64, ())),
        *(("state.scale", state.scale, f32, ()), ("state.good", state.good, i64, ()), ("state.count", state.count, f32, ())),
    )
    for name, x, dtype, shape in checks:
        if x is not None and (x.shape != shape or x.dtype != dtype or x.device != device):
            raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}; expected {shape} {dtype} on {device}")
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} has strides {x.stride()}; expected a contiguous tensor")
    options: dict[str, Any] = {"grads": grads, "norm": norm, "clip": clip, "decay": float(decay), "limit": limit}
    if wide == torch.float64:
        return guard_reference(loss, ce, kl, top1, rows, state, **options)
    verdict: Verdict = run("guard", loss, guard_reference, loss, ce, kl, top1, rows, state, **options)
    return verdict
