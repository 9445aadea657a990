"""bn_act's kernels, interpreted: values and gradients against float64, guard bands, launches, bytes, seeded bugs.

Bounds (reliability.md 4.3): fp32 values 5e-6 relative + 1e-6 absolute, gradients 16 eps x the scale of what is summed, bf16 and
fp16 outputs 2 ulp more (the interpreter truncates). The absolute part grows with the terms of y that cancel. The scale of dx is
max |g| |weight| / std and that of dweight and dbias the largest sum of |terms|, not the largest gradient: with two rows a
channel, or one channel, those may cancel to nothing.
"""

import importlib
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from fastinterp import fast
from kernelkit import EPS, Guards, device_work, draws, guarded, saved_bytes
from torch import Tensor

from fastffl_kernels import _launch, use
from fastffl_kernels._launch import Norm
from fastffl_kernels.bn_act import bn_act, bn_act_reference, bytes_moved
from fastffl_kernels.jit import bn_act as jit

op: Any = importlib.import_module("fastffl_kernels.bn_act")  # the file, not the function of that name
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65)
SPREAD = ((0.0, 1.0), (0.0, 1.0), (100.0, 1.0), (0.0, 1e-3), (-3.0, 50.0))


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with fast():
        yield


class Case(NamedTuple):
    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    running: tuple[Tensor | None, Tensor | None]
    relu: bool
    training: bool
    momentum: float
    eps: float
    dy: Tensor
    uses: str = ""  # "": no fork; else which of y and skip are used: "both", "y", "skip"
    dskip: Tensor | None = None  # of skip where both are used

    def upstream(self) -> list[tuple[int, Tensor]]:
        """(which output, its gradient)."""
        if self.dskip is not None:
            return [(0, self.dy), (1, self.dskip)]
        return [(int(self.uses == "skip"), self.dy)]


def lay(g: Guards, r: random.Random, x: Tensor) -> Tensor:
    """x among canaries, mostly channels_last, else with any order of strides, stepped, shifted or inside a larger tensor."""
    how = r.choice(("last", "last", "plain", "shifted", "stepped", "inside", "transposed"))
    if how == "last" and x.ndim == 4:
        return g.put(x.contiguous(memory_format=torch.channels_last))
    if how == "shifted":
        return g.put(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x, shift=r.choice((1, 3)))
    if how == "stepped":
        return g.put(x.new_zeros([2 * s for s in x.shape]))[tuple(slice(0, 2 * s, 2) for s in x.shape)].copy_(x)
    if how == "inside":
        return g.put(x.new_zeros([s + 3 for s in x.shape]))[tuple(slice(1, 1 + s) for s in x.shape)].copy_(x)
    return g.put(x.transpose(-1, -2).contiguous().transpose(-1, -2) if how == "transposed" else x)


