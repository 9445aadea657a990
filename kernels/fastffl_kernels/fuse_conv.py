"""fuse_conv: the fusion module of Feature Fusion Learning, K maps in, the fused classifier's logits (or features) out.

    F = concat_ch(f_1..f_K)   D = dw3x3(F)   A = relu(bn1(D))   P = pw1x1(A)   G = mean_hw relu(bn2(P))   u = G Wfc^T + b

Letters: B images, C = sum of the K maps' channels, N channels of the fused map, M = B*H*W rows, X = bytes of F, P's = N/C X.

Training, fused: dw_forward | pw_forward | tail_forward, then head_backward | pw_backward_data | pw_backward_weight |
dw_backward. A BatchNorm's statistics need all of its input before its output, so three launches are the least. F is never
made; A and the gradient of P are rebuilt from D and P in the GEMMs' prologues; BatchNorm 2's two sums come from counts that
the forward leaves (its upstream gradient is constant over a plane). Bytes: 3X + 2P forward, 7X + 2P backward.
"""

from functools import lru_cache
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _launch
from ._dispatch import register, run
from ._launch import LAUNCHES, Norm, counters, divup, launch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALL_COUNTS = 256  # planes up to this size have counts that bf16 holds exactly
TWICE = "fuse_conv: double backward is not supported; FASTFFL_KERNELS=reference has it"


def fuse_conv_reference(
    maps: tuple[Tensor, ...],
    dw_weight: Tensor,
    bn1: Norm,
    pw_weight: Tensor,
    bn2: Norm,
    fc_weight: Tensor | None,
    fc_bias: Tensor | None,
    *,
    training: bool,
    recompute: bool = False,
) -> Tensor:
    """The module in plain torch: the CPU path, the oracle of the tests and the benchmark's baseline. Saves what torch saves,
    with `recompute` too."""
    f = torch.cat(maps, 1)
    if f.is_meta or not torch.is_autocast_enabled(f.device.type):  # autocast has casts of its own
        dw_weight, pw_weight = dw_weight.to(f.dtype), pw_weight.to(f.dtype)
        fc_weight = None if fc_weight is None else fc_weight.to(f.dtype)
        fc_bias = None if fc_bias is None else fc_bias.to(f.dtype)
    a = F.relu(_norm(F.conv2d(f, dw_weight, padding=1, groups=f.shape[1]), bn1, training), inplace=True)
    f = F.relu(_norm(F.conv2d(a, pw_weight), bn2, training), inplace=True)
    g = f.mean((2, 3))
    return g if fc_weight is None else F.linear(g, fc_weight, fc_bias)


def _norm(x: Tensor, bn: Norm, training: bool) -> Tensor:
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training, bn.momentum, bn.eps)


# --- which path each part takes ------------------------------------------------------------------------------------------


class Speeds(NamedTuple):
    """What the break-even rule needs of a GPU: bytes/s of a copy, FLOP/s of the library's GEMM and of the fused ones
    (bf16), seconds of a launch. Assumed until measured: nothing here comes from a run of these kernels."""

    copy: float
    library: float
    fused: float
    launch: float = 2.5e-6


SPEEDS = {
    80: Speeds(1.7e12, 250e12, 165e12),
    90: Speeds(4.3e12, 680e12, 450e12),  # H200; the rule needs 420e12 for 1024 > 512 channels, 589e12 for 4096 > 2048
    100: Speeds(7.0e12, 1500e12, 800e12),
    120: Speeds(1.5e12, 200e12, 140e12),
}
FP32 = {True: (2.0, 2.0), False: (15.0, 30.0)}  # TF32 or not: how many times slower than bf16 (library, fused)

Way = Literal["fused", "library"]


class Plan(NamedTuple):
    """Which path each part takes; `plan_table` prints it.

    forward, backward   "fused": GEMMs with prologues and epilogues. "library": passes of their own round torch.mm
    classifier          "tail": in the kernel that pools. "gemm": a launch of its own. "none"
    inference           "whole": a single kernel. "fused" or "library": depthwise kernel, that GEMM, tail
    """

    forward: Way
    backward: Way
    classifier: Literal["tail", "gemm", "none"]
    inference: Literal["whole", "fused", "library"]


@lru_cache(maxsize=256)
def plan(
    batch: int,
    channels: tuple[int, ...],
    width: int,
    height: int,
    wide: int,
    classes: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    capability: int = 90,
    tf32: bool = True,
    speeds: Speeds | None = None,
) -> Plan:
    """Fused GEMM iff it loses less time to the library's than the passes it saves cost: t_fused - t_library < saved bytes /
    copy speed + saved launches. channels: of each map; width: N; height x wide: the plane; capability: 10 x major + minor."""
    jit = _jit()
    c, rows = sum(channels), batch * height * wide
    s = speeds or SPEEDS[max((k for k in SPEEDS if k <= capability), default=80)]
    slow = FP32[tf32] if dtype == torch.float32 else (1.0, 1.0)
    size = 4 if dtype == torch.float32 else 2
    x, p = rows * c * size, rows * width * size
    lost = 2 * rows * c * width * (slow[1] / s.fused - slow[0] / s.library)
    forward: Way = "fused" if lost < (2 * x + p) / s.copy + 2 * s.launch else "library"
    backward: Way = "fused" if 2 * lost < (3 * x + 2 * p) / s.copy + 3 * s.launch else "library"
    tail = jit.pick_tail(width, height * wide, classes)
    one = jit.pick_infer(channels, width, height * wide, classes, batch)
    bare: Way = "fused" if lost < s.launch else "library"
    return Plan(forward, backward, "tail" if tail.k else "gemm" if classes else "none", "whole" if one else bare)


