"""Kernels with the names, arguments and flags of NVIDIA's amp_C, in torch. None of them tells the host anything."""

from typing import Any

import torch
from torch import Tensor

Lists = list[list[Tensor]]
COUNT = {"calls": 0}


def _put(flag: Tensor, old: Tensor, new: Tensor) -> None:
    old.copy_(torch.where(flag.reshape(()) != 0, old, new))


def multi_tensor_sgd(
    chunk: int, flag: Tensor, lists: Lists, wd: float, mu: float, damp: float, lr: float, nesterov: bool, first: bool, *more: Any
) -> None:
    COUNT["calls"] += 1
    wd_after, scale = more
    assert isinstance(lr, float) and not wd_after and scale == 1.0 and flag.dtype == torch.int32
    for g, p, m in zip(*lists, strict=True):
        assert g.stride() == p.stride() == m.stride()
        d = g + wd * p
        buf = d.clone() if first else mu * m + (1 - damp) * d
        if mu:
            d = d + mu * buf if nesterov else buf
            _put(flag, m, buf)
        _put(flag, p, p - lr * d)


def multi_tensor_adam_capturable(
    chunk: int, flag: Tensor, lists: Lists, lr: Tensor, b1: float, b2: float, eps: float, step: Tensor, *more: Any
) -> None:
    COUNT["calls"] += 1
    mode, corrected, wd, inv_scale = more
    assert isinstance(lr, Tensor) and lr.dtype == torch.float32 and step.dtype == torch.int32 and mode == corrected == 1
    for g, p, m, v in zip(*lists, strict=True):
        g = g * inv_scale
        first, second = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        unbiased = (second / (1 - b2**step)).sqrt() + eps
        new = p - lr * (first / (1 - b1**step) / unbiased + wd * p)
        for old, now in ((p, new), (m, first), (v, second)):
            _put(flag, old, now)


def multi_tensor_l2norm_mp(chunk: int, flag: Tensor, lists: Lists, each: bool) -> tuple[Tensor, Tensor]:
    COUNT["calls"] += 1
    norm = torch.stack([t.norm() for t in lists[0]]).norm().reshape(1)
    _put(flag, flag, torch.where(norm.isfinite(), flag, torch.ones_like(flag)))
    return norm, norm


def multi_tensor_lamb_mp(
    chunk: int, flag: Tensor, lists: Lists, lr: Tensor, b1: float, b2: float, eps: float, step: Tensor, *more: Any
) -> None:
    COUNT["calls"] += 1
    corrected, wd, averaged, mode, norm, most, nvlamb, found, inv_scale = more
    assert lr.dtype == norm.dtype == most.dtype == found.dtype == torch.float32 and step.dtype == torch.int32
    assert corrected == averaged == mode == 1 and not nvlamb
    clipped = torch.where(norm > most, norm / most, torch.ones_like(norm))
    for g, p, m, v in zip(*lists, strict=True):
        g = g * inv_scale / clipped
        first, second = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        update = first / (1 - b1**step) / ((second / (1 - b2**step)).sqrt() + eps) + wd * p
        both = (p.norm() != 0) & (update.norm() != 0)
        ratio = torch.where(both, p.norm() / update.norm(), torch.ones(())) if wd else torch.ones(())
        for old, now in ((p, p - lr * ratio * update), (m, first), (v, second)):
            _put(flag, old, now)


def multi_tensor_adam(*_: Any) -> None:
    raise AssertionError("this kernel does not read the flag")


multi_tensor_adam_capturable_master = multi_tensor_lamb = multi_tensor_l2norm = multi_tensor_adam
