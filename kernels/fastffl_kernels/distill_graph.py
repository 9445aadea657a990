"""distill_graph: every cross-entropy, every teaching edge, all gradients and the top-1/top-5 counts of one step, in one launch.

Nodes are predictions z_m (B, C): those given, then one per entry of `means` (the mean of the logits of some of them).

    ce_h = 1/n sum_b sum_c t_bc (-log p_1(z_h)_c)             for each labelled node h
    kl_e = T^2/n sum_b sum_c q' (log q' - log p_T(student))   for each edge e, q' = p_T(teacher) + eps
    loss = sum_h w_h ce_h + sum_e w_e kl_e

The target t is (1 - s) (a onehot(y) + (1 - a) onehot(y2)) + s / C: s the label smoothing, a the share of y where labels are mixed
(mixup, cutmix), else 1. n counts the rows none of whose labels is `ignore_index`; the other rows weigh nothing, in ce and in
kl. eps is 0 except to reproduce code that adds 1e-7 to the teacher's probabilities (FFL, ONE; not renormalised: the sum is
1 + C eps).

Gradients, S = 1 + C eps:   dz_h = w/n (p_1 - t)   dz_student = w T/n (S p_T - q')   and where the teacher is not detached
dz_teacher = w T/n q (log(q'/p) - sum_c q log(q'/p)), q = p_T(teacher).

Letters: B rows, C classes, M nodes, H labelled nodes, E edges. Bytes at least: read every given logit once, write its gradient
once. The forward makes the gradients too and keeps them (in the logits' dtype) instead of the logits; `backward` multiplies
them by the upstream gradient in place, and touches nothing where that is 1.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _launch
from ._dispatch import register, run
from ._launch import divup, launch

TOP = 5


class GraphEdge(NamedTuple):
    """`teacher` teaches `student` (node indices) at temperature `T`; a detached teacher gets no gradient."""

    teacher: int
    student: int
    T: float = 3.0
    detach: bool = True
    eps: float = 0.0


class GraphOut(NamedTuple):
    """What one evaluation of the graph gives; all fp32 (fp64 for fp64 logits) except the counts, which are int64. Only the loss
    carries a gradient; for that of one term call the op with that term alone."""

    loss: Tensor  # ()
    ce: Tensor  # (H,)
    kl: Tensor  # (E,)
    top1: Tensor  # (M,) rows whose label has the largest logit; among equal logits the lowest class wins
    top5: Tensor  # (M,)
    rows: Tensor  # () rows that count


def rank(z: Tensor, y: Tensor) -> Tensor:
    """How many classes come before the label, z (B, C), y (B,) -> (B,) int64. Among equal logits the lowest class comes
    first; a label whose logit is NaN is never among the first TOP."""
    z_y = z.gather(1, y[:, None])
    c = torch.arange(z.shape[1], device=z.device)
    behind = (z < z_y) | ((z == z_y) & (c >= y[:, None]))
    return (~behind).sum(1) + TOP * z_y[:, 0].isnan()


def distill_graph_reference(
    logits: tuple[Tensor, ...],
    labels: Tensor,
    hard: tuple[tuple[int, float], ...],
    edges: tuple[GraphEdge, ...],
    weights: Tensor,
    means: tuple[tuple[int, ...], ...] = (),
    ignore_index: int | None = -100,
    *,
    labels2: Tensor | None = None,
    mix: Tensor | None = None,
    smoothing: float = 0.0,
) -> GraphOut:
    """The graph in plain torch: the CPU path, the oracle of the tests and the benchmark's baseline."""
    C = logits[0].shape[1]
    wide = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    nodes = [z.to(wide) for z in logits]
    nodes += [torch.stack([nodes[k] for k in members]).mean(0) for members in means]
    targets = [labels] if labels2 is None else [labels, labels2]
    keep = torch.ones_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        for y in targets:
            keep = keep & (y != ignore_index)
    rows = keep.sum()
    share = keep.to(wide) / rows.clamp(min=1)  # (B,): 1/n where the row counts, 0 elsewhere
    nan = torch.zeros_like(share)
    for y in targets:  # a label that is no class makes the loss NaN, never a silent number
        nan = torch.where(keep & ((y < 0) | (y >= C)), torch.nan, nan)
    targets = [torch.where((y >= 0) & (y < C), y, 0) for y in targets]

    log_p: dict[tuple[int, float, bool], Tensor] = {}

    def log_softmax(node: int, T: float, detach: bool) -> Tensor:
        key = (node, T, detach)
        if key not in log_p:
            z = nodes[node].detach() if detach else nodes[node]
            log_p[key] = torch.log_softmax(z / T, 1)
        return log_p[key]

    ce = []
    for h, _ in hard:
        log_q = log_softmax(h, 1.0, False)
        row = -log_q.gather(1, targets[0][:, None])[:, 0]
        if mix is not None:
            row = mix * row - (1 - mix) * log_q.gather(1, targets[1][:, None])[:, 0]
        if smoothing:
            row = (1 - smoothing) * row - smoothing / C * log_q.sum(1)
        ce.append(((row + nan) * share).sum())
    kl = []
    for e in edges:
        log_q = log_softmax(e.teacher, e.T, e.detach)
        q = log_q.exp()
        if e.eps:
            q = q + e.eps
            log_q = q.log()
        row = (q * (log_q - log_softmax(e.student, e.T, False))).sum(1)
        kl.append(e.T**2 * (row * share).sum())

    zero = nodes[0].sum() * 0 if not (ce or kl) else share.new_zeros(())
    ce_H = torch.stack(ce) if ce else share.new_zeros(0)
    kl_E = torch.stack(kl) if kl else share.new_zeros(0)
    loss = zero + sum((w * c for (_, w), c in zip(hard, ce, strict=True)), zero) + (weights.to(wide) * kl_E).sum()
    with torch.no_grad():
        ranks = rank(torch.cat(nodes), targets[0].repeat(len(nodes))).view(len(nodes), -1)
        scored = keep & (labels >= 0) & (labels < C)
        top1, top5 = (((ranks < n) & scored).sum(1) for n in (1, TOP))
    return GraphOut(loss, ce_H.detach(), kl_E.detach(), top1, top5, rows)


