"""What the kernels are measured on: each op at one shape and type, the ways to compute it, and its answer in float64.

A style is one way to compute a problem: ours, the op's reference, torch as people write it, torch.compile of that, another
package. All styles of a problem get the same inputs and give the same outputs by name, gradients included.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastffl_kernels
from fastffl_kernels import Classes, GraphEdge, GuardState, _dispatch, class_order, distill_graph_reference, negatives
from fastffl_kernels._launch import Norm

from .. import nets
from ..data.resident import crop_flip
from ..data.rng import below, uniform_bits

Inputs = dict[str, Any]  # tensors, or tuples of them, by name; what a style keeps of its own has a name with _
Outputs = dict[str, Tensor]
EPS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23, torch.float64: 2.0**-52}
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
VALUE = 42.0  # 5e-6 in units of fp32 eps
MAX = "max-autotune-no-cudagraphs"
T, RAMP = 3.0, 0.5


class Style(NamedTuple):
    """One way to compute a problem.

    group    ours, reference, eager, compile, liger, apex: goals name the group they are against, its best row counts
    mode     torch.compile's, or "" for a plain call
    missing  why it can't run here, or ""
    """

    name: str
    group: str
    forward: Callable[[Inputs], Outputs]
    mode: str = ""
    missing: str = ""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An op at one shape and type.

    draw      (device, seed) -> inputs; a pure function of both
    exact     the answer from inputs in float64
    wrt       the inputs whose gradients belong to the answer; a forward's first output is differentiated, by inputs["upstream"]
              unless it is a scalar, or as many outputs as that has tensors
    bytes     what our path must move; flop: what it must compute
    sure      inputs -> masks by output: where rounding can't change which side of a kink a value is on
    limit     largest error of ours in units of eps x largest value: eps of `dtype` for gradients, of its own type for a value,
              where fp32 values may be off by VALUE instead
    rival     that of others, in eps of `dtype` throughout: they may keep more in it
    far       how many times the usual relative distance from the truth an output may have
    """

    op: str
    case: str
    dtype: torch.dtype
    draw: Callable[[torch.device, int], Inputs]
    exact: Callable[[Inputs], Outputs]
    styles: tuple[Style, ...]
    wrt: tuple[str, ...] = ()
    sure: Callable[[Inputs], dict[str, Tensor]] | None = None
    bytes: int = 0
    flop: int = 0
    limit: float = 16.0
    rival: float = 64.0
    far: float = 1.0
    gemm: bool = False
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {self.case}"


def leaves(value: Any) -> list[Tensor]:
    """The tensors among inputs, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [x for part in parts for x in leaves(part)]


def in_float64(value: Any) -> Any:
    """Inputs with every floating-point tensor in float64, leaves again."""
    if isinstance(value, Tensor):
        return value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: in_float64(part) for name, part in value.items()}
    if isinstance(value, tuple):
        parts = [in_float64(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def solved(forward: Callable[[Inputs], Outputs], wrt: tuple[str, ...], inputs: Inputs) -> Outputs:
    """The outputs and, under `d NAME`, the gradients of a forward."""
    if not wrt:
        with torch.no_grad():
            return forward(inputs)
    out = forward(inputs)
    upstream = leaves(inputs.get("upstream")) or None
    heads = list(out.values())[: len(upstream) if upstream else 1]
    targets = {f"d {name}{k}": x for name in wrt for k, x in enumerate(leaves(inputs[name]))}
    grads = torch.autograd.grad(heads, list(targets.values()), upstream)
    return {**{name: x.detach() for name, x in out.items()}, **dict(zip(targets, grads, strict=True))}


class Truth(NamedTuple):
    """A problem's answer in float64, and where its gradients are certain."""

    values: Outputs
    sure: dict[str, Tensor]


def truth(problem: Problem, inputs: Inputs) -> Truth:
    wide = in_float64(inputs)
    with torch.no_grad():
        sure = problem.sure(wide) if problem.sure else {}
    return Truth(solved(problem.exact, problem.wrt, wide), sure)


def errors(got: Outputs, want: Truth, dtype: torch.dtype, *, own: bool = False) -> dict[str, float]:
    """Per output the largest |got - want| in units of eps x largest |want|: the coarser eps of `dtype` and the output's type, and
    with `own` that of its type for values (not gradients). A value within 1e-6 of the truth is right, integers must be equal."""
    made = {}
    for name, x in got.items():
        y = want.values[name]
        if not x.is_floating_point():
            made[name] = 0.0 if torch.equal(x, y) else float("inf")
            continue
        off = (x.double() - y).abs()
        if name in want.sure:
            off = off[want.sure[name]]
        worst, top = (float(v.max()) if v.numel() else 0.0 for v in (off, y.abs()))
        value = not name.startswith("d ")
        eps = max(EPS[x.dtype], EPS[torch.float32])  # sums in fp64 are of products in fp32
        unit = eps if own and value else max(eps, EPS[dtype])
        made[name] = 0.0 if value and worst <= 1e-6 else worst / (unit * max(top, 1e-30))
    return made


def distances(got: Outputs, want: Truth) -> dict[str, float]:
    """Relative distance (root of summed squares) per output: what no single kink can excuse."""
    made = {}
    for name, x in got.items():
        if x.is_floating_point() and x.numel():
            y = want.values[name]
            off = torch.where(want.sure[name], x.double() - y, 0.0) if name in want.sure else x.double() - y
            far = float(off.norm() / y.norm().clamp(min=1e-30))
            made[name] = far if far == far else float("inf")
    return made


