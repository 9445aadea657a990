"""Random steps for `guard`: its arguments and its state, with what is not finite in every place that can hold it."""

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastffl_kernels import GuardState, Verdict
from fastffl_kernels.guard import EVERY

WILD = (float("nan"), float("inf"), float("-inf"))


class Case(NamedTuple):
    """Arguments of one call: loss, ce, kl, top1, rows; the state; the gradient or its norm; options."""

    given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    state: GuardState
    by: dict[str, Tensor]
    options: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        return [*self.given, *(x for x in self.state if x is not None), *self.by.values()]


def draw(r: random.Random, grads: bool, n: int = 1) -> Case:
    """One step; half of them finite. `grads`: the norm is to be taken of n elements."""
    torch.manual_seed(r.randrange(1 << 30))
    H, E, N, limit = r.randrange(0, 6), r.randrange(0, 9), r.randrange(1, 9), r.choice((1, 3, 10))
    ce, kl, loss = torch.rand(H) * 5, torch.rand(E), torch.rand(()) * 5
    way = {"grads": torch.randn(n) * r.choice((1e-3, 1.0, 1e3))} if grads else {"norm": torch.rand(()) * 10}
    for x in r.sample([ce, kl, loss, *way.values()], r.choice((0, 0, 0, 1, 1, 2))):
        if x.numel():
            x.view(-1)[r.randrange(x.numel())] = r.choice(WILD)
    top1, rows = torch.randint(0, 129, (N,)), torch.tensor(r.randrange(0, 129))
    state = GuardState(
        streak=torch.tensor(r.choice((0, 0, 0, 1, limit - 1, limit, limit + 2))),
        skipped=torch.tensor(r.randrange(9)),
        bad=torch.rand(H + E + 1) < 0.3,
        loss_sum=torch.rand((), dtype=torch.float64) * 1e4,
        term_sum=torch.rand(H + E, dtype=torch.float64) * 1e4,
        top1=torch.randint(0, 1 << 40, (N,)),
        rows=torch.randint(0, 1 << 40, ()),
    )
    if r.random() < 0.5:
        good = torch.tensor(r.choice((0, 1, EVERY - 2, EVERY - 1, EVERY + 3)))
        state = state._replace(scale=torch.tensor(r.choice((65536.0, 1024.0, 2.0, 1.0, 1.5, 2.0**-3))), good=good)
    if r.random() < 0.5:
        state = state._replace(count=torch.tensor(float(r.choice((0, 1, 7, 1000, 1 << 20)))))
    options = {"clip": r.choice((None, 0.1, 5.0, 1e4)), "decay": r.choice((0.5, 0.999, 0.9999)), "limit": limit}
    return Case((loss, ce, kl, top1, rows), state, way, options)


def named(verdict: Verdict, state: GuardState) -> dict[str, Tensor | None]:
    """All that a call gives and leaves, by name."""
    return {**verdict._asdict(), **{f"state.{k}": v for k, v in state._asdict().items()}}
