"""nce: noise-contrastive estimation of M embeddings against M memory banks, without gathering the banks' rows.

For every ordered pair (a, b) of different branches, sample i, its own row I_0 = i and R negatives I_r of other classes:

    s_r = exp(<V_a[I_r], v_b> / tau)      P_r = s_r / Z      Z = N mean of all s of the pair (no gradient, made anew each call)
    NCE(a, b) = -1/n sum_i [ log(P_0 / (P_0 + c + eps)) + sum_r log(c / (P_r + c + eps)) ]      c = R / N
    d NCE / d v_b = 1/(n tau) sum_i [ -(c + eps) / (P_0 + c + eps) V_a[i] + sum_r P_r / (P_r + c + eps) V_a[I_r] ]

The loss is the sum over pairs. Letters: M branches, B samples, n of which count, N rows of a bank of D numbers, R negatives.

Negatives are a pure function of (counter, sample id, r): place r of a keyed permutation of the pool, which is the list of all
samples sorted by class without the class's own stretch. The permutation is exact for any pool: places are written in rows of
2^k, about as many rows; a turn shifts every column, then every row, by a hash of its number (the last row, which is not whole,
stays), then all places by one number. So no index travels from the host, and none is drawn twice.

Bytes at least: a bank's R + 1 rows for every sample, twice (sums, then loss and gradient), whatever the number of students. The
forward makes the gradient too and keeps it, M B D, instead of R + 1 rows a sample.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _launch
from ._dispatch import choice, register, run
from ._draws import MASK, below, uniform_bits
from .distill_graph import _scale_op

IGNORE = -100  # a label that weighs nothing
WRONG = -2  # in place of a sample's own row: an id or label that there is not; -1: the sample weighs nothing
STREAM = 1 << 20  # of random numbers, beyond those of views
TURNS = 4  # of the permutation; after 2 the draws that fall in a quarter of a pool vary 1.6 times as much as they should
KEYS = 3 * TURNS + 1  # a sample's: two rounds and a rotation a turn, draws with replacement
DRAWN = 1 << 17  # negatives drawn at once: 1 MiB in int64
BLOCK = {"dense": 16 << 20, "gather": 4 << 20}  # bytes of scores or of rows at once
DENSE = 8  # a bank's rows per negative up to which a GEMM of all beats gathered ones; on 2 cores from 9 (M = 4) to 20 (M = 2)
TAU = 0.02  # at least: sums of exp(1 / tau) over 10^9 scores are within fp32
BRANCHES, WIDTH = 8, 2048  # at most, in the kernels: what their registers hold


class Classes(NamedTuple):
    """Samples sorted by class. `order` holds those that have a label; class c is its stretch start[c], count[c] long."""

    order: Tensor  # (at most N,) int32
    start: Tensor  # (C,) int64
    count: Tensor  # type: ignore[assignment]  # (C,) int64; hides tuple.count


class NceOut(NamedTuple):
    """The sum over pairs, which carries the gradient, and each pair's value, for the record: (0, 1), (0, 2), ... (M-1, M-2)."""

    loss: Tensor  # ()
    pairs: Tensor  # (M (M - 1),)


def class_order(labels: Tensor, classes: int) -> Classes:
    """The order of a data set's labels (N,) int64, once. Samples labelled -100 are nobody's negatives. A host read.

    ValueError if a label is outside 0..classes-1 or if one class holds all samples.
    """
    wrong = ((labels < 0) | (labels >= classes)) & (labels != IGNORE)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(f"labels[{at}] is {int(labels[at])}; expected a class 0..{classes - 1} or {IGNORE}")
    known = labels != IGNORE
    count = torch.bincount(labels[known], minlength=classes)
    if int(count.max() if classes else 0) == int(count.sum()):
        raise ValueError(
            f"{int(count.sum())} labelled samples of one class; negatives are of other classes, so there must be two"
        )
    order = torch.argsort(torch.where(known, labels, classes), stable=True)[: int(count.sum())]
    return Classes(order.to(torch.int32), count.cumsum(0) - count, count)