def compiled(style: Style, mode: str) -> Style:
    name = f"compile {'max ' if mode == MAX else ''}{style.name.removeprefix('eager').strip()}".strip()
    return Style(name, "compile", style.forward, mode)


def both_modes(*styles: Style) -> tuple[Style, ...]:
    return tuple(compiled(s, mode) for mode in ("default", MAX) for s in styles)


def module(op: str) -> ModuleType | None:
    """The file of an op of ours; None where this version has none."""
    name = f"fastffl_kernels.{op}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def _of_ours(op: str, made: Callable[[Callable[..., Any]], Callable[[Inputs], Outputs]]) -> list[Style]:
    """The op, and the same with its reference forced, as styles; what is not in this version says so."""
    file = module(op)
    if file is None:
        return [Style(group, group, lambda inputs: {}, missing="not in this version") for group in ("ours", "reference")]
    path = getattr(file, op)

    def plainly(*args: Any, **named: Any) -> Any:
        with fastffl_kernels.use("reference"):
            return path(*args, **named)

    return [Style("ours", "ours", made(path)), Style("reference", "reference", made(plainly))]


def has_triton(op: str) -> bool:
    return module(op) is not None and op in _dispatch._TRITON and importlib.util.find_spec("triton") is not None


def not_installed(package: str) -> str:
    return "" if importlib.util.find_spec(package) else "not installed"


def no_apex() -> str:
    """NVIDIA's apex is known by its files and its extension: another project holds the name on the package index."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "not installed"
    if not any((Path(p) / "optimizers" / "fused_sgd.py").is_file() for p in spec.submodule_search_locations or []):
        return "the installed 'apex' is not NVIDIA's"
    return "" if importlib.util.find_spec("amp_C") else "NVIDIA's apex was built without its CUDA extensions"


def randoms(device: torch.device, seed: int) -> Callable[..., Tensor]:
    """normal(shape, dtype, scale) from one generator on the device."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    return normal


# ---- distill_graph: FFL's graph of K peers and the fused classifier ---------------------------------------------------------


def _graph(peers: int) -> tuple[tuple[tuple[int, float], ...], tuple[GraphEdge, ...], tuple[tuple[int, ...], ...]]:
    fused, mean = peers, peers + 1
    edges = [GraphEdge(fused, k, T) for k in range(peers)] + [GraphEdge(mean, fused, T)]
    return tuple((k, 1.0) for k in range(peers + 1)), tuple(edges), (tuple(range(peers)),)


def _by_op(op: Callable[..., Any], inputs: Inputs) -> Outputs:
    hard, edges, means = _graph(len(inputs["z"]) - 1)
    return {"loss": op(inputs["z"], inputs["labels"], hard, edges, inputs["weights"], means).loss}


def _by_torch(wide: bool, inputs: Inputs) -> Outputs:
    """The loss as it is usually written; `wide` casts the logits to fp32 first."""
    z = [x.float() if wide else x for x in inputs["z"]]
    fused, mean = z[-1], torch.stack(z[:-1]).mean(0)
    loss = sum((F.cross_entropy(x, inputs["labels"]) for x in z), z[0].new_zeros(()))
    pairs = [(fused, x) for x in z[:-1]] + [(mean, fused)]
    for k, (teacher, student) in enumerate(pairs):
        target = F.log_softmax(teacher.detach() / T, 1)
        kl = F.kl_div(F.log_softmax(student / T, 1), target, reduction="batchmean", log_target=True)
        loss = loss + inputs["weights"][k] * T**2 * kl
    return {"loss": loss}


def _by_logsumexp(inputs: Inputs) -> Outputs:
    """The same with each softmax reduced to its logsumexp: what a compiler fuses best."""
    z = [x.float() for x in inputs["z"]]
    fused, mean = z[-1], torch.stack(z[:-1]).mean(0)
    at = inputs["labels"][:, None]
    loss = sum(((x.logsumexp(1) - x.gather(1, at)[:, 0]).mean() for x in z), z[0].new_zeros(()))
    for k, (teacher, student) in enumerate([(fused, x) for x in z[:-1]] + [(mean, fused)]):
        t, s = teacher.detach() / T, student / T
        lse_t, lse_s = t.logsumexp(1), s.logsumexp(1)
        row = ((t - lse_t[:, None]).exp() * (t - s)).sum(1) - lse_t + lse_s
        loss = loss + inputs["weights"][k] * T**2 * row.mean()
    return {"loss": loss}


