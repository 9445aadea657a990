"""fuse_conv's kernels in the interpreter: random cases against float64, launches, bytes, laws, and bugs that must be seen."""

import importlib
import importlib.util
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastinterp import fast
from kernelkit import EPS, device_work, draws, guarded, layouts, rounded_error, saved_bytes
from torch import Tensor

from fastffl.fusion import ConvFusion
from fastffl.values import MapSpec
from fastffl_kernels import _launch, use
from fastffl_kernels._launch import Norm, recorded

op: Any = importlib.import_module("fastffl_kernels.fuse_conv")  # the file, not the function of that name
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
EDGES = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40)
SMALL = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16)
LAYOUTS = ("contiguous", "inside", "stepped", "shifted", "transposed", "channels_last")


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    torch.set_num_threads(1)
    with use("triton"), fast():
        yield


class Case(NamedTuple):
    maps: tuple[Tensor, ...]
    parameters: dict[str, Any]
    plan: op.Plan
    recompute: bool
    what: str

    def tensors(self) -> dict[str, Tensor]:
        """Everything that can have a gradient, by name."""
        p = self.parameters
        named = {f"map{k}": m for k, m in enumerate(self.maps)} | {"dw": p["dw_weight"], "pw": p["pw_weight"]}
        named |= {f"{bn}.{name}": getattr(p[bn], name) for bn in ("bn1", "bn2") for name in ("weight", "bias")}
        return named | {k: p[k] for k in ("fc_weight", "fc_bias") if p[k] is not None}

    def running(self) -> list[Tensor]:
        stats = [t for bn in ("bn1", "bn2") for t in self.parameters[bn][2:4]]
        return [t for t in stats if t is not None]

    def to(self, dtype: torch.dtype, map_dtype: torch.dtype | None = None) -> "Case":
        """The same values as fresh leaves, floating-point tensors of another type."""
        new = lambda t: t.detach().to(dtype).clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t  # noqa: E731
        maps = tuple(m.detach().to(map_dtype or dtype).clone().requires_grad_(m.requires_grad) for m in self.maps)
        made = {k: Norm(*map(new, v)) if isinstance(v, Norm) else new(v) for k, v in self.parameters.items()}
        return self._replace(maps=maps, parameters=made)

    def __call__(self, training: bool = True) -> Tensor:
        return op.fuse_conv(self.maps, **self.parameters, training=training, recompute=self.recompute)


def draw(r: random.Random, guards: Any = None, sizes: tuple[int, ...] = SMALL, rows: int = 16) -> Case:
    """A random case: dtypes, sizes at block edges, layouts, absent parts, which tensors want a gradient."""
    torch.manual_seed(r.randrange(1 << 30))
    dtype = r.choice((BF16, FP16, FP32))
    wide = r.choice((dtype, FP32))
    k = r.choice((1, 1, 1, 2, 2, 3))
    channels, width = [r.choice(sizes) for _ in range(k)], r.choice(sizes)
    while True:
        b, h, w = r.randint(1, 4), r.randint(1, 9), r.randint(1, 9)
        if (3 if dtype == FP32 else 8) <= b * h * w <= rows:  # of very few rows a half-precision deviation is mostly rounding
            break
    c, classes = sum(channels), r.choice((0, 1, 3, 7, 10, 15, 16, 17))
    put: Callable[..., Tensor] = guards.put if guards else lambda t, shift=0: t
    maps, names = [], []
    for n in channels:
        m = torch.randn(b, n, h, w) * r.choice((0.5, 1.0, 3.0)) + r.choice((0.0, 0.0, 1.0))
        name = r.choice(LAYOUTS)
        m = layouts(m.to(dtype))[name]
        names.append(name)
        maps.append(put(m, r.choice((0, 1))) if name in ("contiguous", "channels_last") else m)

    def norm(n: int) -> Norm:
        gamma = (torch.rand(n) + 0.5) * torch.tensor([-1.0, 1.0, 1.0])[torch.randint(3, (n,))]
        drawn = (gamma, torch.randn(n) * 0.5, torch.randn(n), torch.rand(n) + 0.5)
        gamma, beta, mean, var = (put(t.to(wide)) for t in drawn)
        kept = r.random() < 0.8
        return Norm(
            gamma, beta, mean if kept else None, var if kept else None, r.choice((0.1, 0.01, 1.0)), r.choice((1e-5, 1e-3))
        )

    made = {
        "dw_weight": put((torch.randn(c, 1, 3, 3) / 3).to(wide)),
        "bn1": norm(c),
        "pw_weight": put((torch.randn(width, c, 1, 1) / c**0.5).to(wide)),
        "bn2": norm(width),
        "fc_weight": put(torch.randn(classes, width).to(wide)) if classes else None,
        "fc_bias": put(torch.randn(classes).to(wide)) if classes and r.random() < 0.7 else None,
    }
    way = "library" if r.random() < 0.15 else "fused"
    plan = op.Plan(way, way, "tail", "whole")
    case = Case(
        tuple(maps), made, plan, r.random() < 0.2, f"{dtype} {wide} B{b} {channels}>{width} {h}x{w} K{classes} {names} {way}"
    )
    wanted = 1.0 if r.random() < 0.8 else 0.5
    for t in case.tensors().values():
        t.requires_grad_(r.random() < wanted)
    case.tensors()["bn1.weight"].requires_grad_(True)
    return case


