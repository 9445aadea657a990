"""Device code of guard: every program sums the squares of a stretch of the gradient, the last to arrive decides.

Vectors of terms and nodes fit one block. Every thread reads the scalars it decides by, and one of them writes them: a barrier
lies between.
"""

# mypy: allow-untyped-defs
from typing import Any

import triton
import triton.language as tl

from .._compile import Case

BLOCK, WARPS = 4096, 8  # elements of one tile: four 16-byte loads a thread
PROGRAMS = 512  # at most: just under 4 on each of 132 SMs, 62 KB in flight on one; partials of all fit one block


def plan(n: int) -> tuple[int, int]:
    """Programs, and the elements of each: whole tiles. One program where there is no gradient to read."""
    tiles = max(1, -(-n // BLOCK))
    per = -(-tiles // PROGRAMS)
    return -(-tiles // per), per * BLOCK


def terms(H: int, E: int, N: int) -> int:
    """Slots of the block that holds terms or nodes."""
    return 1 << max(max(H, E, N) - 1, 0).bit_length()


@triton.jit
def _wild(x):
    """NaN or infinite."""
    return (x != x) | (tl.abs(x) == float("inf"))


@triton.jit
def _sum_squares(grads, start, stop, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(start, stop, BLOCK):
        index = at + tl.arange(0, BLOCK)
        x = tl.load(grads + index, mask=index < stop, other=0.0)
        total += x * x
    return tl.sum(total, 0)


@triton.jit
def _add_terms(total, x, index, size, rows, skip):
    """total += x rows, product in fp32 and sum in fp64, as the meters have it."""
    inside = index < size
    gained = tl.where(skip, 0.0, x * rows.to(tl.float32))
    tl.store(total + index, tl.load(total + index, mask=inside, other=0.0) + gained.to(tl.float64), mask=inside)


@triton.jit
def _decide(
    norm, loss, ce, kl, top1, rows, streak, skipped, bad, loss_sum, term_sum, top1_sum, rows_sum, scale, good, count,
    ok_out, found_inf, factor_out, blend, clip, decay, limit,
    FLOOR: tl.constexpr, EVERY: tl.constexpr, H: tl.constexpr, E: tl.constexpr, N: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, TERMS)
    hard = tl.load(ce + index, mask=index < H, other=0.0)
    soft = tl.load(kl + index, mask=index < E, other=0.0)
    value = tl.load(loss)
    bad_hard, bad_soft, bad_norm = _wild(hard), _wild(soft), _wild(norm)
    bad_loss = (tl.max((bad_hard | bad_soft).to(tl.int32), 0) > 0) | _wild(value)
    run = tl.load(streak)
    old = 1.0
    if scale is not None:
        old = tl.load(scale)
    tl.debug_barrier()
    halted = run >= limit
    blame = bad_loss | bad_norm
    skip = blame | halted
    one = tl.where(skip, 0, 1)
    factor = 1.0
    if scale is not None:
        blame = bad_loss | (bad_norm & (old <= FLOOR))
        factor = tl.div_rn(1.0, old)
    if blame & (run == 0):
        tl.store(bad + index, bad_hard.to(tl.uint8), mask=index < H)
        tl.store(bad + H + index, bad_soft.to(tl.uint8), mask=index < E)
        tl.store(bad + H + E, bad_norm.to(tl.uint8))
    tl.store(skipped, tl.load(skipped) + (1 - one))
    tl.store(streak, tl.where(halted, run, tl.where(blame, run + 1, 0)))
    if clip is not None:
        shrink = tl.div_rn(1.0, norm * factor + 1e-6) * clip
        factor = factor * tl.where(shrink > 1.0, 1.0, shrink)
    if scale is not None:
        steps = tl.load(good) + 1
        full = steps >= EVERY
        moved = tl.where(skip, tl.maximum(old * 0.5, FLOOR), tl.where(full, old * 2.0, old))
        tl.store(scale, tl.where(halted, old, moved))
        tl.store(good, tl.where(halted, steps - 1, tl.where(skip | full, 0, steps)))
    part = 1.0
    if count is not None:
        n = tl.load(count)
        part = (1.0 - tl.minimum(tl.div_rn(1.0 + n, 10.0 + n), decay)) * one.to(tl.float32)
        tl.store(count, n + one.to(tl.float32))
    tl.store(ok_out, one.to(tl.uint8))
    tl.store(found_inf, (1 - one).to(tl.float32))
    tl.store(factor_out, tl.where(skip, 0.0, factor))
    tl.store(blend, part)
    given = tl.load(rows)
    _add_terms(term_sum, hard, index, H, given, skip)
    _add_terms(term_sum + H, soft, index, E, given, skip)
    gained = tl.where(skip, 0.0, value * given.to(tl.float32))
    tl.store(loss_sum, tl.load(loss_sum) + gained.to(tl.float64))
    hits = tl.load(top1 + index, mask=index < N, other=0) * one
    tl.store(top1_sum + index, tl.load(top1_sum + index, mask=index < N, other=0) + hits, mask=index < N)
    tl.store(rows_sum, tl.load(rows_sum) + given * one)


@triton.jit
def guard_kernel(
    loss, ce, kl, top1, rows, grads, norm, partial, counter,
    streak, skipped, bad, loss_sum, term_sum, top1_sum, rows_sum, scale, good, count,
    ok_out, found_inf, factor_out, blend, clip, decay, limit, n, per, parts,
    FLOOR: tl.constexpr, EVERY: tl.constexpr, H: tl.constexpr, E: tl.constexpr, N: tl.constexpr, TERMS: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    if grads is None:
        _decide(
            tl.load(norm), loss, ce, kl, top1, rows, streak, skipped, bad, loss_sum, term_sum, top1_sum, rows_sum,
            scale, good, count, ok_out, found_inf, factor_out, blend, clip, decay, limit, FLOOR, EVERY, H, E, N, TERMS,
        )  # fmt: skip
    else:
        start = tl.program_id(0).to(tl.int64) * per
        mine = _sum_squares(grads, start, tl.minimum(start + per, n), BLOCK)
        tl.store(partial + tl.program_id(0), mine)
        tl.debug_barrier()
        if tl.atomic_add(counter, 1) == parts - 1:
            slot = tl.arange(0, SLOTS)
            squares = tl.load(partial + slot, mask=slot < parts, other=0.0, cache_modifier=".cg")
            _decide(
                tl.sqrt_rn(tl.sum(squares, 0)),
                loss, ce, kl, top1, rows, streak, skipped, bad, loss_sum, term_sum, top1_sum, rows_sum,
                scale, good, count, ok_out, found_inf, factor_out, blend, clip, decay, limit, FLOOR, EVERY, H, E, N, TERMS,
            )  # fmt: skip
            tl.store(counter, 0)


def cases() -> list[Case]:
    """FFL's graph of two peers (3 cross-entropies, 3 edges, 4 nodes), plain and with all that can be asked for."""
    types = {
        **dict.fromkeys(("loss", "ce", "kl", "grads", "norm", "partial", "scale", "count"), "*fp32"),
        **dict.fromkeys(("found_inf", "factor_out", "blend"), "*fp32"),
        **dict.fromkeys(("top1", "rows", "streak", "skipped", "top1_sum", "rows_sum", "good"), "*i64"),
        **dict.fromkeys(("loss_sum", "term_sum"), "*fp64"),
        **{"bad": "*u8", "ok_out": "*u8", "counter": "*i32", "clip": "fp32", "decay": "fp32"},
        **dict.fromkeys(("limit", "n", "per", "parts"), "i32"),
    }
    sizes = {"FLOOR": 1.0, "EVERY": 2000, "H": 3, "E": 3, "N": 4, "TERMS": terms(3, 3, 4), "BLOCK": BLOCK, "SLOTS": PROGRAMS}

    def case(name: str, *absent: str, loads: int = 16) -> Case:
        constants: dict[str, Any] = {**sizes, **dict.fromkeys(absent)}
        signature = {k: "constexpr" if k in constants else types[k] for k in guard_kernel.arg_names}
        return Case(name, guard_kernel, signature, constants, WARPS, loads=loads, unaligned=("limit", "parts"))

    plain, known = ("scale", "good", "count", "clip"), ("grads", "partial", "counter")
    return [
        case("norm taken here", "norm", *plain),
        case("norm taken here, loss scale, clipping, average", "norm"),
        case("norm given, scalars only", *known, *plain, loads=8),
        case("norm given, loss scale, clipping, average; scalars only", *known, loads=8),
    ]