def _by_liger(inputs: Inputs) -> Outputs:
    """Liger's cross-entropy and KL kernels composed by hand; the first overwrites its input, hence the copies."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss  # type: ignore[import-not-found, unused-ignore]

    ce, kl = LigerCrossEntropyLoss(), LigerKLDIVLoss(reduction="batchmean", log_target=True)
    z = [x.float() for x in inputs["z"]]
    fused, mean = z[-1], torch.stack(z[:-1]).mean(0)
    loss = sum((ce(x.clone(), inputs["labels"]) for x in z), z[0].new_zeros(()))
    for k, (teacher, student) in enumerate([(fused, x) for x in z[:-1]] + [(mean, fused)]):
        target = F.log_softmax(teacher.detach() / T, 1)
        loss = loss + inputs["weights"][k] * T**2 * kl(F.log_softmax(student / T, 1), target)
    return {"loss": loss}


def loss(batch: int, classes: int, peers: int, dtype: torch.dtype, *, quick: bool = False) -> Problem:
    """FFL's whole loss and its gradients for every logit; bytes: each logit read and each gradient written once."""

    def draw(device: torch.device, seed: int) -> Inputs:
        normal = randoms(device, seed)
        z = tuple(normal(batch, classes, dtype=dtype, scale=2.0).requires_grad_() for _ in range(peers + 1))
        labels = torch.randint(0, classes, (batch,), generator=torch.Generator().manual_seed(seed)).to(device)
        return {"z": z, "labels": labels, "weights": torch.full((peers + 1,), RAMP, device=device)}

    floats = Style("eager .float()", "eager", partial(_by_torch, True))
    plain = Style("eager no cast", "eager", partial(_by_torch, False))
    sums = Style("eager logsumexp", "eager", _by_logsumexp)
    styles = [*_of_ours("distill_graph", lambda path: partial(_by_op, path)), floats]
    styles += [plain, sums] if dtype.itemsize == 2 else [sums]
    styles += [Style("liger", "liger", _by_liger, missing=not_installed("liger_kernel"))]
    styles += both_modes(*(s for s in (floats, plain, sums) if s in styles))
    op, logits = module("distill_graph"), (peers + 1) * batch * classes
    assert op is not None
    return Problem(
        op="distill_graph",
        case=f"B{batch} C{classes} K{peers}",
        dtype=dtype,
        draw=draw,
        exact=partial(_by_op, distill_graph_reference),
        styles=tuple(styles),
        wrt=("z",),
        bytes=op.bytes_moved(batch, classes, peers + 1, dtype),
        flop=16 * logits,  # two softmaxes, their gradients and the divergence
        quick=quick,
    )


# ---- fuse_conv: the fusion module ---------------------------------------------------------------------------------------------


def _norm(inputs: Inputs, which: str) -> Norm:
    return Norm(inputs[which][0], inputs[which][1], inputs[f"{which} running"][0], inputs[f"{which} running"][1])


def _norms(normal: Callable[..., Tensor], name: str, channels: int, learns: bool = True) -> Inputs:
    """The parameters of a BatchNorm, and its running statistics away from 0 and 1."""
    weight, bias = 1 + normal(channels, scale=0.1), normal(channels, scale=0.1)
    running = normal(channels, scale=0.1), 1 + normal(channels, scale=0.1).abs()
    return {name: (weight.requires_grad_(learns), bias.requires_grad_(learns)), f"{name} running": running}


def _fusion(path: Callable[..., Tensor], training: bool, inputs: Inputs) -> Outputs:
    norms = _norm(inputs, "bn1"), _norm(inputs, "bn2")
    return {"u": path(inputs["maps"], inputs["dw"], norms[0], inputs["pw"], norms[1], *inputs["fc"], training=training)}


def _fusion_by_torch(
    maps: tuple[Tensor, ...], dw: Tensor, bn1: Norm, pw: Tensor, bn2: Norm, fc: Tensor, bias: Tensor, *, training: bool
) -> Tensor:
    """The module as it is usually written."""
    x = F.conv2d(torch.cat(maps, 1), dw, padding=1, groups=dw.shape[0])
    x = F.relu(F.batch_norm(x, bn1.running_mean, bn1.running_var, bn1.weight, bn1.bias, training), inplace=True)
    x = F.conv2d(x, pw)
    x = F.relu(F.batch_norm(x, bn2.running_mean, bn2.running_var, bn2.weight, bn2.bias, training), inplace=True)
    return F.linear(x.mean((2, 3)), fc, bias)


def _no_kinks(inputs: Inputs) -> dict[str, Tensor]:
    """Gradients are certain only where no value before either ReLU is within fp32's rounding of 0."""
    bn1, bn2 = _norm(inputs, "bn1"), _norm(inputs, "bn2")
    d = F.conv2d(torch.cat(inputs["maps"], 1), inputs["dw"], padding=1, groups=inputs["dw"].shape[0])
    d = F.batch_norm(d, None, None, bn1.weight, bn1.bias, True)
    p = F.batch_norm(F.conv2d(F.relu(d), inputs["pw"]), None, None, bn2.weight, bn2.bias, True)
    safe = bool((d.abs() > 1e-5).all() and (p.abs() > 1e-5).all())
    names = {name: leaves(inputs[name]) for name in ("maps", "dw", "bn1", "pw", "bn2")}
    return {f"d {name}{k}": torch.full_like(x, safe, dtype=torch.bool) for name, xs in names.items() for k, x in enumerate(xs)}