class _Round(torch.autograd.Function):
    """Round to a type and back; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def oracle(case: Case, dtype: torch.dtype, training: bool = True, stored: bool = True) -> tuple[Tensor, float, list[float]]:
    """The module in float64, rounded to `dtype` where the op stores or multiplies in it: weights, D, A, P, G, u. Without
    those roundings a bf16 case differs where rounding moves a value across a relu's zero: about 1 in 300.
    Inference keeps D, and in one kernel (not `stored`) P too, in fp32.

    Also the size of the terms of the output's sums: the classifier may cancel, and then an ulp of a term is more than one of u.
    And that of each running statistic's, in their order: a mean may be 0.003 where what it is of is 1.
    """
    p, sizes = case.parameters, list[float]()
    rounded = lambda t: _Round.apply(t, dtype)  # noqa: E731

    def bn(x: Tensor, size: Tensor, norm: Norm, kept: bool) -> Tensor:
        mean, var = norm.running_mean, norm.running_var
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            if norm.running_mean is not None:
                n = x.numel() // x.shape[1]
                norm.running_mean.lerp_(mean.detach(), norm.momentum)
                norm.running_var.lerp_(var.detach() * n / (n - 1), norm.momentum)
                sizes.extend((float(size.max()), float((size * var.detach().sqrt()[None, :, None, None]).max())))
        at = (slice(None), None, None)
        scale = norm.weight / (var + norm.eps).sqrt()
        return ((rounded(x) if kept else x) - mean[at]) * scale[at] + norm.bias[at]

    f = torch.cat(case.maps, 1)
    dw, pw = rounded(p["dw_weight"]), rounded(p["pw_weight"])
    d_size = F.conv2d(f.detach().abs(), dw.detach().abs(), padding=1, groups=f.shape[1])
    a = rounded(F.relu(bn(F.conv2d(f, dw, padding=1, groups=f.shape[1]), d_size, p["bn1"], training)))
    p_size = F.conv2d(a.detach(), pw.detach().abs())
    g = rounded(F.relu(bn(F.conv2d(a, pw), p_size, p["bn2"], stored)).mean((2, 3)))
    if p["fc_weight"] is None:
        return g, 0.0, sizes
    weight = rounded(p["fc_weight"])
    term = float((g.abs().amax(0) * weight.abs()).detach().max())
    return F.linear(g, weight, None if p["fc_bias"] is None else rounded(p["fc_bias"])), term, sizes


def values(case: Case, out: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """The output, the running statistics and all wanted gradients."""
    wanted = {k: t for k, t in case.tensors().items() if t.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), upstream.to(out.dtype))
    found = {"out": out.detach()} | {f"d {k}": g for k, g in zip(wanted, grads, strict=True)}
    return found | {f"running{k}": t for k, t in enumerate(case.running())}


def compare(case: Case, upstream_seed: int = 0) -> dict[str, tuple[float, float]]:
    """name -> (error, bound) of one training step, in units of eps x the largest value.

    fp32: 5e-6 relative for values, 16 eps of the step's largest for gradients, or four times what torch's own fp32 module does if
    that is more: a channel whose few rows are nearly equal is divided by a small deviation, in torch as here.
    bf16, fp16: 1 ulp for values, 16 for gradients.
    """
    dtype = case.maps[0].dtype
    exact = case.to(FP64)
    for t in exact.tensors().values():
        t.requires_grad_()
    want, term, sizes = oracle(exact, dtype)
    torch.manual_seed(upstream_seed)
    upstream = torch.randn(want.shape, dtype=FP64).to(dtype).double()
    wanted = values(exact, want, upstream)
    largest = max(float(t.abs().max()) for k, t in wanted.items() if k.startswith("d "))
    unwanted = {f"d {k}" for k, t in case.tensors().items() if not t.requires_grad}
    wanted = {k: t for k, t in wanted.items() if k not in unwanted}
    value_bound = 5e-6 / EPS[dtype] if dtype == FP32 else 1.0
    # Behind a BatchNorm some gradients vanish by cancellation (that of pw_weight where C = 1 is 0 but for eps) and their error
    # is that of the terms: gradients are measured against the largest of the step.
    bounds = {k: 16.0 * largest / max(float(t.abs().max()), 1e-30) if k[:2] == "d " else value_bound for k, t in wanted.items()}
    for name, size in {"out": term, **{f"running{k}": size for k, size in enumerate(sizes)}}.items():
        bounds[name] *= max(1.0, size / max(float(wanted[name].abs().max()), 1e-30))
    if dtype == FP32:
        own = case.to(FP32)
        with use("reference"):
            theirs = values(own, own(), upstream)
        bounds = {k: max(b, 4 * rounded_error(theirs[k], wanted[k])) for k, b in bounds.items()}
    before = {k: t.detach().clone() for k, t in case.tensors().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "plan", lambda *_: case.plan)
        got = values(case, case(), upstream)
    for k, t in case.tensors().items():
        assert torch.equal(t, before[k]), f"{k} was changed: {case.what}"
    assert all(got[k].dtype == (dtype if k == "out" else got[k].dtype) for k in got)
    return {
        k: (rounded_error(got[k], wanted[k]), b if got[k].dtype == dtype else max(b * EPS[dtype] / EPS[got[k].dtype], b))
        for k, b in bounds.items()
    }


CASES = 50


@pytest.mark.parametrize("seed", range(20))
def test_random_training_steps_equal_float64(seed: int) -> None:
    for r in draws(seed, CASES):
        with guarded() as guards:
            case = draw(r, guards)
            found = compare(case)
        bad = {k: v for k, v in found.items() if not v[0] <= v[1]}
        assert not bad, (case.what, bad)


@pytest.mark.parametrize("programs", [1, 3])
def test_long_chunks_and_block_edges(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs walk many rows each: the statistics of several tiles are joined before those of several programs."""
    monkeypatch.setattr(op._jit(), "PROGRAMS", programs)
    for r in draws(1000 + programs, 5):
        with guarded() as guards:
            case = draw(r, guards, EDGES, rows=330)
            found = compare(case)
        bad = {k: v for k, v in found.items() if not v[0] <= v[1]}
        assert not bad, (case.what, bad)


