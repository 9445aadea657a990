"""bn_act: BatchNorm over channels_last maps, the residual's addition and the ReLU, forward and backward.

    y = relu?((x - mean) / sqrt(var + eps) * weight + bias + residual?)

    g = dy where y > 0, dbias = sum g, dweight = sum g xhat, dx = weight / std (g - dbias / N - xhat dweight / N)

x (B, C, H, W) is taken as rows (N, C), N = B H W. X = N C itemsize, the bytes of one map. Maps moved through HBM:

    training forward    2 launches  stats x | x, residual -> y                                       3 X, 4 X with residual
    backward            2 launches  sums dy, x | dy, x -> dx                                         5 X
      relu + residual               sums dy, x, y -> g | g, x -> dx; g is the residual's gradient    7 X
      fork                          sums dy, dskip, x -> g | g, x -> dx                              7 X
      fork, relu + residual         sums dy, dskip, x, y -> g | g, x -> dx                           8 X
    eval                1 launch    x, residual -> y                                                 2 X, 3 X with residual
    small maps          1 launch each way, whose second reading comes out of L2                      2 X; 3 X, 5 X with residual
                                                                                    and 1 X more for a fork

A fork gives y twice, so that the gradients of its two uses arrive apart and are added here in fp32: torch adds them with a launch
of its own, 3 X. g is written once although x could tell the ReLU's mask again: dy and dskip read a second time cost the same 1 X
more, and the second launch would carry another operand. In one launch both come out of L2 the second time, and g is written only
where it is the residual's gradient.

Saved for backward: x, and y only where both ReLU and residual are there (its storage is also the next layer's input), else the
ReLU's mask is made again from x. Torch's own BatchNorm and ReLU save x and y.

Statistics are fp32, merged as (mean, M2) in a fixed order (Chan, Golub, LeVeque 1983): the same input gives the same bits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _launch
from ._dispatch import register, run
from ._launch import LAUNCHES, Norm, counters, launch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def bn_act_reference(
    x: Tensor,
    norm: Norm,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    training: bool,
    batches: Tensor | None = None,
    fork: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The op in plain torch: the CPU path, the oracle of the tests and the benchmark's baseline. Bit for bit what a net
    computes that has nn.BatchNorm2d, `h += residual` and F.relu(h, inplace=True) one after the other."""
    if training and batches is not None:
        batches.add_(1)
    weight, bias, running_mean, running_var, momentum, eps = norm
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y += residual
    y = F.relu(y, inplace=True) if relu else y
    return (y, y) if fork else y


def _jit() -> Any:
    """The device code; imported here because a machine may have no triton, by a statement because Dynamo traces those."""
    from .jit import bn_act as jit

    return jit


def bytes_moved(
    rows: int, C: int, itemsize: int, *, residual: bool, relu: bool, training: bool, fork: bool = False
) -> dict[str, int]:
    """Kernel -> bytes of the maps it reads and writes, each once; vectors of C and partials (under 1 % from 2,000 rows on)
    are not counted. `fork`: both gradients come."""
    X, add = rows * C * itemsize, int(residual)
    if not training:
        return {"bn_act_apply": (2 + add) * X}
    y = int(relu and residual)  # read, and g written
    if _jit().whole(rows, C, itemsize):
        g = int(residual and (relu or fork))
        return {"bn_act_whole": (2 + add) * X, "bn_act_backward_whole": (3 + fork + y + g) * X}
    g = int(y or fork)
    return {
        **{"bn_act_stats": X, "bn_act_apply": (2 + add) * X},
        **{"bn_act_backward_sums": (2 + fork + y + g) * X, "bn_act_backward_apply": 3 * X},
    }


def _vectors(x: Tensor, n: int) -> tuple[Tensor, ...]:
    """n fp32 vectors of the channels of x (N, C)."""
    return tuple(_launch.empty((x.shape[1],), torch.float32, x.device) for _ in range(n))


