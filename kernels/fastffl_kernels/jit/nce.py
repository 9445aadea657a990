"""Device code of nce in four launches: indices, sums of scores, loss and gradient in parts, the parts' sums.

Letters: M branches, B samples, N rows of a bank, D numbers of a row, R negatives, S parts that the indices of a sample are cut
into, W the stride of a sample's indices. A program of the second and third kernel has one bank and one part of one sample: it
reads each of its rows once for the M - 1 students. All arithmetic is fp32; sums run in a fixed order, so the same input gives
the same bits.

Random numbers are those of `nce.negatives`, in unsigned arithmetic. Indices are made once for all banks and both passes: in the
loops over rows every lane of a warp would make the same one, and that takes more instructions than the rows' arithmetic.

Largest sizes that are checked for spills: 8 branches of 128 numbers, 7 of 2048. Triton 3.6 spills 16 bytes a thread for 8 of
2048 on sm_90 (16 warps have 128 registers a thread; 32 warps load 8 bytes at once, and Triton 3.9 then spills), and takes 155
registers for 8 of 512. That costs time, not answers: fewer programs fit on a multiprocessor.
"""

# mypy: allow-untyped-defs
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._compile import Case
from .augment import _bits, _step

WRONG: tl.constexpr = tl.constexpr(-2)
GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B9)
DRAWS = 1024  # indices a program makes
FINISH = 4  # warps of the last kernel
SLOTS: tl.constexpr = tl.constexpr(1024)  # partial sums added at once


class Pick(NamedTuple):
    rows: int  # of a tile of terms_kernel; of sums_kernel twice as many
    wide: int  # columns of a tile: all of a row
    warps: int
    parts: int  # S
    per: int  # indices of a part, whole tiles


