"""The optimizer of a learner: parameter groups with their own weight decay, fused where torch has it."""

import torch
from torch import nn
from torch.optim import Optimizer

from ..recipe import Optim
from .learner import Learner


def groups(learner: Learner, optim: Optim) -> list[dict[str, object]]:
    """Parameter groups: peers and method, each split into decayed and (where the recipe says so) not decayed norm and bias.

    Every trainable parameter is in exactly one group; a shared stem counts once.
    """
    own = learner.method.decay()
    made: list[dict[str, object]] = []
    seen: set[int] = set()
    for name, module, decay in (
        ("peers", learner.cohort, optim.weight_decay),
        ("method", learner.method, optim.weight_decay if own is None else own),
    ):
        weights: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for p in module.parameters():
            if p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                (weights if optim.decay_norm_bias or p.ndim > 1 else rest).append(p)
        for part, params, wd in ((name, weights, decay), (f"{name} norm+bias", rest, 0.0)):
            if params:
                made.append({"params": params, "weight_decay": wd, "name": part})
    return made


def build(learner: Learner, optim: Optim) -> Optimizer:
    """SGD or AdamW, fused. Its `found_inf` attribute, set by the step, makes it skip on the device."""
    parts = groups(learner, optim)
    if optim.name == "adamw":
        return torch.optim.AdamW(parts, lr=optim.lr, fused=True)
    made = torch.optim.SGD(
        parts, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov and optim.momentum > 0, fused=True
    )
    if optim.momentum:
        # torch (2.11 to 2.15) allocates fused momentum by empty_like on the first step and takes it as written even
        # where that step is skipped: the next step then reads garbage. Zeros are exact, as dampening is 0.
        for group in made.param_groups:
            for p in group["params"]:
                made.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return made