def _scrambled(x: Tensor, key: Tensor) -> Tensor:
    """32 bits of 32 bits and a key: murmur3's finaliser."""
    h = x ^ key
    h ^= h >> 16
    h.mul_(0x85EBCA6B).bitwise_and_(MASK)
    h ^= h >> 13
    h.mul_(0xC2B2AE35).bitwise_and_(MASK)
    h ^= h >> 16
    return h


def _keys(counter: Tensor, ids: Tensor) -> Tensor:
    """A sample's keys, (B, KEYS, 1) int64 of 32 bits each."""
    low, high = (uniform_bits(counter, 0, ids, STREAM + k)[:, None, None] for k in range(2))
    steps = torch.arange(1, KEYS + 1, device=ids.device)[:, None] * 0x9E3779B9  # no two alike modulo 2^32
    return _scrambled((low + steps) & MASK, high)


def _places(r: Tensor, pool: Tensor, keys: Tensor) -> Tensor:
    """Where in a pool draw r lies: keyed permutations of 0..pool-1, one a row. r (1, n), pool (B, 1) -> (B, n) int64."""
    bits = (pool >= 4 ** torch.arange(1, 16, device=pool.device)).sum(1, keepdim=True)  # 4^bits <= pool
    rows, mask = pool >> bits, (1 << bits) - 1
    x = r
    for k in range(TURNS):
        low, high = x & mask, x >> bits
        whole = high < rows
        high = high + below(_scrambled(low, keys[:, 3 * k]), rows)
        high -= rows * (high >= rows)
        low = (low + _scrambled(high, keys[:, 3 * k + 1])).bitwise_and_(mask)
        x = torch.where(whole, (high << bits).bitwise_or_(low), x).add_(below(keys[:, 3 * k + 2], pool))
        x -= pool * (x >= pool)
    return x


