"""Device code of distill_graph: the whole graph of a step in one launch, for any static graph.

Letters: B rows, C classes, M given nodes and then one per mean, P programs. What is static is a constexpr:

    MEANS   ((node, ...), ...)                         groups of given nodes; mean j is node M + j
    PAIRS   ((node, c, base, power), ...)              every (node, temperature) whose softmax is needed; c = log2(e) / T;
                                                       base >= 0: exp(x) is exp of pair `base` to an integer power
    HARD    ((node, weight, pair), ...)                who meets the labels
    EDGES   ((teacher, student, T, detach, eps, pair of teacher, pair of student, its place), ...)
    GRADS   (bool, ...)                                which given nodes get a gradient

All arithmetic is fp32, exponents in base 2 of differences to the row's maximum: exp2((z - max) c). Sums over rows go through
partials that the last program to arrive adds in a fixed order, so the same input gives the same bits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._compile import Case

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
NO_TARGET: tl.constexpr = tl.constexpr(-1)  # a class no column has
TOP: tl.constexpr = tl.constexpr(5)

ONE_BLOCK = 4096  # columns up to which a row is held in registers; beyond it the row is read twice (the second time from L2)
SCANNED = 2048  # rows up to which every program counts the labels itself; beyond it a launch of its own does
MAXNREG = 128  # left to itself ptxas takes 56 registers for small graphs and spills 8 bytes
CHUNK = 64  # partials added at once
GROUPS = 1024  # at most so many groups of programs add their partials before the last one adds the groups'


@triton.jit
def _mean(zs, g: tl.constexpr, MEANS: tl.constexpr):
    """Mean g of the given nodes' tiles, summed in order and divided as torch does, so that equal logits stay equal."""
    total = zs[MEANS[g][0]]
    for j in tl.static_range(1, len(MEANS[g])):
        total = total + zs[MEANS[g][j]]
    return tl.math.div_rn(total, tl.zeros_like(total) + len(MEANS[g]))


@triton.jit
def _logits(
    xs, strides_b, strides_c, row, c, mask, other: tl.constexpr, C: tl.constexpr, CONTIGUOUS: tl.constexpr, MEANS: tl.constexpr
):
    """All nodes' logits at (row, c) in fp32, means formed: M + len(MEANS) tiles, `other` where masked."""
    zs = ()
    for i in tl.static_range(len(xs)):
        if CONTIGUOUS:
            at = xs[i] + row * C + c
        else:
            at = xs[i] + row * strides_b[i] + c.to(tl.int64) * strides_c[i]
        zs = zs + (tl.load(at, mask=mask, other=other).to(tl.float32),)
    for g in tl.static_range(len(MEANS)):
        zs = zs + (_mean(zs, g, MEANS),)
    return zs


@triton.jit
def _labels_of(labels, labels2, mix, mix_stride, row, live, C: tl.constexpr, IGNORE: tl.constexpr, MIXED: tl.constexpr):
    """A tile's labels: y, y2, the share of y, which rows count, which of those have a label outside [0, C)."""
    y = tl.load(labels + row, mask=live, other=0)
    keep = live
    if IGNORE is not None:
        keep = keep & (y != IGNORE)
    bad = (y < 0) | (y >= C)
    y2 = y
    share = tl.zeros(y.shape, tl.float32) + 1.0
    if MIXED:
        y2 = tl.load(labels2 + row, mask=live, other=0)
        share = tl.load(mix + row * mix_stride, mask=live, other=1.0).to(tl.float32)
        if IGNORE is not None:
            keep = keep & (y2 != IGNORE)
        bad = bad | (y2 < 0) | (y2 >= C)
    bad = bad & keep
    good = keep & (bad == 0)
    return tl.where(good, y, NO_TARGET).to(tl.int32), tl.where(good, y2, NO_TARGET).to(tl.int32), share, keep, bad


@triton.jit
def _count(labels, labels2, B, IGNORE: tl.constexpr, MIXED: tl.constexpr, SCAN: tl.constexpr):
    """Rows that count. Every program counts them all: B labels from L2 cost less than a second launch."""
    k = tl.arange(0, SCAN)
    total = tl.zeros([SCAN], tl.int32)
    for start in range(0, B, SCAN):
        at = start + k
        keep = tl.load(labels + at, mask=at < B, other=IGNORE) != IGNORE
        if MIXED:
            keep = keep & (tl.load(labels2 + at, mask=at < B, other=IGNORE) != IGNORE)
        total += keep.to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _sums(zs, tops, PAIRS: tl.constexpr):
    """sum_c exp((z - max) / T) of every pair, (ROWS,). A power of another pair's exponential costs multiplications only; the
    special-function unit would else bind: two exponentials a column and node, here and in the gradient, are 0.49 ms at
    B, C, K = 4096, 21841, 4 while the memory takes 0.42 ms."""
    sums, es = (), ()
    for p in tl.static_range(len(PAIRS)):
        if PAIRS[p][2] < 0:
            e = tl.exp2((zs[PAIRS[p][0]] - tops[PAIRS[p][0]][:, None]) * PAIRS[p][1])
        else:
            e = es[PAIRS[p][2]]
            for k in tl.static_range(1, 4):
                if k < PAIRS[p][3]:
                    e = e * es[PAIRS[p][2]]
        es = es + (e,)
        sums = sums + (tl.sum(e, 1),)
    return sums