def fusion(
    batch: int,
    channels: int,
    width: int,
    side: int,
    dtype: torch.dtype,
    *,
    classes: int = 100,
    training: bool = True,
    quick: bool = False,
) -> Problem:
    """Two peers' maps of channels / 2 each into logits; forward and backward, or inference. Weights have the maps' type, as
    an optimizer with shadow weights leaves them."""

    def draw(device: torch.device, seed: int) -> Inputs:
        normal = randoms(device, seed)
        shape = batch, channels // 2, side, side
        maps = [normal(*shape, dtype=dtype).relu_().contiguous(memory_format=torch.channels_last) for _ in range(2)]
        dw = normal(channels, 1, 3, 3, dtype=dtype, scale=0.3)
        pw = normal(width, channels, 1, 1, dtype=dtype, scale=channels**-0.5)
        fc = normal(classes, width, dtype=dtype, scale=width**-0.5), normal(classes, dtype=dtype, scale=0.1)
        made = {"maps": tuple(maps), "dw": dw, "pw": pw, "fc": fc}
        for x in leaves(made):
            x.requires_grad_(training)
        for name, n in (("bn1", channels), ("bn2", width)):
            made |= _norms(normal, name, n, training)
        return made | {"upstream": normal(batch, classes, dtype=dtype, scale=1 / batch)}

    op = module("fuse_conv")
    plain = Style("eager", "eager", partial(_fusion, _fusion_by_torch, training))
    styles = _of_ours("fuse_conv", lambda path: partial(_fusion, path, training))
    if training and op:
        again = partial(op.fuse_conv, recompute=True)
        styles.append(Style("ours, D made again", "ours again", partial(_fusion, again, training)))
    x, p = batch * channels * side**2, batch * width * side**2
    moved = (10 * x + 4 * p if training else x) * dtype.itemsize  # forward 3X + 2P, backward 7X + 2P
    if training and op and has_triton("fuse_conv"):
        halves, plane = (channels // 2,) * 2, (side, side)
        way = op.plan(batch, halves, width, *plane, classes, dtype)
        moved = sum(op.bytes_moved(batch, halves, width, *plane, classes, dtype=dtype, weights=dtype, made=way))
    flop = 18 * x + 2 * x * width
    return Problem(
        op="fuse_conv",
        case=f"B{batch} C{channels}>{width} {side}x{side}{'' if training else ' inference'}",
        dtype=dtype,
        draw=draw,
        exact=partial(_fusion, _fusion_by_torch, training),
        styles=(*styles, plain, *both_modes(plain)),
        wrt=("maps", "dw", "bn1", "pw", "bn2", "fc") if training else (),
        bytes=moved,
        flop=3 * flop if training else flop,
        sure=_no_kinks if training and dtype == torch.float32 else None,
        # A value that rounding carries across a ReLU's kink moves its gradient by all of itself, and one in 300 bf16 values is
        # that close: torch itself is 37 % of the largest gradient and 6.7 % in distance away at (2, 1024, 512, 7). In fp32
        # sums of thousands cancel: torch is up to 86 eps away.
        limit=1 / EPS[dtype] if dtype.itemsize == 2 else 256.0,
        rival=1 / EPS[dtype] if dtype.itemsize == 2 else 256.0,
        far=3.0,
        gemm=channels >= 1024,
        quick=quick,
    )


def _depthwise(inputs: Inputs) -> Outputs:
    return {"D": F.conv2d(inputs["x"], inputs["dw"], padding=1, groups=inputs["x"].shape[1])}


def _depthwise_backward(inputs: Inputs) -> Outputs:
    x, w, g = inputs["x"], inputs["dw"], inputs["g"]
    wants = [True, True, False]
    dx, dw, _ = torch.ops.aten.convolution_backward(g, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], x.shape[1], wants)
    return {"d x": dx, "d dw": dw}


def _native(forward: Callable[[Inputs], Outputs], inputs: Inputs) -> Outputs:
    """Torch's own depthwise kernels in place of the vendor's."""
    with torch.backends.cudnn.flags(enabled=False):
        return forward(inputs)


class _Caught:
    """Inside the block every launch of the kernels of a file is kept, so that one of them can be run again alone."""

    def __init__(self, file: ModuleType):
        self.file, self.real = file, file.launch
        self.launches: dict[str, tuple[Callable[[], None], dict[str, Any]]] = {}

    def __enter__(self) -> "_Caught":
        def keep(kernel: Any, *args: Any, **named: Any) -> None:
            self.launches[kernel.__name__] = partial(self.real, kernel, *args, **named), named
            self.real(kernel, *args, **named)

        vars(self.file)["launch"] = keep
        return self

    def __exit__(self, *_: object) -> None:
        vars(self.file)["launch"] = self.real


def _module_gradients(path: Callable[..., Tensor], inputs: Inputs) -> Outputs:
    with torch.enable_grad():
        return solved(partial(_fusion, path, True), ("maps", "dw"), inputs)


def _ours_alone(backward: bool, inputs: Inputs) -> Outputs:
    """The depthwise kernel of the module launched again with the arguments that it had in the module: forward it takes the maps
    unconcatenated and BatchNorm's statistics as well, backward it goes through BatchNorm first."""
    name = "dw_backward" if backward else "dw_forward"
    if f"_{name}" not in inputs:
        file = module("fuse_conv")
        assert file is not None
        with _Caught(file) as caught:
            _module_gradients(file.fuse_conv, inputs)
        inputs[f"_{name}"] = caught.launches[name]
    again, named = inputs[f"_{name}"]
    again()
    if backward:
        return {"d maps0": named["dxs"][0], "d maps1": named["dxs"][1], "d dw0": named["dweight"]}
    b, _, h, w = inputs["x"].shape
    return {"D": named["d"].view(b, h, w, -1).permute(0, 3, 1, 2)}


def _depthwise_exact(backward: bool, forward: Callable[[Inputs], Outputs], inputs: Inputs) -> Outputs:
    """What the conv alone gives and, backward, what the module's kernel gives."""
    return forward(inputs) | (_module_gradients(_fusion_by_torch, inputs) if backward else {})