@pytest.mark.parametrize("seed", range(8))
def test_random_inference_equals_float64(seed: int) -> None:
    """The three ways of inference; bf16 and fp16 within 1 ulp of the largest value."""
    for r in draws(2000 + seed, 50):
        with guarded() as guards:
            case = draw(r, guards, rows=100)
            if not all(t is not None for bn in ("bn1", "bn2") for t in case.parameters[bn]):
                continue
            way = r.choice(("whole", "fused", "library"))
            dtype = case.maps[0].dtype
            with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(op, "plan", lambda *_, way=way: op.Plan("fused", "fused", "tail", way))
                got = case(False)
                want, term, _ = oracle(case.to(FP64), dtype, False, stored=way != "whole")
        assert got.dtype == dtype
        scale = max(term, float(want.abs().max()))
        assert rounded_error(got, want, scale) <= (5e-6 / EPS[dtype] if dtype == FP32 else 1.0), (case.what, way)


def fixed(
    channels: tuple[int, ...] = (6, 10),
    width: int = 8,
    classes: int = 7,
    side: int = 4,
    batch: int = 3,
    dtype: torch.dtype = FP32,
) -> Case:
    """One ordinary case, channels_last, everything wanting a gradient."""
    torch.manual_seed(7)
    c = sum(channels)
    maps = tuple(
        torch.randn(batch, k, side, side).to(dtype, memory_format=torch.channels_last).requires_grad_() for k in channels
    )

    def norm(n: int) -> Norm:
        return Norm((torch.rand(n) + 0.5).requires_grad_(), torch.randn(n).requires_grad_(), torch.zeros(n), torch.ones(n))

    made = {
        "dw_weight": (torch.randn(c, 1, 3, 3) / 3).requires_grad_(),
        "bn1": norm(c),
        "pw_weight": (torch.randn(width, c, 1, 1) / c**0.5).requires_grad_(),
        "bn2": norm(width),
        "fc_weight": torch.randn(classes, width).requires_grad_() if classes else None,
        "fc_bias": torch.randn(classes).requires_grad_() if classes else None,
    }
    return Case(maps, made, op.Plan("fused", "fused", "tail", "whole"), False, "fixed")