@triton.jit
def _logs(sums, PAIRS: tl.constexpr):
    """log2 of the sums, and for a power of another pair the factor that makes its probability from that pair's."""
    logs, factors = (), ()
    for p in tl.static_range(len(PAIRS)):
        logs = logs + (tl.log2(sums[p]),)
        factor = tl.zeros_like(sums[p])
        if PAIRS[p][2] >= 0:
            factor = tl.exp2(PAIRS[p][3] * logs[PAIRS[p][2]] - logs[p])
        factors = factors + (factor,)
    return logs, factors


@triton.jit
def _softmax(p: tl.constexpr, zs, tops, logs, factors, PAIRS: tl.constexpr):
    """The probabilities of pair p. Made anew wherever needed: kept, they would take twice the registers of the logits."""
    if PAIRS[p][2] < 0:
        q = tl.exp2((zs[PAIRS[p][0]] - tops[PAIRS[p][0]][:, None]) * PAIRS[p][1] - logs[p][:, None])
    else:
        base = _softmax(PAIRS[p][2], zs, tops, logs, factors, PAIRS)
        q = base * factors[p][:, None]
        for k in tl.static_range(1, 4):
            if k < PAIRS[p][3]:
                q = q * base
    return q


@triton.jit
def _ahead(z, z_y, c, y, mask):
    """1 at columns that come before the label: a larger logit, or an equal one of a lower class. In fp32, whose sum is exact
    below 2^24: as integers the sum of bits goes through local memory."""
    behind = (z < z_y[:, None]) | ((z == z_y[:, None]) & (c >= y[:, None]))
    return tl.where(mask & (behind == 0), 1.0, 0.0)


@triton.jit
def _log_ratio(q, zs, tops, logs, mask, e: tl.constexpr, EDGES: tl.constexpr, PAIRS: tl.constexpr):
    """log(q' / p) of an edge's teacher (its probabilities q, eps not added) and student in nats, 0 beyond C."""
    student = (zs[EDGES[e][1]] - tops[EDGES[e][1]][:, None]) * PAIRS[EDGES[e][6]][1] - logs[EDGES[e][6]][:, None]
    if EDGES[e][4] > 0:
        teacher = tl.log2(q + EDGES[e][4])
    else:
        teacher = (zs[EDGES[e][0]] - tops[EDGES[e][0]][:, None]) * PAIRS[EDGES[e][5]][1] - logs[EDGES[e][5]][:, None]
    return tl.where(mask, (teacher - student) * LN2, 0.0)


@triton.jit
def _kl(zs, tops, logs, factors, mask, e: tl.constexpr, EDGES: tl.constexpr, PAIRS: tl.constexpr):
    """q' log(q' / p) - q' + p of a tile, to be summed; the sum is the divergence less C eps.

    No term is negative, and an error common to all log ratios, as that of a row's logarithm of sums is, drops out to first
    order since sum_c (p - q) = 0. Summed plainly, T^2 times it was 7e-4 instead of 4e-8 at T near 1000.
    """
    q = _softmax(EDGES[e][5], zs, tops, logs, factors, PAIRS)
    p = _softmax(EDGES[e][6], zs, tops, logs, factors, PAIRS)
    x = -_log_ratio(q, zs, tops, logs, mask, e, EDGES, PAIRS)
    q = q + EDGES[e][4]
    series = q * x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720)))))  # q (exp(x) - 1 - x), |x| < 1/4
    return tl.where(mask, tl.where(tl.abs(x) < 0.25, series, p - q - q * x), 0.0)


@triton.jit
def _pull(zs, tops, logs, factors, mask, e: tl.constexpr, EDGES: tl.constexpr, PAIRS: tl.constexpr):
    """q log(q' / p) of a tile, to be summed: what a teacher that is not detached subtracts from log(q' / p) in its gradient,
    with the same errors."""
    q = _softmax(EDGES[e][5], zs, tops, logs, factors, PAIRS)
    return q * _log_ratio(q, zs, tops, logs, mask, e, EDGES, PAIRS)