def depthwise(batch: int, channels: int, width: int, side: int, dtype: torch.dtype, backward: bool) -> Problem:
    """The module's first conv alone, channels_last, forward or backward to data and weight."""
    whole = fusion(batch, channels, width, side, dtype)

    def draw(device: torch.device, seed: int) -> Inputs:
        made, normal = whole.draw(device, seed), randoms(device, seed)
        with torch.no_grad():
            x = torch.cat(made["maps"], 1).contiguous(memory_format=torch.channels_last)
        return made | {"x": x, "g": normal(*x.shape, dtype=dtype).contiguous(memory_format=torch.channels_last)}

    forward = _depthwise_backward if backward else _depthwise
    styles = [Style("ours", "ours", partial(_ours_alone, backward), missing="" if module("fuse_conv") else "not in this version")]
    styles += [Style("eager", "eager", forward), Style("eager native", "eager", partial(_native, forward))]
    size = batch * channels * side**2
    return Problem(
        op="fuse_conv",
        case=f"B{batch} C{channels} {side}x{side} depthwise {'backward' if backward else 'forward'}",
        dtype=dtype,
        draw=draw,
        exact=partial(_depthwise_exact, backward, forward),
        styles=tuple(styles),
        bytes=(4 if backward else 2) * size * dtype.itemsize,  # backward: gradient and D behind the BatchNorm, x, and dx
        flop=(36 if backward else 18) * size,
        limit=whole.limit,
        far=whole.far,
    )


# ---- bn_act: BatchNorm, residual, ReLU -----------------------------------------------------------------------------------------


def _bn_act(path: Callable[..., Any], residual: bool, fork: bool, inputs: Inputs) -> Outputs:
    extra = inputs["x"][1] if residual else None
    out = path(inputs["x"][0], _norm(inputs, "bn"), residual=extra, relu=True, training=True, fork=fork)
    return {"y": out[0], "skip": out[1]} if fork else {"y": out}


def _bn_act_by_torch(x: Tensor, norm: Norm, *, residual: Tensor | None, relu: bool, training: bool, fork: bool) -> Any:
    y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training)
    y = F.relu(y if residual is None else y + residual)
    return (y, y) if fork else y


def _far_from_the_kink(residual: bool, inputs: Inputs) -> dict[str, Tensor]:
    """Where rounding can't carry a value across the ReLU's kink, so that the gradients of x and the residual are certain."""
    norm = _norm(inputs, "bn")
    y = F.batch_norm(inputs["x"][0], None, None, norm.weight, norm.bias, True)
    far = (y + inputs["x"][1] if residual else y).abs() > 0.06  # 8 units in the last place of bf16 values below 2
    return {"d x0": far, "d x1": far}


def bn_act(
    batch: int,
    channels: int,
    side: int,
    dtype: torch.dtype,
    *,
    residual: bool = False,
    fork: bool = False,
    quick: bool = False,
) -> Problem:
    """BatchNorm, perhaps an addition, ReLU: forward and backward of one map in training; `fork`: of one that is used twice."""

    def draw(device: torch.device, seed: int) -> Inputs:
        normal = randoms(device, seed)
        shape = batch, channels, side, side
        last = torch.channels_last
        maps = [normal(*shape, dtype=dtype).contiguous(memory_format=last).requires_grad_() for _ in range(1 + residual)]
        upstream = [normal(*shape, dtype=dtype).contiguous(memory_format=last) for _ in range(1 + fork)]
        return {"x": tuple(maps), **_norms(normal, "bn", channels), "upstream": tuple(upstream) if fork else upstream[0]}

    op = module("bn_act")
    plain = Style("eager", "eager", partial(_bn_act, _bn_act_by_torch, residual, fork))
    styles = _of_ours("bn_act", lambda path: partial(_bn_act, path, residual, fork))
    size = batch * channels * side**2
    moved = ((11 if residual else 8) + fork) * size * dtype.itemsize  # forward 3 or 4 maps, backward 5 or 7, 8 of two uses
    if op and has_triton("bn_act"):  # which knows where a map is small enough to be read once
        facts = {"residual": residual, "relu": True, "training": True, "fork": fork}
        moved = sum(op.bytes_moved(batch * side**2, channels, dtype.itemsize, **facts).values())
    return Problem(
        op="bn_act",
        case=f"B{batch} C{channels} {side}x{side}{' + residual' if residual else ''}{', used twice' if fork else ''}",
        dtype=dtype,
        draw=draw,
        exact=partial(_bn_act, _bn_act_by_torch, residual, fork),
        sure=partial(_far_from_the_kink, residual),
        styles=(*styles, plain, *both_modes(plain)),
        wrt=("x", "bn"),
        bytes=moved,
        flop=(16 if residual else 14) * size,
        quick=quick,
    )


# ---- augment: uint8 images to a training batch ---------------------------------------------------------------------------------

SEED, EPOCH, SIDE, PAD = 1, 2, 32, 4
MEAN, STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)  # CIFAR-100


def _augment(path: Callable[..., Any], dtype: torch.dtype, inputs: Inputs) -> Outputs:
    clock = inputs["seed"], inputs["epoch"]
    made = path(inputs["images"], inputs["ids"], *clock, size=SIDE, pad=PAD, mean=MEAN, std=STD, dtype=dtype, channels_last=True)
    return {"x": made.x[0]}


def _augment_by_torch(dtype: torch.dtype, inputs: Inputs) -> Outputs:
    """The trainer's own torch path over images that were padded once, and the cast to the nets' type."""
    ids, span = inputs["ids"], 2 * PAD + 1
    top, left = (below(uniform_bits(SEED, EPOCH, ids, stream), span) for stream in (0, 1))
    flip = uniform_bits(SEED, EPOCH, ids, 2) < 2**31
    cut = crop_flip(inputs["padded"], ids, top, left, flip, SIDE)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {"x": cut.to(wide).mul_(inputs["scale"].to(wide)).add_(inputs["shift"].to(wide)).to(dtype)}