FORWARD = ["dw_forward", "pw_forward", "tail_forward"]
BACKWARD = ["head_backward", "pw_backward_data", "pw_backward_weight", "dw_backward"]


@pytest.fixture
def unrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are noted and not run: the interpreter copies its arguments with torch, which `device_work` would count."""

    def launch(kernel: Any, grid: tuple[int, ...], device: Any, **named: Any) -> None:
        for seen in _launch._recorders:
            seen.append(_launch.Launch(kernel.__name__, grid))

    _launch.counters(torch.device("cpu"))
    monkeypatch.setattr(op, "launch", launch)


@pytest.mark.parametrize(("recompute", "expected"), [(False, BACKWARD), (True, [BACKWARD[0], "dw_forward", *BACKWARD[1:]])])
def test_launches_of_a_training_step_and_nothing_else(recompute: bool, expected: list[str], unrun: None) -> None:
    case = fixed()._replace(recompute=recompute)
    assert device_work(case) == (FORWARD, [])
    out = case()
    leaves, up = list(case.tensors().values()), torch.ones_like(out)
    assert device_work(lambda: torch.autograd.grad(out, leaves, up)) == (expected, [])
    assert len(FORWARD) + len(expected) <= 9 and len(expected) <= 6
    assert sum(_launch.LAUNCHES[f"fastffl::fuse_conv_{k}"] for k in ("maps", "pool", "backward")) == len(FORWARD) + len(BACKWARD)


def test_launches_of_inference_and_of_large_classifiers(unrun: None) -> None:
    for case, expected in ((fixed(), ["infer"]), (fixed(side=12), FORWARD)):
        with torch.no_grad():
            assert device_work(lambda case=case: case(False)) == (expected, [])
    assert device_work(fixed(width=24, classes=700)) == ([*FORWARD, "pw_forward"], [])


def test_launches_where_few_gradients_are_wanted(unrun: None) -> None:
    """The last kernel also sums the chunks of the pointwise weight gradient, with no other programs where only that is wanted."""
    for name, expected in {
        "fc_weight": [],
        "pw": ["pw_backward_weight", "dw_backward"],
        "dw": ["pw_backward_data", "dw_backward"],
    }.items():
        case = fixed()
        for other, t in case.tensors().items():
            t.requires_grad_(other == name)
        out, up = case(), torch.ones(3, 7)
        assert device_work(lambda out=out, up=up, case=case, name=name: torch.autograd.grad(out, [case.tensors()[name]], up)) == (
            ["head_backward", *expected],
            [],
        )


def test_saved_bytes() -> None:
    case = fixed((32, 32), 32, 10, 8, 4, BF16)
    x = sum(m.numel() * 2 for m in case.maps)
    counts = 3 * 4 * 32 * 2 + (2 * 64 + 2 * 32) * 4  # G, m1, m2 and the two statistics
    assert saved_bytes(case) <= 1.5 * x + counts
    assert saved_bytes(case._replace(recompute=True)) <= 0.5 * x + counts


SCRATCH = {"taps", "partial", "splits", "count"}


def moved(case: Case) -> tuple[int, int]:
    """What the launches' tensors hold, but for scratch and vectors of a value per channel."""
    total = [0]

    def launch(kernel: Any, grid: tuple[int, ...], device: Any, **named: Any) -> None:
        chunked = kernel.__name__ == "pw_backward_weight" and named["out"].ndim == 3
        summed_elsewhere = kernel.__name__ == "dw_backward" and named["splits"] is None
        for name, value in named.items():
            if name in SCRATCH or (name == "out" and chunked) or (name == "dpw" and summed_elsewhere):
                continue
            for t in value if isinstance(value, tuple) else [value]:
                if isinstance(t, Tensor) and t.ndim > 1 and "coef" not in name:
                    total[0] += t.numel() * t.element_size()
        original(kernel, grid, device, **named)

    original = _launch.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "launch", launch)
        out = case()
        forward = total[0]
        torch.autograd.grad(out, list(case.tensors().values()), torch.ones_like(out))
    return forward, total[0] - forward


