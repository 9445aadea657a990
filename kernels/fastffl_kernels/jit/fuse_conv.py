"""The Triton kernels of fuse_conv, and the pure functions that choose their blocks. No torch: see `_compile`.

Inside, maps are matrices of M = B*H*W rows: D (M, C) after the depthwise conv, P (M, N) after the pointwise one, both
row-major. Programs walk chunks of rows, so that the last one to arrive has few partial results to merge.
"""

import os
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._compile import Case

# The interpreter's bf16 arithmetic and its fp32 -> bf16 cast are wrong (it truncates): both are done by hand there.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

MERGED = tl.constexpr(32)  # chunks whose partial results the last program of a channel block fetches together
PROGRAMS = 264  # two per SM of an H200: enough to fill it, few enough that one program merges their partial results in 1-2 us
TAIL_FC, TAIL_WIDTH = 1 << 14, 256  # fused width * classes, and width, up to which the tail kernel does the classifier itself
# Arguments that differ from batch to batch: neither a kernel for each that is 1, nor one for each multiple of 16.
COUNTS = ("M", "B", "iters", "programs", "n_split", "n_dpw", "stride_b")
SPLIT_BLOCK = 1024  # values of the pointwise weight gradient that a program sums over the chunks
ONE_WIDTH, ONE_PLANE = 128, 128  # fused width and padded H*W up to which inference is one kernel