@triton.jit
def _gradient(
    node: tl.constexpr, zs, tops, logs, factors, pulls, weights, share, lam, y, y2, c, mask, C: tl.constexpr,
    PAIRS: tl.constexpr, HARD: tl.constexpr, EDGES: tl.constexpr, SMOOTHING: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """d loss / d z of one node (given or mean) in fp32; share (ROWS,) is 1/n where a row counts."""
    g = tl.zeros_like(zs[node])
    for h in tl.static_range(len(HARD)):
        if HARD[h][0] == node:
            if MIXED:
                target = tl.where(c == y[:, None], lam[:, None], 0.0) + tl.where(c == y2[:, None], 1.0 - lam[:, None], 0.0)
            else:
                target = tl.where(c == y[:, None], 1.0, 0.0)
            p = _softmax(HARD[h][2], zs, tops, logs, factors, PAIRS)
            g += (HARD[h][1] * share)[:, None] * (p - (1.0 - SMOOTHING) * target - SMOOTHING / C)
    for e in tl.static_range(len(EDGES)):
        if EDGES[e][1] == node:
            p = _softmax(EDGES[e][6], zs, tops, logs, factors, PAIRS)
            q = _softmax(EDGES[e][5], zs, tops, logs, factors, PAIRS) + EDGES[e][4]
            w = tl.load(weights + EDGES[e][7]).to(tl.float32) * EDGES[e][2]
            g += (w * share)[:, None] * ((1.0 + C * EDGES[e][4]) * p - q)
        if (EDGES[e][0] == node) & (not EDGES[e][3]):
            q = _softmax(EDGES[e][5], zs, tops, logs, factors, PAIRS)
            off = _log_ratio(q, zs, tops, logs, mask, e, EDGES, PAIRS) - pulls[e][:, None]
            w = tl.load(weights + EDGES[e][7]).to(tl.float32) * EDGES[e][2]
            g += (w * share)[:, None] * q * off
    return g


@triton.jit
def _gradients_of_means(
    zs, tops, logs, factors, pulls, weights, share, lam, y, y2, c, mask, C: tl.constexpr, MEANS: tl.constexpr,
    PAIRS: tl.constexpr, HARD: tl.constexpr, EDGES: tl.constexpr, MEAN_GRADS: tl.constexpr, SMOOTHING: tl.constexpr,
    MIXED: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """What each mean hands to each of its members; 0 for a mean that only teaches, detached."""
    out = ()
    for g in tl.static_range(len(MEANS)):
        if MEAN_GRADS[g]:
            of_mean = _gradient(
                GIVEN + g, zs, tops, logs, factors, pulls, weights, share, lam, y, y2, c, mask, C, PAIRS, HARD, EDGES,
                SMOOTHING, MIXED,
            ) / len(MEANS[g])  # fmt: skip
        else:
            of_mean = 0.0
        out = out + (of_mean,)
    return out


@triton.jit
def _store_gradient(
    i: tl.constexpr, gs, of_means, row, live, zs, tops, logs, factors, pulls, weights, share, keep, lam, y, y2, c, mask,
    C: tl.constexpr, MEANS: tl.constexpr, PAIRS: tl.constexpr, HARD: tl.constexpr, EDGES: tl.constexpr, GRADS: tl.constexpr,
    MEAN_GRADS: tl.constexpr, SMOOTHING: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Write a given node's gradient if it is wanted; a row that does not count gets zeros whatever its logits."""
    if GRADS[i]:
        g = _gradient(
            i, zs, tops, logs, factors, pulls, weights, share, lam, y, y2, c, mask, C, PAIRS, HARD, EDGES, SMOOTHING, MIXED
        )  # fmt: skip
        for j in tl.static_range(len(MEANS)):
            if MEAN_GRADS[j]:
                for k in tl.static_range(len(MEANS[j])):
                    if MEANS[j][k] == i:
                        g += of_means[j]
        g = tl.where(keep[:, None], g, 0.0)
        tl.store(gs[i] + row * C + c, g.to(gs[i].dtype.element_ty), mask=mask & live)


@triton.jit
def _add_up(partials, first, end, SLOTS: tl.constexpr, CHUNK: tl.constexpr):
    """Rows first..end of the partials, added in order."""
    slot, k = tl.arange(0, SLOTS), tl.arange(0, CHUNK)[:, None]
    total = tl.zeros([CHUNK, SLOTS], tl.float32)
    for start in range(first, end, CHUNK):
        at = tl.zeros([CHUNK, 1], tl.int64) + start + k
        # from L2, where the other programs left them, whatever this multiprocessor holds
        total += tl.load(partials + at * SLOTS + slot[None, :], mask=at < end, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def _finish(
    acc, n, partials, counters, weights, loss, ce, kl, top1, top5, rows, programs, group,
    NODES: tl.constexpr, HARD: tl.constexpr, EDGES: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Leave this program's sums. The last of each group adds the group's in program order, the last group adds all groups' and
    writes the results: two short sums, where one program would wait for `programs` rows. Counters go back to 0.
    Counts travel as fp32: exact up to 2^24 rows."""
    pid = tl.program_id(0)
    slot = tl.arange(0, SLOTS)
    tl.store(partials + pid.to(tl.int64) * SLOTS + slot, acc)
    tl.debug_barrier()  # all threads' partials before the one thread that announces them
    mine = pid // group
    first = mine * group
    end = tl.minimum(first + group, programs)
    if tl.atomic_add(counters + 1 + mine, 1) == end - first - 1:
        tl.debug_barrier()
        total = _add_up(partials, first, end, SLOTS, CHUNK)
        tl.store(partials + (programs + mine).to(tl.int64) * SLOTS + slot, total)
        tl.store(counters + 1 + mine, 0)
        tl.debug_barrier()
        groups = tl.cdiv(programs, group)
        if tl.atomic_add(counters, 1) == groups - 1:
            tl.debug_barrier()
            total = _add_up(partials, programs, programs + groups, SLOTS, CHUNK)
            term = total / tl.maximum(n, 1).to(tl.float32)
            weight = tl.zeros([SLOTS], tl.float32)
            for h in tl.static_range(len(HARD)):
                weight = tl.where(slot == h, HARD[h][1] * 1.0, weight)
            for e in tl.static_range(len(EDGES)):
                weight = tl.where(slot == len(HARD) + e, tl.load(weights + e).to(tl.float32), weight)
            TERMS: tl.constexpr = len(HARD) + len(EDGES)
            tl.store(loss, tl.sum(tl.where(slot < TERMS, weight * term, 0.0), 0))
            tl.store(ce + slot, term, mask=slot < len(HARD))
            tl.store(kl + slot - len(HARD), term, mask=(slot >= len(HARD)) & (slot < TERMS))
            at = slot - TERMS
            tl.store(top1 + at, total.to(tl.int64), mask=(at >= 0) & (at < NODES))
            tl.store(top5 + at - NODES, total.to(tl.int64), mask=(at >= NODES) & (at < 2 * NODES))
            tl.store(rows, n.to(tl.int64))
            tl.store(counters, 0)


@triton.jit
def _placed(value, where: tl.constexpr, slot):
    """A scalar in its slot, zeros elsewhere: many sums in one register instead of one register each."""
    return tl.where(slot == where, value, 0.0)


@triton.jit
def _hard(at_y, at_y2, lam, top, log, SMOOTHING: tl.constexpr, MIXED: tl.constexpr):
    """Cross-entropy of a node's rows; with smoothing, SMOOTHING / C sum_c (max - z) is still to be added."""
    logsum = log * LN2
    hard = logsum + (top - at_y)
    if MIXED:
        hard = lam * hard + (1.0 - lam) * (logsum + (top - at_y2))
    if SMOOTHING > 0:
        hard = (1.0 - SMOOTHING) * hard + SMOOTHING * logsum
    return hard


@triton.jit
def _rows_that_count(rows, labels, labels2, B, IGNORE: tl.constexpr, MIXED: tl.constexpr, SCAN: tl.constexpr):
    """n: every row, or counted here, or (SCAN 0) counted by count_kernel before."""
    if IGNORE is None:
        n = B
    elif SCAN == 0:
        n = tl.load(rows).to(tl.int32)
    else:
        n = _count(labels, labels2, B, IGNORE, MIXED, SCAN)
    return n


@triton.jit
def count_kernel(rows, labels, labels2, B, IGNORE: tl.constexpr, MIXED: tl.constexpr, SCAN: tl.constexpr):
    """One program: rows that count, for batches too large to be counted by every program."""
    tl.store(rows, _count(labels, labels2, B, IGNORE, MIXED, SCAN).to(tl.int64))


@triton.jit
def one_block_kernel(
    xs, gs, strides_b, strides_c, labels, labels2, mix, mix_stride, weights,
    loss, ce, kl, top1, top5, rows, partials, counters, B, programs, group,
    C: tl.constexpr, MEANS: tl.constexpr, PAIRS: tl.constexpr, HARD: tl.constexpr, EDGES: tl.constexpr, GRADS: tl.constexpr,
    MEAN_GRADS: tl.constexpr, UNDETACHED: tl.constexpr, CONTIGUOUS: tl.constexpr, IGNORE: tl.constexpr,
    SMOOTHING: tl.constexpr, MIXED: tl.constexpr, SCAN: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """C <= BLOCK: a program reads ROWS rows of every node once and keeps them."""
    NODES: tl.constexpr = len(xs) + len(MEANS)
    TERMS: tl.constexpr = len(HARD) + len(EDGES)  # then NODES top-1 counts, then NODES top-5 counts
    slot = tl.arange(0, SLOTS)
    acc = tl.zeros([SLOTS], tl.float32)
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = r < B
    row = tl.where(live, r, 0)  # rows beyond B are computed as row 0 and count nowhere
    c = tl.arange(0, BLOCK)[None, :]
    mask = (c < C) & (row >= 0)[:, None]
    zs = _logits(xs, strides_b, strides_c, row[:, None], c, mask, -float("inf"), C, CONTIGUOUS, MEANS)
    n = _rows_that_count(rows, labels, labels2, B, IGNORE, MIXED, SCAN)
    y, y2, lam, keep, bad = _labels_of(labels, labels2, mix, mix_stride, row, live, C, IGNORE, MIXED)
    at_y = _logits(xs, strides_b, strides_c, row, y, y >= 0, 0.0, C, CONTIGUOUS, MEANS)
    at_y2 = at_y
    if MIXED:
        at_y2 = _logits(xs, strides_b, strides_c, row, y2, y2 >= 0, 0.0, C, CONTIGUOUS, MEANS)
    tops = ()
    for m in tl.static_range(NODES):
        tops = tops + (tl.max(zs[m], 1),)
        ahead = tl.sum(_ahead(zs[m], at_y[m], c, y, mask), 1) + tl.where(at_y[m] == at_y[m], 0, TOP)
        scored = keep & (y >= 0)
        acc += _placed(tl.sum(tl.where(scored & (ahead < 1), 1.0, 0.0), 0), TERMS + m, slot)
        acc += _placed(tl.sum(tl.where(scored & (ahead < TOP), 1.0, 0.0), 0), TERMS + NODES + m, slot)
    logs, factors = _logs(_sums(zs, tops, PAIRS), PAIRS)
    for h in tl.static_range(len(HARD)):
        top = tops[HARD[h][0]]
        off = tl.zeros_like(top)
        if SMOOTHING > 0:
            off = tl.sum(tl.where(mask, top[:, None] - zs[HARD[h][0]], 0.0), 1)
        hard = _hard(at_y[HARD[h][0]], at_y2[HARD[h][0]], lam, top, logs[HARD[h][2]], SMOOTHING, MIXED) + SMOOTHING / C * off
        hard = tl.where(bad, float("nan"), hard)
        acc += _placed(tl.sum(tl.where(keep, hard, 0.0), 0), h, slot)
    pulls = ()
    for e in tl.static_range(len(EDGES)):
        pull = tops[0]
        if not EDGES[e][3]:
            pull = tl.sum(_pull(zs, tops, logs, factors, mask, e, EDGES, PAIRS), 1)
        pulls = pulls + (pull,)
    share = tl.where(bad, float("nan"), 1.0 / tl.maximum(n, 1).to(tl.float32))
    of_means = _gradients_of_means(
        zs, tops, logs, factors, pulls, weights, share, lam, y, y2, c, mask, C, MEANS, PAIRS, HARD, EDGES, MEAN_GRADS, SMOOTHING,
        MIXED, len(xs),
    )  # fmt: skip
    for m in tl.static_range(NODES):  # a student's divergence beside its gradient, so that its probabilities live once
        for e in tl.static_range(len(EDGES)):
            if EDGES[e][1] == m:
                soft = tl.sum(_kl(zs, tops, logs, factors, mask, e, EDGES, PAIRS), 1) + C * EDGES[e][4]
                acc += _placed(tl.sum(tl.where(keep, soft, 0.0), 0) * EDGES[e][2] * EDGES[e][2], len(HARD) + EDGES[e][7], slot)
        if m < len(xs):
            _store_gradient(
                m, gs, of_means, row[:, None], live[:, None], zs, tops, logs, factors, pulls, weights, share, keep, lam, y, y2, c,
                mask, C, MEANS, PAIRS, HARD, EDGES, GRADS, MEAN_GRADS, SMOOTHING, MIXED,
            )  # fmt: skip
    _finish(
        acc, n, partials, counters, weights, loss, ce, kl, top1, top5, rows, programs, group,
        NODES, HARD, EDGES, SLOTS, CHUNK,
    )  # fmt: skip


@triton.jit
def _online(zs, tops, sums, NODES: tl.constexpr, PAIRS: tl.constexpr):
    """Maxima and sums of exponentials after one more block. Before a finite logit is seen the maximum stands at 0, since
    -inf - -inf is no number."""
    new, safe = (), ()
    for m in tl.static_range(NODES):
        top = tl.maximum(tops[m], tl.max(zs[m], 1))
        new = new + (top,)
        safe = safe + (tl.where(top == -float("inf"), 0.0, top),)
    more = _sums(zs, safe, PAIRS)
    out = ()
    for p in tl.static_range(len(PAIRS)):
        out = out + (sums[p] * tl.exp2((tops[PAIRS[p][0]] - safe[PAIRS[p][0]]) * PAIRS[p][1]) + more[p],)
    return new, out


@triton.jit
def _more_pulls(pulls, zs, tops, logs, factors, mask, EDGES: tl.constexpr, PAIRS: tl.constexpr):
    out = ()
    for e in tl.static_range(len(EDGES)):
        if EDGES[e][3]:
            out = out + (pulls[e],)
        else:
            out = out + (pulls[e] + tl.sum(_pull(zs, tops, logs, factors, mask, e, EDGES, PAIRS), 1),)
    return out


@triton.jit
def _more_off(offs, zs, tops, mask, HARD: tl.constexpr, SMOOTHING: tl.constexpr):
    """Smoothing sums, a partial sum per column, after one more block."""
    out = ()
    for h in tl.static_range(len(HARD)):
        if SMOOTHING > 0:
            out = out + (offs[h] + tl.where(mask, tops[HARD[h][0]][:, None] - zs[HARD[h][0]], 0.0),)
        else:
            out = out + (offs[h],)
    return out


@triton.jit
def _more_ahead(aheads, zs, at_y, y, c, mask, NODES: tl.constexpr):
    """Columns before the label, a partial count per column, after one more block."""
    out = ()
    for m in tl.static_range(NODES):
        out = out + (aheads[m] + _ahead(zs[m], at_y[m], c, y, mask),)
    return out


@triton.jit
def _softs_of(m: tl.constexpr, softs, zs, tops, logs, factors, mask, EDGES: tl.constexpr, PAIRS: tl.constexpr):
    """The divergences of node m's edges added to their partial sums."""
    out = ()
    for e in tl.static_range(len(EDGES)):
        if EDGES[e][1] == m:
            out = out + (softs[e] + _kl(zs, tops, logs, factors, mask, e, EDGES, PAIRS),)
        else:
            out = out + (softs[e],)
    return out


@triton.jit
def loop_kernel(
    xs, gs, strides_b, strides_c, labels, labels2, mix, mix_stride, weights,
    loss, ce, kl, top1, top5, rows, partials, counters, B, programs, group,
    C: tl.constexpr, MEANS: tl.constexpr, PAIRS: tl.constexpr, HARD: tl.constexpr, EDGES: tl.constexpr, GRADS: tl.constexpr,
    MEAN_GRADS: tl.constexpr, UNDETACHED: tl.constexpr, CONTIGUOUS: tl.constexpr, IGNORE: tl.constexpr,
    SMOOTHING: tl.constexpr, MIXED: tl.constexpr, SCAN: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """C > BLOCK: a program reads one row of every node twice, the second time from L2: maxima and sums, then the rest."""
    NODES: tl.constexpr = len(xs) + len(MEANS)
    TERMS: tl.constexpr = len(HARD) + len(EDGES)  # then NODES top-1 counts, then NODES top-5 counts
    slot = tl.arange(0, SLOTS)
    acc = tl.zeros([SLOTS], tl.float32)
    one = tl.program_id(0).to(tl.int64)  # a scalar: the row's address is one base, the columns 32-bit offsets
    row = one + tl.zeros([1], tl.int64)
    live = row < B
    n = _rows_that_count(rows, labels, labels2, B, IGNORE, MIXED, SCAN)
    y, y2, lam, keep, bad = _labels_of(labels, labels2, mix, mix_stride, row, live, C, IGNORE, MIXED)
    at_y = _logits(xs, strides_b, strides_c, row, y, y >= 0, 0.0, C, CONTIGUOUS, MEANS)
    at_y2 = at_y
    if MIXED:
        at_y2 = _logits(xs, strides_b, strides_c, row, y2, y2 >= 0, 0.0, C, CONTIGUOUS, MEANS)
    tops, sums, aheads = (), (), ()
    for _ in tl.static_range(NODES):
        tops = tops + (tl.full([1], -float("inf"), tl.float32),)
        aheads = aheads + (tl.zeros([1, FIRST], tl.float32),)
    for _ in tl.static_range(len(PAIRS)):
        sums = sums + (tl.zeros([1], tl.float32),)
    for start in tl.range(0, C, FIRST, disable_licm=True):
        c = start + tl.arange(0, FIRST)[None, :]
        zs = _logits(xs, strides_b, strides_c, one, c, c < C, -float("inf"), C, CONTIGUOUS, MEANS)
        tops, sums = _online(zs, tops, sums, NODES, PAIRS)
        aheads = _more_ahead(aheads, zs, at_y, y, c, c < C, NODES)
    logs, factors = _logs(sums, PAIRS)

    pulls = ()
    for _ in tl.static_range(len(EDGES)):
        pulls = pulls + (tl.zeros([1], tl.float32),)
    if UNDETACHED:
        for start in tl.range(0, C, BLOCK, disable_licm=True):
            c = start + tl.arange(0, BLOCK)[None, :]
            zs = _logits(xs, strides_b, strides_c, one, c, c < C, -float("inf"), C, CONTIGUOUS, MEANS)
            pulls = _more_pulls(pulls, zs, tops, logs, factors, c < C, EDGES, PAIRS)
    softs, offs = (), ()  # a partial sum per column of the block, added up once at the end
    for _ in tl.static_range(len(EDGES)):
        softs = softs + (tl.zeros([1, BLOCK], tl.float32),)
    for _ in tl.static_range(len(HARD)):
        offs = offs + (tl.zeros([1, BLOCK], tl.float32),)
    share = tl.where(bad, float("nan"), 1.0 / tl.maximum(n, 1).to(tl.float32))
    for start in tl.range(0, C, BLOCK, disable_licm=True):
        c = start + tl.arange(0, BLOCK)[None, :]
        mask = c < C
        zs = _logits(xs, strides_b, strides_c, one, c, mask, -float("inf"), C, CONTIGUOUS, MEANS)
        offs = _more_off(offs, zs, tops, mask, HARD, SMOOTHING)
        of_means = _gradients_of_means(
            zs, tops, logs, factors, pulls, weights, share, lam, y, y2, c, mask, C, MEANS, PAIRS, HARD, EDGES, MEAN_GRADS,
            SMOOTHING, MIXED, len(xs),
        )  # fmt: skip
        for m in tl.static_range(NODES):
            softs = _softs_of(m, softs, zs, tops, logs, factors, mask, EDGES, PAIRS)
            if m < len(xs):
                _store_gradient(
                    m, gs, of_means, one, live[:, None], zs, tops, logs, factors, pulls, weights, share, keep, lam, y, y2, c,
                    mask, C, MEANS, PAIRS, HARD, EDGES, GRADS, MEAN_GRADS, SMOOTHING, MIXED,
                )  # fmt: skip
    for h in tl.static_range(len(HARD)):
        hard = _hard(at_y[HARD[h][0]], at_y2[HARD[h][0]], lam, tops[HARD[h][0]], logs[HARD[h][2]], SMOOTHING, MIXED)
        hard = tl.where(bad, float("nan"), hard + SMOOTHING / C * tl.sum(offs[h], 1))
        acc += _placed(tl.sum(tl.where(keep, hard, 0.0), 0), h, slot)
    for e in tl.static_range(len(EDGES)):
        soft = tl.where(keep, tl.sum(softs[e], 1) + C * EDGES[e][4], 0.0)
        acc += _placed(tl.sum(soft, 0) * EDGES[e][2] * EDGES[e][2], len(HARD) + EDGES[e][7], slot)
    scored = keep & (y >= 0)
    for m in tl.static_range(NODES):
        ahead = tl.sum(aheads[m], 1) + tl.where(at_y[m] == at_y[m], 0, TOP)
        acc += _placed(tl.sum(tl.where(scored & (ahead < 1), 1.0, 0.0), 0), TERMS + m, slot)
        acc += _placed(tl.sum(tl.where(scored & (ahead < TOP), 1.0, 0.0), 0), TERMS + NODES + m, slot)
    _finish(
        acc, n, partials, counters, weights, loss, ce, kl, top1, top5, rows, programs, group,
        NODES, HARD, EDGES, SLOTS, CHUNK,
    )  # fmt: skip


@triton.jit
def scale_kernel(gs, factor, n, programs, BLOCK: tl.constexpr):
    """gs *= factor in place, n elements each; where the factor is 1, as for `loss.backward()`, nothing is read or written."""
    f = tl.load(factor).to(tl.float32)
    if f != 1.0:
        k = tl.arange(0, BLOCK)
        for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), programs):
            at = (tl.zeros([BLOCK], tl.int64) + block) * BLOCK + k
            for i in tl.static_range(len(gs)):
                g = tl.load(gs[i] + at, mask=at < n, other=0.0).to(tl.float32)
                tl.store(gs[i] + at, (g * f).to(gs[i].dtype.element_ty), mask=at < n)


LOG2E = 1.4426950408889634
Static = dict[str, Any]


def graph(
    given: int, hard: Sequence[tuple[int, float]], edges: Sequence[tuple[int, int, float, bool, float]],
    means: Sequence[tuple[int, ...]],
) -> Static:  # fmt: skip
    """A graph as the kernels' constants. Of the temperatures a node is needed at, the largest is exponentiated and those that
    are it divided by 2, 3 or 4 are powers of it."""
    needed: dict[int, list[float]] = {}
    for node, _ in hard:
        needed.setdefault(node, []).append(1.0)
    for teacher, student, T, _, _ in edges:
        needed.setdefault(teacher, []).append(float(T))
        needed.setdefault(student, []).append(float(T))
    pairs: list[tuple[int, float, int, int]] = []
    at: dict[tuple[int, float], int] = {}
    for node in sorted(needed):
        base, base_at = 0.0, -1
        for T in sorted(set(needed[node]), reverse=True):
            power = next((k for k in (2, 3, 4) if base == k * T), 0)
            at[node, T] = len(pairs)
            pairs.append((node, LOG2E / T, base_at if power else -1, power))
            if not power:
                base, base_at = T, at[node, T]
    taught = {s for _, s, _, _, _ in edges} | {t for t, _, _, detach, _ in edges if not detach} | {n for n, _ in hard}
    mean_grads = tuple(given + g in taught for g in range(len(means)))
    terms, nodes = len(hard) + len(edges), given + len(means)
    return {
        "MEANS": tuple(tuple(members) for members in means),
        "PAIRS": tuple(pairs),
        "HARD": tuple((node, float(w), at[node, 1.0]) for node, w in hard),
        "EDGES": tuple(
            (t, s, float(T), bool(d), float(eps), at[t, float(T)], at[s, float(T)], e)
            for e, (t, s, T, d, eps) in enumerate(edges)
        ),
        "MEAN_GRADS": mean_grads,
        "UNDETACHED": not all(d for _, _, _, d, _ in edges),
        "SLOTS": 1 << (terms + 2 * nodes - 1).bit_length(),
    }


class Config(NamedTuple):
    """How a graph over (B, C) logits is launched."""

    loop: bool
    rows: int  # per program
    block: int  # columns held at once
    first: int  # columns held at once while maxima and sums are found (loop only)
    warps: int
    scan: int  # labels read at once where each program counts the rows that count; 0: count_kernel does

    def constants(self) -> Static:
        named: Static = {"ROWS": self.rows, "BLOCK": self.block, "SCAN": self.scan, "CHUNK": CHUNK}
        return {**named, "FIRST": self.first} if self.loop else named


def pick(B: int, C: int, nodes: int, undetached: bool, soft_labels: bool) -> Config:
    """The configuration for B rows, C classes and a number of nodes, means included; soft_labels: smoothed or mixed.

    Columns per thread: 8 while the logits of all nodes and what is made of them fit 128 registers (4 nodes: FFL with 2 peers), so
    that bf16 loads are 16 bytes; then 4, then 2. Up to 128 classes four rows share a program, no reduction crosses a warp.
    """
    block = max(16, 1 << (C - 1).bit_length())
    scan = 0 if B > SCANNED else min(1024, max(32, 1 << max(B - 1, 0).bit_length()))
    load = nodes + 2 * undetached + soft_labels
    if block <= 128 and load <= 10:
        return Config(False, 4, block, 0, max(1, block // 32), scan)
    columns = 8 if load <= 4 else 4 if load <= 7 else 2
    warps = max(1, block // (32 * columns))
    if block <= ONE_BLOCK and warps <= 16 and load <= 8:
        return Config(False, 1, block, 0, warps, scan)
    small = 2 if load <= 6 else 1
    return Config(True, 1, 256 * small, 512 * small if load <= 8 else 256, 8, scan)


def groups(programs: int) -> tuple[int, int]:
    """Programs per group (a multiple of CHUNK) and groups."""
    group = CHUNK * -(-programs // (CHUNK * GROUPS))
    return group, -(-programs // group)


def cases() -> list[Case]:
    """A fused node and a mean at the shapes of the goals, an undetached teacher, mixed labels, many nodes, both dtypes."""
    pointers = {
        **dict.fromkeys(("labels", "labels2", "top1", "top5", "rows"), "*i64"),
        **dict.fromkeys(("mix", "weights", "loss", "ce", "kl", "partials"), "*fp32"),
        **{"counters": "*i32", "mix_stride": "i64", "B": "i32", "programs": "i32", "group": "i32"},
    }

    def one(
        name: str, K: int, C: int, dtype: str = "bf16", B: int = 1024, detach: bool = True, loads: int = 16, **changed: Any
    ) -> Case:
        hard = [(m, 1.0) for m in range(K + 1)]
        edges = [(K, k, 3.0, detach, 0.0) for k in range(K)] + [(K + 1, K, 3.0, detach, 0.0)]
        config = pick(B, C, K + 2, not detach, "MIXED" in changed)
        constants: Static = {
            "IGNORE": None,
            "SMOOTHING": 0.0,
            "MIXED": False,
            "CONTIGUOUS": True,
            "C": C,
            "GRADS": (True,) * (K + 1),
        }
        constants |= graph(K + 1, hard, edges, [tuple(range(K))]) | config.constants() | changed
        if not constants["MIXED"]:
            constants |= {"labels2": None, "mix": None}
        many = {"xs": (f"*{dtype}",) * (K + 1), "gs": (f"*{dtype}",) * (K + 1)}
        strides = {"strides_b": ("i64",) * (K + 1), "strides_c": ("i64",) * (K + 1)}
        signature = {**pointers, **many, **strides, **dict.fromkeys(constants, "constexpr")}
        kernel = loop_kernel if config.loop else one_block_kernel
        return Case(
            f"{name} K={K} C={C} {dtype} {config.warps} warps",
            kernel,
            signature,
            constants,
            config.warps,
            loads=loads,
            stores=loads,
            maxnreg=MAXNREG,
        )

    scale = {"gs": ("*bf16",) * 3, "factor": "*fp32", "n": "i64", "programs": "i32", "BLOCK": "constexpr"}
    return [
        one("fused, 200-byte rows", 2, 100, loads=8),
        one("fused", 2, 1000),
        one("fused, 4 columns a thread", 4, 1000, loads=8),
        one("fused, 4 columns a thread", 4, 1000, "fp32"),
        one("fused", 2, 4096),
        one("fused, loop, odd rows", 4, 21841, loads=2),
        one("undetached, 2 columns a thread", 4, 1000, detach=False, loads=4),
        one("undetached, loop, odd rows", 4, 21841, detach=False, loads=2),
        one("mixed, smoothed, labels counted, 4 columns a thread", 2, 1000, loads=8, MIXED=True, SMOOTHING=0.1, IGNORE=-100),
        one("many nodes, loop, 1 column a thread", 7, 1000, loads=2),
        Case("scale", scale_kernel, scale, {"BLOCK": 2048}, 8),
    ]