def pick(M: int, B: int, R: int, D: int) -> Pick:
    """A thread holds the same share of M - 1 gradients as of the tile, 32 fp32 in all. Parts: enough programs that 132 processors
    have 16 each, but no less than 4 tiles for one."""
    each = max(4, 32 // power2(M))
    wide = max(16, power2(D))
    warps = max(4, wide // (32 * each))
    rows = min(64, 32 * warps * each // wide)
    tiles = -(-(R + 1) // (2 * rows))
    parts = max(1, min(-(-132 * 16 // (M * max(B, 1))), tiles // 4))
    per = -(-tiles // parts)
    return Pick(rows, wide, warps, -(-tiles // per), per * 2 * rows)


def power2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@triton.jit
def _scrambled(x, key):
    h = x ^ key
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _below(bits, n):
    return ((bits.to(tl.uint64) * n.to(tl.uint64)) >> 32).to(tl.uint32)


@triton.jit
def _key(low, high, k: tl.constexpr):
    return _scrambled(low + tl.full([], (k + 1) * GOLDEN & 0xFFFFFFFF, tl.uint32), high)


@triton.jit
def draw_kernel(
    ids, labels, order, start, count, counter, index, N, n, C, R, W, S, stride_ids, stride_labels,
    IGNORE: tl.constexpr, STREAM: tl.constexpr, TURNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (sample, part): BLOCK of the R + 1 indices of a sample, its own row first. n: samples that have a label."""
    i, part = (tl.program_id(0) // S).to(tl.int64), tl.program_id(0) % S
    id, label = tl.load(ids + i * stride_ids), tl.load(labels + i * stride_labels)
    known = (label >= 0) & (label < C)
    y = tl.where(known, label, 0)
    gap, first = tl.load(count + y).to(tl.int32), tl.load(start + y).to(tl.uint32)
    own = tl.where(known & (id < N) & (gap < n), id, WRONG)
    own = tl.where((id < 0) | (label == IGNORE), -1, own).to(tl.int32)
    pool = (n - gap).to(tl.uint32)
    bits = tl.zeros([], tl.uint32)
    for k in tl.static_range(1, 16):
        bits += (pool >= 4**k).to(tl.uint32)
    rows, mask = pool >> bits, (tl.full([], 1, tl.uint32) << bits) - 1
    h = _step(tl.full([], 0x9E3779B97F4A7C15, tl.uint64), tl.load(counter).to(tl.uint64))
    h = _step(h, tl.full([], 0, tl.uint64))
    left, right = _bits(h, tl.full([], STREAM, tl.int32), id), _bits(h, tl.full([], STREAM + 1, tl.int32), id)
    column = part * BLOCK + tl.arange(0, BLOCK)
    r = tl.maximum(column - 1, 0).to(tl.uint32)
    x = r
    for k in tl.static_range(TURNS):
        low, high = x & mask, x >> bits
        whole = high < rows
        high += _below(_scrambled(low, _key(left, right, 3 * k)), rows)
        high = tl.where(high >= rows, high - rows, high)
        low = (low + _scrambled(high, _key(left, right, 3 * k + 1))) & mask
        x = tl.where(whole, (high << bits) | low, x) + _below(_key(left, right, 3 * k + 2), pool)
        x = tl.where(x >= pool, x - pool, x)
    x = tl.where(pool < R, _below(_scrambled(r, _key(left, right, 3 * TURNS)), pool), x)
    x = tl.where(x >= first, x + gap.to(tl.uint32), x)
    live = (column > 0) & (column <= R)
    found = tl.load(order + tl.minimum(x.to(tl.int64), n - 1), mask=live & (column < tl.where(known, R + 1, 0)), other=0)
    tl.store(index + i * W + column, tl.where(column == 0, own, found), mask=column <= R)


@triton.jit
def _total(x, n):
    """The sum of n numbers, in a fixed order."""
    at = tl.arange(0, SLOTS)
    total = tl.zeros([SLOTS], tl.float32)
    for k in range(0, n, SLOTS):
        total += tl.load(x + k + at, mask=k + at < n, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 to 1e-6: the device's log is exact to 2^-22 absolute only, and most terms are about 1 / R. Below 1/4
    the series of 2 artanh(x / (2 + x)), whose next term is under 3e-9 of the first."""
    z = x / (2.0 + x)
    q = z * z
    return tl.where(x < 0.25, 2.0 * z * (1.0 + q * (1.0 / 3 + q * (0.2 + q * (1.0 / 7)))), tl.log(1.0 + x))


@triton.jit
def _other(k, a):
    """The k-th branch that is not a."""
    return k + (a <= k).to(tl.int32)


@triton.jit
def _students(v, a, i, B, d, M: tl.constexpr, D: tl.constexpr):
    """The embeddings of sample i by all branches but a, (WIDE,) each."""
    made = ()
    for k in tl.static_range(M - 1):
        b = _other(k, a).to(tl.int64)
        made = made + (tl.load(v + (b * B + i) * D + d, mask=d < D, other=0.0),)
    return made


@triton.jit
def _tile(bank, index, column, stop, d, D: tl.constexpr):
    """The rows of some columns, (ROWS, WIDE); zeros beyond the last."""
    live = column < stop
    row = tl.load(index + column, mask=live, other=0).to(tl.int64)
    return tl.load(bank + row[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def sums_kernel(
    banks, v, index, sums, N, B, R, W, S, per, sharp,
    M: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (bank a, sample i, part): sums[a, b, i S + part] of the scores of each student b; in b = a, 1 for a sample that
    counts."""
    part, i, a = tl.program_id(0) % S, tl.program_id(0) // S % B, tl.program_id(0) // S // B
    index += i.to(tl.int64) * W
    own, d = tl.load(index), tl.arange(0, WIDE)
    bank = banks + a.to(tl.int64) * N * D
    vs = _students(v, a, i, B, d, M, D)
    start = part * per
    stop = tl.where(own >= 0, tl.minimum(start + per, R + 1), start)
    totals = ()
    for _ in tl.static_range(M - 1):
        totals = totals + (tl.zeros([ROWS], tl.float32),)
    for at in range(start, stop, ROWS):
        column = at + tl.arange(0, ROWS)
        tile = _tile(bank, index, column, stop, d, D)
        new = ()
        for k in tl.static_range(M - 1):
            s = tl.exp(tl.sum(tile * vs[k][None, :], 1) * sharp)
            new = new + (totals[k] + tl.where(column < stop, s, 0.0),)
        totals = new
    slot = sums + i * S + part
    for k in tl.static_range(M - 1):
        b = _other(k, a)
        tl.store(slot + (a * M + b).to(tl.int64) * B * S, tl.where(own == WRONG, float("nan"), tl.sum(totals[k], 0)))
    tl.store(slot + (a * M + a).to(tl.int64) * B * S, tl.where((own >= 0) & (part == 0), 1.0, 0.0))


@triton.jit
def terms_kernel(
    banks, v, index, sums, values, parts, N, B, R, W, S, per, sharp, eps, c, ratio,
    M: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, GRADS: tl.constexpr,
):  # fmt: skip
    """Program (bank a, sample i, part): values[a, b, i S + part] of the loss, n times too large, and parts[a, i, part, b] of the
    gradient. sharp: 1 / tau; c: R / N; ratio: (R + 1) / N."""
    part, i, a = tl.program_id(0) % S, tl.program_id(0) // S % B, tl.program_id(0) // S // B
    index += i.to(tl.int64) * W
    own, d = tl.load(index), tl.arange(0, WIDE)
    bank = banks + a.to(tl.int64) * N * D
    vs = _students(v, a, i, B, d, M, D)
    sums += (a * M).to(tl.int64) * B * S
    n = _total(sums + a.to(tl.int64) * B * S, B * S)
    scales, losses, grads = (), (), ()
    for k in tl.static_range(M - 1):
        b = _other(k, a).to(tl.int64)
        scales = scales + (n * ratio / _total(sums + b * B * S, B * S),)
        losses = losses + (tl.zeros([ROWS], tl.float32),)
        grads = grads + (tl.zeros([ROWS, WIDE], tl.float32),)
    start = part * per
    stop = tl.where(own >= 0, tl.minimum(start + per, R + 1), start)
    for at in range(start, stop, ROWS):
        column = at + tl.arange(0, ROWS)
        live = column < stop
        tile = _tile(bank, index, column, stop, d, D)
        new_losses, new_grads = (), ()
        for k in tl.static_range(M - 1):
            p = tl.exp(tl.sum(tile * vs[k][None, :], 1) * sharp) * scales[k]
            term = _log1p(tl.where(column == 0, (c + eps) / p, (p + eps) / c))
            new_losses = new_losses + (losses[k] + tl.where(live, term, 0.0),)
            if GRADS:
                g = tl.where(column == 0, -(c + eps), p) / (p + (c + eps))
                new_grads = new_grads + (grads[k] + g[:, None] * tile,)
        losses = new_losses
        if GRADS:
            grads = new_grads
    values += (a * M).to(tl.int64) * B * S + i * S + part
    parts += ((a.to(tl.int64) * B + i) * S + part) * M * D
    for k in tl.static_range(M - 1):
        b = _other(k, a).to(tl.int64)
        tl.store(values + b * B * S, tl.where(own == WRONG, float("nan"), tl.sum(losses[k], 0)))
        if GRADS:
            tl.store(parts + b * D + d, tl.sum(grads[k], 0) * (sharp / n), mask=d < D)


@triton.jit
def finish_kernel(
    sums, values, parts, index, loss, pairs, grads, B, W, S,
    M: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program 0: the loss and its pairs. Program 1 + b B + i: the gradient of v[b, i], the parts of all banks but b added up."""
    at = tl.program_id(0) - 1
    if at < 0:
        n = _total(sums, B * S)
        whole = tl.zeros([], tl.float32)
        for q in range(M * (M - 1)):
            a = tl.full([], q // (M - 1), tl.int32)
            b = _other(q % (M - 1), a)
            value = _total(values + (a * M + b).to(tl.int64) * B * S, B * S) / tl.maximum(n, 1.0)
            tl.store(pairs + q, value)
            whole += value
        tl.store(loss, whole)
    else:
        b, i, d = at // B, at % B, tl.arange(0, WIDE)
        own = tl.load(index + i.to(tl.int64) * W)
        total = tl.zeros([WIDE], tl.float32)
        for k in range(tl.where(own >= 0, (M - 1) * S, 0)):
            part = ((_other(k // S, b).to(tl.int64) * B + i) * S + k % S) * M + b
            total += tl.load(parts + part * D + d, mask=d < D, other=0.0)
        tl.store(grads + at.to(tl.int64) * D + d, total, mask=d < D)


def cases() -> list[Case]:
    """Four branches at CIFAR's sizes, eight branches, the longest rows that do not spill, rows of an odd length."""
    types = {
        **dict.fromkeys(("banks", "v", "sums", "values", "parts", "loss", "pairs", "grads"), "*fp32"),
        **dict.fromkeys(("ids", "labels", "start", "count", "counter"), "*i64"),
        **dict.fromkeys(("order", "index"), "*i32"),
        **dict.fromkeys(("N", "n", "B", "C", "R", "W", "S", "per", "stride_ids", "stride_labels"), "i32"),
        **dict.fromkeys(("sharp", "eps", "c", "ratio"), "fp32"),
    }
    odd = ("N", "n", "B", "C", "R", "W", "S", "per", "stride_ids", "stride_labels")

    def case(name: str, kernel: Any, constants: dict[str, Any], warps: int, loads: int = 16) -> Case:
        signature = {k: "constexpr" if k in constants else types[k] for k in kernel.arg_names}
        return Case(name, kernel, signature, constants, warps, loads=loads, unaligned=odd)

    def sizes(M: int, B: int, R: int, D: int, double: bool = False) -> tuple[dict[str, Any], int]:
        chosen = pick(M, B, R, D)
        rows = chosen.rows * (2 if double else 1)
        return {"M": M, "D": D, "ROWS": rows, "WIDE": chosen.wide}, chosen.warps

    def terms(name: str, M: int, R: int, D: int, loads: int = 16) -> Case:
        constants, warps = sizes(M, 64, R, D)
        return case(f"terms M{M} D{D}{name}", terms_kernel, constants | {"GRADS": True}, warps, loads)

    draw = {"IGNORE": -100, "STREAM": 1 << 20, "TURNS": 4, "BLOCK": DRAWS}
    few = {k: x for k, x in sizes(4, 64, 16384, 128)[0].items() if k != "ROWS"}
    return [
        case("16,384 draws; loads of 4 bytes: the order is read at random", draw_kernel, draw, 4, 4),
        case("sums M4 D128", sums_kernel, *sizes(4, 64, 16384, 128, True)),
        terms("", 4, 16384, 128),
        terms("", 8, 4096, 128),
        terms("", 7, 4096, 2048),
        terms(": rows of 8 bytes", 2, 4096, 30, loads=8),
        case("finish M4 D128; loads of 4 bytes: a row is a warp's four times", finish_kernel, few, FINISH, 4),
    ]