def shape_of(r: random.Random, rows: int, C: int) -> tuple[int, ...]:
    if r.random() < 0.25:
        return rows, C
    H = r.choice([d for d in range(1, rows + 1) if rows % d == 0])
    W = r.choice([d for d in range(1, rows // H + 1) if (rows // H) % d == 0])
    return rows // H // W, C, H, W


def draw(r: random.Random, g: Guards, training: bool = True) -> Case:
    """Sizes at the edges of the blocks that the plan cuts, or small."""
    torch.manual_seed(r.randrange(1 << 30))
    dtype, C = r.choice(DTYPES), r.choice(CHANNELS)
    block_n = jit.sums_plan(1 << 20, C, 4, jit.TILE).block_n
    edges = [k * n + d for n in (block_n, block_n // 2) for k in (1, 2, 3) for d in (-1, 0, 1) if 2 <= k * n + d <= 1500 // C]
    rows = r.choice(edges) if edges and r.random() < 0.6 else r.randrange(2, 40)
    mean, std = r.choice((*SPREAD, (1e3, 1e-2)) if dtype == torch.float32 else SPREAD)
    shape = shape_of(r, rows, C)
    x = (torch.randn(shape) * std + mean).to(dtype)
    residual = lay(g, r, torch.randn(shape).to(dtype)) if r.random() < 0.5 else None
    kind = r.choice((torch.float32, torch.float32, torch.float32, torch.bfloat16))
    weight, bias = (torch.rand(C) + 0.5) * r.choice((1, -1)), torch.randn(C)
    running = (g.put(torch.randn(C)), g.put(torch.rand(C) + 0.1)) if not training or r.random() < 0.8 else (None, None)
    dy = lay(g, r, torch.randn(shape).to(dtype))
    rest = (r.random() < 0.6, training, r.choice((0.1, 0.01, 1.0)), r.choice((1e-5, 1e-3)))

    x, uses = lay(g, r, x), r.choice(("", "both", "both", "y", "skip"))
    if uses == "both" and x.ndim == 4 and not x.is_contiguous(memory_format=torch.channels_last) and dtype != torch.float32:
        uses = "y"  # autograd adds there, rounded
    dskip = lay(g, r, torch.randn(shape).to(dtype)) if uses == "both" else None
    return Case(x, residual, g.put(weight.to(kind)), g.put(bias.to(kind)), running, *rest, dy, uses, dskip)


def evaluate(c: Case, cast: Callable[[Tensor], Tensor], f: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Output, gradients, running statistics and count of one call on `cast` copies, or on the tensors themselves."""
    ins = {"x": c.x, "residual": c.residual, "weight": c.weight, "bias": c.bias}
    ins = {k: cast(v).detach() for k, v in ins.items() if v is not None}
    for v in ins.values():
        v.requires_grad_(c.training)
    running = [None if v is None else cast(v) for v in c.running]
    batches = torch.zeros((), dtype=torch.int64)
    norm = Norm(ins["weight"], ins["bias"], *running, c.momentum, c.eps)
    more: dict[str, Any] = {"residual": ins.get("residual"), "relu": c.relu, "training": c.training, "batches": batches}
    out = f(x=ins["x"], norm=norm, **more, **({"fork": True} if c.uses else {}))
    y, skip = out if c.uses else (out, out)
    assert y.data_ptr() == skip.data_ptr() and y.stride() == skip.stride()  # a fork takes no memory
    found = {"y": y.detach(), "batches": batches}
    if c.training:
        used = [((y, skip)[k], cast(d)) for k, d in c.upstream()]
        d = torch.autograd.grad([v for v, _ in used], list(ins.values()), [v for _, v in used])
        found |= {f"d{k}": v for k, v in zip(ins, d, strict=True)}
    return found | {k: v for k, v in zip(("running_mean", "running_var"), running, strict=True) if v is not None}


def scales(c: Case, want: dict[str, Tensor]) -> dict[str, float]:
    """What the rounding errors of each gradient are proportional to."""
    over = [d for d in range(c.x.ndim) if d != 1]
    x, g = c.x.double(), sum(d.double().abs() for _, d in c.upstream()) * (want["y"] > 0 if c.relu else 1)
    std = (x.var(over, correction=0) + c.eps).sqrt()
    view = (1, -1) + (1,) * (c.x.ndim - 2)
    normal = (x - x.mean(over, keepdim=True)) / std.view(view)
    w = c.weight.double().view(view)

    straight = float((g * w / std.view(view)).abs().max())
    return {
        "g": straight,
        "dx": straight * max(1.0, float(normal.abs().max())),
        "dresidual": float(g.abs().max()),
        "dweight": float((g * normal).abs().sum(over).max()),
        "dbias": float(g.abs().sum(over).max()),
    }


def top(name: str, c: Case, w: Tensor) -> float:
    """Size of the terms that may cancel to a small value, at least 1: a mean near 0 of large x, a y near 0 of large terms."""
    return max(1.0, float((c.x.double() if name == "running_mean" else w).abs().max()) / (4 if name == "running_mean" else 1))


def compare(c: Case, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    scale = scales(c, want) if c.training else {}
    for name, w in want.items():
        a = got[name].double()
        w = w.double()
        assert a.shape == w.shape and got[name].dtype == (c.weight if name in ("dweight", "dbias") else
            c.x if name in ("y", "dx", "dresidual") else got[name]).dtype, name  # fmt: skip
        room = 16 * EPS[torch.float32] * scale[name] if name in scale else 5e-6 * w.abs() + 1e-6 * top(name, c, w)
        if got[name].dtype in (torch.bfloat16, torch.float16):
            smallest = torch.finfo(got[name].dtype).tiny

            room = room + 2 * EPS[got[name].dtype] * torch.exp2(w.abs().clamp(min=smallest).log2().floor())
            if name == "dx" and c.uses == "both":  # g in x's type lies between, as between torch's addition and its BatchNorm
                room = room + 2 * EPS[c.x.dtype] * scale["g"]

        off = (a - w).abs()
        assert bool((off <= room).all()), f"{name}: off by {float((off / room).max()):.2f} of the bound, {c.x.shape} {c.x.dtype}"


def check(c: Case) -> None:
    """The Triton path on `c` against float64; its inputs stay as they were."""
    inputs = [v for v in (c.x, c.residual, c.weight, c.bias, c.dy, c.dskip) if v is not None]
    before = [v.clone() for v in inputs]
    want = evaluate(c, lambda v: v.double().clone(), bn_act_reference)
    with use("triton"):
        got = evaluate(c, lambda v: v, bn_act)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True)), "an input was changed"
    compare(c, got, want)
    last = c.x.is_contiguous(memory_format=torch.channels_last) if c.x.ndim == 4 else False
    assert got["y"].is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    taken = list(op._launch._counters.values())
    assert not any(bool(k.any()) for pair in taken for k in pair), "an arrival counter was not reset"


def cut(monkeypatch: pytest.MonkeyPatch, r: random.Random) -> None:
    """Small tiles, so that small tensors have several programs and several tiles in each."""
    tile = r.choice((512, 1024))
    sizes = {"TILE": tile, "SUMS_TILE": tile // 2, "STEPS": r.choice((1, 2)), "PROGRAMS": r.choice((3, 7)), "WHOLE": 0}
    for name, value in sizes.items():
        monkeypatch.setattr(jit, name, value)


@pytest.mark.parametrize("batch", range(8))
def test_one_launch_against_float64(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for r in draws(batch, 60):
        monkeypatch.setattr(jit, "WHOLE_WARPS", r.choice((1, jit.WARPS, 16)))  # several tiles, and one
        with guarded() as g:
            check(draw(r, g))


@pytest.mark.parametrize("batch", range(16))
def test_two_launches_against_float64(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for r in draws(100 + batch, 30):
        cut(monkeypatch, r)
        with guarded() as g:
            check(draw(r, g))


@pytest.mark.parametrize("batch", range(2))
def test_eval_against_float64(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for r in draws(200 + batch, 40):
        cut(monkeypatch, r)
        with guarded() as g, torch.no_grad():
            check(draw(r, g, training=False))


def plain(
    shape: tuple[int, ...] = (4, 24, 5, 6),
    dtype: torch.dtype = torch.float32,
    residual: bool = False,
    relu: bool = True,
    training: bool = True,
    mean: float = 0.0,
    std: float = 1.0,
    uses: str = "",
) -> Case:
    """A channels_last case of the usual kind."""
    C = shape[1]
    like = lambda x: x.to(dtype).contiguous(memory_format=torch.channels_last)  # noqa: E731
    maps = [like(torch.randn(shape) * std + mean), *(like(torch.randn(shape)) for _ in range(3))]
    running = (torch.randn(C), torch.rand(C) + 0.1)
    rest = (running, relu, training, 0.1, 1e-5)
    more = (maps[2], uses, maps[3] if uses == "both" else None)
    return Case(maps[0], maps[1] if residual else None, torch.rand(C) + 0.5, torch.randn(C), *rest, *more)


def grown(c: Case) -> dict[str, Tensor]:
    with use("triton"):
        return evaluate(c, lambda v: v.clone(), bn_act)


KINDS = [
    (False, ["bn_act_whole", "bn_act_backward_whole"]),
    (True, ["bn_act_stats", "bn_act_apply", "bn_act_backward_sums", "bn_act_backward_apply"]),
]


@pytest.mark.parametrize("fork", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("two", "kernels"), KINDS)
def test_launches_and_no_other_work(
    two: bool, kernels: list[str], residual: bool, fork: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if two:
        monkeypatch.setattr(jit, "WHOLE", 0)
    c = plain(residual=residual, uses="both" if fork else "")
    ins = [v.requires_grad_() for v in (c.x, c.residual, c.weight, c.bias) if v is not None]
    batches = torch.zeros((), dtype=torch.int64)
    norm = Norm(c.weight, c.bias, *c.running)

    def call() -> None:
        with use("triton"):
            out = bn_act(c.x, norm, residual=c.residual, training=True, batches=batches, fork=fork)
        torch.autograd.grad(out, ins, [d for _, d in c.upstream()])

    seen: list[str] = []  # interpreted kernels copy their arguments with torch, so here none runs
    monkeypatch.setattr(op, "launch", lambda kernel, *_, **__: seen.append(kernel.__name__))
    call()
    assert device_work(call) == ([], []) and seen == kernels * 2
    with use("triton"), torch.no_grad():
        assert device_work(lambda: bn_act(c.x, norm, training=False)) == ([], []) and seen[-1] == "bn_act_apply"


@pytest.mark.parametrize("two", [False, True])
def test_counts_on_meta_tensors_are_those_of_the_launches(two: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    if two:
        monkeypatch.setattr(jit, "WHOLE", 0)
    seen: list[str] = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    c = plain(residual=True)
    with _launch.recorded() as launches:
        grown(c)
    on_meta = c._replace(**{k: v.to("meta") for k, v in c._asdict().items() if isinstance(v, Tensor)})
    on_meta = on_meta._replace(running=tuple(v.to("meta") for v in c.running if v is not None))
    with Counter():
        ins = [v.requires_grad_() for v in (on_meta.x, on_meta.weight, on_meta.bias)]
        with use("triton"):
            y = bn_act(on_meta.x, Norm(*ins[1:], *on_meta.running), residual=on_meta.residual, training=True)
        torch.autograd.grad(y, ins, on_meta.dy)
    assert y.stride() == c.x.stride()
    assert sum(_launch.LAUNCHES[name] for name in seen if name.startswith("fastffl::")) == len(launches) == (4 if two else 2)


@pytest.mark.parametrize(("residual", "relu", "kept"), [(False, True, 1), (True, True, 2), (True, False, 1), (False, False, 1)])
@pytest.mark.parametrize("two", [False, True])
def test_saved_bytes(residual: bool, relu: bool, kept: int, two: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """x, and y only where the mask needs it: never more than the maps that torch's BatchNorm and ReLU keep."""
    if two:
        monkeypatch.setattr(jit, "WHOLE", 0)
    c = plain((4, 16, 8, 8), torch.bfloat16, residual, relu)
    x = c.x.requires_grad_()
    more = {"residual": None if c.residual is None else c.residual.requires_grad_(), "relu": relu, "training": True}
    norm = Norm(c.weight.requires_grad_(), c.bias.requires_grad_(), *c.running)
    with use("triton"):
        ours = saved_bytes(lambda: bn_act(x * 1, norm, **more))
    theirs = saved_bytes(lambda: bn_act_reference(x * 1, norm, **more))
    X, vectors = c.x.numel() * 2, 3 * 4 * 16
    assert ours == kept * X + vectors
    assert ours <= theirs + vectors


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize(("training", "fork"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_modelled_bytes(
    residual: bool, relu: bool, training: bool, fork: bool, two: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model counts what each launch is given: every map once."""
    if two:
        monkeypatch.setattr(jit, "WHOLE", 0)
    c = plain((32, 8, 8, 8), torch.bfloat16, residual, relu, training, uses="both" if fork else "")
    found: dict[str, int] = {}
    small = 0

    def count(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **named: Any) -> None:
        nonlocal small
        sizes = [v.nbytes for v in args if isinstance(v, Tensor)]
        found[kernel.__name__] = sum(n for n in sizes if n == c.x.nbytes)
        small += sum(n for n in sizes if n != c.x.nbytes)
        _launch.launch(kernel, grid, device, *args, **named)

    monkeypatch.setattr(op, "launch", count)
    with torch.set_grad_enabled(training):
        grown(c)
    assert found == bytes_moved(2048, 8, 2, residual=residual, relu=relu, training=training, fork=fork)
    assert small < 0.05 * sum(found.values())


def test_goals_in_bytes() -> None:
    """performance.md B3: 14 X for a conv-BN-ReLU unit leaves 8 X to the BatchNorm and ReLU, forward and backward."""
    X = 131_072 * 16 * 2
    moved = bytes_moved(131_072, 16, 2, residual=False, relu=True, training=True)
    assert sum(moved.values()) == 8 * X and len(moved) == 4
    assert sum(bytes_moved(131_072, 16, 2, residual=True, relu=True, training=True).values()) == 11 * X
    assert sum(bytes_moved(131_072, 16, 2, residual=True, relu=True, training=True, fork=True).values()) == 12 * X  # not 14
    assert len(bytes_moved(2048, 64, 2, residual=False, relu=True, training=True)) == 2


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize(
    ("mean", "std", "dtype"), [(1e3, 1e-2, torch.float32), (100.0, 1.0, torch.bfloat16), (-1e4, 3.0, torch.float32)]
)
def test_far_from_zero(mean: float, std: float, dtype: torch.dtype, two: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of squares would lose all digits here, a mean in one fp32 number 0.3 % of a standard deviation."""
    if two:
        cut(monkeypatch, random.Random(1))
    for residual in (False, True):
        check(plain((16, 5, 5, 5), dtype, residual, mean=mean, std=std))


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_stretches_than_slots(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program goes over the partials in several rounds, the last of them ragged."""
    for name, value in {"TILE": 256, "SUMS_TILE": 128, "STEPS": 1, "PROGRAMS": 1000, "WHOLE": 0}.items():
        monkeypatch.setattr(jit, name, value)
    plans = [jit.sums_plan(157, 33, 4, tile) for tile in (256, 128)]
    assert [(p.parts, p.block_n) for p in plans] == [(20, 8), (40, 4)]  # in 8 slots each
    with guarded():
        check(plain((157, 33, 1, 1), dtype, residual=dtype == torch.float32, mean=5.0))


def test_an_outlier_in_the_first_row() -> None:
    """The first row is the pivot that deviations are taken from; a wild one must not spoil the others."""
    c = plain((40, 4, 5, 5))
    c.x[0, :, 0, 0] = 1e4
    check(c)


def test_one_precise_order_whatever_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, random.Random(2))
    c = plain((16, 8, 5, 5), torch.bfloat16, True)
    one, two = grown(c), grown(c)
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, from the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("two", [False, True])
def test_what_is_not_finite_stays_in_its_channel_and_shows(bad: float, two: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if two:
        cut(monkeypatch, random.Random(3))
    c = plain((8, 5, 5, 5), residual=True)
    c.x[3, 2, 1, 1] = bad
    got, want = grown(c), evaluate(c, lambda v: v.clone(), bn_act_reference)
    for name in ("y", "dx", "dweight", "running_mean", "running_var"):
        assert torch.equal(got[name].isfinite(), want[name].isfinite()), name
    assert got["y"][:, 2].isnan().all() and got["y"][:, [0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0, 3), (2, 3, 0, 4)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    x, w, b = torch.zeros(shape, requires_grad=True), torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    mean, var = torch.full((3,), 2.0), torch.full((3,), 3.0)
    with use("triton"):
        y = bn_act(x, Norm(w, b, mean, var), training=True)
        y.sum().backward()
    assert y.shape == shape and x.grad is not None and mean.tolist() == [2.0] * 3 and var.tolist() == [3.0] * 3
    assert w.grad is None or not w.grad.any()


def test_gradients_only_for_those_who_ask() -> None:
    c = plain(residual=True)
    norm = Norm(c.weight.requires_grad_(), c.bias, *c.running)
    with use("triton"), _launch.recorded() as seen:
        (d,) = torch.autograd.grad(bn_act(c.x, norm, residual=c.residual, training=True), [c.weight], c.dy)
    assert [k.kernel for k in seen] == ["bn_act_whole", "bn_act_backward_sums"]
    want = evaluate(c, lambda v: v.double().clone(), bn_act_reference)
    assert (d - want["dweight"]).abs().max() < 1e-5
    with use("triton"):
        y = bn_act(c.x.requires_grad_(), norm, residual=c.residual, training=True)
        assert torch.autograd.grad(y.expand(2, *y.shape).sum(), [c.x])[0].shape == c.x.shape  # an expanded upstream gradient


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("kind", ["residual", "relu", "bare", "eval", "fork"])
def test_compiles_whole_and_equals_eager(kind: str, two: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if two:
        monkeypatch.setattr(jit, "WHOLE", 0)
    uses = "both" if kind == "fork" else ""
    c = plain((3, 8, 4, 4), torch.float32, kind == "residual", kind != "bare", kind != "eval", uses=uses)
    torch._dynamo.reset()
    compiled = torch.compile(bn_act, fullgraph=True, backend="aot_eager")
    with use("triton"), torch.set_grad_enabled(c.training):
        got, want = evaluate(c, lambda v: v.clone(), compiled), evaluate(c, lambda v: v.clone(), bn_act)
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    assert int(got["batches"]) == int(c.training) and got["y"].stride() == want["y"].stride()


def test_few_compilations_over_many_batch_sizes() -> None:
    """At most two more over 20 batch sizes (reliability.md D9), though some take one launch and some two."""
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(bn_act, fullgraph=True, backend=counter)
    w, b = torch.ones(4, requires_grad=True), torch.zeros(4)
    for B in range(2, 42, 2):
        x = torch.randn(B, 4, 20, 20).contiguous(memory_format=torch.channels_last)
        assert jit.whole(B * 400, 4, 4) == (B * 400 * 16 <= 64 << 10)
        norm = Norm(w, b, torch.zeros(4), torch.ones(4))
        with use("triton"):
            y = compiled(x, norm, training=True)
        (dw,) = torch.autograd.grad(y.square().sum(), w)
        y = bn_act_reference(x, norm, training=True)
        torch.testing.assert_close(dw, torch.autograd.grad(y.square().sum(), w)[0], rtol=1e-4, atol=1e-3)
    assert counter.frame_count <= 3


def test_double_backward_is_an_error_not_a_zero() -> None:
    c = plain()
    x, dy = c.x.requires_grad_(), c.dy.requires_grad_()
    with use("triton"):
        y = bn_act(x, Norm(c.weight, c.bias, *c.running), training=True)
        (dx,) = torch.autograd.grad(y, [x], dy, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not supported; FASTFFL_KERNELS=reference has it"):
            dx.square().sum().backward()


def test_y_changed_after_the_forward_is_an_error() -> None:
    c = plain(residual=True)
    with use("triton"):
        y = bn_act(c.x.requires_grad_(), Norm(c.weight, c.bias, *c.running), residual=c.residual, training=True)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_activation_in_place_behind_it() -> None:
    """What nets do with a norm's output where the ReLU stayed outside."""
    c = plain()
    found = []
    for path in ("triton", "reference"):
        x = c.x.clone().requires_grad_()
        with use(path):  # type: ignore[arg-type]
            y = torch.relu_(bn_act(x, Norm(c.weight, c.bias, None, None), relu=False, training=True))
        found.append(torch.autograd.grad(y, x, c.dy)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(residual: bool) -> None:
    """Every custom op: schema, fake, and what AOT makes of it. `relu and residual` is the kind that returns most."""
    N, C = 12, 6
    x, dy, add = torch.randn(N, C), torch.randn(N, C), torch.randn(N, C) if residual else None
    w, b, run = torch.rand(C) + 0.5, torch.randn(C), (torch.randn(C), torch.rand(C), torch.zeros((), dtype=torch.int64))
    ops = torch.ops.fastffl
    y, mean, invstd = ops.bn_act_whole(x, add, w, b, *run, True, 0.1, 1e-5)
    kept = y if residual else None
    skip = dy * 2 if residual else None
    dweight, dbias, g = ops.bn_act_backward_sums(dy, skip, x, kept, w, b, mean, invstd, True, residual)
    calls: dict[Any, tuple[Any, ...]] = {
        ops.bn_act_stats: (x, *run, 0.1, 1e-5),
        ops.bn_act_apply: (x, add, w, b, mean, invstd, True),
        ops.bn_act_eval: (x, add, w, b, run[0], run[1], True, 1e-5),
        ops.bn_act_whole: (x, add, w, b, *run, True, 0.1, 1e-5),
        ops.bn_act_backward_sums: (dy, skip, x, kept, w, b, mean, invstd, True, residual),
        ops.bn_act_backward_apply: (g if residual else dy, x, w, b, mean, invstd, dweight, dbias, not residual),
        ops.bn_act_backward_whole: (dy, skip, x, kept, w, b, mean, invstd, True, residual),
    }
    for called, args in calls.items():
        torch.library.opcheck(called.default, args)


@triton.jit
def _offsets(out, at, stop, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    cols = tl.arange(0, BLOCK_C)
    offset, mask = jit._tile(at, stop, cols, C, BLOCK_N)
    tl.store(out + tl.arange(0, BLOCK_N)[:, None] * BLOCK_C + cols[None, :], tl.where(mask, offset, -1))


def test_offsets_beyond_32_bits() -> None:
    out = torch.zeros(4, 8, dtype=torch.int64)
    at = (1 << 33) + 5
    _offsets[(1,)](out, at, at + 3, 6, 4, 8)
    assert out.tolist() == [[(at + n) * 6 + c if n < 3 and c < 6 else -1 for c in range(8)] for n in range(4)]


# Each is a wrong launch: the kernel's name and what is done to its arguments.
def _swap(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda a: a.update({name: value(a[name]) if callable(value) else value})


BUGS = {
    "biased rows": ("bn_act_whole", _swap("N", lambda n: n - 1)),
    "momentum": ("bn_act_whole", _swap("momentum", 0.11)),
    "eps": ("bn_act_whole", _swap("eps", 1e-3)),
    "no relu": ("bn_act_whole", _swap("RELU", False)),
    "no residual": ("bn_act_whole", _swap("residual", None)),
    "no count": ("bn_act_whole", _swap("batches", None)),
    "mask forgotten": ("bn_act_backward_whole", _swap("MASK", 0)),
    "weight 1 %": ("bn_act_backward_whole", _swap("weight", lambda w: w * 1.01)),
    "a part too few": ("bn_act_stats", _swap("parts", lambda n: n - 1)),
    "counter not at zero": ("bn_act_stats", _swap("counter", lambda k: k + 1)),
    "stretches overlap": ("bn_act_stats", _swap("per", lambda n: n + 1)),
    "mean without its low part": ("bn_act_apply", _swap("mean", lambda m: m * torch.tensor([[1.0], [0.0]]))),
    "last row not applied": ("bn_act_apply", _swap("N", lambda n: n - 1)),
    "sums of one part less": ("bn_act_backward_sums", _swap("parts", lambda n: n - 1)),
    "mean gradient": ("bn_act_backward_apply", _swap("dbias", lambda v: v * 1.01)),
    "skip forgotten": ("bn_act_backward_sums", _swap("dskip", None)),
    "skip for dy": ("bn_act_backward_sums", _swap("dy", lambda v: v * 0)),
    "skip forgotten in one launch": ("bn_act_backward_whole", _swap("dskip", None)),
    "g for dy": ("bn_act_backward_apply", _swap("g", lambda v: v * 1.01)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_comparison_sees_seeded_bugs(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, change = BUGS[bug]
    if not where.endswith("whole"):
        cut(monkeypatch, random.Random(4))
    c = plain((11, 6, 7, 5), residual=True, mean=1e3, std=1e-2, uses="both")
    check(c)
    changed = 0

    def broken(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **named: Any) -> None:
        nonlocal changed
        given = dict(zip(kernel.arg_names, args, strict=True))
        if kernel.__name__ == where:
            change(given)
            changed += 1
        _launch.launch(kernel, grid, device, *given.values(), **named)

    monkeypatch.setattr(op, "launch", broken)
    with guarded(), pytest.raises(AssertionError):
        check(c)
    assert changed == 1
    for pair in op._launch._counters.values():  # a bug here must not reach the tests behind it
        for k in pair:
            k.zero_()


def test_a_whole_net_with_fused_norms() -> None:
    """resnet8: outputs, gradients and statistics of the plain net, each norm one launch forward and one backward."""
    from fastffl import nets
    from fastffl.nets.fused_norm import fuse_norms

    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        net = nets.plain("resnet8", 5, 3, 8).to(memory_format=torch.channels_last)
        assert not fused or fuse_norms(net) == 9
        x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
        with use("triton" if fused else "reference"), _launch.recorded() as seen:
            net(x).square().sum().backward()
        assert len(seen) == (18 if fused else 0)
        grads = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
        with use("triton" if fused else "reference"), torch.no_grad():
            found.append({**grads, **dict(net.named_buffers()), "eval": net.eval()(x)})
    assert list(found[0]) == list(found[1])
    for name, want in found[1].items():
        torch.testing.assert_close(found[0][name], want, rtol=1e-3, atol=1e-5 * max(1.0, float(want.abs().max())), msg=name)


def test_running_statistics_that_can_not_be_written_in_place() -> None:
    stepped = torch.zeros(6)[::2]
    with use("triton"), pytest.raises(ValueError, match="updated in place; expected contiguous ones"):
        bn_act(torch.randn(4, 3), Norm(torch.ones(3), torch.zeros(3), stepped, torch.ones(3)), training=True)