def _divup(a: int, b: int) -> int:
    return -(-a // b)


def _power2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _block(n: int, most: int, least: int = 16) -> int:
    return max(least, min(most, _power2(n)))


# --- the parts that kernels share ---------------------------------------------------------------------------------------


@triton.jit
def _cast(x, dtype: tl.constexpr):
    """fp32 -> dtype, rounded to nearest even."""
    if INTERPRET:  # noqa: SIM102 (two constexpr conditions: `and` would make a tensor of them)
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRET:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _load(x, at, mask):
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _norm(mean, rstd, gamma, beta, at, mask, eps, VAR: tl.constexpr):
    """(mean, rstd, scale, beta) of some channels; VAR: `rstd` holds variances (the running ones)."""
    r = _load(rstd, at, mask)
    if VAR:
        r = tl.where(mask, 1.0 / tl.sqrt(r + eps), 0.0)
    return _load(mean, at, mask), r, _load(gamma, at, mask) * r, _load(beta, at, mask)


@triton.jit
def _last(count, n):
    """Arrive; true for the last of n programs, which leaves the counter at zero."""
    tl.debug_barrier()
    last = tl.atomic_add(count, 1) == n - 1
    if last:
        tl.store(count, 0)
    return last


@triton.jit
def _merge(n_a, mean_a, m2_a, x, row_ok, n_b):
    """Chan: join (n, mean, M2) per channel with the rows of a tile (R, C), of which the first n_b count."""
    n_b = n_b.to(tl.float32)
    mean_b = tl.sum(tl.where(row_ok[:, None], x, 0.0), 0) / tl.maximum(n_b, 1.0)
    off = tl.where(row_ok[:, None], x - mean_b[None, :], 0.0)
    n = n_a + n_b
    share = n_b / tl.maximum(n, 1.0)
    delta = mean_b - mean_a
    return n, mean_a + delta * share, m2_a + tl.sum(off * off, 0) + delta * delta * n_a * share


@triton.jit
def _finish_stats(partial, programs, rows, M, c, c_ok, mean, rstd, running_mean, running_var, momentum, eps, C: tl.constexpr):
    """The last program of a channel block: partial (2, programs, C) means and M2 of `rows` rows each -> statistics.

    Chan's formula for all chunks at once, from distances to the first chunk's mean: those are no larger than the spread of the
    data, so nothing cancels. MERGED chunks are in flight together: one after the other each would cost a trip to the L2.
    """
    i = tl.arange(0, MERGED)
    second = partial + programs.to(tl.int64) * C
    base = tl.load(partial + c, mask=c_ok, other=0.0, cache_modifier=".cg")
    linear = tl.zeros([MERGED, c.shape[0]], tl.float32)
    square = tl.zeros([MERGED, c.shape[0]], tl.float32)
    for t0 in range(0, programs, MERGED):
        t = t0 + i
        ok = (t < programs)[:, None] & c_ok[None, :]
        n = tl.minimum(tl.maximum(M - t * rows, 0), rows).to(tl.float32)[:, None]
        at = t[:, None] * C + c[None, :]
        off = tl.load(partial + at, mask=ok, other=0.0, cache_modifier=".cg") - base[None, :]
        m2 = tl.load(second + at, mask=ok, other=0.0, cache_modifier=".cg")
        linear += tl.where(ok, n * off, 0.0)
        square += tl.where(ok, m2 + n * off * off, 0.0)
    count = M.to(tl.float32)
    shift = tl.sum(linear, 0) / count
    mu = base + shift
    m2 = tl.maximum(tl.sum(square, 0) - count * shift * shift, 0.0)
    tl.store(mean + c, mu, mask=c_ok)
    tl.store(rstd + c, 1.0 / tl.sqrt(m2 / count + eps), mask=c_ok)
    if running_mean is not None:
        old = _load(running_mean, c, c_ok)
        tl.store(running_mean + c, _cast((1.0 - momentum) * old + momentum * mu, running_mean.dtype.element_ty), mask=c_ok)
        old = _load(running_var, c, c_ok)
        unbiased = m2 / (count - 1.0)
        tl.store(running_var + c, _cast((1.0 - momentum) * old + momentum * unbiased, running_var.dtype.element_ty), mask=c_ok)


@triton.jit
def _finish_sums(partial, programs, M, c, c_ok, gamma, rstd, dgamma, dbeta, coef, C: tl.constexpr):
    """partial (2, programs, C): sums of dy and of dy*xhat -> dgamma, dbeta, and coef (2, C) of BatchNorm's backward:
    dx = scale dy - coef[0] - coef[1] (x - mean)."""
    i = tl.arange(0, MERGED)
    second = partial + programs.to(tl.int64) * C
    one = tl.zeros([MERGED, c.shape[0]], tl.float32)
    two = tl.zeros([MERGED, c.shape[0]], tl.float32)
    for t0 in range(0, programs, MERGED):
        t = t0 + i
        ok = (t < programs)[:, None] & c_ok[None, :]
        at = t[:, None] * C + c[None, :]
        one += tl.load(partial + at, mask=ok, other=0.0, cache_modifier=".cg")
        two += tl.load(second + at, mask=ok, other=0.0, cache_modifier=".cg")
    s1 = tl.sum(one, 0)
    s2 = tl.sum(two, 0)
    tl.store(dbeta + c, _cast(s1, dbeta.dtype.element_ty), mask=c_ok)
    tl.store(dgamma + c, _cast(s2, dgamma.dtype.element_ty), mask=c_ok)
    r = _load(rstd, c, c_ok)
    k = _load(gamma, c, c_ok) * r / M.to(tl.float32)
    tl.store(coef + c, k * s1, mask=c_ok)
    tl.store(coef + C + c, k * r * s2, mask=c_ok)


@triton.jit
def _place(i, CS: tl.constexpr, FIRST: tl.constexpr, OFF: tl.constexpr, LAY: tl.constexpr):
    """Of channel block i: (its map's first block, channels and place among all channels, the map's four strides)."""
    first, cs, off = tl.full([], FIRST[0], tl.int32), tl.full([], CS[0], tl.int32), tl.full([], OFF[0], tl.int32)
    sb, sc = tl.full([], LAY[0][0], tl.int64), tl.full([], LAY[0][1], tl.int64)
    sh, sw = tl.full([], LAY[0][2], tl.int64), tl.full([], LAY[0][3], tl.int64)
    for k in tl.static_range(1, len(CS)):
        here = i >= FIRST[k]
        first = tl.where(here, FIRST[k], first)
        cs = tl.where(here, CS[k], cs)
        off = tl.where(here, OFF[k], off)
        sb = tl.where(here, LAY[k][0], sb)
        sc = tl.where(here, LAY[k][1], sc)
        sh = tl.where(here, LAY[k][2], sh)
        sw = tl.where(here, LAY[k][3], sw)
    return first, cs, off, sb, sc, sh, sw


@triton.jit
def _pointer(xs, i, FIRST: tl.constexpr):
    x = xs[0]
    for k in tl.static_range(1, len(xs)):
        x = tl.where(i >= FIRST[k], xs[k], x)
    return x


@triton.jit
def _taps(w, taps, c, c_ok, C: tl.constexpr, dtype: tl.constexpr):
    """The nine weights of some channels, rounded to the maps' type, as rows (9, C) of this program's own scratch.

    A channel's nine weights lie together; read from there, every thread would fetch its channels one by one.
    """
    j = tl.arange(0, 16)
    ok = c_ok[:, None] & (j < 9)[None, :]
    nine = tl.load(w + c[:, None] * 9 + j[None, :], mask=ok, other=0.0).to(tl.float32)
    tl.store(taps + j[None, :] * C + c[:, None], _cast(nine, dtype).to(tl.float32), mask=ok)
    tl.debug_barrier()


@triton.jit
def _dw(x, taps, at, h, w, row_ok, c, c_off, c_ok, sh, sw, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """The depthwise 3x3 conv of a tile: rows at offsets `at` of the map, channels at offsets c_off."""
    acc = tl.zeros([at.shape[0], c.shape[0]], tl.float32)
    for i in range(3):  # not unrolled: nine taps in flight would take twice the registers
        y = h + (i - 1)
        for j in tl.static_range(3):
            z = w + (j - 1)
            ok = row_ok & (y >= 0) & (y < H) & (z >= 0) & (z < W)
            near = at + ((i - 1) * sh + (j - 1) * sw)
            value = _load(x, near[:, None] + c_off[None, :], ok[:, None] & c_ok[None, :])
            acc += value * tl.load(taps + (3 * i + j) * C + c, mask=c_ok, other=0.0)[None, :]
    return acc


# --- forward -------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=COUNTS)
def dw_forward(
    xs,
    weight,
    taps,
    d,
    partial,
    count,
    mean,
    rstd,
    gamma,
    beta,
    running_mean,
    running_var,
    momentum,
    eps,
    M,
    iters,
    programs,
    CS: tl.constexpr,
    FIRST: tl.constexpr,
    OFF: tl.constexpr,
    LAY: tl.constexpr,
    UNIT: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TILES: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """D = dw3x3(concat(xs)). MODE "stats": and BatchNorm's statistics; "plain": D alone; "act": relu(bn(D)) by running
    statistics. UNIT: every map's channel stride is 1."""
    pid = tl.program_id(0)
    t = pid // TILES
    tile = pid % TILES
    first, cs, off, sb, sc, sh, sw = _place(tile, CS, FIRST, OFF, LAY)
    x = _pointer(xs, tile, FIRST)
    local = (tile - first) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = local < cs
    c = off + local
    if UNIT:
        c_off = local.to(tl.int64)
    else:
        c_off = local.to(tl.int64) * sc
    own = taps + t.to(tl.int64) * (9 * C)
    _taps(weight, own, c, c_ok, C, d.dtype.element_ty)
    if MODE == "act":
        mu, _r, scale, shift = _norm(mean, rstd, gamma, beta, c, c_ok, eps, True)
    n = tl.zeros([], tl.float32)
    avg = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for i in range(iters):
        start = (t * iters + i) * BLOCK_M
        m = start + tl.arange(0, BLOCK_M)
        row_ok = m < M
        w = m % W
        h = (m // W) % H
        at = (m // (H * W)).to(tl.int64) * sb + h.to(tl.int64) * sh + w.to(tl.int64) * sw
        acc = _dw(x, own, at, h, w, row_ok, c, c_off, c_ok, sh, sw, C, H, W)
        if MODE == "act":
            out = tl.maximum((acc - mu[None, :]) * scale[None, :] + shift[None, :], 0.0)
        else:
            out = acc
        if MODE == "stats":
            n, avg, m2 = _merge(n, avg, m2, acc, row_ok, tl.minimum(tl.maximum(M - start, 0), BLOCK_M))
        place = m.to(tl.int64)[:, None] * C + c[None, :]
        tl.store(d + place, _cast(out, d.dtype.element_ty), mask=row_ok[:, None] & c_ok[None, :])
    if MODE == "stats":
        place = t.to(tl.int64) * C + c
        tl.store(partial + place, avg, mask=c_ok)
        tl.store(partial + programs.to(tl.int64) * C + place, m2, mask=c_ok)
        if _last(count + tile, programs):
            _finish_stats(partial, programs, iters * BLOCK_M, M, c, c_ok, mean, rstd, running_mean, running_var, momentum, eps, C)


@triton.jit(do_not_specialize=COUNTS)
def pw_forward(
    d,
    weight,
    bias,
    p,
    mean1,
    rstd1,
    gamma1,
    beta1,
    partial,
    count,
    mean,
    rstd,
    running_mean,
    running_var,
    momentum,
    eps,
    M,
    iters,
    programs,
    C: tl.constexpr,
    N: tl.constexpr,
    TILES: tl.constexpr,
    ACT: tl.constexpr,
    STATS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """p = a weight^T (+ bias), a = relu(bn1(d)) with ACT, else d; with STATS BatchNorm's statistics of p, from fp32."""
    dtype: tl.constexpr = d.dtype.element_ty
    pid = tl.program_id(0)
    t = pid // TILES
    tile = pid % TILES
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < N
    r = tl.arange(0, BLOCK_M)
    seen = tl.zeros([], tl.float32)
    avg = tl.zeros([BLOCK_N], tl.float32)
    m2 = tl.zeros([BLOCK_N], tl.float32)
    for i in range(iters):
        start = (t * iters + i) * BLOCK_M
        row_ok = start + r < M
        rows = d + start.to(tl.int64) * C  # 64 bits to the tile, 32 within it: half the registers for addresses
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for c0 in range(0, C, BLOCK_K):
            c = c0 + tl.arange(0, BLOCK_K)
            c_ok = c < C
            a = tl.load(rows + (r[:, None] * C + c[None, :]), mask=row_ok[:, None] & c_ok[None, :], other=0.0)
            if ACT:
                mu, _r, scale, shift = _norm(mean1, rstd1, gamma1, beta1, c, c_ok, eps, False)
                a = (a.to(tl.float32) - mu[None, :]) * scale[None, :] + shift[None, :]
                a = _cast(tl.maximum(a, 0.0), dtype)
            w = tl.load(weight + n.to(tl.int64)[None, :] * C + c[:, None], mask=n_ok[None, :] & c_ok[:, None], other=0.0)
            if w.dtype != dtype:
                w = _cast(w.to(tl.float32), dtype)
            acc = _dot(a, w, acc, PRECISION)
        if STATS:
            seen, avg, m2 = _merge(seen, avg, m2, acc, row_ok, tl.minimum(tl.maximum(M - start, 0), BLOCK_M))
        if bias is not None:
            acc += _cast(_load(bias, n, n_ok), dtype).to(tl.float32)[None, :]
        place = p + start.to(tl.int64) * N
        tl.store(place + (r[:, None] * N + n[None, :]), _cast(acc, p.dtype.element_ty), mask=row_ok[:, None] & n_ok[None, :])
    if STATS:
        place = t.to(tl.int64) * N + n
        tl.store(partial + place, avg, mask=n_ok)
        tl.store(partial + programs.to(tl.int64) * N + place, m2, mask=n_ok)
        if _last(count + tile, programs):
            _finish_stats(partial, programs, iters * BLOCK_M, M, n, n_ok, mean, rstd, running_mean, running_var, momentum, eps, N)


@triton.jit
def _classify(pooled, fc_weight, fc_bias, u, b, n, n_ok, N: tl.constexpr, CLASSES: tl.constexpr, BLOCK_K: tl.constexpr):
    """u[b] = fc_weight pooled + fc_bias, one image at a time; `pooled` and the parameters rounded to u's type."""
    dtype: tl.constexpr = u.dtype.element_ty
    for k0 in range(0, CLASSES, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        k_ok = k < CLASSES
        w = _cast(_load(fc_weight, k[:, None] * N + n[None, :], k_ok[:, None] & n_ok[None, :]), dtype).to(tl.float32)
        z = tl.sum(w * pooled[None, :], 1)
        if fc_bias is not None:
            z += _cast(_load(fc_bias, k, k_ok), dtype).to(tl.float32)
        tl.store(u + b.to(tl.int64) * CLASSES + k, _cast(z, dtype), mask=k_ok)


@triton.jit
def tail_forward(
    p,
    mean,
    rstd,
    gamma,
    beta,
    eps,
    fc_weight,
    fc_bias,
    g,
    m1,
    m2,
    u,
    N: tl.constexpr,
    HW: tl.constexpr,
    CLASSES: tl.constexpr,
    TILES: tl.constexpr,
    VAR: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """g = mean_hw relu(bn(p)); m1 = how many are positive, m2 = the sum of xhat over those; u = fc(g) where CLASSES > 0."""
    pid = tl.program_id(0)
    b = pid // TILES
    n = (pid % TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < N
    mu, r, scale, shift = _norm(mean, rstd, gamma, beta, n, n_ok, eps, VAR)
    total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    positive = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    hats = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for r0 in range(0, HW, BLOCK_R):
        q = r0 + tl.arange(0, BLOCK_R)
        ok = (q < HW)[:, None] & n_ok[None, :]
        off = _load(p, (b.to(tl.int64) * HW + q)[:, None] * N + n[None, :], ok) - mu[None, :]
        y = off * scale[None, :] + shift[None, :]
        live = ok & (y > 0.0)
        total += tl.where(ok, tl.maximum(y, 0.0), 0.0)
        if SAVE:
            positive += tl.where(live, 1.0, 0.0)
            hats += tl.where(live, off * r[None, :], 0.0)
    dtype: tl.constexpr = g.dtype.element_ty
    pooled = _cast(tl.sum(total, 0) / HW, dtype)
    at = b.to(tl.int64) * N + n
    tl.store(g + at, pooled, mask=n_ok)
    if SAVE:
        tl.store(m1 + at, _cast(tl.sum(positive, 0), m1.dtype.element_ty), mask=n_ok)
        tl.store(m2 + at, _cast(tl.sum(hats, 0), m2.dtype.element_ty), mask=n_ok)
    if CLASSES > 0:
        _classify(pooled.to(tl.float32), fc_weight, fc_bias, u, b, n, n_ok, N, CLASSES, BLOCK_K)


# --- backward ------------------------------------------------------------------------------------------------------------


@triton.jit
def _dp(p, dg, start, r, r_ok, n, n_ok, mu, scale, shift, k0, k1, N: tl.constexpr, HW: tl.constexpr, ROWS: tl.constexpr):
    """The gradient of P in rows start + r, rebuilt: relu and pooling spread dg[b, n] / HW over the positive places, then
    BatchNorm's backward. `ROWS`: the axis of the tile that the rows lie on."""
    first = start // HW
    image = (start + r) // HW - first
    across: tl.constexpr = 1 - ROWS
    ok = tl.expand_dims(r_ok, across) & tl.expand_dims(n_ok, ROWS)
    at = tl.expand_dims(r * N, across) + tl.expand_dims(n, ROWS)
    up = tl.expand_dims(image * N, across) + tl.expand_dims(n, ROWS)
    off = _load(p + start.to(tl.int64) * N, at, ok) - tl.expand_dims(mu, ROWS)
    live = off * tl.expand_dims(scale, ROWS) + tl.expand_dims(shift, ROWS) > 0.0
    y = tl.where(live, _load(dg + first.to(tl.int64) * N, up, ok) * tl.expand_dims(scale * (1.0 / HW), ROWS), 0.0)
    y = y - tl.expand_dims(k0, ROWS) - tl.expand_dims(k1, ROWS) * off
    return tl.where(ok, y, 0.0)


@triton.jit(do_not_specialize=COUNTS)
def head_backward(
    du,
    fc_weight,
    g,
    m1,
    m2,
    gamma,
    rstd,
    dg,
    dfc_weight,
    dfc_bias,
    dgamma,
    dbeta,
    coef,
    partial,
    count,
    B,
    M,
    stride_b,
    stride_k,
    N: tl.constexpr,
    HW: tl.constexpr,
    CLASSES: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """From the gradient of the output: dg (B, N), the classifier's gradients, and BatchNorm 2's two sums from m1 and m2.

    The first programs make dg and the sums, the others a block of dfc_weight each. CLASSES = 0: du is the gradient of g.
    """
    dtype: tl.constexpr = dg.dtype.element_ty
    pid = tl.program_id(0)
    images = (B + BLOCK_B - 1) // BLOCK_B
    n = (pid % TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < N
    if pid < images * TILES:
        t = pid // TILES
        b = t * BLOCK_B + tl.arange(0, BLOCK_B)
        ok = (b < B)[:, None] & n_ok[None, :]
        at = b.to(tl.int64)[:, None] * N + n[None, :]
        if CLASSES > 0:
            acc = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
            for k0 in range(0, CLASSES, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                k_ok = k < CLASSES
                z = _load(
                    du, b.to(tl.int64)[:, None] * stride_b + k.to(tl.int64)[None, :] * stride_k, (b < B)[:, None] & k_ok[None, :]
                )
                w = _load(fc_weight, k.to(tl.int64)[:, None] * N + n[None, :], k_ok[:, None] & n_ok[None, :])
                acc = _dot(_cast(z, dtype), _cast(w, dtype), acc, PRECISION)
        else:
            acc = _load(du, b.to(tl.int64)[:, None] * stride_b + n.to(tl.int64)[None, :] * stride_k, ok)
        up = _cast(acc, dtype)
        tl.store(dg + at, up, mask=ok)
        up = tl.where(ok, up.to(tl.float32), 0.0) * (1.0 / HW)
        own = t.to(tl.int64) * N + n
        tl.store(partial + own, tl.sum(up * _load(m1, at, ok), 0), mask=n_ok)
        tl.store(partial + images.to(tl.int64) * N + own, tl.sum(up * _load(m2, at, ok), 0), mask=n_ok)
        if _last(count + pid % TILES, images):
            _finish_sums(partial, images, M, n, n_ok, gamma, rstd, dgamma, dbeta, coef, N)
    elif CLASSES > 0:
        k = (pid - images * TILES) // TILES * BLOCK_K + tl.arange(0, BLOCK_K)
        k_ok = k < CLASSES
        d = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)  # not acc: a name of both branches must have one shape
        total = tl.zeros([BLOCK_K], tl.float32)
        for b0 in range(0, B, BLOCK_B):
            b = b0 + tl.arange(0, BLOCK_B)
            b_ok = b < B
            z = _load(du, b.to(tl.int64)[None, :] * stride_b + k.to(tl.int64)[:, None] * stride_k, b_ok[None, :] & k_ok[:, None])
            x = tl.load(g + b.to(tl.int64)[:, None] * N + n[None, :], mask=b_ok[:, None] & n_ok[None, :], other=0.0)
            d = _dot(_cast(z, dtype), x, d, PRECISION)
            total += tl.sum(z, 1)
        place = k.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(dfc_weight + place, _cast(d, dfc_weight.dtype.element_ty), mask=k_ok[:, None] & n_ok[None, :])
        if dfc_bias is not None:  # noqa: SIM102
            if (pid - images * TILES) % TILES == 0:
                tl.store(dfc_bias + k, _cast(total, dfc_bias.dtype.element_ty), mask=k_ok)


@triton.jit(do_not_specialize=COUNTS)
def pw_backward_data(
    p,
    dg,
    weight,
    d,
    dd,
    mean2,
    rstd2,
    gamma2,
    beta2,
    coef2,
    mean1,
    rstd1,
    gamma1,
    beta1,
    dgamma1,
    dbeta1,
    coef1,
    partial,
    count,
    M,
    iters,
    programs,
    C: tl.constexpr,
    N: tl.constexpr,
    HW: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dd = relu1'(dP weight), the gradient before BatchNorm 1's backward, and BatchNorm 1's two sums."""
    dtype: tl.constexpr = p.dtype.element_ty
    pid = tl.program_id(0)
    t = pid // TILES
    tile = pid % TILES
    c = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ok = c < C
    r = tl.arange(0, BLOCK_M)
    s1 = tl.zeros([BLOCK_N], tl.float32)
    s2 = tl.zeros([BLOCK_N], tl.float32)
    for i in range(iters):
        start = (t * iters + i) * BLOCK_M
        row_ok = start + r < M
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for n0 in range(0, N, BLOCK_K):
            n = n0 + tl.arange(0, BLOCK_K)
            n_ok = n < N
            mu, _r, scale, shift = _norm(mean2, rstd2, gamma2, beta2, n, n_ok, 0.0, False)
            k0 = _load(coef2, n, n_ok)
            k1 = _load(coef2 + N, n, n_ok)
            a = _cast(_dp(p, dg, start, r, row_ok, n, n_ok, mu, scale, shift, k0, k1, N, HW, 0), dtype)
            w = tl.load(weight + n.to(tl.int64)[:, None] * C + c[None, :], mask=n_ok[:, None] & c_ok[None, :], other=0.0)
            if w.dtype != dtype:
                w = _cast(w.to(tl.float32), dtype)
            acc = _dot(a, w, acc, PRECISION)
        mu, one_by_std, scale, shift = _norm(mean1, rstd1, gamma1, beta1, c, c_ok, 0.0, False)
        ok = row_ok[:, None] & c_ok[None, :]
        place = r[:, None] * C + c[None, :]
        skip = start.to(tl.int64) * C
        off = _load(d + skip, place, ok) - mu[None, :]
        live = ok & (off * scale[None, :] + shift[None, :] > 0.0)
        out = tl.where(live, acc, 0.0)
        tl.store(dd + skip + place, _cast(out, dtype), mask=ok)
        s1 += tl.sum(out, 0)
        s2 += tl.sum(out * off, 0) * one_by_std
    place = t.to(tl.int64) * C + c
    tl.store(partial + place, s1, mask=c_ok)
    tl.store(partial + programs.to(tl.int64) * C + place, s2, mask=c_ok)
    if _last(count + tile, programs):
        _finish_sums(partial, programs, M, c, c_ok, gamma1, rstd1, dgamma1, dbeta1, coef1, C)


@triton.jit(do_not_specialize=COUNTS)
def pw_backward_weight(
    p,
    dg,
    d,
    out,
    mean2,
    rstd2,
    gamma2,
    beta2,
    coef2,
    mean1,
    rstd1,
    gamma1,
    beta1,
    M,
    iters,
    C: tl.constexpr,
    N: tl.constexpr,
    HW: tl.constexpr,
    TILES_N: tl.constexpr,
    TILES_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[s] = dP^T relu(bn1(d)) over the s-th chunk of rows, (N, C): partial sums, or the gradient where there is one chunk."""
    dtype: tl.constexpr = p.dtype.element_ty
    pid = tl.program_id(0)
    s = pid // (TILES_N * TILES_C)
    n = (pid // TILES_C) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    n_ok = n < N
    c_ok = c < C
    mu2, _r2, scale2, shift2 = _norm(mean2, rstd2, gamma2, beta2, n, n_ok, 0.0, False)
    k0 = _load(coef2, n, n_ok)
    k1 = _load(coef2 + N, n, n_ok)
    mu1, _r1, scale1, shift1 = _norm(mean1, rstd1, gamma1, beta1, c, c_ok, 0.0, False)
    r = tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for i in range(iters):
        start = (s * iters + i) * BLOCK_M
        row_ok = start + r < M
        left = _cast(_dp(p, dg, start, r, row_ok, n, n_ok, mu2, scale2, shift2, k0, k1, N, HW, 1), dtype)
        a = _load(d + start.to(tl.int64) * C, r[:, None] * C + c[None, :], row_ok[:, None] & c_ok[None, :])
        a = tl.maximum((a - mu1[None, :]) * scale1[None, :] + shift1[None, :], 0.0)
        acc = _dot(left, _cast(a, dtype), acc, PRECISION)
    place = (s.to(tl.int64) * N + n)[:, None] * C + c[None, :]
    tl.store(out + place, _cast(acc, out.dtype.element_ty), mask=n_ok[:, None] & c_ok[None, :])


@triton.jit(do_not_specialize=COUNTS)
def dw_backward(
    xs,
    dxs,
    weight,
    taps,
    dd,
    d,
    mean,
    rstd,
    gamma,
    beta,
    coef,
    dweight,
    partial,
    count,
    splits,
    dpw,
    n_split,
    n_dpw,
    M,
    iters,
    programs,
    CS: tl.constexpr,
    FIRST: tl.constexpr,
    OFF: tl.constexpr,
    LAY: tl.constexpr,
    DLAY: tl.constexpr,
    UNIT: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TILES: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """BatchNorm 1's backward, then the depthwise conv's: dX into K maps (dxs None: not wanted) and its weight gradient
    (dweight None: not wanted). With MASK, dd still lacks relu 1's mask. The programs behind those sum the chunks (n_split,
    n_dpw) of the pointwise weight gradient."""
    pid = tl.program_id(0)
    if pid < programs * TILES:
        t = pid // TILES
        tile = pid % TILES
        first, cs, off, sb, sc, sh, sw = _place(tile, CS, FIRST, OFF, LAY)
        local = (tile - first) * BLOCK_C + tl.arange(0, BLOCK_C)
        c_ok = local < cs
        c = off + local
        own = taps + t.to(tl.int64) * (9 * C)
        _taps(weight, own, c, c_ok, C, d.dtype.element_ty)
        mu, _r, scale, shift = _norm(mean, rstd, gamma, beta, c, c_ok, 0.0, False)
        k0 = _load(coef, c, c_ok)
        k1 = _load(coef + C, c, c_ok)
        r = tl.arange(0, BLOCK_M)
        j = tl.arange(0, 16)
        zero = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero)  # a tap each, turned so that the next is the first
        for i in range(iters):
            start = (t * iters + i) * BLOCK_M
            m = start + r
            row_ok = m < M
            ok = row_ok[:, None] & c_ok[None, :]
            w = m % W
            h = (m // W) % H
            b = (m // (H * W)).to(tl.int64)
            if dweight is not None:
                at = b * sb + h.to(tl.int64) * sh + w.to(tl.int64) * sw
                if UNIT:
                    f = _load(_pointer(xs, tile, FIRST), at[:, None] + local[None, :], ok)
                else:
                    f = _load(_pointer(xs, tile, FIRST), at[:, None] + (local.to(tl.int64) * sc)[None, :], ok)
            acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
            skip = start.to(tl.int64) * C
            for i3 in tl.static_range(3):
                y = h - (i3 - 1)
                for j3 in tl.static_range(3):
                    z = w - (j3 - 1)
                    near_ok = row_ok & (y >= 0) & (y < H) & (z >= 0) & (z < W)
                    near = (r - ((i3 - 1) * W + (j3 - 1)))[:, None] * C + c[None, :]  # 32 bits: within a row or two of start
                    near_ok = near_ok[:, None] & c_ok[None, :]
                    up = _load(dd + skip, near, near_ok)
                    off_d = _load(d + skip, near, near_ok) - mu[None, :]
                    if MASK:
                        up = tl.where(off_d * scale[None, :] + shift[None, :] > 0.0, up, 0.0)
                    g = tl.where(near_ok, up * scale[None, :] - k0[None, :] - k1[None, :] * off_d, 0.0)
                    if dxs is not None:
                        acc += g * tl.load(own + (3 * i3 + j3) * C + c, mask=c_ok, other=0.0)[None, :]
                    if dweight is not None:
                        sums = sums[1:] + (sums[0] + g * f,)
                tl.debug_barrier()  # loads of three taps in flight, not of nine: they have to fit the registers
            if dxs is not None:
                _f, _c, _o, db, dc, dh, dv = _place(tile, CS, FIRST, OFF, DLAY)
                at = b * db + h.to(tl.int64) * dh + w.to(tl.int64) * dv
                dx = _pointer(dxs, tile, FIRST)
                if UNIT:
                    place = at[:, None] + local[None, :]
                else:
                    place = at[:, None] + (local.to(tl.int64) * dc)[None, :]
                tl.store(dx + place, _cast(acc, dx.dtype.element_ty), mask=ok)
        if dweight is not None:
            place = j[:, None] * C + c[None, :]
            nine = (j < 9)[:, None] & c_ok[None, :]
            for tap in tl.static_range(9):
                tl.store(partial + t.to(tl.int64) * (9 * C) + tap * C + c, tl.sum(sums[tap], 0), mask=c_ok)
            if _last(count + tile, programs):
                k = tl.arange(0, 16)
                many = tl.zeros([16, 16, BLOCK_C], tl.float32)
                for t0 in range(0, programs, 16):  # sixteen chunks in flight, see _finish_stats
                    ok = (t0 + k < programs)[:, None, None] & nine[None, :, :]
                    at = ((t0 + k) * (9 * C))[:, None, None] + place[None, :, :]
                    many += tl.load(partial + at, mask=ok, other=0.0, cache_modifier=".cg")
                tl.store(dweight + c[None, :] * 9 + j[:, None], _cast(tl.sum(many, 0), dweight.dtype.element_ty), mask=nine)
    elif splits is not None:
        at = (pid - programs * TILES).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
        ok = at < n_dpw
        total = tl.zeros([BLOCK_S], tl.float32)
        for s in range(0, n_split):
            total += tl.load(splits + s * n_dpw.to(tl.int64) + at, mask=ok, other=0.0)
        tl.store(dpw + at, _cast(total, dpw.dtype.element_ty), mask=ok)


# --- beside a library GEMM: what the fused GEMMs do in their prologues and epilogues, as passes of their own --------------


@triton.jit(do_not_specialize=COUNTS)
def bn_relu(
    x, mean, rstd, gamma, beta, out, M, C: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out = relu(bn(x)), (M, C)."""
    pid = tl.program_id(0)
    m = pid // TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    ok = (m < M)[:, None] & c_ok[None, :]
    mu, _r, scale, shift = _norm(mean, rstd, gamma, beta, c, c_ok, 0.0, False)
    at = m.to(tl.int64)[:, None] * C + c[None, :]
    y = (_load(x, at, ok) - mu[None, :]) * scale[None, :] + shift[None, :]
    tl.store(out + at, _cast(tl.maximum(y, 0.0), out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=COUNTS)
def column_stats(
    x,
    partial,
    count,
    mean,
    rstd,
    running_mean,
    running_var,
    momentum,
    eps,
    M,
    iters,
    programs,
    C: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BatchNorm's statistics of x (M, C)."""
    pid = tl.program_id(0)
    t = pid // TILES
    tile = pid % TILES
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    n = tl.zeros([], tl.float32)
    avg = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for i in range(iters):
        start = (t * iters + i) * BLOCK_M
        m = start + tl.arange(0, BLOCK_M)
        value = _load(x, m.to(tl.int64)[:, None] * C + c[None, :], (m < M)[:, None] & c_ok[None, :])
        n, avg, m2 = _merge(n, avg, m2, value, m < M, tl.minimum(tl.maximum(M - start, 0), BLOCK_M))
    place = t.to(tl.int64) * C + c
    tl.store(partial + place, avg, mask=c_ok)
    tl.store(partial + programs.to(tl.int64) * C + place, m2, mask=c_ok)
    if _last(count + tile, programs):
        _finish_stats(partial, programs, iters * BLOCK_M, M, c, c_ok, mean, rstd, running_mean, running_var, momentum, eps, C)


@triton.jit(do_not_specialize=COUNTS)
def dp_rebuild(
    p,
    dg,
    mean,
    rstd,
    gamma,
    beta,
    coef,
    out,
    M,
    N: tl.constexpr,
    HW: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = the gradient of P, (M, N)."""
    pid = tl.program_id(0)
    start = pid // TILES * BLOCK_M
    r = tl.arange(0, BLOCK_M)
    r_ok = start + r < M
    n = pid % TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    n_ok = n < N
    mu, _r, scale, shift = _norm(mean, rstd, gamma, beta, n, n_ok, 0.0, False)
    k0 = _load(coef, n, n_ok)
    k1 = _load(coef + N, n, n_ok)
    y = _dp(p, dg, start, r, r_ok, n, n_ok, mu, scale, shift, k0, k1, N, HW, 0)
    place = out + start.to(tl.int64) * N + (r[:, None] * N + n[None, :])
    tl.store(place, _cast(y, out.dtype.element_ty), mask=r_ok[:, None] & n_ok[None, :])


@triton.jit(do_not_specialize=COUNTS)
def relu_sums(
    da,
    d,
    mean,
    rstd,
    gamma,
    beta,
    dgamma,
    dbeta,
    coef,
    partial,
    count,
    M,
    iters,
    programs,
    C: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BatchNorm 1's two sums from the gradient of A, which relu 1 has yet to mask."""
    pid = tl.program_id(0)
    t = pid // TILES
    tile = pid % TILES
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    mu, r, scale, shift = _norm(mean, rstd, gamma, beta, c, c_ok, 0.0, False)
    s1 = tl.zeros([BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_C], tl.float32)
    for i in range(iters):
        m = (t * iters + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        ok = (m < M)[:, None] & c_ok[None, :]
        at = m.to(tl.int64)[:, None] * C + c[None, :]
        off = _load(d, at, ok) - mu[None, :]
        live = ok & (off * scale[None, :] + shift[None, :] > 0.0)
        up = tl.where(live, _load(da, at, ok), 0.0)
        s1 += tl.sum(up, 0)
        s2 += tl.sum(up * off, 0) * r
    place = t.to(tl.int64) * C + c
    tl.store(partial + place, s1, mask=c_ok)
    tl.store(partial + programs.to(tl.int64) * C + place, s2, mask=c_ok)
    if _last(count + tile, programs):
        _finish_sums(partial, programs, M, c, c_ok, gamma, rstd, dgamma, dbeta, coef, C)


# --- inference in one kernel ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=COUNTS)
def infer(
    xs,
    weight,
    taps,
    mean1,
    var1,
    gamma1,
    beta1,
    eps1,
    pw_weight,
    mean2,
    var2,
    gamma2,
    beta2,
    eps2,
    fc_weight,
    fc_bias,
    g,
    u,
    B,
    CS: tl.constexpr,
    FIRST: tl.constexpr,
    OFF: tl.constexpr,
    LAY: tl.constexpr,
    UNIT: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CLASSES: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    IMAGES: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The whole module by running statistics: a program takes IMAGES images, a plane each in PLANE rows, and all N channels."""
    dtype: tl.constexpr = g.dtype.element_ty
    pid = tl.program_id(0)
    row = tl.arange(0, IMAGES * PLANE)
    q = row % PLANE
    b = pid.to(tl.int64) * IMAGES + row // PLANE
    row_ok = (q < H * W) & (b < B)
    h = q // W
    w = q % W
    n = tl.arange(0, BLOCK_N)
    n_ok = n < N
    own = taps + pid.to(tl.int64) * (9 * C)
    p = tl.zeros([IMAGES * PLANE, BLOCK_N], tl.float32)
    for tile in range(TILES):
        first, cs, off, sb, sc, sh, sw = _place(tile, CS, FIRST, OFF, LAY)
        local = (tile - first) * BLOCK_C + tl.arange(0, BLOCK_C)
        c_ok = local < cs
        c = off + local
        if UNIT:
            c_off = local.to(tl.int64)
        else:
            c_off = local.to(tl.int64) * sc
        _taps(weight, own, c, c_ok, C, dtype)
        at = b * sb + h.to(tl.int64) * sh + w.to(tl.int64) * sw
        a = _dw(_pointer(xs, tile, FIRST), own, at, h, w, row_ok, c, c_off, c_ok, sh, sw, C, H, W)
        mu, _r, scale, shift = _norm(mean1, var1, gamma1, beta1, c, c_ok, eps1, True)
        a = tl.maximum((a - mu[None, :]) * scale[None, :] + shift[None, :], 0.0)
        k = _load(pw_weight, n[None, :] * C + c[:, None], n_ok[None, :] & c_ok[:, None])
        p = _dot(_cast(a, dtype), _cast(k, dtype), p, PRECISION)
    mu, _r, scale, shift = _norm(mean2, var2, gamma2, beta2, n, n_ok, eps2, True)
    p = tl.where(row_ok[:, None], tl.maximum((p - mu[None, :]) * scale[None, :] + shift[None, :], 0.0), 0.0)
    pooled = _cast(tl.sum(tl.reshape(p, [IMAGES, PLANE, BLOCK_N]), 1) / (H * W), dtype)
    image = pid.to(tl.int64) * IMAGES + tl.arange(0, IMAGES)
    if CLASSES > 0:
        pooled = pooled.to(tl.float32)
        for k0 in range(0, CLASSES, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            k_ok = k < CLASSES
            w_fc = _cast(_load(fc_weight, k[:, None] * N + n[None, :], k_ok[:, None] & n_ok[None, :]), dtype).to(tl.float32)
            z = tl.sum(pooled[:, None, :] * w_fc[None, :, :], 2)
            if fc_bias is not None:
                z += _cast(_load(fc_bias, k, k_ok), dtype).to(tl.float32)[None, :]
            tl.store(u + image[:, None] * CLASSES + k[None, :], _cast(z, dtype), mask=(image < B)[:, None] & k_ok[None, :])
    else:
        tl.store(g + image[:, None] * N + n[None, :], pooled, mask=(image < B)[:, None] & n_ok[None, :])


# --- what the host chooses -----------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """A walk over rows: `programs` chunks of `iters` tiles of `m` rows, times `tiles` blocks of `n` channels."""

    m: int
    n: int
    k: int
    tiles: int
    iters: int
    programs: int
    warps: int
    stages: int

    @property
    def grid(self) -> int:
        return self.programs * self.tiles


def _walk(rows: int, m: int, n: int, k: int, tiles: int, warps: int, stages: int, share: float = 1.0) -> Blocks:
    """Chunks of rows so that about PROGRAMS * share programs run, however long the map."""
    blocks = max(1, _divup(rows, m))
    iters = _divup(blocks, max(1, int(PROGRAMS * share) // max(1, tiles)))
    return Blocks(m, n, k, tiles, iters, _divup(blocks, iters), warps, stages)


class Placed(NamedTuple):
    """The constants that tell a kernel where K maps lie among the C channels."""

    CS: tuple[int, ...]
    FIRST: tuple[int, ...]
    OFF: tuple[int, ...]
    tiles: int


def place(channels: tuple[int, ...], block: int) -> Placed:
    first, off = [0], [0]
    for c in channels:
        first.append(first[-1] + _divup(c, block))
        off.append(off[-1] + c)
    return Placed(channels, tuple(first[:-1]), tuple(off[:-1]), first[-1])


def pick_dw(channels: tuple[int, ...], rows: int, backward: bool) -> Blocks:
    """Depthwise kernels: 64 channels (128 bytes of bf16) a tile; backward 32, and two values a thread, beside which nine sums
    for the weight gradient fit 128 registers."""
    c = _block(max(channels), 32 if backward else 64)
    m = _block(rows, 16 if backward else 32)
    return _walk(rows, m, c, 0, place(channels, c).tiles, 8 if backward else 4, 2)


def pick_rows(width: int, rows: int) -> Blocks:
    """The passes beside a library GEMM."""
    c = _block(width, 64)
    return _walk(rows, _block(rows, 32), c, 0, _divup(width, c), 4, 2)


def pick_gemm(rows: int, depth: int, width: int, wide: bool, stages: int = 3) -> Blocks:
    """(rows, depth) x (depth, width): 128 x 128 x 64 in bf16 at most; `wide`: fp32, half of that each way in bytes."""
    k = _block(depth, 32 if wide else 64)
    n = _block(width, 64)
    m = _block(rows, 64 if wide else 128)
    return _walk(rows, m, n, k, _divup(width, n), 8 if m >= 128 else 4, stages)


def pick_weight(rows: int, depth: int, width: int, wide: bool) -> tuple[Blocks, int, int]:
    """dP^T A: (blocks, tiles of width, tiles of depth); `programs` is the number of chunks, whose partial sums cost
    2 * programs * width * depth fp32 in the L2."""
    n = _block(width, 64)
    c = _block(depth, 64 if wide else 128)
    m = _block(rows, 32 if wide else 64)
    tiles_n, tiles_c = _divup(width, n), _divup(depth, c)
    return _walk(rows, m, n, c, tiles_n * tiles_c, 8 if n * c >= 64 * 128 else 4, 3, 0.25), tiles_n, tiles_c


def pick_head(batch: int, width: int, classes: int) -> Blocks:
    b, n = _block(batch, 64), _block(width, 64)
    tiles = _divup(width, n)
    images = max(1, _divup(batch, b))
    return Blocks(
        b, n, _block(max(classes, 1), 64), tiles, 1, images + (_divup(classes, _block(classes, 64)) if classes else 0), 4, 3
    )


def pick_tail(width: int, plane: int, classes: int) -> Blocks:
    """`programs` is per image; the classifier is inside (k > 0) where it is small."""
    inside = 0 < classes * width <= TAIL_FC and width <= TAIL_WIDTH
    n = _block(width, TAIL_WIDTH if inside else 64)
    r = max(1, min(_power2(plane), 64, 4096 // n))
    return Blocks(r, n, max(1, min(_power2(classes), 2048 // n, 32)) if inside else 0, _divup(width, n), 1, 1, 4, 2)


class One(NamedTuple):
    images: int
    plane: int
    c: int
    n: int
    k: int
    warps: int


def pick_infer(channels: tuple[int, ...], width: int, plane: int, classes: int, batch: int) -> One | None:
    """Inference in one kernel, or None where the planes or the fused width are too large for it."""
    padded = _power2(plane)
    if width > ONE_WIDTH or padded > ONE_PLANE or classes * width > TAIL_FC:
        return None
    images = max(1, min(64, _power2(batch) * padded) // padded)
    images = max(images, 16 // padded)
    n = _block(width, ONE_WIDTH)
    return One(images, padded, _block(max(channels), 32), n, max(1, min(_power2(max(classes, 1)), 4096 // (n * images), 16)), 4)


def nhwc(c: int, h: int, w: int) -> tuple[int, int, int, int]:
    """Strides of a channels_last map."""
    return h * w * c, 1, w * c, c


def _case(
    name: str, kernel: Any, dtype: str, constants: dict[str, Any], warps: int, stages: int, kind: str, **given: Any
) -> Case:
    """Signature by argument name: the maps' type for maps, fp32 for parameters and statistics, int32 for counts."""
    maps = {"d", "p", "g", "u", "m1", "m2", "dg", "du", "dd", "da", "x"} | (
        {"out"} if "partial" not in kernel.arg_names else set()
    )
    numbers = dict.fromkeys(COUNTS, "i32")
    floats = dict.fromkeys(("eps", "eps1", "eps2", "momentum"), "fp32")
    kinds: dict[str, Any] = {**numbers, **floats, "count": "*i32", **given}
    for arg in kernel.arg_names:
        if arg in constants:
            kinds[arg] = "constexpr"
        elif arg in ("xs", "dxs"):
            kinds[arg] = (f"*{dtype}",) * len(constants["CS"])
        else:
            kinds.setdefault(arg, f"*{dtype}" if arg in maps else "*fp32")
    signature = {arg: kinds[arg] for arg in kernel.arg_names}
    return Case(f"fuse_conv/{name} {dtype}", kernel, signature, constants, warps, stages, kind, unaligned=COUNTS)


def cases() -> list[Case]:
    """Two maps of 64 channels, 8x8, 100 classes (CIFAR), and the GEMMs of two maps of 512 channels, 7x7; in fp32 what differs."""
    made = []
    h = w = 8
    batch, cs, n, classes = 1024, (64, 64), 64, 100
    c, hw = sum(cs), h * w
    rows = batch * hw
    lay = tuple(nhwc(k, h, w) for k in cs)
    maps = {"LAY": lay, "UNIT": True, "C": c, "H": h, "W": w}

    def stencil(kernel: Any, dtype: str, blocks: Blocks, **more: Any) -> None:
        at = place(cs, blocks.n)
        both = {
            **maps,
            "CS": at.CS,
            "FIRST": at.FIRST,
            "OFF": at.OFF,
            "TILES": at.tiles,
            "BLOCK_M": blocks.m,
            "BLOCK_C": blocks.n,
        }
        made.append(_case(kernel.__name__, kernel, dtype, both | more, blocks.warps, blocks.stages, "stencil"))

    stencil(dw_forward, "bf16", pick_dw(cs, rows, False), MODE="stats")
    for dtype in ("bf16", "fp32"):
        stencil(dw_backward, dtype, pick_dw(cs, rows, True), DLAY=lay, MASK=False, BLOCK_S=SPLIT_BLOCK)
    for dtype, deep, width, plane in (("bf16", 1024, 512, 49), ("fp32", c, n, hw)):
        wide, m, name = dtype == "fp32", batch * plane, f"{deep}>{width}"
        shape = {"C": deep, "N": width, "PRECISION": "tf32"}
        b = pick_gemm(m, deep, width, wide)
        more = {"TILES": b.tiles, "BLOCK_M": b.m, "BLOCK_N": b.n, "BLOCK_K": b.k, "ACT": True, "STATS": True, "bias": None}
        made.append(_case(f"pw_forward {name}", pw_forward, dtype, shape | more, b.warps, b.stages, "gemm"))
        if wide:
            continue
        b = pick_gemm(m, width, deep, wide, 2)
        more = {"HW": plane, "TILES": b.tiles, "BLOCK_M": b.m, "BLOCK_N": b.n, "BLOCK_K": b.k}
        made.append(_case(f"pw_backward_data {name}", pw_backward_data, dtype, shape | more, b.warps, b.stages, "gemm"))
        b, tiles_n, tiles_c = pick_weight(m, deep, width, wide)
        more = {"HW": plane, "TILES_N": tiles_n, "TILES_C": tiles_c, "BLOCK_M": b.m, "BLOCK_N": b.n, "BLOCK_C": b.k}
        split = {**shape, **more}
        made.append(_case(f"pw_backward_weight {name}", pw_backward_weight, dtype, split, b.warps, b.stages, "gemm", out="*fp32"))
    b = pick_tail(n, hw, classes)
    tail = {"N": n, "HW": hw, "CLASSES": classes, "TILES": b.tiles, "VAR": False, "SAVE": True}
    tail |= {"BLOCK_R": b.m, "BLOCK_N": b.n, "BLOCK_K": b.k}
    made.append(_case("tail_forward", tail_forward, "bf16", tail, b.warps, b.stages, "row"))
    b = pick_head(batch, n, classes)
    head = {"N": n, "HW": hw, "CLASSES": classes, "TILES": b.tiles, "PRECISION": "tf32", "stride_k": 1}
    head |= {"BLOCK_B": b.m, "BLOCK_N": b.n, "BLOCK_K": b.k}
    made.append(_case("head_backward", head_backward, "bf16", head, b.warps, b.stages, "gemm"))
    one = pick_infer(cs, n, hw, classes, batch)
    assert one
    at = place(cs, one.c)
    whole = {**maps, "CS": at.CS, "FIRST": at.FIRST, "OFF": at.OFF, "TILES": at.tiles, "N": n, "CLASSES": classes}
    whole |= {"IMAGES": one.images, "PLANE": one.plane, "BLOCK_C": one.c, "BLOCK_N": one.n, "BLOCK_K": one.k, "PRECISION": "tf32"}
    made.append(_case("infer", infer, "bf16", whole, one.warps, 2, "gemm"))
    for kernel in (bn_relu, column_stats, dp_rebuild, relu_sums):
        b = pick_rows(4096, batch * 49)
        passes = {"N" if kernel is dp_rebuild else "C": 4096, "TILES": b.tiles, "BLOCK_M": b.m, "BLOCK_C": b.n}
        passes |= {"HW": 49} if kernel is dp_rebuild else {}
        made.append(_case(kernel.__name__, kernel, "bf16", passes, b.warps, b.stages, "row"))
    return made