@pytest.mark.parametrize(
    ("dtype", "recompute", "classes"),
    [(BF16, False, 7), (FP32, False, 7), (BF16, True, 7), (BF16, False, 0), (BF16, False, 3000)],
)
def test_modelled_bytes_are_those_of_the_launches(dtype: torch.dtype, recompute: bool, classes: int) -> None:
    case = fixed((6, 10), 8, classes, 4, 3, dtype)._replace(recompute=recompute)
    made = op.Plan("fused", "fused", "gemm" if classes > 2048 else "tail", "whole")
    want = op.bytes_moved(3, (6, 10), 8, 4, 4, classes, dtype=dtype, recompute=recompute, made=made)
    assert moved(case) == tuple(want)


def test_a_step_is_the_same_bit_for_bit_and_leaves_the_counters_at_zero() -> None:
    case = fixed(dtype=BF16, side=7)
    up = torch.randn(3, 7)
    first, second = (values(c, c(), up) for c in (case.to(FP32, BF16), case.to(FP32, BF16)))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(not t.any() for pair in _launch._counters.values() for t in pair)


def test_gradients_have_the_layout_of_their_maps() -> None:
    case = fixed()
    maps = (case.maps[0], case.maps[1].detach().contiguous().requires_grad_())
    grads = torch.autograd.grad(case._replace(maps=maps)().sum(), maps)
    assert grads[0].is_contiguous(memory_format=torch.channels_last) and grads[1].is_contiguous()


def test_an_expanded_gradient_and_expanded_maps() -> None:
    case = fixed(dtype=FP32)
    wide = case.to(FP32)._replace(maps=tuple(m.detach()[:1].expand(3, -1, -1, -1).requires_grad_() for m in case.maps))
    flat = wide._replace(maps=tuple(m.detach().contiguous().requires_grad_() for m in wide.maps))
    for a, b in zip(torch.autograd.grad(wide().sum(), wide.maps), torch.autograd.grad(flat().sum(), flat.maps), strict=True):
        assert torch.equal(a, b)


