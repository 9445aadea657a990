"""objectives: losses of a method that have optimizers of their own, beside the one loss of everybody.

All gradients of a step are taken at one point, the weights before it: those of the loss by backward, an objective's by
autograd.grad for its own parameters alone; only then the optimizers step, the peers' first. (Stepping in between would change
weights that the second backward still needs.)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from .learner import Learner


class Objectives:
    """The optimizers of a learner's objectives, Adam each; `rate(share)` sets theirs to a share of their peak.

    leaf   what the forward computes with in place of a parameter
    """

    def __init__(self, learner: Learner, device: torch.device, leaf: Callable[[nn.Parameter], Tensor]):
        self.all, self._leaf = learner.objectives, leaf
        self._cuda = device.type == "cuda"
        self.optimizers = []
        for o in self.all:
            lr: Any = torch.tensor(o.lr, device=device) if self._cuda else o.lr  # a captured step reads it there
            options: dict[str, Any] = {"betas": o.betas, "weight_decay": o.weight_decay, "capturable": self._cuda}
            self.optimizers.append(torch.optim.Adam(o.params, lr=lr, fused=True, **options))
        self._grads: list[list[Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self.all)

    def rate(self, share: float) -> None:
        for o, optimizer in zip(self.all, self.optimizers, strict=True):
            for group in optimizer.param_groups:
                if self._cuda:
                    group["lr"].fill_(o.lr * share)
                else:
                    group["lr"] = o.lr * share

    def add(self, losses: Sequence[Tensor], up: Tensor, scale: Tensor | None) -> None:
        """Take the gradients of this part of a batch, times `up` less the loss scale in it, beside those of the parts before."""
        found = []
        for k, (o, loss) in enumerate(zip(self.all, losses, strict=True)):
            leaves = [self._leaf(p) for p in o.params]
            more = k < len(self.all) - 1
            made = torch.autograd.grad(loss, leaves, up, retain_graph=more)
            found.append([g.to(p.dtype) for g, p in zip(made, o.params, strict=True)])
            if scale is not None:  # now: the step's verdict may change it
                torch._foreach_div_(found[-1], scale)
        if self._grads:
            for mine, theirs in zip(self._grads, found, strict=True):
                torch._foreach_add_(mine, theirs)
        else:
            self._grads = found

    @property
    def grads(self) -> list[Tensor]:
        return [g for part in self._grads for g in part]

    def finite(self) -> Tensor:
        """() 0 where all gradients are finite, else NaN: added to a norm, it makes the step one that changes nothing."""
        return get_total_norm(self.grads) * 0

    def step(self, found_inf: Tensor) -> None:
        """All optimizers."""
        for o, optimizer, grads in zip(self.all, self.optimizers, self._grads, strict=True):
            for p, g in zip(o.params, grads, strict=True):
                p.grad = g
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # read by torch's fused optimizers
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._grads = []

    def forget(self) -> None:
        self._grads = []

    def state(self) -> list[dict[str, Any]]:
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        for state in states:
            for group in state["param_groups"]:
                group["lr"] = float(group["lr"])
        return states

    def load(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            mine = [{k: g[k] for k in ("lr", "fused", "capturable", "foreach")} for g in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, how in zip(optimizer.param_groups, mine, strict=True):
                group.update(how)