SHAPES = (
    (128, (64, 64), 64, 8, 100),
    (1024, (64, 64), 64, 8, 100),
    (256, (512, 512), 512, 7, 1000),
    (256, (2048, 2048), 2048, 7, 1000),
)


def plan_table(capability: int = 90, speeds: Speeds | None = None) -> str:
    """The plan for two CIFAR and two ImageNet fusions in bf16, as text, with the modelled traffic in units of X."""
    lines = [f"{'B, C > N, HxW':26}{'forward':>9}{'backward':>10}{'classifier':>12}{'inference':>11}{'fwd X':>7}{'bwd X':>7}"]
    for batch, channels, width, side, classes in SHAPES:
        made = plan(batch, channels, width, side, side, classes, capability=capability, speeds=speeds)
        moved = bytes_moved(batch, channels, width, side, side, classes, made=made)
        x = batch * sum(channels) * side * side * 2
        name = f"{batch}, {sum(channels)} > {width}, {side}x{side}"
        lines.append(
            f"{name:26}{made.forward:>9}{made.backward:>10}{made.classifier:>12}{made.inference:>11}"
            f"{moved.forward / x:7.2f}{moved.backward / x:7.2f}"
        )
    return "\n".join(lines)


class Bytes(NamedTuple):
    forward: int
    backward: int


def bytes_moved(
    batch: int,
    channels: tuple[int, ...],
    width: int,
    height: int,
    wide: int,
    classes: int = 0,
    *,
    dtype: torch.dtype = torch.bfloat16,
    weights: torch.dtype = torch.float32,
    recompute: bool = False,
    made: Plan = Plan("fused", "fused", "tail", "whole"),  # noqa: B008
) -> Bytes:
    """Bytes a training step's launches read and write, each tensor once per launch, all gradients wanted.

    Not counted: vectors of a value per channel, and scratch (partial results, the chunks of a weight gradient), which a
    launch leaves in the L2 for the last program or the next launch.
    """
    size, w_size = dtype.itemsize, weights.itemsize
    c, plane = sum(channels), height * wide
    x, p = batch * plane * c * size, batch * plane * width * size
    w, dw, fc = c * width * w_size, 9 * c * w_size, classes * width * w_size
    g = batch * width * size
    counts = 2 * batch * width * (size if plane <= SMALL_COUNTS else 4)
    u = batch * classes * size
    conv = 2 * x + dw
    library_w = w + (c * width * size * 2 if w_size != size else 0)  # the cast reads one and writes the other, mm reads that
    gemm = x + w + p if made.forward == "fused" else 2 * x + (x + library_w + p) + p
    tail = p + g + counts + u + fc + (g if made.classifier == "gemm" else 0)
    head = (u + fc + g + fc if classes else g) + counts + g
    if made.backward == "fused":
        data, weight = p + g + w + x + x, p + g + x + w
    else:
        data = (p + g + p) + (p + library_w + x) + 2 * x
        weight = 2 * x + p + x + library_w
    last = 4 * x + 2 * dw
    return Bytes(conv + gemm + tail, head + data + weight + last + (conv if recompute else 0))


# --- launching -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _jit() -> ModuleType:
    from .jit import fuse_conv as jit

    return jit


def _tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