@cache
def _jit() -> ModuleType:
    """The device code, imported when first needed: a machine may have no triton."""
    from .jit import distill_graph

    return distill_graph


@lru_cache(maxsize=256)
def _static(graph: Callable[..., dict[str, Any]], given: int, *flat: tuple[Any, ...]) -> dict[str, Any]:
    """The kernels' constants from the flat lists an operator's schema can hold; a step asks for the same ones every time."""
    hard, hard_weights, edges, temperatures, eps, members, sizes = flat
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    means = [members[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    triples = [edges[3 * e : 3 * e + 3] for e in range(len(edges) // 3)]
    full = [(t, s, T, bool(d), x) for (t, s, d), T, x in zip(triples, temperatures, eps, strict=True)]
    return graph(given, list(zip(hard, hard_weights, strict=True)), full, means)


@torch.library.custom_op("fastffl::distill_graph", mutates_args=())
def _graph_op(
    logits: list[Tensor],
    labels: Tensor,
    labels2: Tensor | None,
    mix: Tensor | None,
    weights: Tensor,
    hard: list[int],
    hard_weights: list[float],
    edges: list[int],
    temperatures: list[float],
    eps: list[float],
    members: list[int],
    sizes: list[int],
    ignore_index: int | None,
    smoothing: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """loss, ce, kl, top1, top5, rows and the gradients of the wanted nodes. edges: (teacher, student, detach) flattened."""
    jit, device = _jit(), logits[0].device
    B, C = logits[0].shape
    flat = (hard, hard_weights, edges, temperatures, eps, members, sizes)
    static = _static(jit.graph, len(logits), *(tuple(part) for part in flat))
    nodes = len(logits) + len(sizes)
    f32, i64 = torch.float32, torch.int64
    loss, ce, kl = (_launch.empty(shape, f32, device) for shape in ((), (len(hard),), (len(temperatures),)))
    top1, top5, rows = (_launch.empty(shape, i64, device) for shape in ((nodes,), (nodes,), ()))
    grads = [_launch.empty((B, C), z.dtype, device) for z, w in zip(logits, wanted, strict=True) if w]
    if B == 0:
        for t in (loss, ce, kl, top1, top5, rows):
            t.zero_()
        return loss, ce, kl, top1, top5, rows, grads
    labels, weights = labels.contiguous(), weights.contiguous()
    labels2 = None if labels2 is None else labels2.contiguous()
    config = jit.pick(B, C, nodes, static["UNDETACHED"], smoothing > 0 or labels2 is not None)
    programs = divup(B, config.rows)
    group, groups = jit.groups(programs)
    partials = _launch.empty((programs + groups, static["SLOTS"]), f32, device)
    asked = iter(grads)
    fixed = {"IGNORE": ignore_index, "MIXED": labels2 is not None, "SCAN": config.scan}
    if ignore_index is not None and not config.scan:
        launch(jit.count_kernel, (1,), device, rows, labels, labels2, B, warps=8, **{**fixed, "SCAN": 4096})
    launch(
        jit.loop_kernel if config.loop else jit.one_block_kernel, (programs,), device,
        tuple(logits), tuple(next(asked) if w else z for z, w in zip(logits, wanted, strict=True)),
        tuple(z.stride(0) for z in logits), tuple(z.stride(1) for z in logits),
        labels, labels2, mix, mix.stride(0) if mix is not None else 0, weights,
        loss, ce, kl, top1, top5, rows, partials, _launch.counters(device, 1 + groups), B, programs, group,
        warps=config.warps, maxnreg=jit.MAXNREG, C=C, GRADS=tuple(wanted), SMOOTHING=smoothing,
        CONTIGUOUS=all(z.is_contiguous() for z in logits), **{**static, **config.constants(), **fixed},
    )  # fmt: skip
    return loss, ce, kl, top1, top5, rows, grads


@_graph_op.register_fake
def _graph_fake(logits, labels, labels2, mix, weights, hard, hard_weights, edges, temperatures, *rest):  # type: ignore[no-untyped-def]
    sizes, wanted = rest[2], rest[5]
    nodes = len(logits) + len(sizes)
    f32, i64 = {"dtype": torch.float32}, {"dtype": torch.int64}
    new = logits[0].new_empty
    grads = [torch.empty(z.shape, dtype=z.dtype, device=z.device) for z, w in zip(logits, wanted, strict=True) if w]
    counts = (new((nodes,), **i64), new((nodes,), **i64), new((), **i64))
    return new((), **f32), new((len(hard),), **f32), new((len(temperatures),), **f32), *counts, grads


@torch.library.custom_op("fastffl::scale_", mutates_args=("grads",))
def _scale_op(grads: list[Tensor], factor: Tensor) -> None:
    """grads *= factor, in place, contiguous; nothing is read or written where the factor is 1."""
    n = grads[0].numel()
    programs = min(divup(n, 2048), 1056)  # 8 programs of 8 warps on each of 132 multiprocessors
    for few in (grads[k : k + 8] for k in range(0, len(grads), 8)):
        launch(_jit().scale_kernel, (programs,), factor.device, tuple(few), factor, n, programs, BLOCK=2048, warps=8)


@_scale_op.register_fake
def _(grads, factor):  # type: ignore[no-untyped-def]
    return None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    _, ce, kl, top1, top5, rows, grads = output
    ctx.mark_non_differentiable(ce, kl, top1, top5, rows, *grads)
    ctx.save_for_backward(kl, *grads)
    ctx.wanted, ctx.weights = inputs[-1], inputs[4].dtype
    # torch takes an empty list of numbers for an empty list of tensors, whose gradient is an empty list
    ctx.nothing = [[] if x == [] else None for x in inputs[5:]]


def _backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("distill_graph: double backward is not supported by the Triton path; FASTFFL_KERNELS=reference has it")
    nothing: list[Any] = [[None] * len(ctx.wanted), None, None, None, None, *ctx.nothing]
    if g is None:
        return tuple(nothing)
    try:
        kl, *grads = ctx.saved_tensors
    except RuntimeError as error:
        raise RuntimeError("distill_graph: backward ran through this loss already; its gradients are made once") from error
    if not all(type(v) is Tensor for v in grads):  # being traced: a graph has no place for writing into what it saved
        grads = [(v.to(torch.float32) * g).to(v.dtype) for v in grads]
    elif grads and grads[0].numel():
        _scale_op(grads, g)
    asked = iter(grads)
    nothing[0] = [next(asked) if w else None for w in ctx.wanted]
    if ctx.needs_input_grad[4]:
        nothing[4] = (g * kl).to(ctx.weights)
    return tuple(nothing)


_graph_op.register_autograd(_backward, setup_context=_keep)
_launch.LAUNCHES |= {"fastffl::distill_graph": 1, "fastffl::scale_": 1}


def _triton(
    logits: tuple[Tensor, ...], labels: Tensor, hard: tuple[tuple[int, float], ...], edges: tuple[GraphEdge, ...],
    weights: Tensor, means: tuple[tuple[int, ...], ...], ignore_index: int | None, *,
    labels2: Tensor | None, mix: Tensor | None, smoothing: float,
) -> GraphOut:  # fmt: skip
    flat = (
        [h for h, _ in hard], [float(w) for _, w in hard],
        [x for e in edges for x in (e.teacher, e.student, int(e.detach))], [float(e.T) for e in edges],
        [float(e.eps) for e in edges], [k for members in means for k in members], [len(members) for members in means],
    )  # fmt: skip
    on = torch.is_grad_enabled()
    learns = {h for h, _ in hard} | {e.student for e in edges} | {e.teacher for e in edges if not e.detach}
    learns |= {k for g, members in enumerate(means) if len(logits) + g in learns for k in members}
    wanted = [on and z.requires_grad and k in learns for k, z in enumerate(logits)]
    out = _graph_op(list(logits), labels, labels2, mix, weights, *flat, ignore_index, float(smoothing), wanted)
    return GraphOut(*out[:6])


register("distill_graph", _triton)


def bytes_moved(B: int, C: int, given: int, dtype: torch.dtype, upstream_one: bool = True) -> int:
    """Bytes a forward and backward must move: logits in, gradients out, labels; and the gradients in and out once more where
    the upstream gradient is not 1."""
    return given * B * C * dtype.itemsize * (2 if upstream_one else 4) + 8 * B


def distill_graph(
    logits: tuple[Tensor, ...],
    labels: Tensor,
    hard: tuple[tuple[int, float], ...],
    edges: tuple[GraphEdge, ...],
    weights: Tensor,
    means: tuple[tuple[int, ...], ...] = (),
    ignore_index: int | None = -100,
    *,
    labels2: Tensor | None = None,
    mix: Tensor | None = None,
    smoothing: float = 0.0,
    check: bool = True,
) -> GraphOut:
    """All terms, the total loss and the counts of one step (Kim et al., Feature Fusion Learning; and its siblings by data).

    logits        M tensors (B, C), or heatmaps (B, J, H, W) whose rows are (b, joint) and whose classes are the H W pixels;
                  bf16, fp16, fp32 (also mixed; fp64 takes the reference path), one device; any strides; never stacked or changed.
                  Strided labels and weights are copied
    labels        (B,) int64 in [0, C) or `ignore_index`; for heatmaps (B, J), the pixel h W + w. On the CPU a label outside is a
                  ValueError; on a GPU, where the host reads nothing, it makes the loss NaN
    hard          (node, weight) of every node that meets the labels
    edges         who teaches whom; indices below M + len(means)
    weights       (E,) floating point on the device: an edge's weight, ramp included, so that a captured step can change it
    means         groups of given nodes whose mean logits form a further node each
    ignore_index  rows with this label weigh nothing; None: there are no such rows, and nobody looks for them
    labels2, mix  second labels (as `labels`) and the share of the first ones, floating point (B,) in [0, 1]: mixup and cutmix.
                  Counts are of the first labels
    smoothing     label smoothing s in [0, 1)
    check         False: the labels' range was checked before (`check_labels`), as where a data set is read

    The gradient flows through `loss`, into logits and weights, once (retain_graph does not help); ce and kl are for the
    record. B = 0 and all rows ignored give loss 0 with zero gradients (torch's own cross-entropy gives NaN there). Reductions
    run in a fixed order: the same input gives the same bits. ValueError says what was wrong with shapes, dtypes, devices or
    indices; a second derivative is a RuntimeError on the Triton path.
    """
    if not logits:
        raise ValueError("distill_graph needs at least one node's logits, got none")
    if all(z.ndim == 4 for z in logits):
        flat = tuple(z.flatten(2).flatten(0, 1) for z in logits)
        rows = [None if t is None else t.flatten() for t in (labels, labels2, mix)]
        assert rows[0] is not None
        return distill_graph(
            *(flat, rows[0], hard, edges, weights, means, ignore_index),
            labels2=rows[1],
            mix=rows[2],
            smoothing=smoothing,
            check=check,
        )
    shape, device = logits[0].shape, logits[0].device
    for k, z in enumerate(logits):
        if z.ndim != 2 or z.shape != shape:
            raise ValueError(f"logits[{k}] is {tuple(z.shape)}; every node needs the same (B, C), here {tuple(shape)}")
        if not z.is_floating_point():
            raise ValueError(f"logits[{k}] is {z.dtype}; expected bf16, fp16, fp32 or fp64")
        if z.device != device:
            raise ValueError(f"logits[{k}] is on {z.device}, logits[0] on {device}")
    if shape[1] < 1:
        raise ValueError(f"logits are {tuple(shape)}; expected at least one class")
    for name, y in (("labels", labels), ("labels2", labels2)):
        if y is not None and (y.shape != shape[:1] or y.dtype != torch.int64 or y.device != device):
            raise ValueError(
                f"{name} are {tuple(y.shape)} {y.dtype} on {y.device}; expected ({shape[0]},) torch.int64 on {device}"
            )
    if (labels2 is None) != (mix is None):
        raise ValueError("labels2 and mix belong together: got only one of them")
    if mix is not None and (mix.shape != shape[:1] or not mix.is_floating_point() or mix.device != device):
        raise ValueError(
            f"mix is {tuple(mix.shape)} {mix.dtype} on {mix.device}; expected ({shape[0]},) floating point on {device}"
        )
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing}; expected 0 <= smoothing < 1")
    if weights.shape != (len(edges),) or weights.device != device or not weights.is_floating_point():
        raise ValueError(
            f"weights are {tuple(weights.shape)} {weights.dtype} on {weights.device}; expected one per edge, ({len(edges)},), "
            f"floating point on {device}"
        )
    if not all(members and all(0 <= k < len(logits) for k in members) for members in means):
        raise ValueError(f"means {means} must name given nodes 0..{len(logits) - 1}")
    count = len(logits) + len(means)
    named = [h for h, _ in hard] + [k for e in edges for k in (e.teacher, e.student)]
    if not all(0 <= k < count for k in named):
        raise ValueError(f"hard {hard} or edges {edges} name a node outside 0..{count - 1}")
    for e in edges:
        if not 0 < e.T < float("inf") or not e.eps >= 0:
            raise ValueError(f"edge {e.teacher}>{e.student}: T={e.T}, eps={e.eps}; expected a finite T > 0 and eps >= 0")
    if check and device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(labels, shape[1], ignore_index)
        if labels2 is not None:
            check_labels(labels2, shape[1], ignore_index)
    arguments = (logits, labels, hard, edges, weights, means, ignore_index)
    mixed: dict[str, Any] = {"labels2": labels2, "mix": mix, "smoothing": smoothing}
    if any(z.dtype == torch.float64 for z in logits):
        return distill_graph_reference(*arguments, **mixed)
    out: GraphOut = run("distill_graph", logits[0], distill_graph_reference, *arguments, **mixed)
    return out


def check_labels(labels: Tensor, classes: int, ignore_index: int | None = -100) -> None:
    """ValueError if a label is neither in [0, classes) nor `ignore_index`. A host read: for the CPU, or once per data set."""
    bad = (labels < 0) | (labels >= classes)
    if ignore_index is not None:
        bad = bad & (labels != ignore_index)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"labels[{first}] is {int(labels[first])}; expected a class 0..{classes - 1} or ignore_index={ignore_index}"
        )
