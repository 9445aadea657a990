"""Cases of nce, and its answer as its formula reads: every row gathered, every pair by itself, in float64, by autograd."""

import random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastffl_kernels import Classes, class_order, negatives


class Case(NamedTuple):
    banks: Tensor
    v: Tensor
    ids: Tensor
    labels: Tensor
    classes: Classes
    counter: Tensor
    options: dict[str, Any]

    @property
    def given(self) -> tuple[Any, ...]:
        return self[:-1]


def make(M: int, N: int, D: int, B: int, R: int, C: int, r: random.Random | None = None, **options: Any) -> Case:
    """Random unit rows, classes of uneven sizes, ids without duplicates; with `r` some samples weigh nothing, in both ways."""
    of_all = (torch.rand(N) ** 2 * C).long()
    of_all[:2] = torch.arange(2)
    ids = torch.randperm(N)[:B]
    labels = of_all[ids]
    if r is not None:
        for k in range(B):
            if r.random() < 0.15:
                (ids if r.random() < 0.5 else labels)[k] = -1 if r.random() < 0.5 and ids[k] >= 0 else -100
        labels[labels == -1] = -100
    banks, v = F.normalize(torch.randn(M, N, D), dim=2), F.normalize(torch.randn(M, B, D), dim=2)
    counter = torch.tensor(r.randrange(-(2**63), 2**63) if r else 5)
    return Case(banks, v.requires_grad_(), ids, labels, class_order(of_all, C), counter, {"count": R, "tau": 0.1, **options})


def naive(c: Case, N: int | None = None, drawn: Tensor | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss, values of the pairs, gradient for v. The negatives are what `negatives` says unless given, with the banks' length."""
    R, tau, eps = c.options["count"], c.options["tau"], c.options.get("eps", 1e-7)
    M, N = len(c.banks), N or c.banks.shape[1]
    live = [i for i in range(len(c.ids)) if c.ids[i] >= 0 and c.labels[i] != -100]
    drawn = negatives(c.ids, c.labels, c.classes, R, c.counter).long() if drawn is None else drawn
    banks, v = c.banks.double(), c.v.detach().double().requires_grad_()
    pairs = []
    for a in range(M):
        for b in range(M):
            if a == b:
                continue
            rows = [banks[a][torch.cat([c.ids[i : i + 1], drawn[i]])] for i in live]
            scores = [torch.exp(row @ v[b, i] / tau) for row, i in zip(rows, live, strict=True)]
            Z = N * torch.stack(scores).mean().detach() if live else 1.0
            total = v.sum() * 0
            for s in scores:
                P = s / Z
                total = total - torch.log(P[0] / (P[0] + R / N + eps)) - torch.log(R / N / (P[1:] + R / N + eps)).sum()
            pairs.append(total / max(len(live), 1))
    loss = torch.stack(pairs).sum()
    return loss.detach(), [p.detach() for p in pairs], torch.autograd.grad(loss, v)[0]


def wrong(c: Case, got: Any, grad: Tensor, upstream: float, rtol: float = 5e-6, **known: Any) -> str:
    """What of an answer is further from the formula than `rtol` of its largest value, in words; empty if nothing."""
    loss, pairs, want = naive(c, **known)
    for name, x, y in (("loss", got.loss, loss), ("pairs", got.pairs, torch.stack(pairs)), ("gradient", grad, want * upstream)):
        if x.shape != y.shape or x.dtype != c.v.dtype:
            return f"{name} is {tuple(x.shape)} {x.dtype}, expected {tuple(y.shape)}"
        off, top = float((x.detach().double() - y).abs().max()), float(y.abs().max())
        if not off <= rtol * top:
            return f"{name} is off by {off:.3g}, its largest value is {top:.3g}"
    return ""
