# mypy: allow-untyped-defs
"""Device code of bn_act: x as rows (N, C) with unit channel stride, statistics and sums per channel in fp32.

A program owns BLOCK_C channels and a stretch of rows. Two launches each way: the first leaves one partial per stretch, and
the last program to arrive at a block of channels merges them in the order of the stretches; the second applies. Where the
rows of BLOCK_C channels are few, one program does both (`*_whole`), its second reading comes out of L2.

Means are held as a pair, mean[0] + mean[1]: data at 1,000 +- 0.01 in fp32 would lose 0.3 % of a standard deviation in one.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._compile import Case

TILE = 2048  # elements of one tile: 16 a thread, two 16-byte loads of bf16, and 32 registers of accumulators
SUMS_TILE = 1024  # of the backward's sums, which have two or three operands and five vectors of channels in registers
WARPS, WHOLE_WARPS = 4, 16  # the tile of a whole launch is as many times larger
SUM_C, WHOLE_C, APPLY_C = 32, 16, 64  # channels of a program; 64, 32 and 128 bytes of a bf16 row
# Programs of a first launch, 5 on each of 132 SMs: 20 KB of loads in flight an SM, and all run at once at 96 registers. Not
# the device's own number, so that a sum has the same order on every GPU.
PROGRAMS = 660
MAXNREG = 96  # of the backward's sums: the compiler, left to itself, spills for a sixth program on an SM
STEPS = 2  # tiles a program of a first launch reads at least: fewer programs, fewer partials to merge
# Bytes of one operand that one program of a whole launch reads. It is alone on its SM and has one tile in flight: 16 warps x 32
# lanes x 32 bytes = 16 KB of bf16 in each 0.25 us that L2 takes are 65 GB/s, so 64 KiB read twice cost 2 us, about what the
# second launch costs inside a CUDA graph (performance.md, C4); 4 warps would have 4 KB in flight and take 8 us. ResNet-32 at
# batch 128 has 4 MiB, 1 MiB and 256 KiB at its stages: the last would take 8 us against 5 of two launches. Not yet measured.
WHOLE = 64 << 10
COUNTERS = 1 << 12  # blocks of channels that a first launch may have, each takes an arrival counter

NO_MASK, FROM_X, FROM_Y = 0, 1, 2  # where the backward finds which ReLUs were open


class Plan(NamedTuple):
    """How rows (N, C) are cut: `blocks` of block_c channels, `parts` stretches of `per` rows, tiles of block_n rows a program
    of so many warps."""

    whole: bool
    block_n: int
    block_c: int
    blocks: int
    parts: int
    per: int
    warps: int = WARPS


def _power2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def whole(rows: int, C: int, itemsize: int) -> bool:
    """Whether rows (N, C) take one launch each way: where the slab of a program is small. Also asked while tracing."""
    return rows * min(_power2(C), WHOLE_C) * itemsize <= WHOLE or C > COUNTERS * SUM_C


def sums_plan(rows: int, C: int, itemsize: int, tile: int) -> Plan:
    """The statistics (TILE) and the backward's sums (SUMS_TILE)."""
    one = whole(rows, C, itemsize)
    block_c = min(_power2(C), WHOLE_C if one else SUM_C)
    block_n, blocks = tile // block_c, -(-C // block_c)
    if one:
        return Plan(True, block_n * WHOLE_WARPS // WARPS, block_c, blocks, 1, rows, WHOLE_WARPS)
    parts = max(1, min(PROGRAMS // blocks, -(-rows // (STEPS * block_n))))
    per = -(-rows // (parts * block_n)) * block_n
    return Plan(False, block_n, block_c, blocks, -(-rows // per), per)


def apply_plan(rows: int, C: int) -> Plan:
    """One tile a program."""
    block_c = min(_power2(C), APPLY_C)
    block_n, blocks = TILE // block_c, -(-C // block_c)
    return Plan(False, block_n, block_c, blocks, -(-rows // block_n), block_n)


@triton.jit
def _tile(at, stop, cols, C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets and mask of rows at..at+BLOCK_N below `stop`."""
    rows = at + tl.arange(0, BLOCK_N).to(tl.int64)
    return rows[:, None] * C + cols[None, :], (rows < stop)[:, None] & (cols < C)[None, :]


@triton.jit
def _partials(at, parts, cols, C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets and mask of the first of the two vectors that each stretch leaves."""
    rows = at + tl.arange(0, BLOCK_N).to(tl.int64)
    return rows[:, None] * (2 * C) + cols[None, :], (rows < parts)[:, None] & (cols < C)[None, :]


@triton.jit
def _vector(pointer, cols, C: tl.constexpr):
    return tl.load(pointer + cols, mask=cols < C, other=0.0).to(tl.float32)


@triton.jit
def _pool(mean, M2, count, n):
    """(mean, M2) of all slots, `n` rows together. The second sum takes back what the first rounded away."""
    rough = tl.sum(mean * count, 0) / n
    all_mean = rough + tl.sum((mean - rough[None, :]) * count, 0) / n
    off = mean - all_mean[None, :]
    return all_mean, tl.sum(M2 + off * off * count, 0)


@triton.jit
def _welford(x, pivot, start, stop, cols, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations of x - pivot per channel, over rows start..stop: every slot of the tile goes its own
    way down the rows, at the end the slots are merged."""
    mean = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    M2 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    seen = 0.0
    for at in range(start, stop, BLOCK_N):
        offset, mask = _tile(at, stop, cols, C, BLOCK_N)
        d = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) - pivot[None, :]
        seen += 1.0
        off = tl.where(mask, d - mean, 0.0)
        mean += off * (1.0 / seen)
        M2 += off * (d - mean)
    slot = tl.arange(0, BLOCK_N)
    count = ((stop - start - slot + BLOCK_N - 1) // BLOCK_N).to(tl.float32)[:, None]  # rows this slot met
    return _pool(mean, M2, count, (stop - start).to(tl.float32))


@triton.jit
def _merge(partial, N, per, parts, cols, C: tl.constexpr, SLOTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """(mean, M2) of all rows from those of the stretches (Chan): slot k takes stretches k, k + SLOTS, ..., then slots merge."""
    count = tl.zeros((SLOTS, 1), tl.float32)
    mean = tl.zeros((SLOTS, BLOCK_C), tl.float32)
    M2 = tl.zeros((SLOTS, BLOCK_C), tl.float32)
    for at in range(0, parts, SLOTS):
        offset, mask = _partials(at, parts, cols, C, SLOTS)
        part = at + tl.arange(0, SLOTS)
        n = tl.where(part < parts, tl.minimum(N - part.to(tl.int64) * per, per).to(tl.float32), 0.0)[:, None]
        share = n / tl.maximum(count + n, 1.0)
        off = tl.load(partial + offset, mask=mask, other=0.0, cache_modifier=".cg") - mean
        M2 += tl.load(partial + C + offset, mask=mask, other=0.0, cache_modifier=".cg") + off * off * (count * share)
        mean += off * share
        count += n
    return _pool(mean, M2, count, N.to(tl.float32))


@triton.jit
def _merge_sums(partial, parts, cols, C: tl.constexpr, SLOTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The two sums of all stretches, in the same order."""
    one = tl.zeros((SLOTS, BLOCK_C), tl.float32)
    two = tl.zeros((SLOTS, BLOCK_C), tl.float32)
    for at in range(0, parts, SLOTS):
        offset, mask = _partials(at, parts, cols, C, SLOTS)
        one += tl.load(partial + offset, mask=mask, other=0.0, cache_modifier=".cg")
        two += tl.load(partial + C + offset, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(one, 0), tl.sum(two, 0)


@triton.jit
def _finish(
    off, M2, pivot, N, cols, first, mean, invstd, running_mean, running_var, batches, momentum, eps, C: tl.constexpr
):  # fmt: skip
    """Statistics of a block of channels out, running ones forward. `off`: mean - pivot. Returns the mean's pair and invstd."""
    inside = cols < C
    high = pivot + off
    part = high - pivot
    low = (pivot - (high - part)) + (off - part)  # what the sum rounded away, exactly (Knuth, TwoSum)
    n = N.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(M2 / n + eps)
    tl.store(mean + cols, high, mask=inside)
    tl.store(mean + C + cols, low, mask=inside)
    tl.store(invstd + cols, scale, mask=inside)
    if running_mean is not None:
        old = _vector(running_mean, cols, C)
        tl.store(running_mean + cols, (1.0 - momentum) * old + momentum * high, mask=inside)
    if running_var is not None:
        old = _vector(running_var, cols, C)
        tl.store(running_var + cols, (1.0 - momentum) * old + momentum * (M2 / (n - 1.0)), mask=inside)
    if batches is not None:
        tl.store(batches, tl.load(batches) + 1, mask=first)
    return high, low, scale


@triton.jit
def _normal(x, high, low, scale):
    """(x - mean) / std; x - high is exact near the mean, so nothing cancels."""
    return ((x - high[None, :]) - low[None, :]) * scale[None, :]


@triton.jit
def _open(g, v):
    """g where the ReLU was open at v; NaN counts as open, as in torch."""
    return tl.where(v <= 0.0, 0.0, g)


@triton.jit
def _forward_tile(x, residual, y, offset, mask, high, low, scale, w, b, RELU: tl.constexpr):
    v = _normal(tl.load(x + offset, mask=mask, other=0.0).to(tl.float32), high, low, scale) * w[None, :] + b[None, :]
    if residual is not None:
        v += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        v = _open(v, v)
    tl.store(y + offset, v, mask=mask)


@triton.jit
def _backward_tile(dy, dskip, x, y, offset, mask, high, low, scale, w, b, MASK: tl.constexpr):
    """Gradient behind the ReLU, of both uses of y together, and the normalised input of a tile."""
    g = tl.load(dy + offset, mask=mask, other=0.0).to(tl.float32)
    if dskip is not None:
        g += tl.load(dskip + offset, mask=mask, other=0.0).to(tl.float32)
    normal = _normal(tl.load(x + offset, mask=mask, other=0.0).to(tl.float32), high, low, scale)
    if MASK == 1:
        g = _open(g, normal * w[None, :] + b[None, :])
    if MASK == 2:
        g = _open(g, tl.load(y + offset, mask=mask, other=0.0).to(tl.float32))
    return g, normal


@triton.jit
def bn_act_stats(
    x, partial, counter, mean, invstd, running_mean, running_var, batches, momentum, eps, N, per, parts,
    C: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % BLOCKS
    part = tl.program_id(0) // BLOCKS
    cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
    pivot = _vector(x, cols, C)  # the first row
    N = N.to(tl.int64)
    start = part.to(tl.int64) * per
    off, M2 = _welford(x, pivot, start, tl.minimum(start + per, N), cols, C, BLOCK_N, BLOCK_C)
    mine = partial + part.to(tl.int64) * (2 * C) + cols
    tl.store(mine, off, mask=cols < C)
    tl.store(mine + C, M2, mask=cols < C)
    tl.debug_barrier()
    if tl.atomic_add(counter + block, 1) == parts - 1:
        off, M2 = _merge(partial, N, per, parts, cols, C, BLOCK_N, BLOCK_C)
        _finish(off, M2, pivot, N, cols, block == 0, mean, invstd, running_mean, running_var, batches, momentum, eps, C)
        tl.store(counter + block, 0)


@triton.jit
def bn_act_apply(
    x, residual, y, weight, bias, mean, scale, eps, N,
    RELU: tl.constexpr, EVAL: tl.constexpr, C: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """EVAL: `mean` and `scale` are the running mean and variance; else a mean's pair and 1 / std."""
    cols = (tl.program_id(0) % BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    offset, mask = _tile((tl.program_id(0) // BLOCKS).to(tl.int64) * BLOCK_N, N, cols, C, BLOCK_N)
    high, s = _vector(mean, cols, C), _vector(scale, cols, C)
    if EVAL:
        low, s = tl.zeros_like(high), 1.0 / tl.sqrt_rn(s + eps)
    else:
        low = _vector(mean + C, cols, C)
    _forward_tile(x, residual, y, offset, mask, high, low, s, _vector(weight, cols, C), _vector(bias, cols, C), RELU)


@triton.jit
def bn_act_whole(
    x, residual, y, weight, bias, mean, invstd, running_mean, running_var, batches, momentum, eps, N,
    RELU: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    pivot = _vector(x, cols, C)
    start = tl.full((), 0, tl.int64)
    N = N.to(tl.int64)
    off, M2 = _welford(x, pivot, start, N, cols, C, BLOCK_N, BLOCK_C)
    first = tl.program_id(0) == 0
    high, low, s = _finish(off, M2, pivot, N, cols, first, mean, invstd, running_mean, running_var, batches, momentum, eps, C)
    w, b = _vector(weight, cols, C), _vector(bias, cols, C)
    for at in range(start, N, BLOCK_N):
        offset, mask = _tile(at, N, cols, C, BLOCK_N)
        _forward_tile(x, residual, y, offset, mask, high, low, s, w, b, RELU)


@triton.jit
def bn_act_backward_sums(
    dy, dskip, x, y, g, weight, bias, mean, invstd, partial, counter, dweight, dbias, N, per, parts,
    MASK: tl.constexpr, C: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dbias = sum g, dweight = sum g (x - mean) / std with g the gradient behind the ReLU, which goes out where it is wanted."""
    block = tl.program_id(0) % BLOCKS
    part = tl.program_id(0) // BLOCKS
    cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
    high, low, s = _vector(mean, cols, C), _vector(mean + C, cols, C), _vector(invstd, cols, C)
    w, b = _vector(weight, cols, C), _vector(bias, cols, C)
    sum_g = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    sum_gx = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    start = part.to(tl.int64) * per
    stop = tl.minimum(start + per, N.to(tl.int64))
    for at in range(start, stop, BLOCK_N):
        offset, mask = _tile(at, stop, cols, C, BLOCK_N)
        d, normal = _backward_tile(dy, dskip, x, y, offset, mask, high, low, s, w, b, MASK)
        if g is not None:
            tl.store(g + offset, d, mask=mask)
        sum_g += d
        sum_gx += d * normal
    mine = partial + part.to(tl.int64) * (2 * C) + cols
    tl.store(mine, tl.sum(sum_g, 0), mask=cols < C)
    tl.store(mine + C, tl.sum(sum_gx, 0), mask=cols < C)
    tl.debug_barrier()
    if tl.atomic_add(counter + block, 1) == parts - 1:
        all_g, all_gx = _merge_sums(partial, parts, cols, C, 2 * BLOCK_N, BLOCK_C)
        tl.store(dbias + cols, all_g, mask=cols < C)
        tl.store(dweight + cols, all_gx, mask=cols < C)
        tl.store(counter + block, 0)


@triton.jit
def bn_act_backward_apply(
    g, x, dx, weight, bias, mean, invstd, dweight, dbias, N,
    MASK: tl.constexpr, C: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    cols = (tl.program_id(0) % BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    offset, mask = _tile((tl.program_id(0) // BLOCKS).to(tl.int64) * BLOCK_N, N, cols, C, BLOCK_N)
    high, low, s = _vector(mean, cols, C), _vector(mean + C, cols, C), _vector(invstd, cols, C)
    w, b = _vector(weight, cols, C), _vector(bias, cols, C)
    d, normal = _backward_tile(g, None, x, None, offset, mask, high, low, s, w, b, MASK)
    n = N.to(tl.float32)
    mean_g, mean_gx = _vector(dbias, cols, C) / n, _vector(dweight, cols, C) / n
    tl.store(dx + offset, (d - mean_g[None, :] - normal * mean_gx[None, :]) * (w * s)[None, :], mask=mask)


@triton.jit
def bn_act_backward_whole(
    dy, dskip, x, y, g, dx, weight, bias, mean, invstd, dweight, dbias, N,
    MASK: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    high, low, s = _vector(mean, cols, C), _vector(mean + C, cols, C), _vector(invstd, cols, C)
    w, b = _vector(weight, cols, C), _vector(bias, cols, C)
    sum_g = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    sum_gx = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    start = tl.full((), 0, tl.int64)
    N = N.to(tl.int64)
    for at in range(start, N, BLOCK_N):
        offset, mask = _tile(at, N, cols, C, BLOCK_N)
        d, normal = _backward_tile(dy, dskip, x, y, offset, mask, high, low, s, w, b, MASK)
        sum_g += d
        sum_gx += d * normal
    all_g, all_gx = tl.sum(sum_g, 0), tl.sum(sum_gx, 0)
    tl.store(dbias + cols, all_g, mask=cols < C)
    tl.store(dweight + cols, all_gx, mask=cols < C)
    n = N.to(tl.float32)
    for at in range(start, N, BLOCK_N):
        offset, mask = _tile(at, N, cols, C, BLOCK_N)
        d, normal = _backward_tile(dy, dskip, x, y, offset, mask, high, low, s, w, b, MASK)
        if g is not None:
            tl.store(g + offset, d, mask=mask)
        tl.store(dx + offset, (d - (all_g / n)[None, :] - normal * (all_gx / n)[None, :]) * (w * s)[None, :], mask=mask)


def cases() -> list[Case]:
    """The kernels at a CIFAR stage (128 x 16 x 16 maps of 32 channels) and, whole, at a small late map (32 x 8 x 8 of 64)."""
    types = {
        **dict.fromkeys(("x", "dy", "dskip", "g", "y", "residual", "dx"), "map"),
        **dict.fromkeys(("partial", "mean", "scale", "invstd", "running_mean", "running_var", "weight", "bias"), "*fp32"),
        **dict.fromkeys(("dweight", "dbias"), "*fp32"),
        **{"counter": "*i32", "batches": "*i64", "momentum": "fp32", "eps": "fp32", "N": "i32", "per": "i32", "parts": "i32"},
    }

    def case(
        name: str, kernel: Any, plan: Plan, C: int, dtype: str = "*bf16", absent: tuple[str, ...] = (), **flags: Any
    ) -> Case:
        constants = {"C": C, "BLOCKS": plan.blocks, "BLOCK_N": plan.block_n, "BLOCK_C": plan.block_c, **flags}
        constants = {k: v for k, v in constants.items() if k in kernel.arg_names} | dict.fromkeys(absent)
        signature = {k: "constexpr" if k in constants else types[k] for k in kernel.arg_names}

        signature = {k: dtype if v == "map" else v for k, v in signature.items()}
        most = MAXNREG if kernel is bn_act_backward_sums else None
        return Case(f"{name} C={C} {dtype[1:]}", kernel, signature, constants, plan.warps, maxnreg=most)

    rows, C = 128 * 16 * 16, 32
    stats, sums, apply = sums_plan(rows, C, 2, TILE), sums_plan(rows, C, 2, SUMS_TILE), apply_plan(rows, C)
    whole, back = sums_plan(32 * 8 * 8, 64, 2, TILE), sums_plan(16 * 8 * 8, 64, 4, SUMS_TILE)
    assert whole.whole and back.whole and not sums.whole
    return [
        case("stats", bn_act_stats, stats, C),
        case("stats", bn_act_stats, stats, C, "*fp32"),
        case("apply+add+relu", bn_act_apply, apply, C, RELU=True, EVAL=False),
        case("eval relu", bn_act_apply, apply, C, absent=("residual",), RELU=True, EVAL=True),
        case("whole+add+relu", bn_act_whole, whole, 64, RELU=True),
        case("sums, mask from x", bn_act_backward_sums, sums, C, absent=("dskip", "y", "g"), MASK=FROM_X),
        case("sums, mask from y", bn_act_backward_sums, sums, C, absent=("dskip",), MASK=FROM_Y),
        case("sums of a fork, mask from x", bn_act_backward_sums, sums, C, absent=("y",), MASK=FROM_X),
        case("sums of a fork, mask from y", bn_act_backward_sums, sums, C, MASK=FROM_Y),
        case("sums of a fork, mask from y", bn_act_backward_sums, sums, C, "*fp32", MASK=FROM_Y),
        case("sums of a small map, mask from x", bn_act_backward_sums, back, 64, absent=("dskip", "y", "g"), MASK=FROM_X),
        case("backward apply, mask from x", bn_act_backward_apply, apply, C, MASK=FROM_X),
        case("backward apply, no mask", bn_act_backward_apply, apply, C, MASK=NO_MASK),
        case("backward whole, mask from y", bn_act_backward_whole, back, 64, absent=("dskip",), MASK=FROM_Y),
        case("backward whole, mask from x", bn_act_backward_whole, back, 64, "*fp32", ("dskip", "y", "g"), MASK=FROM_X),
        case("backward whole of a fork, mask from y", bn_act_backward_whole, back, 64, MASK=FROM_Y),
        case("backward whole of a fork, mask from x", bn_act_backward_whole, back, 64, absent=("y", "g"), MASK=FROM_X),
    ]