def augment(batch: int, dtype: torch.dtype, *, quick: bool = False) -> Problem:
    """CIFAR's pad 4, crop, flip, normalise, channels_last."""

    def draw(device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (4 * batch, 3, SIDE, SIDE), generator=generator).to(torch.uint8)
        padded = F.pad(images.half(), (PAD,) * 4, "reflect").to(torch.uint8)
        last = torch.channels_last
        made = {"images": images.to(device), "padded": padded.to(device).contiguous(memory_format=last)}
        made["ids"] = torch.randperm(4 * batch, generator=generator)[:batch].to(device)
        made |= {name: torch.tensor(v, device=device) for name, v in (("seed", SEED), ("epoch", EPOCH))}
        mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
        return made | {"scale": (1 / (255 * std)).to(device), "shift": (-mean / std).to(device)}

    op = module("augment")
    moved = batch * 3 * SIDE**2 * (1 + dtype.itemsize) + 8 * batch
    plain = Style("eager", "eager", partial(_augment_by_torch, dtype))
    return Problem(
        op="augment",
        case=f"B{batch} 3x{SIDE}x{SIDE}",
        dtype=dtype,
        draw=draw,
        exact=partial(_augment_by_torch, torch.float64),
        styles=(*_of_ours("augment", lambda path: partial(_augment, path, dtype)), plain, *both_modes(plain)),
        bytes=op.bytes_moved(batch, 3, SIDE, dtype) if op else moved,
        flop=2 * batch * 3 * SIDE**2,
        quick=quick,
    )


# ---- sgd_flat: momentum SGD over all parameters, and the half-precision weights behind it --------------------------------------

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}


def _stepped(make: Callable[[list[Tensor]], tuple[Any, Callable[[Tensor], Tensor] | None]], key: str, inputs: Inputs) -> Outputs:
    """One step of an optimizer that is made once per inputs, over parameters of its own. Where it writes no half-precision
    weights itself they are copied after it."""
    if key not in inputs:
        params = [x.clone().requires_grad_() for x in inputs["p"]]
        for x, g in zip(params, inputs["g"], strict=True):
            x.grad = g.clone()
        optimizer, shadow_of = make(params)
        shadows = [shadow_of(x) for x in params] if shadow_of else [torch.empty_like(x, dtype=torch.bfloat16) for x in params]
        inputs[key] = optimizer, params, shadows, shadow_of is None
    optimizer, params, shadows, copies = inputs[key]
    optimizer.step()
    if copies:
        torch._foreach_copy_(shadows, [x.detach() for x in params])
    return _weights([x.detach() for x in params], shadows)


def _weights(params: Sequence[Tensor], shadows: Sequence[Tensor]) -> Outputs:
    return {f"p{k}": x for k, x in enumerate(params)} | {f"half {k}": x for k, x in enumerate(shadows)}


def _fused(params: list[Tensor]) -> tuple[Any, None]:
    return torch.optim.SGD(params, fused=True, **SGD), None


def _apex(params: list[Tensor]) -> tuple[Any, None]:
    from apex.optimizers import FusedSGD  # type: ignore[import-not-found, unused-ignore]

    return FusedSGD(params, **SGD), None


def _flat(params: list[Tensor]) -> tuple[Any, Callable[[Tensor], Tensor]]:
    file = module("sgd_flat")
    assert file is not None
    optimizer = file.FlatSGD(params, shadow=torch.bfloat16, **SGD)
    return optimizer, optimizer.shadow_of


def _flat_plainly(params: list[Tensor]) -> tuple[Any, Callable[[Tensor], Tensor]]:
    optimizer, shadow_of = _flat(params)
    real = optimizer.step

    def step() -> None:
        with fastffl_kernels.use("reference"):
            real()

    optimizer.step = step
    return optimizer, shadow_of


def _foreach(inputs: Inputs) -> Outputs:
    """The step in torch's list operations, in place."""
    p, g, m, shadows = (list(inputs[name]) for name in ("p", "g", "m", "half"))
    d = torch._foreach_add(g, p, alpha=SGD["weight_decay"])
    torch._foreach_mul_(m, SGD["momentum"])
    torch._foreach_add_(m, d)
    torch._foreach_add_(p, torch._foreach_add(d, m, alpha=SGD["momentum"]), alpha=-SGD["lr"])
    torch._foreach_copy_(shadows, p)
    return _weights(p, shadows)


def sgd_flat(name: str, shapes: Sequence[tuple[int, ...]], *, quick: bool = False) -> Problem:
    """One step over parameters of the given shapes in fp32, with bf16 weights written behind it."""

    def draw(device: torch.device, seed: int) -> Inputs:
        normal = randoms(device, seed)
        made = {which: tuple(normal(*shape, scale=0.1) for shape in shapes) for which in ("p", "g")}
        made["m"] = tuple(torch.zeros_like(x) for x in made["p"])
        return made | {"half": tuple(torch.empty_like(x, dtype=torch.bfloat16) for x in made["p"])}

    missing = "" if module("sgd_flat") else "not in this version"
    plain = Style("eager foreach", "eager", _foreach)
    styles = [Style("ours", "ours", partial(_stepped, _flat, "_ours"), missing=missing)]
    styles += [Style("reference", "reference", partial(_stepped, _flat_plainly, "_reference"), missing=missing)]
    styles += [Style("eager fused SGD, cast", "eager", partial(_stepped, _fused, "_fused")), plain]
    styles += [Style("apex FusedSGD, cast", "apex", partial(_stepped, _apex, "_apex"), missing=no_apex())]
    size = sum(math.prod(shape) for shape in shapes)
    return Problem(
        op="sgd_flat",
        case=name,
        dtype=torch.float32,
        draw=draw,
        exact=_foreach,
        styles=(*styles, *both_modes(plain)),
        bytes=22 * size,
        flop=7 * size,
        quick=quick,
    )