class _Call:
    """Sizes and settings that all launches of one call share."""

    def __init__(self, maps: list[Tensor], pw_weight: Tensor, fc_weight: Tensor | None):
        self.maps = maps
        self.batch, _, self.height, self.wide = maps[0].shape
        self.channels = tuple(m.shape[1] for m in maps)
        self.c, self.n = sum(self.channels), pw_weight.shape[0]
        self.plane = self.height * self.wide
        self.rows = self.batch * self.plane
        self.classes = 0 if fc_weight is None else fc_weight.shape[0]
        self.dtype, self.device = maps[0].dtype, maps[0].device
        self.full = self.dtype == torch.float32
        self.precision = "ieee" if self.full and not _tf32() else "tf32"
        self.jit = _jit()
        capability = torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (9, 0)
        self.plan = plan(
            *(self.batch, self.channels, self.n, self.height, self.wide, self.classes),
            *(self.dtype, 10 * capability[0] + capability[1], self.precision == "tf32"),
        )

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return _launch.empty(shape, dtype or self.dtype, self.device)

    def vectors(self, n: int, c: int) -> list[Tensor]:
        return [self.empty(c, dtype=torch.float32) for _ in range(n)]

    def launch(self, kernel: Any, grid: int, b: Any, /, **named: Any) -> None:
        launch(kernel, (grid,), self.device, warps=b.warps, stages=getattr(b, "stages", 2), **named)

    def where(self, tensors: list[Tensor]) -> tuple[tuple[int, int, int, int], ...]:
        """Strides; of an axis of length 1 they are free, and chosen so that they do not stop wide loads."""
        lay = []
        for m in tensors:
            b, c, h, w = (0 if n == 1 else s for s, n in zip(m.stride(), m.shape, strict=True))
            lay.append((b, c if m.shape[1] > 1 else 1, h, w))
        return tuple(lay)

    def conv(self, dw_weight: Tensor, mode: str, bn: tuple[Any, ...], momentum: float, eps: float) -> Tensor:
        """dw_forward; bn: mean, rstd, gamma, beta, running mean and variance, where the mode has them."""
        b = self.jit.pick_dw(self.channels, self.rows, False)
        at = self.jit.place(self.channels, b.n)
        lay = self.where(self.maps)
        d = self.empty(self.rows, self.c)
        stats = mode == "stats"
        mean, rstd, gamma, beta, running_mean, running_var = bn
        self.launch(
            self.jit.dw_forward,
            b.grid,
            b,
            xs=tuple(self.maps),
            weight=dw_weight,
            taps=self.empty(b.programs, 9, self.c, dtype=torch.float32),
            d=d,
            partial=self.empty(2, b.programs, self.c, dtype=torch.float32) if stats else None,
            count=counters(self.device, at.tiles) if stats else None,
            **{"mean": mean, "rstd": rstd, "gamma": gamma, "beta": beta},
            **{"running_mean": running_mean, "running_var": running_var, "momentum": momentum, "eps": eps},
            **{"M": self.rows, "iters": b.iters, "programs": b.programs},
            **{"CS": at.CS, "FIRST": at.FIRST, "OFF": at.OFF, "LAY": lay, "UNIT": all(s[1] == 1 for s in lay)},
            **{"C": self.c, "H": self.height, "W": self.wide, "TILES": at.tiles, "MODE": mode},
            **{"BLOCK_M": b.m, "BLOCK_C": b.n},
        )
        return d

    def gemm(self, a: Tensor, weight: Tensor, bias: Tensor | None, bn1: Any, bn2: Any, momentum: float, eps: float) -> Tensor:
        """pw_forward; bn1: mean, rstd, gamma, beta of the prologue or None; bn2: mean, rstd and the running ones or None."""
        rows, depth = a.shape
        width = weight.shape[0]
        b = self.jit.pick_gemm(rows, depth, width, self.full)
        p = self.empty(rows, width)
        mean1, rstd1, gamma1, beta1 = bn1 or (None,) * 4
        mean2, rstd2, running_mean, running_var = bn2 or (None,) * 4
        self.launch(
            self.jit.pw_forward,
            b.grid,
            b,
            **{"d": a, "weight": weight, "bias": bias, "p": p},
            **{"mean1": mean1, "rstd1": rstd1, "gamma1": gamma1, "beta1": beta1},
            partial=self.empty(2, b.programs, width, dtype=torch.float32) if bn2 else None,
            count=counters(self.device, b.tiles) if bn2 else None,
            **{"mean": mean2, "rstd": rstd2, "running_mean": running_mean, "running_var": running_var},
            **{"momentum": momentum, "eps": eps, "M": rows, "iters": b.iters, "programs": b.programs},
            **{"C": depth, "N": width, "TILES": b.tiles, "ACT": bn1 is not None, "STATS": bn2 is not None},
            **{"PRECISION": self.precision, "BLOCK_M": b.m, "BLOCK_N": b.n, "BLOCK_K": b.k},
        )
        return p

    def act(self, d: Tensor, bn: tuple[Tensor, ...]) -> Tensor:
        a = self.empty(*d.shape)
        b = self.jit.pick_rows(self.c, self.rows)
        self.launch(
            self.jit.bn_relu,
            divup(self.rows, b.m) * b.tiles,
            b,
            **dict(zip(("x", "mean", "rstd", "gamma", "beta"), (d, *bn), strict=True)),
            **{"out": a, "M": self.rows, "C": self.c, "TILES": b.tiles, "BLOCK_M": b.m, "BLOCK_C": b.n},
        )
        return a

    def tail(self, p: Tensor, bn: tuple[Any, ...], eps: float, fc_weight: Any, fc_bias: Any, save: bool) -> tuple[Any, ...]:
        """tail_forward and, where it does not classify itself, the classifier: (u, G, m1, m2)."""
        b = self.jit.pick_tail(self.n, self.plane, self.classes)
        inside = b.k > 0
        small = self.dtype if self.plane <= SMALL_COUNTS else torch.float32
        g = self.empty(self.batch, self.n)
        m1, m2 = [self.empty(self.batch, self.n, dtype=small) for _ in range(2)] if save else (None, None)
        u = self.empty(self.batch, self.classes) if inside else None
        self.launch(
            self.jit.tail_forward,
            self.batch * b.tiles,
            b,
            **dict(zip(("mean", "rstd", "gamma", "beta"), bn, strict=True)),
            **{"p": p, "eps": eps, "g": g, "m1": m1, "m2": m2, "u": u},
            **{"fc_weight": fc_weight if inside else None, "fc_bias": fc_bias if inside else None},
            **{"N": self.n, "HW": self.plane, "CLASSES": self.classes if inside else 0, "TILES": b.tiles},
            **{"VAR": not save, "SAVE": save, "BLOCK_R": b.m, "BLOCK_N": b.n, "BLOCK_K": max(b.k, 1)},
        )
        if self.classes and not inside:
            u = self.gemm(g, fc_weight, fc_bias, None, None, 0.0, 0.0)
        return (u if self.classes else g), g, m1, m2


