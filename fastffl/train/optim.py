"""The optimizer of a learner: parameter groups with their own weight decay, fused where torch has it, flat on a GPU.

On a GPU all parameters lie in one buffer: one launch updates them and writes the half-precision weights that the next forward
computes with, so that no step casts a weight. On a CPU torch's own fused optimizers are faster (one pass, no chunks).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastffl_kernels.sgd_flat import FlatParameters, FlatSGD

from .. import methods
from ..recipe import Optim
from .learner import Learner

# what autocast computes in half precision with weights of its own; other classes may read theirs in fp32
LOWERED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


def groups(learner: Learner, optim: Optim) -> list[dict[str, object]]:
    """Parameter groups: peers and method, each split into decayed and (where the recipe says so) not decayed norm and bias.

    Every trainable parameter is in exactly one group, or in an objective; a shared stem counts once.
    """
    own = methods.ask(learner.method, "decay")
    made: list[dict[str, object]] = []
    # what the method has for its objectives alone is theirs
    seen = {id(p) for o in learner.objectives for p in o.params} & {id(p) for p in learner.method.parameters()}
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


class FlatAdamW(torch.optim.AdamW):
    """torch's fused AdamW over parameters that lie in one buffer; the shadows are written after it."""

    def __init__(self, parts: list[dict[str, Any]], lr: float, shadow: torch.dtype | None):
        cuda = all(p.is_cuda for part in parts for p in part["params"])
        super().__init__(parts, lr=lr, fused=True, capturable=cuda)
        members = [(p, k) for k, group in enumerate(self.param_groups) for p in group["params"]]
        self.flat = FlatParameters([p for p, _ in members], [k for _, k in members], shadow)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.flat.adopt()
        loss = super().step(closure)
        self.flat.refresh()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.flat.refresh()


class HostRate(Optimizer):
    """Put before an optimizer whose rate is a constant of its launches: a captured step would repeat that rate for ever."""

    def step(self, closure: Callable[[], Any] | None = None, **more: Any) -> Any:
        if self.param_groups[0]["params"][0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("this optimizer takes its rate from the host; optim.impl=auto does not")
        inner: Any = super()
        return inner.step(closure, **more)


class TorchSGD(HostRate, torch.optim.SGD):
    """torch's own."""


class TorchAdamW(HostRate, torch.optim.AdamW):
    """torch's own."""


def build(learner: Learner, optim: Optim, flat: bool | None = None) -> Optimizer:
    """SGD, AdamW or LAMB. Its `found_inf` attribute, set by the step, makes it skip on the device.

    flat   parameters in one buffer, `.flat` of the optimizer, with shadows in the learner's half precision; None: with
           optim.impl=auto, not on a CPU
    """
    parts = groups(learner, optim)
    if optim.impl == "apex":
        from . import apex

        return apex.build(parts, optim)
    if flat is None:
        flat = optim.impl == "auto" and next(learner.parameters()).device.type != "cpu"
    nesterov = optim.nesterov and optim.momentum > 0
    if flat and optim.name == "adamw":
        return FlatAdamW(parts, optim.lr, learner.amp_dtype)
    if flat:
        return FlatSGD(parts, lr=optim.lr, momentum=optim.momentum, nesterov=nesterov, shadow=learner.amp_dtype)
    if optim.name == "adamw":
        return TorchAdamW(parts, lr=optim.lr, fused=True)
    made = TorchSGD(parts, lr=optim.lr, momentum=optim.momentum, nesterov=nesterov, fused=True)
    if optim.momentum:
        # torch (2.11 to 2.15) allocates fused momentum by empty_like on the first step and takes it as written even
        # where that step is skipped: the next step then reads garbage. Zeros are exact, as dampening is 0.
        for group in made.param_groups:
            for p in group["params"]:
                made.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return made


class Lowered:
    """`with lowered():` the convolutions and linear layers of a net compute with their half-precision shadows.

    Values and gradients are those of autocast, which would cast the same weights in every step. Outside the block the net
    holds its fp32 parameters: what is saved, averaged and exported knows nothing of this.
    """

    def __init__(self, net: nn.Module, flat: FlatParameters):
        layers = [m for m in net.modules() if type(m) in LOWERED]
        found = [(m._parameters, name, p) for m in layers for name, p in m._parameters.items() if p is not None]
        leaves = flat.lower(p for _, _, p in found) if flat.shadow is not None else {}
        self._slots = [(slot, name, p, leaves[p]) for slot, name, p in found if p in leaves]
        self._leaves = leaves

    def leaf(self, p: nn.Parameter) -> Tensor:
        """What the block computes with in place of `p`."""
        return self._leaves.get(p, p)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        try:
            for slot, name, _, leaf in self._slots:
                slot[name] = leaf
            yield
        finally:
            for slot, name, p, _ in self._slots:
                slot[name] = p


def flat_of(optimizer: Optimizer) -> FlatParameters | None:
    """The buffers of a flat optimizer."""
    return getattr(optimizer, "flat", None)