# ---- guard: what a step decides between backward and update -------------------------------------------------------------------

GUARD: dict[str, Any] = {"clip": 5.0, "decay": 0.999}
TERMS = 3  # cross-entropies, and edges, of FFL's graph of two peers; its nodes are one more


def _guarded(op: Callable[..., Any], inputs: Inputs) -> Outputs:
    state = GuardState(*inputs["state"])
    verdict = op(*inputs["step"], state, grads=inputs["grads"], **GUARD)
    return {name: x for name, x in {**verdict._asdict(), **state._asdict()}.items() if x is not None}


def guard(n: int, *, quick: bool = False) -> Problem:
    """The norm of n gradients, the verdict, loss scale, meters and the average's share; every call moves the state."""

    def draw(device: torch.device, seed: int) -> Inputs:
        normal = randoms(device, seed)
        step = [normal().abs(), normal(TERMS).abs(), normal(TERMS).abs()]
        counts = [torch.arange(TERMS + 1, device=device), torch.tensor(128, device=device)]
        sums = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((), (2 * TERMS,))]
        count = [torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((), (), (TERMS + 1,), (), ())]
        bad = torch.zeros(2 * TERMS + 1, dtype=torch.bool, device=device)
        scale, updates = (torch.tensor(v, device=device) for v in (1024.0, 5.0))
        state = (*count[:2], bad, *sums, *count[2:4], scale, count[4], updates)
        return {"grads": normal(n, scale=0.1), "step": (*step, *counts), "state": state}

    plain = Style("eager", "eager", partial(_guarded, fastffl_kernels.guard_reference))
    return Problem(
        op="guard",
        case=f"{n / 1e6:.2g} M gradients" if n >= 10_000 else f"{n} gradients",
        dtype=torch.float32,
        draw=draw,
        exact=partial(_guarded, fastffl_kernels.guard_reference),
        styles=(*_of_ours("guard", lambda path: partial(_guarded, path)), plain, *both_modes(plain)),
        bytes=4 * n,
        flop=2 * n,
        quick=quick,
    )


# ---- nce: embeddings against memory banks -------------------------------------------------------------------------------------

TAU, NAMES = 0.1, 100  # classes


def _contrasted(path: Callable[..., Any], count: int, inputs: Inputs) -> Outputs:
    given = inputs["banks"], inputs["v"], inputs["ids"], inputs["labels"], Classes(*inputs["classes"]), inputs["counter"]
    made = path(*given, count=count, tau=TAU)
    return {"loss": made.loss, "pairs": made.pairs}


def _by_gather(once: bool, count: int, inputs: Inputs) -> Outputs:
    """The loss as the authors' code writes it: for every pair the rows are gathered anew, or, with `once`, for every bank. Their
    loader brings the negatives; here they are drawn first."""
    banks, v, ids = inputs["banks"], inputs["v"], inputs["ids"]
    M, N = banks.shape[:2]
    drawn = negatives(ids, inputs["labels"], Classes(*inputs["classes"]), count, inputs["counter"])
    index, share, eps, pairs = torch.cat([ids[:, None], drawn], 1).flatten(), count / N, 1e-7, []
    for a in range(M):
        for b in range(M):
            if a == b:
                continue
            if not once or b == (a == 0):  # the first other branch
                rows = banks[a].index_select(0, index).view(len(ids), count + 1, -1)
            s = torch.bmm(rows, v[b][:, :, None])[:, :, 0].div(TAU).exp()
            p = s / (s.detach().mean() * N)
            hit = (p[:, 0] / (p[:, 0] + share + eps)).log().sum()
            pairs.append(-(hit + (share / (p[:, 1:] + share + eps)).log().sum()) / len(ids))
    values = torch.stack(pairs)
    return {"loss": values.sum(), "pairs": values}


def nce(M: int, batch: int, count: int, rows: int, width: int, *, quick: bool = False) -> Problem:
    """All ordered pairs of M branches: loss and the gradient for every embedding. What a style draws is what all draw."""

    def draw(device: torch.device, seed: int) -> Inputs:
        normal = randoms(device, seed)
        labels = torch.randint(0, NAMES, (rows,), generator=torch.Generator().manual_seed(seed)).to(device)
        labels[:2] = torch.arange(2, device=device)
        ids = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:batch].to(device)
        unit = [F.normalize(normal(M, n, width), dim=2) for n in (rows, batch)]
        made: Inputs = {"banks": unit[0], "v": unit[1].requires_grad_(), "ids": ids, "labels": labels[ids]}
        return made | {"classes": tuple(class_order(labels, NAMES)), "counter": torch.tensor(seed, device=device)}

    op = module("nce")
    assert op is not None
    plain = Style("eager", "eager", partial(_by_gather, False, count))
    once = Style("eager, a gather a bank", "eager", partial(_by_gather, True, count))
    return Problem(
        op="nce",
        case=f"M{M} B{batch} R{count} N{rows} D{width}",
        dtype=torch.float32,
        draw=draw,
        exact=partial(_by_gather, True, count),
        styles=(*_of_ours("nce", lambda path: partial(_contrasted, path, count)), plain, once, *both_modes(once)),
        wrt=("v",),
        bytes=op.bytes_moved(M, batch, count, width),
        flop=6 * M * (M - 1) * batch * (count + 1) * width,  # scores twice, weighted rows
        limit=32.0,  # sums over R rows of terms of both signs
        rival=4096.0,  # a sum of R logarithms of what is 1 to about 1 / R
        quick=quick,
    )


