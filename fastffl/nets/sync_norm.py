"""sync_norm: batch norms over the samples of all ranks, by changing the class of the layers in place and back.

On CUDA the layers become torch's SyncBatchNorm. torch has none for a CPU; there the same arithmetic is written out, in two sums
over the ranks that autograd knows how to differentiate.
"""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Synced:
    """What the changed layers have in common: `plain` is the class they came from."""

    plain: type[nn.Module]


def normalised(bn: Any, x: Tensor) -> Tensor:
    """x (B, D, ...) by the mean and variance of all ranks' samples, each rank counting by its own number (Chan et al. 1979: the
    variances within ranks and that between them). Running statistics follow as in torch, with the unbiased variance."""
    if not bn.training:
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    over = [k for k in range(x.ndim) if k != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    n = wide.new_full((1,), float(x.numel() // x.shape[1]))
    own = wide.mean(over)
    sums = all_reduce(torch.cat([own * n, n]))
    total = sums[-1]
    mean = sums[:-1] / total
    var = all_reduce(n * (wide.var(over, correction=0) + (own - mean) ** 2)) / total
    if bn.running_mean is not None:
        bn.num_batches_tracked.add_(1)
        momentum = 1 / bn.num_batches_tracked.float() if bn.momentum is None else bn.momentum
        with torch.no_grad():
            bn.running_mean.lerp_(mean.detach(), momentum)
            bn.running_var.lerp_(var.detach() * total / (total - 1).clamp(min=1), momentum)
    y = (wide - mean.view(shape)) * (var.view(shape) + bn.eps).rsqrt()
    if bn.weight is not None:
        y = y * bn.weight.view(shape) + bn.bias.view(shape)
    return y.to(x.dtype)


@cache
def _class(kind: type[nn.Module], cuda: bool) -> type[nn.Module]:
    """The layer class that takes the place of `kind`: torch's norms, and timm's norm with its activation."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if cuda:
            y = nn.SyncBatchNorm.forward(self, x)
        else:
            y = normalised(self, x)
        return y if kind in PLAIN else self.act(self.drop(y))

    bases = (_Synced, kind, nn.SyncBatchNorm) if cuda else (_Synced, kind)
    # process_group None is the default one: all ranks
    return type(f"Sync{kind.__name__}", bases, {"forward": forward, "plain": kind, "process_group": None})


def _takes(kind: type[nn.Module]) -> bool:
    from timm.layers import BatchNormAct2d

    return kind in PLAIN or kind is BatchNormAct2d


def sync_norms(module: nn.Module, cuda: bool) -> int:
    """Every batch norm of `module` over all ranks; how many there are. Those of unknown subclasses stay as they are.

    cuda   where the module is going to be
    """
    assert dist.is_initialized()
    found = [m for m in module.modules() if isinstance(m, _BatchNorm) and _takes(type(m))]
    for m in found:
        changed: Any = _class(type(m), cuda)  # type: ignore[arg-type]
        m.__class__ = changed
    return len(found)


def plain_norms(module: nn.Module) -> None:
    """Undo `sync_norms`."""
    for m in module.modules():
        if isinstance(m, _Synced):
            m.__class__ = m.plain  # type: ignore[assignment]