def _flat(*tensors: Tensor | None) -> list[Any]:
    """Parameters as the kernels read them; a copy only where one is not contiguous."""
    return [None if t is None else t.contiguous() for t in tensors]


# The forward is two ops, because an op that changes its inputs (the running statistics) can have no autograd formula: the
# first makes D, P and the statistics from detached inputs; the second pools, and its formula is the whole module's.


@torch.library.custom_op(
    "fastffl::fuse_conv_maps", mutates_args=("running_mean1", "running_var1", "running_mean2", "running_var2")
)
def _maps(
    maps: list[Tensor],
    dw_weight: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    running_mean1: Tensor | None,
    running_var1: Tensor | None,
    pw_weight: Tensor,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    momentum1: float,
    eps1: float,
    momentum2: float,
    eps2: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(D, P, mean1, rstd1, mean2, rstd2)."""
    call = _Call(maps, pw_weight, None)
    dw_weight, gamma1, beta1, pw_weight = _flat(dw_weight, gamma1, beta1, pw_weight)
    mean1, rstd1 = call.vectors(2, call.c)
    mean2, rstd2 = call.vectors(2, call.n)
    if call.batch == 0:
        return call.empty(0, call.c), call.empty(0, call.n), mean1, rstd1, mean2, rstd2
    d = call.conv(dw_weight, "stats", (mean1, rstd1, gamma1, beta1, running_mean1, running_var1), momentum1, eps1)
    stats2 = (mean2, rstd2, running_mean2, running_var2)
    if call.plan.forward == "fused":
        p = call.gemm(d, pw_weight, None, (mean1, rstd1, gamma1, beta1), stats2, momentum2, eps2)
        return d, p, mean1, rstd1, mean2, rstd2
    p = call.empty(call.rows, call.n)
    torch.mm(call.act(d, (mean1, rstd1, gamma1, beta1)), pw_weight.view(call.n, call.c).to(call.dtype).t(), out=p)
    b = call.jit.pick_rows(call.n, call.rows)
    call.launch(
        call.jit.column_stats,
        b.grid,
        b,
        **{"x": p, "partial": call.empty(2, b.programs, call.n, dtype=torch.float32), "count": counters(call.device, b.tiles)},
        **dict(zip(("mean", "rstd", "running_mean", "running_var"), stats2, strict=True)),
        **{"momentum": momentum2, "eps": eps2, "M": call.rows, "iters": b.iters, "programs": b.programs},
        **{"C": call.n, "TILES": b.tiles, "BLOCK_M": b.m, "BLOCK_C": b.n},
    )
    return d, p, mean1, rstd1, mean2, rstd2


@_maps.register_fake
def _(
    maps: list[Tensor],
    dw_weight: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    running_mean1: Tensor | None,
    running_var1: Tensor | None,
    pw_weight: Tensor,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    momentum1: float,
    eps1: float,
    momentum2: float,
    eps2: float,
) -> tuple[Tensor, ...]:
    x = maps[0]
    rows, c, n = x.shape[0] * x.shape[2] * x.shape[3], dw_weight.shape[0], pw_weight.shape[0]
    return (x.new_empty(rows, c), x.new_empty(rows, n), *(x.new_empty(k, dtype=torch.float32) for k in (c, c, n, n)))


@torch.library.custom_op("fastffl::fuse_conv_pool", mutates_args=())
def _pool(
    maps: list[Tensor],
    dw_weight: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    pw_weight: Tensor,
    gamma2: Tensor,
    beta2: Tensor,
    fc_weight: Tensor | None,
    fc_bias: Tensor | None,
    d: Tensor | None,
    p: Tensor,
    mean1: Tensor,
    rstd1: Tensor,
    mean2: Tensor,
    rstd2: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, G, m1, m2) from P; the other inputs are there to be differentiated or saved. G is empty where it is `out`."""
    call = _Call(maps, pw_weight, fc_weight)
    gamma2, beta2, fc_weight, fc_bias = _flat(gamma2, beta2, fc_weight, fc_bias)
    if call.batch == 0:
        return tuple(call.empty(0, k) for k in (call.classes or call.n, call.n if call.classes else 0, call.n, call.n))  # type: ignore[return-value]
    out, g, m1, m2 = call.tail(p, (mean2, rstd2, gamma2, beta2), 0.0, fc_weight, fc_bias, True)
    return out, g if call.classes else call.empty(0, 0), m1, m2


@_pool.register_fake
def _(
    maps: list[Tensor],
    dw_weight: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    pw_weight: Tensor,
    gamma2: Tensor,
    beta2: Tensor,
    fc_weight: Tensor | None,
    fc_bias: Tensor | None,
    d: Tensor | None,
    p: Tensor,
    mean1: Tensor,
    rstd1: Tensor,
    mean2: Tensor,
    rstd2: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, n = maps[0], pw_weight.shape[0]
    batch = x.shape[0]
    small = x.dtype if x.shape[2] * x.shape[3] <= SMALL_COUNTS else torch.float32
    m1, m2 = (x.new_empty(batch, n, dtype=small) for _ in range(2))
    if fc_weight is None:
        return x.new_empty(batch, n), x.new_empty(0, 0), m1, m2
    return x.new_empty(batch, fc_weight.shape[0]), x.new_empty(batch, n), m1, m2


def _like(m: Tensor, make: Any) -> Tensor:
    """A map's gradient: channels_last where the map is, else contiguous."""
    b, c, h, w = m.shape
    if c > 1 and m.stride(1) == 1:
        made: Tensor = make(b, h, w, c).permute(0, 3, 1, 2)
        return made
    made = make(b, c, h, w)
    return made


@torch.library.custom_op("fastffl::fuse_conv_backward", mutates_args=())
def _backward(
    grad: Tensor,
    maps: list[Tensor],
    dw_weight: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    pw_weight: Tensor,
    gamma2: Tensor,
    beta2: Tensor,
    fc_weight: Tensor | None,
    fc_bias: Tensor | None,
    d: Tensor | None,
    p: Tensor,
    mean1: Tensor,
    rstd1: Tensor,
    mean2: Tensor,
    rstd2: Tensor,
    g: Tensor,
    m1: Tensor,
    m2: Tensor,
    need_maps: bool,
    need_dw: bool,
    need_norm1: bool,
    need_pw: bool,
) -> list[Tensor]:
    """Gradients of dw_weight, gamma1, beta1, pw_weight, gamma2, beta2, fc_weight, fc_bias, then of every map; those not
    wanted are empty. d None: made again."""
    call = _Call(maps, pw_weight, fc_weight)
    jit, shape = call.jit, (call.rows, call.c)
    dw_weight, gamma1, beta1, pw_weight, gamma2, beta2, fc_weight = _flat(
        dw_weight, gamma1, beta1, pw_weight, gamma2, beta2, fc_weight
    )

    def like(t: Tensor | None, wanted: bool = True) -> Tensor:  # outputs of an op may not be one another: each `none` its own
        return _launch.empty(tuple(t.shape), t.dtype, t.device) if t is not None and wanted else call.empty(0)

    below = need_maps or need_dw or need_norm1
    dfc_weight, dfc_bias = like(fc_weight), like(fc_bias)
    dgamma1, dbeta1, dgamma2, dbeta2 = like(gamma1, below), like(beta1, below), like(gamma2), like(beta2)
    ddw, dpw = like(dw_weight, need_dw), like(pw_weight, need_pw)
    dmaps = [_like(m, call.empty) if need_maps else call.empty(0) for m in maps]
    made = [ddw, dgamma1, dbeta1, dpw, dgamma2, dbeta2, dfc_weight, dfc_bias, *dmaps]
    if call.batch == 0:
        return [t.zero_() for t in made]

    dg = call.empty(call.batch, call.n)
    coef2 = call.empty(2, call.n, dtype=torch.float32)
    b = jit.pick_head(call.batch, call.n, call.classes)
    images = divup(call.batch, b.m)
    call.launch(
        jit.head_backward,
        b.grid,
        b,
        **{"du": grad, "fc_weight": fc_weight, "g": g, "m1": m1, "m2": m2, "gamma": gamma2, "rstd": rstd2, "dg": dg},
        **{
            "dfc_weight": dfc_weight,
            "dfc_bias": None if fc_bias is None else dfc_bias,
            "dgamma": dgamma2,
            "dbeta": dbeta2,
            "coef": coef2,
        },
        **{"partial": call.empty(2, images, call.n, dtype=torch.float32), "count": counters(call.device, b.tiles)},
        **{"B": call.batch, "M": call.rows, "stride_b": grad.stride(0), "stride_k": grad.stride(1)},
        **{"N": call.n, "HW": call.plane, "CLASSES": call.classes, "TILES": b.tiles, "PRECISION": call.precision},
        **{"BLOCK_B": b.m, "BLOCK_N": b.n, "BLOCK_K": b.k},
    )
    if not (below or need_pw):
        return made
    if d is None:
        d = call.conv(dw_weight, "plain", (None,) * 6, 0.0, 0.0)
    norm1 = dict(zip(("mean1", "rstd1", "gamma1", "beta1"), (mean1, rstd1, gamma1, beta1), strict=True))
    norm2 = dict(zip(("mean2", "rstd2", "gamma2", "beta2", "coef2"), (mean2, rstd2, gamma2, beta2, coef2), strict=True))
    one = {k[:-1]: v for k, v in norm1.items()}
    coef1, dd, splits, chunks = call.empty(2, call.c, dtype=torch.float32), call.empty(0), None, 0
    sums = {"dgamma1": dgamma1, "dbeta1": dbeta1, "coef1": coef1}
    fused = call.plan.backward == "fused"
    if fused:
        if below:
            dd = call.empty(*shape)
            b = jit.pick_gemm(call.rows, call.n, call.c, call.full, 2)
            call.launch(
                jit.pw_backward_data,
                b.grid,
                b,
                **{"p": p, "dg": dg, "weight": pw_weight, "d": d, "dd": dd, **norm1, **norm2, **sums},
                **{"partial": call.empty(2, b.programs, call.c, dtype=torch.float32), "count": counters(call.device, b.tiles)},
                **{"M": call.rows, "iters": b.iters, "programs": b.programs},
                **{"C": call.c, "N": call.n, "HW": call.plane, "TILES": b.tiles, "PRECISION": call.precision},
                **{"BLOCK_M": b.m, "BLOCK_N": b.n, "BLOCK_K": b.k},
            )
        if need_pw:
            b, tiles_n, tiles_c = jit.pick_weight(call.rows, call.c, call.n, call.full)
            if b.programs > 1:
                splits, chunks = call.empty(b.programs, call.n, call.c, dtype=torch.float32), b.programs
            call.launch(
                jit.pw_backward_weight,
                b.grid,
                b,
                **{"p": p, "dg": dg, "d": d, "out": dpw if splits is None else splits, **norm1, **norm2},
                **{"M": call.rows, "iters": b.iters, "C": call.c, "N": call.n, "HW": call.plane},
                **{"TILES_N": tiles_n, "TILES_C": tiles_c, "PRECISION": call.precision},
                **{"BLOCK_M": b.m, "BLOCK_N": b.n, "BLOCK_C": b.k},
            )
    else:
        dp = call.empty(call.rows, call.n)
        b = jit.pick_rows(call.n, call.rows)
        call.launch(
            jit.dp_rebuild,
            divup(call.rows, b.m) * b.tiles,
            b,
            **{"p": p, "dg": dg, **{k.removesuffix("2"): v for k, v in norm2.items()}, "out": dp},
            **{"M": call.rows, "N": call.n, "HW": call.plane, "TILES": b.tiles, "BLOCK_M": b.m, "BLOCK_C": b.n},
        )
        if below:
            dd = call.empty(*shape)
            torch.mm(dp, pw_weight.view(call.n, call.c).to(call.dtype), out=dd)
            b = jit.pick_rows(call.c, call.rows)
            call.launch(
                jit.relu_sums,
                b.grid,
                b,
                **{"da": dd, "d": d, **one, **{k.removesuffix("1"): v for k, v in sums.items()}},
                **{"partial": call.empty(2, b.programs, call.c, dtype=torch.float32), "count": counters(call.device, b.tiles)},
                **{"M": call.rows, "iters": b.iters, "programs": b.programs},
                **{"C": call.c, "TILES": b.tiles, "BLOCK_M": b.m, "BLOCK_C": b.n},
            )
        if need_pw:
            dpw.view(call.n, call.c).copy_(torch.mm(dp.t(), call.act(d, (mean1, rstd1, gamma1, beta1))))
    if need_maps or need_dw or splits is not None:
        b = jit.pick_dw(call.channels, call.rows, True)
        at = jit.place(call.channels, b.n)
        lay = call.where(maps)
        dlay = call.where(dmaps) if need_maps else lay
        programs = b.programs if need_maps or need_dw else 0
        weights = 0 if splits is None else divup(call.n * call.c, jit.SPLIT_BLOCK)
        call.launch(
            jit.dw_backward,
            programs * at.tiles + weights,
            b,
            **{"xs": tuple(maps), "dxs": tuple(dmaps) if need_maps else None, "weight": dw_weight},
            **{"taps": call.empty(b.programs, 9, call.c, dtype=torch.float32), "dd": dd, "d": d, **one, "coef": coef1},
            **{"dweight": ddw if need_dw else None},
            **{"partial": call.empty(b.programs, 9, call.c, dtype=torch.float32) if need_dw else None},
            **{"count": counters(call.device, at.tiles) if need_dw else None, "splits": splits, "dpw": dpw},
            **{"n_split": chunks, "n_dpw": call.n * call.c, "M": call.rows, "iters": b.iters, "programs": programs},
            **{"CS": at.CS, "FIRST": at.FIRST, "OFF": at.OFF, "LAY": lay, "DLAY": dlay},
            **{"UNIT": all(s[1] == 1 for s in (*lay, *dlay)), "C": call.c, "H": call.height, "W": call.wide},
            **{"TILES": at.tiles, "MASK": not fused, "BLOCK_M": b.m, "BLOCK_C": b.n, "BLOCK_S": jit.SPLIT_BLOCK},
        )
    return made


@_backward.register_fake
def _(
    grad: Tensor,
    maps: list[Tensor],
    dw_weight: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    pw_weight: Tensor,
    gamma2: Tensor,
    beta2: Tensor,
    fc_weight: Tensor | None,
    fc_bias: Tensor | None,
    d: Tensor | None,
    p: Tensor,
    mean1: Tensor,
    rstd1: Tensor,
    mean2: Tensor,
    rstd2: Tensor,
    g: Tensor,
    m1: Tensor,
    m2: Tensor,
    need_maps: bool,
    need_dw: bool,
    need_norm1: bool,
    need_pw: bool,
) -> list[Tensor]:
    none = lambda: maps[0].new_empty(0)  # noqa: E731
    like = lambda t, wanted=True: t.new_empty(t.shape) if t is not None and wanted else none()  # noqa: E731
    below = need_maps or need_dw or need_norm1
    parameters = [like(dw_weight, need_dw), like(gamma1, below), like(beta1, below), like(pw_weight, need_pw)]
    parameters += [like(gamma2), like(beta2), like(fc_weight), like(fc_bias)]
    return parameters + [_like(m, m.new_empty) if need_maps else none() for m in maps]


@torch.library.custom_op("fastffl::fuse_conv_infer", mutates_args=())
def _infer(
    maps: list[Tensor],
    dw_weight: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    mean1: Tensor,
    var1: Tensor,
    eps1: float,
    pw_weight: Tensor,
    gamma2: Tensor,
    beta2: Tensor,
    mean2: Tensor,
    var2: Tensor,
    eps2: float,
    fc_weight: Tensor | None,
    fc_bias: Tensor | None,
) -> Tensor:
    call = _Call(maps, pw_weight, fc_weight)
    jit = call.jit
    dw_weight, gamma1, beta1, mean1, var1, pw_weight, gamma2, beta2, mean2, var2, fc_weight, fc_bias = _flat(
        dw_weight, gamma1, beta1, mean1, var1, pw_weight, gamma2, beta2, mean2, var2, fc_weight, fc_bias
    )
    if call.batch == 0:
        return call.empty(0, call.classes or call.n)
    if call.plan.inference == "whole":
        one = jit.pick_infer(call.channels, call.n, call.plane, call.classes, call.batch)
        at = jit.place(call.channels, one.c)
        lay = call.where(maps)
        out = call.empty(call.batch, call.classes or call.n)
        grid = divup(call.batch, one.images)
        call.launch(
            jit.infer,
            grid,
            one,
            **{"xs": tuple(maps), "weight": dw_weight, "taps": call.empty(grid, 9, call.c, dtype=torch.float32)},
            **{"mean1": mean1, "var1": var1, "gamma1": gamma1, "beta1": beta1, "eps1": eps1, "pw_weight": pw_weight},
            **{"mean2": mean2, "var2": var2, "gamma2": gamma2, "beta2": beta2, "eps2": eps2},
            **{"fc_weight": fc_weight, "fc_bias": fc_bias, "g": out, "u": out, "B": call.batch},
            **{"CS": at.CS, "FIRST": at.FIRST, "OFF": at.OFF, "LAY": lay, "UNIT": all(s[1] == 1 for s in lay)},
            **{"C": call.c, "N": call.n, "H": call.height, "W": call.wide, "CLASSES": call.classes, "TILES": at.tiles},
            **{"PRECISION": call.precision, "IMAGES": one.images, "PLANE": one.plane},
            **{"BLOCK_C": one.c, "BLOCK_N": one.n, "BLOCK_K": one.k},
        )
        return out
    a = call.conv(dw_weight, "act", (mean1, var1, gamma1, beta1, None, None), 0.0, eps1)
    if call.plan.inference == "fused":
        p = call.gemm(a, pw_weight, None, None, None, 0.0, 0.0)
    else:
        p = call.empty(call.rows, call.n)
        torch.mm(a, pw_weight.view(call.n, call.c).to(call.dtype).t(), out=p)
    made: Tensor = call.tail(p, (mean2, var2, gamma2, beta2), eps2, fc_weight, fc_bias, False)[0]
    return made


@_infer.register_fake
def _(
    maps: list[Tensor],
    dw_weight: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    mean1: Tensor,
    var1: Tensor,
    eps1: float,
    pw_weight: Tensor,
    gamma2: Tensor,
    beta2: Tensor,
    mean2: Tensor,
    var2: Tensor,
    eps2: float,
    fc_weight: Tensor | None,
    fc_bias: Tensor | None,
) -> Tensor:
    return maps[0].new_empty(maps[0].shape[0], pw_weight.shape[0] if fc_weight is None else fc_weight.shape[0])


LAUNCHES["fastffl::fuse_conv_maps"] = 2
LAUNCHES["fastffl::fuse_conv_pool"] = 1
LAUNCHES["fastffl::fuse_conv_backward"] = 4
LAUNCHES["fastffl::fuse_conv_infer"] = 1


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    maps, *tensors = inputs
    _, g, m1, m2 = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(g, m1, m2)
    ctx.maps = len(maps)
    ctx.save_for_backward(*maps, *tensors, g, m1, m2)


def _gradients(ctx: Any, grad: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad
    if grad is None:
        return (None,) * len(wanted)
    maps, tensors = list(ctx.saved_tensors[: ctx.maps]), ctx.saved_tensors[ctx.maps :]
    made = _backward(grad, maps, *tensors, any(wanted[0]), wanted[1], wanted[2] or wanted[3], wanted[4])
    dmaps = [t if w else None for t, w in zip(made[8:], wanted[0], strict=True)]
    return (dmaps, *(t if w else None for t, w in zip(made[:8], wanted[1:9], strict=True)), *(None,) * 6)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(TWICE)


_pool.register_autograd(_gradients, setup_context=_setup)
_backward.register_autograd(_refuse)


def _triton(
    maps: tuple[Tensor, ...],
    dw_weight: Tensor,
    bn1: Norm,
    pw_weight: Tensor,
    bn2: Norm,
    fc_weight: Tensor | None,
    fc_bias: Tensor | None,
    *,
    training: bool,
    recompute: bool,
) -> Tensor:
    device = maps[0].device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # which knows no meta
        maps = tuple(m.to(torch.get_autocast_dtype(device)) for m in maps)
    one = (bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var)
    two = (bn2.weight, bn2.bias, bn2.running_mean, bn2.running_var)
    if not training:
        return _infer(list(maps), dw_weight, *one, bn1.eps, pw_weight, *two, bn2.eps, fc_weight, fc_bias)
    inputs = (dw_weight, *one), (pw_weight, *two[2:])
    detached = [None if t is None else t.detach() for part in inputs for t in part]
    scalars = (bn1.momentum, bn1.eps, bn2.momentum, bn2.eps)
    d, *rest = _maps([m.detach() for m in maps], *detached, *scalars)
    parameters = (dw_weight, *one[:2], pw_weight, *two[:2], fc_weight, fc_bias)
    out: Tensor = _pool(list(maps), *parameters, None if recompute else d, *rest)[0]
    return out


register("fuse_conv", _triton)


def fuse_conv(
    maps: tuple[Tensor, ...],
    dw_weight: Tensor,
    bn1: Norm,
    pw_weight: Tensor,
    bn2: Norm,
    fc_weight: Tensor | None,
    fc_bias: Tensor | None,
    *,
    training: bool,
    recompute: bool = False,
) -> Tensor:
    """The fusion module of Kim et al., Feature Fusion Learning, in one call: (B, classes), or (B, N) without a classifier.

    maps        K >= 1 tensors (B, C_k, H, W), floating point, one dtype and device; channels_last is the fast layout, any
                strides are right. Their gradients come back channels_last where a map is, else contiguous
    dw_weight   (C, 1, 3, 3), C = sum of the C_k       pw_weight  (N, C, 1, 1)       fc_weight, fc_bias  (classes, N), (classes,)
    bn1, bn2    over C and N channels; in training the running statistics (None: not kept) are updated as nn.BatchNorm2d does
    training    batch statistics, differentiable once. Without it the running ones; where a gradient is then wanted, the
                reference path gives it
    recompute   keep P only for the backward, not D: one depthwise pass more, 0.5X instead of 1.5X saved at N = C/2

    Parameters are fp32 or of the maps' dtype and rounded to the maps' dtype where they meet them; the output has that dtype.
    Under autocast maps become autocast's dtype, as torch's own convolution does. fp64 takes the reference path.
    BatchNorm's statistics are taken from fp32 values before D and P are rounded: less than one bf16 ulp from torch's.
    B = 0 gives (0, ...), zero gradients and running statistics as they were. ValueError says what was wrong.
    """
    _check(maps, dw_weight, bn1, pw_weight, bn2, fc_weight, fc_bias, training)
    inputs = (*maps, dw_weight, bn1.weight, bn1.bias, pw_weight, bn2.weight, bn2.bias, fc_weight, fc_bias)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    arguments = (maps, dw_weight, bn1, pw_weight, bn2, fc_weight, fc_bias)
    options: dict[str, Any] = {"training": training, "recompute": recompute}
    if maps[0].dtype == torch.float64 or (learns and not training):
        return fuse_conv_reference(*arguments, **options)
    out: Tensor = run("fuse_conv", maps[0], fuse_conv_reference, *arguments, **options)
    return out


def _check(
    maps: tuple[Tensor, ...],
    dw_weight: Tensor,
    bn1: Norm,
    pw_weight: Tensor,
    bn2: Norm,
    fc_weight: Tensor | None,
    fc_bias: Tensor | None,
    training: bool,
) -> None:
    if not maps:
        raise ValueError("fuse_conv needs at least one map, got none")
    x = maps[0]
    for k, m in enumerate(maps):
        if m.ndim != 4 or m.shape[0] != x.shape[0] or m.shape[2:] != x.shape[2:] or 0 in m.shape[1:]:
            raise ValueError(
                f"maps[{k}] is {tuple(m.shape)}; expected (B, C_k, H, W) with the B, H and W of maps[0], {tuple(x.shape)}"
            )
        if m.dtype not in (*DTYPES, torch.float64):
            raise ValueError(f"maps[{k}] is {m.dtype}; expected bf16, fp16, fp32 or fp64")
        if m.dtype != x.dtype or m.device != x.device:
            raise ValueError(f"maps[{k}] is {m.dtype} on {m.device}, maps[0] {x.dtype} on {x.device}; expected the same")
    c, n = sum(m.shape[1] for m in maps), pw_weight.shape[0]
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("dw_weight", dw_weight, (c, 1, 3, 3)),
        ("pw_weight", pw_weight, (n, c, 1, 1)),
        *((f"bn1.{name}", t, (c,)) for name, t in zip(Norm._fields[:4], bn1[:4], strict=True)),
        *((f"bn2.{name}", t, (n,)) for name, t in zip(Norm._fields[:4], bn2[:4], strict=True)),
    ]
    if fc_weight is not None:
        expected += [("fc_weight", fc_weight, (fc_weight.shape[0], n)), ("fc_bias", fc_bias, (fc_weight.shape[0],))]
    elif fc_bias is not None:
        raise ValueError("fc_bias came without fc_weight; expected both or fc_weight alone")
    for name, t, shape in expected:
        if t is None:
            continue
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} is {tuple(t.shape)}; expected {shape} for maps of {[m.shape[1] for m in maps]} channels")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, the maps on {x.device}")
        if t.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name} is {t.dtype}; expected torch.float32 or the maps' {x.dtype}")
    for name, bn in (("bn1", bn1), ("bn2", bn2)):
        if (bn.running_mean is None) != (bn.running_var is None):
            raise ValueError(f"{name} has only one of running_mean and running_var; expected both or none")
        if not training and bn.running_mean is None:
            raise ValueError(f"{name} keeps no running statistics, which training=False needs")
    if training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        size = torch.Size((x.shape[0], c, x.shape[2], x.shape[3]))
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
