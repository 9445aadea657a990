"""FusedSGD's habits: the flag is a buffer that nobody sets, and a group's last parameter says whether it is the first step."""

from typing import Any

import amp_C
import torch


class FusedSGD(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float, momentum: float = 0, weight_decay: float = 0, nesterov: bool = False):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int)

    def zero_grad(self) -> None:  # type: ignore[override]  # it takes no argument
        raise AssertionError("its gradients are zeroed, not dropped")

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            lists: list[list[Any]] = [[], [], []]
            first = True
            for p in group["params"]:
                if p.grad is None:
                    continue
                first = "momentum_buffer" not in self.state[p]
                if first:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.data)
                for kept, t in zip(lists, (p.grad, p, self.state[p]["momentum_buffer"]), strict=True):
                    kept.append(t)
            mu, nesterov = group["momentum"], group["nesterov"]
            amp_C.multi_tensor_sgd(
                65536, self._dummy_overflow_buf, lists, group["weight_decay"], mu, 0.0, group["lr"], nesterov, first, False, 1.0
            )
