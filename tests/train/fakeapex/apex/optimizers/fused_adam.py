"""FusedAdam's habits with capturable=True: count and rate on the device, the count begun at 1 and moved by the flag of the step
before, and the flag taken from a GradScaler or else cleared."""

from typing import Any

import amp_C
import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self, params: Any, lr: float, adam_w_mode: bool = False, capturable: bool = False, weight_decay: float = 0, **more: Any
    ):
        assert adam_w_mode and capturable, "its other kernels do not read the flag"
        defaults = {"lr": torch.tensor(lr), "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int)

    def zero_grad(self) -> None:  # type: ignore[override]
        raise AssertionError("it takes no argument")

    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:
        for group in self.param_groups:
            device = group["params"][0].device
            if "step" in group:
                group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            else:
                group["step"] = torch.tensor([1], dtype=torch.int)
            lists: list[list[Any]] = [[], [], [], []]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p.data), torch.zeros_like(p.data)
                for kept, t in zip(lists, (p.grad, p, state["exp_avg"], state["exp_avg_sq"]), strict=True):
                    kept.append(t)
            found = grad_scaler._check_inf_per_device(self)[device] if grad_scaler is not None else torch.zeros(1)
            self._dummy_overflow_buf.copy_(found)
            inverse = grad_scaler._get_scale_async().double().reciprocal().float() if grad_scaler else torch.ones(1)
            more = (1, 1, group["weight_decay"], inverse)
            how = (group["lr"], *group["betas"], group["eps"], group["step"])
            amp_C.multi_tensor_adam_capturable(65536, self._dummy_overflow_buf, lists, *how, *more)
