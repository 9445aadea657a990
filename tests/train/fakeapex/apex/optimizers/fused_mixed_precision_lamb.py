"""FusedMixedPrecisionLamb's habits: as FusedAdam's, with a norm of all gradients and a load_state_dict that leaves tensors where
they are."""

from copy import deepcopy
from typing import Any

import amp_C
import torch


class FusedMixedPrecisionLamb(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float, weight_decay: float = 0.01, max_grad_norm: float = 1.0):
        defaults = {"lr": torch.tensor(lr), "step": torch.tensor([0], dtype=torch.int), "betas": (0.9, 0.999), "eps": 1e-6}
        super().__init__(params, {**defaults, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm})
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self.param_groups[-1].update({k: v.clone() for k, v in self.defaults.items() if isinstance(v, torch.Tensor)})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = deepcopy(state_dict)
        of = dict(enumerate(p for group in self.param_groups for p in group["params"]))
        for mine, theirs in zip(self.param_groups, saved["param_groups"], strict=True):
            mine.update({k: v for k, v in theirs.items() if k != "params"})
        self.state.clear()
        self.state.update({of[k]: v for k, v in saved["state"].items()})

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        device = self.param_groups[0]["params"][0].device
        found = grad_scaler._check_inf_per_device(self)[device] if grad_scaler is not None else torch.zeros(1)
        self._dummy_overflow_buf.copy_(found)
        scale = grad_scaler._get_scale_async() if grad_scaler else torch.ones(1)
        most, inverse = self.defaults["max_grad_norm"] * scale, scale.double().reciprocal().float()
        norm = amp_C.multi_tensor_l2norm_mp(65536, self._dummy_overflow_buf, [grads], False)[0]
        for group in self.param_groups:
            group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            lists: list[list[Any]] = [[], [], [], []]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p.data), torch.zeros_like(p.data)
                for kept, t in zip(lists, (p.grad, p, state["exp_avg"], state["exp_avg_sq"]), strict=True):
                    kept.append(t)
            how = (group["lr"], *group["betas"], group["eps"], group["step"], 1, group["weight_decay"], 1, 1)
            amp_C.multi_tensor_lamb_mp(65536, self._dummy_overflow_buf, lists, *how, norm, most, False, found, inverse)
