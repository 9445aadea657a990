"""Nets whose BatchNorm, residual and ReLU run as one op: `fuse_norms(net)`.

Every plain nn.BatchNorm2d, and every timm BatchNormAct2d that ends in a ReLU or in nothing, changes its class and nothing else:
parameters, buffers, names and state_dict stay. On a CPU the op is torch's own functions in the same order, to the bit.
"""

from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastffl_kernels._launch import Norm
from fastffl_kernels.bn_act import bn_act


class Fused(nn.BatchNorm2d):
    """What the fused classes share. `then_relu`: the ReLU that follows in the net is done here."""

    then_relu = False

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False, fork: bool = False) -> Any:
        self._check_input_dim(input)
        assert self.momentum is not None  # else `fuse_norms` leaves it alone
        norm = Norm(self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps)
        return bn_act(
            input,
            norm,
            residual=residual,
            relu=relu or self.then_relu,
            training=self.training,
            batches=self.num_batches_tracked if self.training else None,
            fork=fork,
        )


class FusedBatchNorm2d(Fused):
    """nn.BatchNorm2d with what follows it: relu?(norm(x) + residual?). num_batches_tracked counts as in nn.BatchNorm2d."""


@cache
def _timm_class() -> type[nn.BatchNorm2d]:
    """timm's BatchNormAct2d, fused; made when first needed, so that nets without timm do not import it."""
    from timm.layers import BatchNormAct2d

    made = type("FusedBatchNormAct2d", (Fused, BatchNormAct2d), {"__module__": __name__, "__doc__": BatchNormAct2d.__doc__})
    return made


def __getattr__(name: str) -> Any:
    """Unpickling a whole module looks the class up by its name here."""
    if name == "FusedBatchNormAct2d":
        return _timm_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class DoneInNorm(nn.Identity):
    """In the place of a ReLU that the norm before it does."""

    def __init__(self, inplace: bool):
        super().__init__()
        self.inplace = inplace


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual?), one op where the norm is fused."""
    if isinstance(norm, Fused):
        return norm(x, residual, relu=True)
    h = norm(x)
    if residual is not None:
        h += residual  # in place: backward of BN does not need its output
    return F.relu(h, inplace=True)


def norm_relu_fork(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same twice, for two uses: where the norm is fused, their gradients are added in its backward."""
    if isinstance(norm, Fused) and not hooked(norm):
        return norm(x, residual, relu=True, fork=True)
    h = norm_relu(norm, x, residual)
    return h, h


def hooked(part: nn.Module) -> bool:
    """Whether somebody listens to what goes in or out, forward or backward."""
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)


def _plain(norm: nn.Module) -> bool:
    """Whether the op computes what this BatchNorm2d does, and nobody listens in between."""
    return (
        isinstance(norm, nn.BatchNorm2d)
        and norm.affine
        and norm.bias is not None
        and norm.track_running_stats
        and norm.running_mean is not None
        and norm.momentum is not None
        and not hooked(norm)
    )


# Where a net calls norm and activation one after the other, by the class that does: (norm, activation, what must be nothing).
_PAIRS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "timm.models.resnet.BasicBlock": (("bn1", "act1", "drop_block"),),
    "timm.models.resnet.Bottleneck": (("bn1", "act1", ""), ("bn2", "act2", "drop_block")),
    "timm.models.resnet.ResNet": (("bn1", "act1", ""),),
}


def _pairs(parent: nn.Module) -> list[tuple[str, str]]:
    """Names of (norm, ReLU) children that run one after the other."""
    kind = f"{type(parent).__module__}.{type(parent).__qualname__}"
    has = parent._modules
    if type(parent) is nn.Sequential:
        return list(pairwise(has))
    return [(n, a) for n, a, between in _PAIRS.get(kind, ()) if not between or type(has.get(between)) is nn.Identity]


def fuse_norms(net: nn.Module) -> int:
    """Fuse the BatchNorms of `net` in place and return how many.

    A ReLU goes into its norm where the structure shows that it follows: behind it in an nn.Sequential, inside timm's
    BatchNormAct2d, in timm's ResNet blocks; its place is taken by an nn.Identity. The blocks of this package's nets also give
    the residual. A norm that several parents hold keeps its ReLU apart.
    Left alone: SyncBatchNorm and other subclasses, momentum=None, track_running_stats=False, affine=False, norms with hooks.
    """
    ways = Counter(id(child) for parent in net.modules() for child in parent._modules.values())
    count = 0
    for norm in list(net.modules()):
        if not _plain(norm):
            continue
        if type(norm) is nn.BatchNorm2d:
            norm.__class__ = FusedBatchNorm2d
            count += 1
        elif (type(norm).__module__, type(norm).__name__) == ("timm.layers.norm_act", "BatchNormAct2d"):
            act, drop = norm._modules["act"], norm._modules["drop"]
            if type(act) in (nn.ReLU, nn.Identity) and type(drop) is nn.Identity:
                norm.__class__ = _timm_class()
                norm.then_relu = type(act) is nn.ReLU  # type: ignore[assignment]
                count += 1
    for parent in list(net.modules()):
        for first, second in _pairs(parent):
            norm, relu = parent._modules[first], parent._modules[second]  # type: ignore[assignment]
            if type(norm) is FusedBatchNorm2d and ways[id(norm)] == 1 and type(relu) is nn.ReLU and not hooked(relu):
                norm.then_relu = True
                parent._modules[second] = DoneInNorm(relu.inplace)
    return count


def unfuse_norms(net: nn.Module) -> None:
    """Undo `fuse_norms`: every norm and ReLU is of its own class again."""
    for parent in list(net.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, DoneInNorm):
                parent._modules[name] = nn.ReLU(child.inplace).train(child.training)
    for norm in net.modules():
        if isinstance(norm, Fused):
            norm.__dict__.pop("then_relu", None)
            norm.__class__ = nn.BatchNorm2d if type(norm) is FusedBatchNorm2d else _timm_class().__bases__[1]