@torch.library.custom_op("fastffl::bn_act_stats", mutates_args=("running_mean", "running_var", "batches"))
def _stats(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """x (N, C) -> the mean as a pair of rows (2, C) and 1 / std (C,)."""
    jit, (N, C) = _jit(), x.shape
    plan = jit.sums_plan(N, C, x.element_size(), jit.TILE)
    mean, (invstd,) = _launch.empty((2, C), torch.float32, x.device), _vectors(x, 1)
    partial = _launch.empty((plan.parts, 2, C), torch.float32, x.device)
    launch(
        *(jit.bn_act_stats, (plan.parts * plan.blocks,), x.device),
        *(x, partial, counters(x.device, plan.blocks), mean, invstd, running_mean, running_var, batches, momentum, eps),
        *(N, plan.per, plan.parts, C, plan.blocks, plan.block_n, plan.block_c),
        warps=plan.warps,
    )
    return mean, invstd


@_stats.register_fake
def _(x, running_mean, running_var, batches, momentum, eps):  # type: ignore[no-untyped-def]
    C = x.shape[1]
    return x.new_empty((2, C), dtype=torch.float32), x.new_empty((C,), dtype=torch.float32)


def _apply_launch(x: Tensor, residual: Tensor | None, *vectors: Any, relu: bool, evaluation: bool) -> Tensor:
    jit, (N, C) = _jit(), x.shape
    plan = jit.apply_plan(N, C)
    y = _launch.empty((N, C), x.dtype, x.device)
    launch(
        *(jit.bn_act_apply, (plan.parts * plan.blocks,), x.device, x, residual, y, *vectors, N),
        *(relu, evaluation, C, plan.blocks, plan.block_n, plan.block_c),
        warps=plan.warps,
    )
    return y


@torch.library.custom_op("fastffl::bn_act_apply", mutates_args=())
def _apply(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, relu: bool) -> Tensor:
    return _apply_launch(x, residual, weight, bias, mean, invstd, 0.0, relu=relu, evaluation=False)


@_apply.register_fake
def _(x, residual, weight, bias, mean, invstd, relu):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op("fastffl::bn_act_eval", mutates_args=())
def _eval(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    relu: bool,
    eps: float,
) -> Tensor:
    return _apply_launch(x, residual, weight, bias, running_mean, running_var, eps, relu=relu, evaluation=True)


@_eval.register_fake
def _(x, residual, weight, bias, running_mean, running_var, relu, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op("fastffl::bn_act_whole", mutates_args=("running_mean", "running_var", "batches"))
def _whole(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    relu: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics and y in one launch: y (N, C), the mean's pair (2, C), 1 / std (C,)."""
    jit, (N, C) = _jit(), x.shape
    plan = jit.sums_plan(N, C, x.element_size(), jit.TILE)
    y, mean = _launch.empty((N, C), x.dtype, x.device), _launch.empty((2, C), torch.float32, x.device)
    (invstd,) = _vectors(x, 1)
    launch(
        *(jit.bn_act_whole, (plan.blocks,), x.device, x, residual, y, weight, bias, mean, invstd),
        *(running_mean, running_var, batches, momentum, eps, N, relu, C, plan.block_n, plan.block_c),
        warps=plan.warps,
    )
    return y, mean, invstd


@_whole.register_fake
def _(x, residual, weight, bias, running_mean, running_var, batches, relu, momentum, eps):  # type: ignore[no-untyped-def]
    C = x.shape[1]
    return torch.empty_like(x), x.new_empty((2, C), dtype=torch.float32), x.new_empty((C,), dtype=torch.float32)


def _mask(relu: bool, y: Tensor | None) -> int:
    jit = _jit()
    return int(jit.NO_MASK if not relu else jit.FROM_X if y is None else jit.FROM_Y)


@torch.library.custom_op("fastffl::bn_act_backward_sums", mutates_args=())
def _backward_sums(
    dy: Tensor,
    dskip: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    invstd: Tensor,
    relu: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dweight, dbias (C,) fp32, and with `keep` the gradient behind the ReLU (N, C), else (0, C)."""
    jit, (N, C), mask = _jit(), x.shape, _mask(relu, y)
    plan = jit.sums_plan(N, C, x.element_size(), jit.SUMS_TILE)
    dweight, dbias = _vectors(x, 2)
    partial = _launch.empty((plan.parts, 2, C), torch.float32, x.device)
    g = _launch.empty((N if keep else 0, C), x.dtype, x.device)
    launch(
        *(jit.bn_act_backward_sums, (plan.parts * plan.blocks,), x.device),
        *(dy, dskip, x, y, g if keep else None, weight, bias, mean, invstd),
        *(partial, counters(x.device, plan.blocks), dweight, dbias, N, plan.per, plan.parts),
        *(mask, C, plan.blocks, plan.block_n, plan.block_c),
        warps=plan.warps,
        maxnreg=jit.MAXNREG,
    )
    return dweight, dbias, g


@_backward_sums.register_fake
def _(dy, dskip, x, y, weight, bias, mean, invstd, relu, keep):  # type: ignore[no-untyped-def]
    C = x.shape[1]
    vector = lambda: x.new_empty((C,), dtype=torch.float32)  # noqa: E731
    return vector(), vector(), x.new_empty((x.shape[0] if keep else 0, C))


@torch.library.custom_op("fastffl::bn_act_backward_apply", mutates_args=())
def _backward_apply(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    invstd: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    relu: bool,
) -> Tensor:
    """dx from the sums; `relu`: g is dy and the mask is made again from x."""
    jit, (N, C) = _jit(), x.shape
    plan = jit.apply_plan(N, C)
    dx = _launch.empty((N, C), x.dtype, x.device)
    launch(
        *(jit.bn_act_backward_apply, (plan.parts * plan.blocks,), x.device),
        *(g, x, dx, weight, bias, mean, invstd, dweight, dbias, N),
        *(_mask(relu, None), C, plan.blocks, plan.block_n, plan.block_c),
        warps=plan.warps,
    )
    return dx


@_backward_apply.register_fake
def _(g, x, weight, bias, mean, invstd, dweight, dbias, relu):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op("fastffl::bn_act_backward_whole", mutates_args=())
def _backward_whole(
    dy: Tensor,
    dskip: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    invstd: Tensor,
    relu: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (N, C), dweight, dbias (C,) fp32, and the gradient behind the ReLU as `bn_act_backward_sums` gives it."""
    jit, (N, C), mask = _jit(), x.shape, _mask(relu, y)
    plan = jit.sums_plan(N, C, x.element_size(), jit.SUMS_TILE)
    dweight, dbias = _vectors(x, 2)
    dx = _launch.empty((N, C), x.dtype, x.device)
    g = _launch.empty((N if keep else 0, C), x.dtype, x.device)
    launch(
        *(jit.bn_act_backward_whole, (plan.blocks,), x.device),
        *(dy, dskip, x, y, g if keep else None, dx, weight, bias, mean, invstd, dweight, dbias, N),
        *(mask, C, plan.block_n, plan.block_c),
        warps=plan.warps,
    )
    return dx, dweight, dbias, g


@_backward_whole.register_fake
def _(dy, dskip, x, y, weight, bias, mean, invstd, relu, keep):  # type: ignore[no-untyped-def]
    C = x.shape[1]
    vector = lambda: x.new_empty((C,), dtype=torch.float32)  # noqa: E731
    return torch.empty_like(x), vector(), vector(), x.new_empty((x.shape[0] if keep else 0, C))


def _twice(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("bn_act: double backward is not supported; FASTFFL_KERNELS=reference has it")


for _op in (_backward_sums, _backward_apply, _backward_whole):
    _op.register_autograd(_twice)
LAUNCHES.update({f"fastffl::bn_act_{name}": 1 for name in ("stats", "apply", "eval", "whole")})
LAUNCHES.update({f"fastffl::bn_act_backward_{name}": 1 for name in ("sums", "apply", "whole")})


class _BnAct(torch.autograd.Function):
    """Training. A Function and no `register_autograd`, which refuses ops that change an argument (the running statistics)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        batches: Tensor | None,
        relu: bool,
        fork: bool,
        momentum: float,
        eps: float,
    ) -> Any:
        if _jit().whole(*x.shape, x.element_size()):
            y, mean, invstd = _whole(x, residual, weight, bias, running_mean, running_var, batches, relu, momentum, eps)
        else:
            mean, invstd = _stats(x, running_mean, running_var, batches, momentum, eps)
            y = _apply(x, residual, weight, bias, mean, invstd, relu)
        ctx.save_for_backward(x, y if relu and residual is not None else None, weight, bias, mean, invstd)
        ctx.set_materialize_grads(False)
        ctx.relu, ctx.added = relu, residual is not None
        return (y, y.view_as(y)) if fork else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, mean, invstd = ctx.saved_tensors
        come = [d.contiguous() for d in grads if d is not None]
        if not come:
            return (None,) * 11
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        need_residual = need_residual and ctx.added
        dy, dskip, relu, dx = come[0], come[1] if len(come) > 1 else None, ctx.relu, None
        made = y is not None or dskip is not None  # else the gradient behind the ReLU is dy, or dy and what x tells
        if need_x and _jit().whole(*x.shape, x.element_size()):
            keep = need_residual and made
            dx, dweight, dbias, g = _backward_whole(dy, dskip, x, y, weight, bias, mean, invstd, relu, keep)
        else:
            keep = (need_x or need_residual) and made
            dweight, dbias, g = _backward_sums(dy, dskip, x, y, weight, bias, mean, invstd, relu, keep)
            if need_x:
                dx = _backward_apply(g if made else dy, x, weight, bias, mean, invstd, dweight, dbias, relu and not made)
        return (
            *(dx, (g if made else dy) if need_residual else None),
            *(_like(dweight, weight) if need_weight else None, _like(dbias, bias) if need_bias else None),
            *(None,) * 7,
        )


def _like(d: Tensor, parameter: Tensor) -> Tensor:
    return d if parameter.dtype == d.dtype else d.to(parameter.dtype)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B H W, C), contiguous: a view of a channels_last map, a copy of any other. (B, C) likewise."""
    return (x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) if x.ndim == 4 else x).contiguous()


def _triton(
    x: Tensor, norm: Norm, *, residual: Tensor | None, relu: bool, training: bool, batches: Tensor | None, fork: bool
) -> Tensor | tuple[Tensor, Tensor]:
    weight, bias, running_mean, running_var, momentum, eps = norm
    if not all(v is None or v.is_contiguous() for v in (running_mean, running_var)):
        raise ValueError("the running mean and variance are updated in place; expected contiguous ones")
    weight, bias, rows = weight.contiguous(), bias.contiguous(), _rows(x)
    add = None if residual is None else _rows(residual)
    if not training:
        y = _maps(x, _eval(rows, add, weight, bias, running_mean, running_var, relu, eps))
        return (y, y) if fork else y
    fork_here = fork and (x.ndim == 2 or x.is_contiguous(memory_format=torch.channels_last))  # else each would be copied back
    out = _BnAct.apply(rows, add, weight, bias, running_mean, running_var, batches, relu, fork_here, momentum, eps)
    if fork_here:
        return _maps(x, out[0]), _maps(x, out[1])
    y = _maps(x, out)
    return (y, y) if fork else y


def _maps(x: Tensor, y: Tensor) -> Tensor:
    """Rows as the maps they were: a view where x is channels_last."""
    if x.ndim == 2:
        return y
    B, C, H, W = x.shape
    y = y.view(B, H, W, C).permute(0, 3, 1, 2)
    return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()


register("bn_act", _triton)


def bn_act(
    x: Tensor,
    norm: Norm,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    training: bool,
    batches: Tensor | None = None,
    fork: bool = False,
) -> Any:
    """BatchNorm of x, plus `residual`, through a ReLU: y of x's shape and dtype, channels_last if x is; with `fork` (y, skip).

    x         (B, C, H, W) or (B, C), bf16, fp16 or fp32. A map that is not channels_last is copied to it and back
    norm      weight and bias (C,); in training the running statistics (contiguous, or None) move by `momentum`, the variance
              unbiased, as nn.BatchNorm2d has it. In eval they are what x is normalised with
    residual  like x, added in front of the ReLU; its gradient is dy behind the ReLU
    batches   () int64, one more each call in training: nn.BatchNorm2d.num_batches_tracked, without a launch of its own
    fork      skip is y once more, for the next block's residual: no launch and no bytes, but its gradient arrives apart, and
              backward adds both in fp32 where autograd would add them with a launch of its own, rounded

    B = 0 gives an empty result and leaves the running statistics. An x of fp64 and an eval that needs gradients take the
    reference. Double backward is an error except on the reference. Upstream gradients that are not contiguous as rows are
    copied. ValueError says what was wrong with shapes, dtypes or devices.
    """
    if x.ndim not in (2, 4) or x.dtype not in FLOATS:
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}; expected (B, C, H, W) or (B, C) of bf16, fp16, fp32 or fp64")
    C = x.shape[1]
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(
            f"residual is {tuple(residual.shape)} {residual.dtype} on {residual.device}; "
            f"expected x's {tuple(x.shape)} {x.dtype} on {x.device}"
        )
    for name, v in zip(("weight", "bias", "running_mean", "running_var"), norm[:4], strict=True):
        if v is not None and (v.shape != (C,) or v.device != x.device or v.dtype not in FLOATS):
            raise ValueError(f"{name} is {tuple(v.shape)} {v.dtype} on {v.device}; expected ({C},) floating point on {x.device}")
    if not training and (norm.running_mean is None or norm.running_var is None):
        raise ValueError("training=False needs the running mean and variance, got None")
    if training and x.numel() == C:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
    learns = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, residual, norm.weight, norm.bias))
    only_reference = x.dtype == torch.float64 or x.numel() == 0 or (learns and not training)
    options: dict[str, Any] = {"residual": residual, "relu": relu, "training": training, "batches": batches, "fork": fork}
    if only_reference:
        return bn_act_reference(x, norm, **options)
    return run("bn_act", x, bn_act_reference, x, norm, **options)