def negatives(ids: Tensor, labels: Tensor, classes: Classes, count: int, counter: Tensor) -> Tensor:
    """(B, count) int32: samples of other classes than the sample's own, for ids and labels (B,) int64 and a counter () int64.

    Without replacement where the other classes have `count` samples, else with. Each is a function of (counter, id, its column)
    alone. Rows of a label that is no class are 0.
    """
    order, start, own = classes
    known = (labels >= 0) & (labels < len(own))
    y = torch.where(known, labels, 0)
    pool = (len(order) - own[y])[:, None].clamp(min=1)
    first, gap = start[y][:, None], own[y][:, None]
    keys = _keys(counter, ids)
    out = torch.empty((len(ids), count), dtype=torch.int32, device=ids.device)
    step = max(1, DRAWN // max(1, len(ids)))
    for at in range(0, count, step):
        r = torch.arange(at, min(count, at + step), device=ids.device)[None]
        x = torch.where(pool < count, below(_scrambled(r, keys[:, -1]), pool), _places(r, pool, keys))
        x = torch.where(x >= first, x + gap, x).clamp(max=len(order) - 1)
        out[:, at : at + step] = torch.where(known[:, None], order[x], 0)
    return out


def _own(ids: Tensor, labels: Tensor, classes: Classes, N: int) -> Tensor:
    """(B,) int32: a sample's own row, -1 where it weighs nothing, WRONG where id or label are none."""
    C = len(classes.count)
    wrong = (ids >= N) | (labels < 0) | (labels >= C)
    wrong = wrong | (classes.count[torch.where(wrong, 0, labels)] >= len(classes.order))
    return torch.where((ids < 0) | (labels == IGNORE), -1, torch.where(wrong, WRONG, ids)).to(torch.int32)


def route(N: int, R: int) -> str:
    """How the reference finds scores: "dense", all of a bank's by GEMM, where N <= DENSE (R + 1), else "gather", by rows."""
    return "dense" if N <= DENSE * (R + 1) else "gather"


def _blocks(way: str, K: int, N: int, D: int, R: int, size: int) -> tuple[int, int]:
    """Samples, and columns of one, that are worked on at once."""
    if way == "dense":
        return max(1, BLOCK[way] // (K * N * size)), R + 1
    rows = max(1, BLOCK[way] // (D * size))
    return max(1, rows // (R + 1)), min(R + 1, rows)


def _scores(bank: Tensor, w: Tensor, index: Tensor, way: str, columns: int) -> Tensor:
    """<bank[index], w>: bank (N, D), w (K, b, D), index (b, R + 1) -> (K, b, R + 1)."""
    K, b, D = w.shape
    if way == "dense":
        return (w.reshape(K * b, D) @ bank.t()).view(K, b, -1).gather(2, index.long().expand(K, -1, -1))
    out = w.new_empty((K, b, index.shape[1]))
    for at in range(0, index.shape[1], columns):
        part = index[:, at : at + columns]
        rows = bank.index_select(0, part.flatten()).view(b, -1, D)
        out[:, :, at : at + columns] = torch.bmm(w.transpose(0, 1), rows.transpose(1, 2)).transpose(0, 1)
    return out


def _weighted(bank: Tensor, g: Tensor, index: Tensor, way: str, columns: int) -> Tensor:
    """sum over r of g bank[index]: g (K, b, R + 1) -> (K, b, D)."""
    K, b, _ = g.shape
    if way == "dense":
        whole = g.new_zeros((K, b, len(bank))).scatter_add_(2, index.long().expand(K, -1, -1), g)
        return (whole.view(K * b, -1) @ bank).view(K, b, -1)
    out = g.new_zeros((K, b, bank.shape[1]))
    for at in range(0, index.shape[1], columns):
        rows = bank.index_select(0, index[:, at : at + columns].flatten()).view(b, -1, bank.shape[1])
        out += torch.bmm(g[:, :, at : at + columns].transpose(0, 1), rows).transpose(0, 1)
    return out


def _evaluate(
    banks: Tensor, v: Tensor, own: Tensor, drawn: Tensor, tau: float, eps: float, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, values of pairs and, where wanted, the gradient (M, B, D) for v, a bank at a time."""
    (M, N, D), (B, R) = banks.shape, drawn.shape
    way, K, c = route(N, R), M - 1, R / N
    keep, index = own >= 0, torch.cat([own[:, None].clamp(min=0), drawn], 1)
    n = keep.sum().to(v.dtype)
    share = torch.where((own == WRONG).any(), torch.nan, 1 / n.clamp(min=1))
    step, columns = _blocks(way, K, N, D, R, v.itemsize)
    blocks = [slice(at, min(B, at + step)) for at in range(0, B, step)]
    values = []
    grads = torch.zeros_like(v) if wanted else v.new_empty(0)
    for a in range(M):
        others = [b for b in range(M) if b != a]
        s, loss = v.new_empty((K, B, R + 1)), v.new_zeros(K)
        for rows in blocks:
            w = torch.stack([v[b, rows] for b in others])
            scores = _scores(banks[a], w, index[rows], way, columns)
            s[:, rows] = scores.div_(tau).exp_().masked_fill_(~keep[rows, None], 0)
        scale = n * (R + 1) / (N * s.sum((1, 2)))  # 1 / Z
        for rows in blocks:
            p = s[:, rows].mul_(scale[:, None, None])
            row = torch.log1p((c + eps) / p[..., 0]) + torch.log1p((p[..., 1:] + eps) / c).sum(2)
            loss += torch.where(keep[rows], row, 0).sum(1)
            if wanted:
                g = p / (p + (c + eps))
                g[..., 0] = -(c + eps) / (p[..., 0] + (c + eps))
                g.masked_fill_(~keep[rows, None], 0).mul_(share / tau)
                for k, d in enumerate(_weighted(banks[a], g, index[rows], way, columns)):
                    grads[others[k], rows] += d
        values.append(loss * share)
    pairs = torch.cat(values)
    return pairs.sum(), pairs, grads


class _Reference(torch.autograd.Function):
    """The loss with the gradient that was made beside it."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, banks: Tensor, own: Tensor, drawn: Tensor, tau: float, eps: float, wanted: bool
    ) -> tuple[Tensor, Tensor]:
        loss, pairs, grads = _evaluate(banks, v.detach(), own, drawn, tau, eps, wanted)
        ctx.save_for_backward(grads)
        ctx.mark_non_differentiable(pairs)
        return loss, pairs

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("nce: double backward is not supported")
        (grads,) = ctx.saved_tensors
        return grads * g, *(None,) * 6


def nce_reference(
    banks: Tensor,
    v: Tensor,
    ids: Tensor,
    labels: Tensor,
    classes: Classes,
    counter: Tensor,
    *,
    count: int,
    tau: float,
    eps: float = 1e-7,
) -> NceOut:
    """The op in plain torch: the CPU path, the oracle of the kernels and the baseline of the benchmark."""
    own = _own(ids, labels, classes, banks.shape[1])
    drawn = negatives(ids, labels, classes, count, counter)
    wanted = torch.is_grad_enabled() and v.requires_grad
    return NceOut(*_Reference.apply(v, banks, own, drawn, tau, eps, wanted))


@torch.library.custom_op("fastffl::nce", mutates_args=())
def _nce(
    banks: Tensor,
    v: Tensor,
    ids: Tensor,
    labels: Tensor,
    order: Tensor,
    start: Tensor,
    own: Tensor,
    counter: Tensor,
    count: int,
    tau: float,
    eps: float,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, values of pairs and the gradient, which is empty unless wanted; own: samples of each class."""
    from .jit import nce as jit

    (M, N, D), B, device = banks.shape, len(ids), banks.device
    f32 = torch.float32
    loss, pairs = _launch.empty((), f32, device), _launch.empty((M * (M - 1),), f32, device)
    grads = _launch.empty((M, B, D) if wanted else (0,), f32, device)
    if B == 0:
        return loss.zero_(), pairs.zero_(), grads
    v, start, own, order = (x.contiguous() for x in (v, start, own, order))
    chosen = jit.pick(M, B, count, D)
    width = 4 * _launch.divup(count + 1, 4)
    blocks = _launch.divup(count + 1, jit.DRAWS)
    index = _launch.empty((B, width), torch.int32, device)
    sums, values = (_launch.empty((M, M, B * chosen.parts), f32, device) for _ in range(2))
    parts = _launch.empty((M, B, chosen.parts, M, D) if wanted else (0,), f32, device)
    _launch.launch(
        *(jit.draw_kernel, (B * blocks,), device, ids, labels, order, start, own, counter, index, N, len(order), len(own)),
        *(count, width, blocks, ids.stride(0), labels.stride(0), IGNORE, STREAM, TURNS, jit.DRAWS),
        warps=4,
    )
    grid = (M * B * chosen.parts,)
    common = (N, B, count, width, chosen.parts, chosen.per, 1 / tau)
    sizes: dict[str, Any] = {"M": M, "D": D, "WIDE": chosen.wide}
    _launch.launch(
        *(jit.sums_kernel, grid, device, banks, v, index, sums, *common),
        **{**sizes, "ROWS": 2 * chosen.rows},
        warps=chosen.warps,
    )
    _launch.launch(
        *(jit.terms_kernel, grid, device, banks, v, index, sums, values, parts, *common, eps, count / N, (count + 1) / N),
        **{**sizes, "ROWS": chosen.rows, "GRADS": wanted},
        warps=chosen.warps,
    )
    last = (1 + (M * B if wanted else 0),)
    _launch.launch(
        *(jit.finish_kernel, last, device, sums, values, parts, index, loss, pairs, grads, B, width, chosen.parts),
        **sizes,
        warps=jit.FINISH,
    )
    return loss, pairs, grads


@_nce.register_fake
def _(banks, v, ids, labels, order, start, own, counter, count, tau, eps, wanted):  # type: ignore[no-untyped-def]
    M = banks.shape[0]
    return v.new_empty(()), v.new_empty((M * (M - 1),)), v.new_empty(v.shape if wanted else (0,))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2])
    ctx.wanted = inputs[-1]


def _backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("nce: double backward is not supported")
    nothing = (None,) * 10
    if g is None or not ctx.wanted:
        return None, None, *nothing
    try:
        (grads,) = ctx.saved_tensors
    except RuntimeError as error:
        raise RuntimeError("nce: backward ran through this loss already; its gradient is made once") from error
    if type(grads) is not Tensor:  # being traced: a graph has no place for writing into what it saved
        return None, grads * g, *nothing
    if grads.numel():
        _scale_op([grads], g)
    return None, grads, *nothing


_nce.register_autograd(_backward, setup_context=_keep)
_launch.LAUNCHES["fastffl::nce"] = 4


def _triton(
    banks: Tensor,
    v: Tensor,
    ids: Tensor,
    labels: Tensor,
    classes: Classes,
    counter: Tensor,
    *,
    count: int,
    tau: float,
    eps: float,
) -> NceOut:
    M, _, D = banks.shape
    if M > BRANCHES or D > WIDTH:
        if choice() == "triton":
            raise ValueError(
                f"{M} branches of {D} numbers; the kernels take at most {BRANCHES} of {WIDTH}, use auto or reference"
            )
        return nce_reference(banks, v, ids, labels, classes, counter, count=count, tau=tau, eps=eps)
    wanted = torch.is_grad_enabled() and v.requires_grad
    loss, pairs, _ = _nce(banks, v, ids, labels, *classes, counter, count, tau, eps, wanted)
    return NceOut(loss, pairs)


register("nce", _triton)


def bytes_moved(M: int, B: int, R: int, D: int, wanted: bool = True) -> int:
    """Bytes of rows that are read, a bank's once for its sums and once for loss and gradient, indices four ways, the gradient."""
    return 2 * M * B * (R + 1) * (4 * D + 4) + 8 * B * (R + 1) + 4 * M * B * D * (2 + wanted)


def nce(
    banks: Tensor,
    v: Tensor,
    ids: Tensor,
    labels: Tensor,
    classes: Classes,
    counter: Tensor,
    *,
    count: int,
    tau: float,
    eps: float = 1e-7,
) -> NceOut:
    """Every branch's embeddings against the memory banks of all others (Yang et al., Multi-View Contrastive Learning for Online
    Knowledge Distillation, ICASSP 2021), as in the authors' code.

    banks         (M, N, D), rows of unit length: what branch a last said of each of N samples; no gradient
    v             (M, B, D), rows of unit length, of the banks' type: fp32, or fp64, which takes the reference
    ids, labels   (B,) int64: a sample's row in the banks and its class. A sample with a negative id or label -100 weighs nothing;
                  any other outside is a ValueError on the CPU and makes the loss NaN on a GPU
    classes       of all N samples, by `class_order`
    counter       () int64 on the device: what negatives are drawn for. Change it between steps; a captured step reads it anew
    count         R, negatives a sample: without replacement where the other classes have as many, else with
    tau           temperature, at least 0.02: exp(1 / tau) has to be within fp32
    eps           added to R / N, as in the authors' code

    The gradient flows through `loss` into v, once on the Triton path (retain_graph does not help). B = 0 and samples that all
    weigh nothing give loss 0 with zero gradients. Z is of this process's samples. Sums run in a fixed order: the same input gives
    the same bits. ValueError says what was wrong; a second derivative is a RuntimeError.
    """
    device = banks.device
    if banks.ndim != 3 or len(banks) < 2 or banks.dtype not in (torch.float32, torch.float64) or not banks.is_contiguous():
        raise ValueError(
            f"banks are {tuple(banks.shape)} {banks.dtype} with strides {banks.stride()}; expected contiguous fp32 (M, N, D) "
            "of at least 2 branches"
        )
    M, N, D = banks.shape
    if v.ndim != 3 or v.shape[::2] != (M, D) or v.dtype != banks.dtype or v.device != device:
        raise ValueError(
            f"v is {tuple(v.shape)} {v.dtype} on {v.device}; expected ({M}, B, {D}) {banks.dtype} on {device}, as the banks"
        )
    if not 0 < N < 2**31 or D < 1:
        raise ValueError(f"banks are {tuple(banks.shape)}; expected 1 to 2^31 - 1 rows of at least one number")
    B, C = v.shape[1], classes.count.numel()
    for name, x, dtype, shape in (
        ("ids", ids, torch.int64, (B,)),
        ("labels", labels, torch.int64, (B,)),
        ("counter", counter, torch.int64, ()),
        ("classes.order", classes.order, torch.int32, (classes.order.numel(),)),
        ("classes.start", classes.start, torch.int64, (C,)),
        ("classes.count", classes.count, torch.int64, (C,)),
    ):
        if x.shape != shape or x.dtype != dtype or x.device != device:
            raise ValueError(f"{name}: {tuple(x.shape)} {x.dtype} on {x.device}; expected {shape} {dtype} on {device}")
    if not 0 < classes.order.numel() <= N or C < 1:
        raise ValueError(
            f"classes are of {classes.order.numel()} samples in {C} classes; expected 1 to {N} samples, as the banks"
        )
    if count < 1:
        raise ValueError(f"count={count}; expected at least one negative a sample")
    if not TAU <= tau < float("inf") or not eps >= 0:
        raise ValueError(f"tau={tau}, eps={eps}; expected a finite tau of at least {TAU} and eps of at least 0")
    if device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (_own(ids, labels, classes, N) == WRONG).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                f"sample {at} has id {int(ids[at])} and label {int(labels[at])}; expected an id below {N} and a class 0..{C - 1} "
                f"besides which there are others, or, to leave it out, a negative id or label {IGNORE}"
            )
    given = (banks, v, ids, labels, classes, counter)
    if v.dtype == torch.float64:
        return nce_reference(*given, count=count, tau=float(tau), eps=float(eps))
    out: NceOut = run("nce", v, nce_reference, *given, count=count, tau=float(tau), eps=float(eps))
    return out


@torch.no_grad()
def remember(banks: Tensor, v: Tensor, ids: Tensor, labels: Tensor, keep: float = 0.5, ok: Tensor | None = None) -> None:
    """banks[:, ids] <- unit(keep banks[:, ids] + (1 - keep) v), in place: after the scores of the same step.

    banks (M, N, D), v (M, B, D), ids and labels (B,) int64 as in `nce`, no id twice among the samples that count; the others
    leave the banks alone, and so does every sample where ok () bool is false. The host reads nothing.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep={keep}; expected a share 0..1")
    if not len(ids):
        return
    write = (ids >= 0) & (labels != IGNORE)
    if ok is not None:
        write = write & ok
    # whoever does not write repeats the first who does: an index that stands there twice writes the same bits twice
    who = torch.where(write, torch.arange(len(ids), device=ids.device), write.long().argmax())
    row = ids[who].clamp(min=0)
    old = banks.index_select(1, row)
    new = torch.nn.functional.normalize(torch.lerp(v.detach().to(banks.dtype).index_select(1, who), old, keep), dim=2)
    banks.index_copy_(1, row, torch.where(write[who, None], new, old))