def _shapes(net: str, classes: int, size: int) -> list[tuple[int, ...]]:
    """Of the parameters of two such nets."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in nets.plain(net, classes, 3, size).parameters()] * 2


# ---- what is run --------------------------------------------------------------------------------------------------------------

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _losses() -> list[Problem]:
    goals = [loss(1024, 1000, 4, BF16, quick=True), loss(4096, 21841, 4, BF16), loss(128, 100, 2, BF16, quick=True)]
    return [*goals, loss(1024, 1000, 4, FP32), loss(1024, 100, 2, BF16), loss(256, 1000, 2, BF16)]


def _fusions() -> list[Problem]:
    made = [fusion(b, 128, 64, 8, BF16, quick=b == 128) for b in (128, 1024)]
    made += [fusion(256, c, c // 2, 7, BF16, classes=1000) for c in (1024, 4096)]
    made += [fusion(b, 128, 64, 8, BF16, training=False, quick=b == 128) for b in (128, 1024)]
    return made + [depthwise(1024, 128, 64, 8, BF16, backward) for backward in (False, True)]


def _bn_acts() -> list[Problem]:
    """The maps of ResNet-32 on CIFAR and of ResNet-50 at 224 pixels: after a conv, and where a block ends."""
    made = []
    for batch in (128, 1024):
        for channels, side in ((16, 32), (32, 16), (64, 8)):
            made += [bn_act(batch, channels, side, BF16, residual=r, quick=batch == 128) for r in (False, True)]
            made += [bn_act(batch, channels, side, BF16, residual=True, fork=True, quick=batch == 128)]
    made += [bn_act(256, c, s, BF16) for c, s in ((64, 112), (64, 56), (128, 28), (256, 14), (512, 7))]
    return made + [bn_act(256, c, s, BF16, residual=True) for c, s in ((256, 56), (512, 28), (1024, 14), (2048, 7))]


def _augments() -> list[Problem]:
    return [augment(b, t, quick=b == 128) for b in (128, 1024) for t in (BF16, FP32)]


def _steps() -> list[Problem]:
    small = sgd_flat("ResNet-32 x2", _shapes("resnet32", 100, 32), quick=True)
    return [small, sgd_flat("ResNet-50 x2", _shapes("resnet50", 1000, 224))]


def _guards() -> list[Problem]:
    """The gradients of the same nets."""
    sizes = [sum(math.prod(shape) for shape in _shapes(*net)) for net in (("resnet32", 100, 32), ("resnet50", 1000, 224))]
    return [guard(n, quick=k == 0) for k, n in enumerate(sizes)]


def _contrasts() -> list[Problem]:
    """The paper's CIFAR and ImageNet settings, and the widest embedding."""
    cifar = [nce(4, 64, count, 50_000, 128, quick=True) for count in (256, 16_384)]
    return [*cifar, nce(4, 64, 16_384, 50_000, 512), nce(2, 128, 16_384, 1_281_167, 128)]


FULL: dict[str, Callable[[], list[Problem]]] = {
    "distill_graph": _losses,
    "fuse_conv": _fusions,
    "bn_act": _bn_acts,
    "augment": _augments,
    "guard": _guards,
    "sgd_flat": _steps,
    "nce": _contrasts,
}

# Sizes the interpreter does in seconds.
SMALL: dict[str, Callable[[], list[Problem]]] = {
    "distill_graph": lambda: [loss(5, 10, 2, FP32), loss(3, 129, 3, FP32), loss(4, 100, 2, BF16), loss(2, 1000, 4, FP16)],
    "fuse_conv": lambda: [
        *(fusion(3, 6, 5, 4, t, classes=3, training=train) for t in (FP32, BF16) for train in (True, False)),
        *(depthwise(2, 6, 5, 4, FP32, backward) for backward in (False, True)),
    ],
    "sgd_flat": lambda: [sgd_flat("3 tensors", [(3, 2, 3, 3), (5,), (700, 4)])],
    "guard": lambda: [guard(n) for n in (5, 9001)],
    "nce": lambda: [nce(3, 2, 20, 200, 16), nce(2, 3, 150, 300, 7), nce(4, 2, 9, 40, 130)],
    "augment": lambda: [augment(4, t) for t in (FP32, BF16)],
    "bn_act": lambda: [
        bn_act(3, 5, 4, t, residual=r, fork=f) for t in (FP32, BF16) for r, f in ((False, False), (True, False), (True, True))
    ],
}


def full(ops: Iterable[str], quick: bool) -> list[Problem]:
    """The shapes that are timed: those of the goals first."""
    return [p for op in ops for p in FULL[op]() if p.quick or not quick]


def small(ops: Iterable[str]) -> list[Problem]:
    """The shapes whose answers are checked where nothing can be timed."""
    return [p for op in ops for p in SMALL[op]()]
