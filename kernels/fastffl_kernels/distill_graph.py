"""distill_graph: every cross-entropy, every teaching edge and the top-1/top-5 counts of one step.

Nodes are predictions z_m (B, C): those given, then one per entry of `means` (the mean of the logits of some of them).

    ce_h = 1/n sum_b  -log p_1(z_h)[y_b]                          for each labelled node h
    kl_e = T^2/n sum_b sum_c q' (log q' - log p_T(student))       for each edge e, q' = p_T(teacher) + eps
    loss = sum_h w_h ce_h + sum_e w_e kl_e

n counts the rows whose label is not `ignore_index`; the other rows weigh nothing, in ce and in kl. eps is 0 except to
reproduce code that adds 1e-7 to the teacher's probabilities (FFL, ONE; not renormalised: the sum is 1 + C eps).

Gradients for one student, S = 1 + C eps:   dz = w T/n (S p_T(z) - q')   and, for labels,   dz = w/n (p_1(z) - onehot(y)).
Letters: B rows, C classes, M nodes, H labelled nodes, E edges. Bytes at least: read and write every given logit once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import triton_path

TOP = 5


class GraphEdge(NamedTuple):
    """`teacher` teaches `student` (node indices) at temperature `T`; a detached teacher gets no gradient."""

    teacher: int
    student: int
    T: float = 3.0
    detach: bool = True
    eps: float = 0.0


class GraphOut(NamedTuple):
    """What one evaluation of the graph gives; all fp32 (fp64 for fp64 logits) except the counts, which are int64."""

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
    ignore_index: int = -100,
) -> GraphOut:
    """The graph in plain torch: the CPU path, the oracle of the tests and the benchmark's baseline."""
    wide = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    nodes = [z.to(wide) for z in logits]
    nodes += [torch.stack([nodes[k] for k in members]).mean(0) for members in means]
    keep = labels != ignore_index
    rows = keep.sum()
    share = keep.to(wide) / rows.clamp(min=1)  # (B,): 1/n where the row counts, 0 elsewhere
    y = labels.clamp(min=0)

    log_p: dict[tuple[int, float, bool], Tensor] = {}

    def log_softmax(node: int, T: float, detach: bool) -> Tensor:
        key = (node, T, detach)
        if key not in log_p:
            z = nodes[node].detach() if detach else nodes[node]
            log_p[key] = torch.log_softmax(z / T, 1)
        return log_p[key]

    ce = [-(log_softmax(h, 1.0, False).gather(1, y[:, None])[:, 0] * share).sum() for h, _ in hard]
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
        ranks = [rank(z, y) for z in nodes]
        top1 = torch.stack([((r < 1) & keep).sum() for r in ranks])
        top5 = torch.stack([((r < TOP) & keep).sum() for r in ranks])
    return GraphOut(loss, ce_H, kl_E, top1, top5, rows)


def distill_graph(
    logits: tuple[Tensor, ...],
    labels: Tensor,
    hard: tuple[tuple[int, float], ...],
    edges: tuple[GraphEdge, ...],
    weights: Tensor,
    means: tuple[tuple[int, ...], ...] = (),
    ignore_index: int = -100,
) -> GraphOut:
    """All terms, the total loss and the counts of one step (Kim et al., Feature Fusion Learning; and its siblings by data).

    logits        M tensors (B, C), floating point, one device; they are read, never stacked or changed
    labels        (B,) int64 in [0, C) or `ignore_index`; the range is the caller's to hold (checked where data is read)
    hard          (node, weight) of every node that meets the labels
    edges         who teaches whom; indices below M + len(means)
    weights       (E,) floating point on the device: an edge's weight, ramp included, so that a captured step can change it
    means         groups of given nodes whose mean logits form a further node each

    B = 0 and all rows ignored give loss 0 with zero gradients (torch's own cross-entropy gives NaN there).
    ValueError says what was wrong with shapes, dtypes, devices or indices.
    """
    if not logits:
        raise ValueError("distill_graph needs at least one node's logits, got none")
    shape, device = logits[0].shape, logits[0].device
    for k, z in enumerate(logits):
        if z.ndim != 2 or z.shape != shape:
            raise ValueError(f"logits[{k}] is {tuple(z.shape)}; every node needs the same (B, C), here {tuple(shape)}")
        if not z.is_floating_point():
            raise ValueError(f"logits[{k}] is {z.dtype}; expected bf16, fp16, fp32 or fp64")
        if z.device != device:
            raise ValueError(f"logits[{k}] is on {z.device}, logits[0] on {device}")
    if labels.shape != shape[:1] or labels.dtype != torch.int64 or labels.device != device:
        raise ValueError(
            f"labels are {tuple(labels.shape)} {labels.dtype} on {labels.device}; expected ({shape[0]},) torch.int64 on {device}"
        )
    if weights.shape != (len(edges),):
        raise ValueError(f"weights are {tuple(weights.shape)}; expected one per edge, ({len(edges)},)")
    if not all(members and all(0 <= k < len(logits) for k in members) for members in means):
        raise ValueError(f"means {means} must name given nodes 0..{len(logits) - 1}")
    count = len(logits) + len(means)
    named = [h for h, _ in hard] + [k for e in edges for k in (e.teacher, e.student)]
    if not all(0 <= k < count for k in named):
        raise ValueError(f"hard {hard} or edges {edges} name a node outside 0..{count - 1}")
    for e in edges:
        if not 0 < e.T < float("inf") or not e.eps >= 0:
            raise ValueError(f"edge {e.teacher}>{e.student}: T={e.T}, eps={e.eps}; expected a finite T > 0 and eps >= 0")
    path = triton_path("distill_graph", logits[0]) or distill_graph_reference
    out: GraphOut = path(logits, labels, hard, edges, weights, means, ignore_index)
    return out
