"""NVIDIA's apex: whether what is installed is it and can be used, and its fused optimizers, made to skip on the device.

Another project holds the name `apex` on the package index, so it is known by its files, before anything of it is imported. Of
its kernels those are used that read the flag "change nothing": multi_tensor_sgd, multi_tensor_adam_capturable and
multi_tensor_lamb_mp. Those of plain FusedAdam and FusedLAMB ignore it (apex of July 2026, csrc/).
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import UsageError
from ..recipe import Optim
from .optim import HostRate

State = Literal["ok", "absent", "wrong", "python-only", "mismatched"]
KERNELS = ("multi_tensor_sgd", "multi_tensor_adam_capturable", "multi_tensor_lamb_mp", "multi_tensor_l2norm_mp")
DEVICES = ("cuda",)  # what its kernels compute on


class Found(NamedTuple):
    """state; said: what is the matter, fix: what to do about it, both empty where it can be used."""

    state: State
    version: str = ""
    said: str = ""
    fix: str = ""


def _build() -> str:
    nvcc = f"with nvcc {torch.version.cuda}, torch's own, " if torch.version.cuda else ""
    command = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
    return f"{nvcc}in a clone of github.com/NVIDIA/apex: {command}"


def _version() -> str:
    try:
        return importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        return ""


def found() -> Found:
    """What `apex` is here. Nothing of another project's is run; amp_C, the compiled part, is loaded if the rest is NVIDIA's.

    absent       no package of that name
    wrong        a package of that name that is not NVIDIA's
    python-only  NVIDIA's, built without its CUDA part
    mismatched   compiled for another torch, or too old to have what is needed
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Found("absent", said="NVIDIA's apex is not installed", fix=_build())
    places = [Path(p) for p in spec.submodule_search_locations or []]
    if not any((p / "optimizers" / "fused_sgd.py").is_file() for p in places):
        at = places[0] if places else spec.origin
        fix = f"pip uninstall apex, then {_build()}"
        return Found("wrong", _version(), f"the package 'apex' in {at} is not NVIDIA's but another project's", fix)
    if importlib.util.find_spec("amp_C") is None:
        return Found("python-only", _version(), "apex was built without its CUDA part (amp_C)", _build())
    try:
        part = importlib.import_module("amp_C")
    except ImportError as error:
        said = f"apex was compiled for another torch than {torch.__version__} ({str(error).splitlines()[0]})"
        return Found("mismatched", _version(), said, f"build it again, {_build()}")
    if lacking := [name for name in KERNELS if not hasattr(part, name)]:
        return Found(
            "mismatched", _version(), f"apex is too old, its amp_C has no {lacking[0]}", f"build a newer one, {_build()}"
        )
    return Found("ok", _version())


def _class(module: str, name: str) -> Any:
    """A class of apex. UsageError where apex can't be used, in one sentence."""
    at = found()
    if at.state != "ok":
        raise UsageError(f"optim.impl apex: {at.said}; {at.fix}; or leave it: --set optim.impl=auto")
    try:
        return getattr(importlib.import_module(f"apex.optimizers.{module}"), name)
    except (ImportError, AttributeError) as error:
        said = f"apex {at.version} can't be used beside torch {torch.__version__} ({str(error).splitlines()[0]})"
        raise UsageError(f"optim.impl apex: {said}; build a newer one, {_build()}; or leave it: --set optim.impl=auto") from None


class Skipping(HostRate):
    """What is put before a class of apex: its step obeys `found_inf` (one fp32 on the device, set before it) without a host
    read, where apex's own asks a GradScaler. A step that is skipped changes nothing, its count of steps included."""

    found_inf: Tensor | None = None
    on_device = True  # apex's step takes rate and count from the device

    def prepare(self) -> None:
        """After apex's own __init__."""
        device = self.param_groups[0]["params"][0].device
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int, device=device)  # apex's name: not 0 means change nothing
        self._off, self._one = torch.zeros(1, device=device), torch.ones(1, device=device)
        self._rates = [torch.zeros((), device=device) for _ in self.param_groups]
        for group in self.param_groups:
            group["lr"] = float(group["lr"])
            if self.on_device:
                # apex sets 1 in the first step even where that one is skipped
                group["step"] = torch.zeros(1, dtype=torch.int, device=device)
            else:
                # apex takes a whole group for new if its last parameter is; zeros are exact, as dampening is 0
                for p in group["params"]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def zero_grad(self, set_to_none: bool = True) -> None:
        Optimizer.zero_grad(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **more: Any) -> Any:
        self._dummy_overflow_buf.copy_(self._flag())
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.stride() != p.stride():
                    p.grad = torch.empty_like(p).copy_(p.grad)  # the kernels go through memory, whatever the strides
        if not self.on_device:
            return super().step(closure)
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group, mine in zip(self.param_groups, self._rates, strict=True):
                group["lr"] = mine.fill_(group["lr"])
            return super().step(closure, grad_scaler=self)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def _flag(self) -> Tensor:
        return self._off if self.found_inf is None else self.found_inf

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[torch.device, Tensor]:
        """What apex asks a GradScaler: the flag."""
        flag = self._flag()
        return {flag.device: flag}

    def _get_scale_async(self) -> Tensor:
        """What apex asks a GradScaler: the loss scale, which the step has taken out of the gradients by now."""
        return self._one

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            if "step" in group:
                group["step"] = group["step"].to(self._off.device)
            for p in group["params"]:
                self.state[p] = {k: v.to(p.device) if isinstance(v, Tensor) else v for k, v in self.state[p].items()}


class SkippingSGD(Skipping):
    on_device = False


def build(parts: list[dict[str, Any]], optim: Optim) -> Optimizer:
    """FusedSGD, FusedAdam (as AdamW) or FusedMixedPrecisionLamb over parameter groups (`optim.groups`) of fp32 parameters.

    UsageError says what apex lacks, or that the parameters are not on CUDA. apex's own clipping in LAMB is off: `optim.clip`
    does that.
    """
    base: type[Skipping] = Skipping
    more: dict[str, Any] = {}
    if optim.name == "sgd":
        kind, base = _class("fused_sgd", "FusedSGD"), SkippingSGD
        more = {"momentum": optim.momentum, "nesterov": optim.nesterov and optim.momentum > 0}
    elif optim.name == "adamw":
        kind, more = _class("fused_adam", "FusedAdam"), {"adam_w_mode": True, "capturable": True}
    else:
        kind, more = _class("fused_mixed_precision_lamb", "FusedMixedPrecisionLamb"), {"max_grad_norm": float("inf")}
    device = parts[0]["params"][0].device
    if device.type not in DEVICES:
        raise UsageError(f"optim.impl apex computes on CUDA and this run is on {device.type}; --set optim.impl=auto works there")
    made: Any = type(f"Skipping{kind.__name__}", (base, kind), {})(parts, lr=optim.lr, **more)
    made.prepare()
    return made