def test_offsets_beyond_32_bits() -> None:
    """A map whose images lie 3 x 2^30 elements apart: the second would be read before the first with 32-bit offsets."""
    case = fixed(channels=(4,), batch=2, dtype=BF16).to(FP32, BF16)
    gap = 3 << 30
    whole = torch.from_numpy(np.zeros(gap + 4 * 4 * 4, dtype=np.int16)).view(BF16)  # pages that nobody touches take no memory
    m = whole.as_strided((2, 4, 4, 4), (gap, 1, 16, 4))
    m.copy_(case.maps[0].detach())
    with torch.no_grad():
        assert torch.equal(case._replace(maps=(m,))(), case.to(FP32, BF16)())


def test_an_empty_batch() -> None:
    case = fixed()
    maps = tuple(m.detach()[:0].requires_grad_() for m in case.maps)
    empty = case._replace(maps=maps)
    out = empty()
    assert out.shape == (0, 7)
    grads = torch.autograd.grad(out.sum(), list(empty.tensors().values()))
    assert all(not g.any() and g.shape == t.shape for g, t in zip(grads, empty.tensors().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(case.running(), fixed().running(), strict=True))
    with torch.no_grad():
        assert empty(False).shape == (0, 7)


def test_double_backward_says_what_to_do() -> None:
    case = fixed()
    grads = torch.autograd.grad(case().square().sum(), case.maps, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported; FASTFFL_KERNELS=reference has it"):
        grads[0].sum().backward()


def test_inference_that_wants_a_gradient_takes_the_reference() -> None:
    case = fixed()
    with recorded() as seen:
        out = case(False)
        torch.autograd.grad(out.sum(), case.maps)
    assert not seen


def test_float64_takes_the_reference() -> None:
    case = fixed().to(FP64)
    with recorded() as seen:
        case()
    assert not seen


def test_autocast_gives_its_own_type() -> None:
    """fp32 maps become bf16, as torch's convolution makes them; the gradients come back in fp32."""
    case = fixed()
    with torch.autocast("cpu", BF16):
        out = case()
    assert out.dtype == BF16
    again = case.to(FP32, BF16)()
    assert torch.equal(out, again)
    assert torch.autograd.grad(out.sum(), case.maps)[0].dtype == FP32


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own copies
def test_opcheck() -> None:
    case = fixed((2, 3), 4, 3, 2, 2)
    p = case.parameters
    one, two = ([t.detach() for t in p[k][:4]] for k in ("bn1", "bn2"))
    maps, dw, pw = [m.detach() for m in case.maps], p["dw_weight"].detach(), p["pw_weight"].detach()
    scalars = (0.1, 1e-5, 0.1, 1e-5)
    torch.library.opcheck(op._maps, (maps, dw, *one, pw, *two[2:], *scalars))
    d, *rest = op._maps(maps, dw, *one, pw, *two[2:], *scalars)
    parameters = (dw, *one[:2], pw, *two[:2], p["fc_weight"].detach(), p["fc_bias"].detach())
    leaves = [t.clone().requires_grad_() for t in parameters]
    for kept in (d, None):
        torch.library.opcheck(op._pool, ([m.clone().requires_grad_() for m in maps], *leaves, kept, *rest))
    out, *more = op._pool(maps, *parameters, d, *rest)
    torch.library.opcheck(op._backward, (torch.ones_like(out), maps, *parameters, d, *rest, *more, True, True, True, True))
    torch.library.opcheck(op._infer, (maps, dw, *one, 1e-5, pw, *two, 1e-5, *parameters[6:]))


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_whole_it_equals_eager(recompute: bool) -> None:
    eager = fixed()._replace(recompute=recompute)
    twin = eager.to(FP32)
    step = torch.compile(lambda: twin(), fullgraph=True, backend="aot_eager")
    up = torch.randn(3, 7)
    want, got = values(eager, eager(), up), values(twin, step(), up)
    assert all(torch.equal(want[k], got[k]) for k in want)


MUTANTS = {
    "biased running variance": ("unbiased = m2 / (count - 1.0)", "unbiased = m2 / count"),
    "the means of chunks are not joined": ("m2 + n * off * off", "m2"),
    "the means of tiles are not joined": ("+ delta * delta * n_a * share", ""),
    "a term of batch norm's backward dropped": ("- k0[None, :] - k1[None, :] * off_d", "- k0[None, :]"),
    "taps not flipped backward": ("y = h - (i3 - 1)", "y = h + (i3 - 1)"),
    "gradient of a map 1 % too large": ("acc += g * tl.load(own", "acc += 1.01 * g * tl.load(own"),
    "weight gradient 1 % too large": ("total += tl.load(splits", "total += 1.01 * tl.load(splits"),
    "the plane's edge": (
        "(y >= 0) & (y < H) & (z >= 0) & (z < W)\n            near",
        "(y >= 0) & (y < H) & (z >= 0)\n            near",
    ),
    "relu 2 forgotten backward": ("tl.expand_dims(shift, ROWS) > 0.0", "tl.expand_dims(shift, ROWS) > -1e9"),
    "rows beyond the map in the statistics": ("tl.where(row_ok[:, None], x - mean_b[None, :], 0.0)", "x - mean_b[None, :]"),
    "a counter that is not reset": ("tl.store(count, 0)", "tl.store(count, 1)"),
}


@pytest.mark.parametrize("bug", [None, *MUTANTS])
def test_seeded_bugs_are_seen(bug: str | None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of the random cases fails on every one of these kernels, and not on the kernels as they are."""
    source = Path(op._jit().__file__).read_text()
    if bug:
        old, new = MUTANTS[bug]
        assert old in source
        source = source.replace(old, new)
    path = tmp_path / "mutant.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("fastffl_kernels.jit.mutant", path)
    assert spec and spec.loader
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    mutant.PROGRAMS = 8
    monkeypatch.setattr(op, "_jit", lambda: mutant)
    op.plan.cache_clear()
    monkeypatch.setattr(_launch, "_counters", {})
    monkeypatch.setattr(_launch, "_next", {})
    case = fixed((6, 18), 8, 7, 7, 3)
    found = {}
    for _ in range(2 if bug is None or "counter" in bug else 1):
        found |= {k: v for k, v in compare(case.to(FP32)).items() if not v[0] <= v[1]}
        _launch._next[torch.device("cpu")] = [0, 0]  # the same counters again
    assert bool(found) == bool(bug), found


def test_the_fusion_module_takes_the_kernels_and_counts_its_batches() -> None:
    nets = [ConvFusion((MapSpec(3, 4, 4), MapSpec(5, 4, 4)), 6) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    maps = [torch.randn(2, k, 4, 4) + 1 for k in (3, 5)]
    with recorded() as seen:
        got = nets[0](maps)
    with use("reference"):
        want = nets[1](maps)
    assert [k.kernel for k in seen] == FORWARD
    assert rounded_error(got.detach(), want.detach().double()) <= 5e-6 / EPS[FP32]
    for (name, a), b in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7), name


class _Backend:
    """Runs a graph as traced, and counts."""

    compiled = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.compiled += 1
        return graph


def test_many_batch_sizes_compile_at_most_three_times() -> None:
    case = fixed()
    step = torch.compile(
        lambda maps: op.fuse_conv(maps, **case.parameters, training=True), fullgraph=True, backend=(counted := _Backend())
    )
    for batch in (2, 3, 4, 5, 6):
        step(tuple(torch.randn(batch, m.shape[1], 4, 4) for m in case.maps))
    assert counted.compiled <= 3
