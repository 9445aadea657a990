"""distill_graph's kernels, interpreted, against float64: random graphs over random logits, every tensor among canaries."""

import importlib
import inspect
import math
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from fastinterp import fast
from kernelkit import EPS, device_work, draws, guarded, layouts, saved_bytes
from torch import Tensor

from fastffl_kernels import GraphEdge, GraphOut, _launch, distill_graph, use
from fastffl_kernels._launch import recorded
from fastffl_kernels.distill_graph import _scale_op, bytes_moved, distill_graph_reference
from fastffl_kernels.jit import distill_graph as jit

OP = importlib.import_module("fastffl_kernels.distill_graph")  # the package's attribute of that name is the function


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with fast():
        yield


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EDGE_SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 255, 257)


class Problem(NamedTuple):
    """Everything one call takes, drawn at random."""

    z: list[Tensor]
    y: Tensor
    hard: tuple[tuple[int, float], ...]
    edges: tuple[GraphEdge, ...]
    weights: Tensor
    means: tuple[tuple[int, ...], ...]
    ignore: int | None
    mixed: dict[str, Any]
    upstream: float

    def call(self, z: list[Tensor], weights: Tensor, mixed: dict[str, Any], op: Any = distill_graph) -> GraphOut:
        out: GraphOut = op(tuple(z), self.y, self.hard, self.edges, weights, self.means, self.ignore, **mixed)
        return out


def problem(rng: random.Random) -> Problem:
    """Up to 4 nodes and 2 means, any edges, sizes at block edges, temperatures 0.05 to 1000, logits up to 1e4."""
    C, M = rng.choice(EDGE_SIZES), rng.choice((1, 2, 2, 3, 3, 4))
    B = rng.choice((1, 2, 3, 4, 5, 8, 9)) if C <= 128 else rng.choice((1, 2))  # one row a program from 129 classes on
    same = rng.choice(DTYPES)
    dtypes = [rng.choice(DTYPES) if rng.random() < 0.1 else same for _ in range(M)]
    size = 10.0 ** rng.uniform(-1, 4)
    shape = torch.Generator().manual_seed(rng.getrandbits(31))
    common = torch.randn(B, C, generator=shape)  # nodes resemble each other, as trained peers do
    z = [(size * (common + rng.choice((0.0, 0.01, 1.0)) * torch.randn(B, C, generator=shape))).to(d) for d in dtypes]
    means = tuple(tuple(rng.sample(range(M), rng.randint(1, M))) for _ in range(rng.choice((0, 0, 1, 2))))
    nodes = range(M + len(means))
    hard = tuple((h, rng.uniform(0, 2)) for h in nodes if rng.random() < 0.5)
    edges = []
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3))):
        T = rng.choice((1.0, 2.0, 3.0, 4.0, 10.0 ** rng.uniform(math.log10(0.05), 3)))
        edges.append(GraphEdge(rng.choice(nodes), rng.choice(nodes), T, rng.random() < 0.6, rng.choice((0.0, 0.0, 1e-7, 1e-3))))
    y = torch.randint(0, C, (B,), generator=shape)
    ignore = rng.choice((-100, -100, 255, None))
    if ignore is not None:
        y[torch.rand(B, generator=shape) < 0.3] = ignore
    mixed: dict[str, Any] = {"smoothing": rng.choice((0.0, 0.0, 0.1))}
    if rng.random() < 0.3:
        mixed |= {"labels2": torch.randint(0, C, (B,), generator=shape), "mix": torch.rand(B, generator=shape)}
    weights = torch.rand(len(edges), generator=shape) * 2
    if rng.random() < 0.3:
        z = [layouts(v)[rng.choice(sorted(layouts(v)))] for v in z]
        if rng.random() < 0.3:
            z[0] = z[0][:1].expand(B, C)
    return Problem(z, y, hard, tuple(edges), weights, means, ignore, mixed, rng.choice((1.0, 1.0, rng.uniform(-3, 3))))


def differences(p: Problem, op: Any = distill_graph) -> list[str]:
    """What an implementation gets wrong against float64 autograd; empty if it is right."""
    with guarded() as g, use("triton"):
        strided = [v.requires_grad_() if not v.is_contiguous() else g.put(v).requires_grad_() for v in p.z]
        before = [v.detach().clone() for v in strided]
        weights = g.put(p.weights).requires_grad_()
        mixed = {k: g.put(v) if isinstance(v, Tensor) else v for k, v in p.mixed.items()}
        got = p.call(strided, weights, mixed, op)
        if got.loss.requires_grad:
            torch.autograd.backward(got.loss, torch.tensor(p.upstream))
        said = [f"input {k} changed" for k, (a, b) in enumerate(zip(strided, before, strict=True)) if not torch.equal(a, b)]
    exact = [v.detach().double().requires_grad_() for v in p.z]
    w64 = p.weights.double().requires_grad_()
    m64 = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in p.mixed.items()}
    want = p.call(exact, w64, m64, distill_graph_reference)
    if want.loss.requires_grad:
        torch.autograd.backward(want.loss, torch.tensor(p.upstream, dtype=torch.float64))

    # A divergence near 0 is a difference of numbers as large as the exponents, each known to fp32: hence their size.
    spread = max((float((v.detach().double().max() - v.detach().double().min()).abs()) for v in p.z), default=0.0)
    for name, a, b, size in (
        ("ce", got.ce, want.ce, torch.full_like(want.ce, spread)),
        ("kl", got.kl, want.kl, torch.tensor([e.T * spread for e in p.edges], dtype=torch.float64)),
    ):
        limit = 5e-6 * b.abs() + 1e-6 + 4 * EPS[torch.float32] * size
        if a.shape != b.shape or bool(((a - b).abs() > limit).any()):
            said.append(f"{name}: {a.tolist()} instead of {b.tolist()}")
    terms = torch.cat([want.ce, want.kl]).abs()
    share = torch.cat([torch.tensor([w for _, w in p.hard], dtype=torch.float64), p.weights.double()])
    scale = float((terms * share).sum()) + spread * float(share.sum())
    if abs(float(got.loss.detach()) - float(want.loss.detach())) > 5e-6 * scale + 1e-6:
        said.append(f"loss {float(got.loss.detach())} instead of {float(want.loss.detach())}")
    if got.rows != want.rows:
        said.append(f"rows {got.rows} instead of {want.rows}")
    # ranks of fp32 means: the oracle ranks float64 means, so compare with the reference in the same precision
    counts = p.call([v.detach() for v in p.z], p.weights, p.mixed, distill_graph_reference)
    if got.top1.tolist() != counts.top1.tolist() or got.top5.tolist() != counts.top5.tolist():
        said.append(f"counts {got.top1.tolist()} {got.top5.tolist()} instead of {counts.top1.tolist()} {counts.top5.tolist()}")
    for k, (v, e) in enumerate(zip(strided, exact, strict=True)):
        if v.grad is None or e.grad is None:
            if v.grad is not e.grad and (e.grad is None or bool(e.grad.any())):
                said.append(f"gradient {k}: {v.grad is None} instead of {e.grad is None}")
            continue
        # 16 eps of fp32 for the arithmetic, relative to the largest gradient any node's terms can have here, and for low
        # precision two ulps of the value (the interpreter truncates where a GPU rounds)
        most = abs(p.upstream) * float((share * torch.tensor([1.0] * len(p.hard) + [e_.T for e_ in p.edges])).sum())
        stretch = max([1.0, *(spread / e_.T for e_ in p.edges), spread]) ** 0.5
        most *= max(1.0, *(float(abs(x)) for x in (want.kl / torch.tensor([e_.T**2 for e_ in p.edges])).tolist() or [0.0]))
        rows = max(int(want.rows), 1)
        limit = 16 * EPS[torch.float32] * stretch * most / rows + 2 * EPS[v.dtype] * e.grad.abs() * (v.dtype != torch.float32)
        tiny = torch.finfo(v.dtype).smallest_normal * 2
        if v.grad.dtype != v.dtype or bool(((v.grad.double() - e.grad).abs() > limit + tiny).any()):
            off = ((v.grad.double() - e.grad).abs() - limit).max()
            said.append(
                f"gradient {k} ({v.dtype}) is off by {float(off):.3g} beyond its limit, largest {float(e.grad.abs().max()):.3g}"
            )
    if weights.grad is not None and w64.grad is not None:
        limit = abs(p.upstream) * (
            5e-6 * want.kl.abs() + 1e-6 + 4 * EPS[torch.float32] * spread * torch.tensor([e.T for e in p.edges])
        )
        if bool(((weights.grad - w64.grad).abs() > limit).any()):
            said.append(f"weights' gradient {weights.grad.tolist()} instead of {w64.grad.tolist()}")
    return said


def loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on every graph takes the loop, 64 columns at a time."""
    monkeypatch.setattr(jit, "pick", lambda B, C, *_: jit.Config(True, 1, 64, 128, 1, 32 if B <= 6 else 0))


@pytest.mark.parametrize("batch", range(16))
def test_random_graphs_against_float64(batch: int) -> None:
    for k, rng in enumerate(draws(f"graph {batch}", 60)):
        said = differences(problem(rng))
        assert not said, f"draw {batch}/{k}: {said}"


@pytest.mark.parametrize("batch", range(4))
def test_random_graphs_through_the_loop(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loops(monkeypatch)
    for k, rng in enumerate(draws(f"loop {batch}", 20)):
        said = differences(problem(rng))
        assert not said, f"draw {batch}/{k}: {said}"


def simple(C: int = 10, B: int = 6, dtype: torch.dtype = torch.float32, K: int = 2) -> Problem:
    """FFL with K peers."""
    shape = torch.Generator().manual_seed(C)
    z = [torch.randn(B, C, generator=shape).to(dtype) for _ in range(K + 1)]
    y = torch.randint(0, C, (B,), generator=shape)
    y[-1] = -100
    edges = (*(GraphEdge(K, k) for k in range(K)), GraphEdge(K + 1, K, 2.0, False, 1e-3))
    hard = tuple((m, 1.0 + m) for m in range(K + 1))
    weights = torch.rand(K + 1, generator=shape) + 0.5
    return Problem(z, y, hard, edges, weights, (tuple(range(K)),), -100, {"smoothing": 0.0}, 1.7)


def mixed(p: Problem) -> Problem:
    labels2 = (p.y.clamp(min=0) + 1) % p.z[0].shape[1]
    return p._replace(mixed={"smoothing": 0.1, "labels2": labels2, "mix": torch.linspace(0.1, 0.9, len(p.y))})


BUGS = {
    "temperatures off by 1 %": lambda g: {"PAIRS": tuple((n, c * 1.01, b, k) for n, c, b, k in g["PAIRS"])},
    "an edge taught by the wrong node": lambda g: (
        {"EDGES": (g["EDGES"][1][:1] + g["EDGES"][0][1:], *g["EDGES"][1:])}
        if g["EDGES"][0][0] != g["EDGES"][1][0]
        else {"EDGES": ((g["EDGES"][0][1], *g["EDGES"][0][1:5], g["EDGES"][0][6], *g["EDGES"][0][6:]), *g["EDGES"][1:])}
    ),
    "T instead of T squared": lambda g: {"EDGES": tuple((*e[:2], e[2] ** 0.5, *e[3:]) for e in g["EDGES"])},
    "a teacher detached that is not": lambda g: {"EDGES": tuple((*e[:3], True, *e[4:]) for e in g["EDGES"]), "UNDETACHED": False},
    "eps forgotten": lambda g: {"EDGES": tuple((*e[:4], 0.0, *e[5:]) for e in g["EDGES"])},
    "a hard weight of 1.01 times": lambda g: {"HARD": tuple((n, w * 1.01, p) for n, w, p in g["HARD"])},
    "a power too few": lambda g: {"PAIRS": tuple((n, c, b, k - 1 if k else 0) for n, c, b, k in g["PAIRS"])},
    "weights of the wrong edges": lambda g: {"EDGES": tuple((*e[:7], len(g["EDGES"]) - 1 - e[7]) for e in g["EDGES"])},
    "a mean of too few": lambda g: {"MEANS": tuple(m[:1] for m in g["MEANS"])},
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_comparison_sees_a_seeded_bug(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not differences(simple())
    right = jit.graph
    monkeypatch.setattr(jit, "graph", lambda *a: (g := right(*a)) | BUGS[bug](g))
    assert differences(simple())


def test_the_comparison_sees_a_wrong_gradient_and_a_write_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    p = simple()
    real = _launch.launch

    def stretched(kernel: Any, grid: Any, device: Any, *args: Any, **named: Any) -> None:
        real(kernel, grid, device, *args, **named)
        if kernel is jit.one_block_kernel:
            args[1][0].mul_(1.01)

    monkeypatch.setattr(OP, "launch", stretched)
    assert differences(p)

    def beyond(kernel: Any, grid: Any, device: Any, *args: Any, **named: Any) -> None:
        real(kernel, grid, device, *args, **named)
        if kernel is jit.one_block_kernel:
            g = args[1][0]
            g.as_strided((1,), (1,), g.storage_offset() + g.numel()).fill_(0)

    monkeypatch.setattr(OP, "launch", beyond)
    with pytest.raises(AssertionError, match="wrote outside a tensor"):
        differences(p)


def test_counters_left_uncleared_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call over the same counters is right only if the first put them back to 0."""
    mine = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(_launch, "counters", lambda device, n: mine[:n])
    for _ in range(3):
        assert not differences(simple())
        assert not mine.any()
    mine[1] = 1
    assert differences(simple())


@pytest.mark.parametrize("B", [200, 5000])
def test_many_programs_and_groups(B: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two levels of partial sums, and from 2,049 rows on a launch that counts labels; a coarse tile keeps it quick."""
    if B > 1000:
        monkeypatch.setattr(jit, "pick", lambda B, *_: jit.Config(False, 64, 16, 0, 4, 0))
        monkeypatch.setattr(jit, "GROUPS", 2)
    assert not differences(simple(5, B))


def test_it_is_one_launch_forward_and_one_backward() -> None:
    for p in (simple(), mixed(simple(100)), simple(K=1)):
        z = [v.requires_grad_() for v in p.z]
        with use("triton"), recorded() as forward:
            out = p.call(z, p.weights, p.mixed)
        with recorded() as backward:
            out.loss.backward()
        assert [k.kernel for k in forward] == ["one_block_kernel"] and [k.kernel for k in backward] == ["scale_kernel"]
        assert _launch.LAUNCHES["fastffl::distill_graph"] + _launch.LAUNCHES["fastffl::scale_"] == 2


def test_nothing_else_runs_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels' own work taken away (the interpreter copies arguments by torch operations) nothing computes; the
    upstream gradient's 1 is autograd's."""
    p = simple()
    z = [v.requires_grad_() for v in p.z]
    monkeypatch.setattr(OP, "launch", lambda *a, **k: None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # no check of CPU labels
    _launch.counters(torch.device("cpu"), 2)

    def step() -> None:
        with use("triton"):
            loss = p.call(z, p.weights, p.mixed).loss
        torch.autograd.grad(loss, z, torch.ones_like(loss))

    ours, theirs = device_work(step)
    assert not ours and set(theirs) <= {"aten::ones_like", "aten::fill_"}


def test_no_more_is_saved_than_the_logits() -> None:
    for dtype in DTYPES:
        p = simple(100, 8, dtype)
        z = [(v + 0).requires_grad_() for v in p.z]
        logits = sum(v.numel() * v.element_size() for v in z)

        def forward(p: Problem = p, z: list[Tensor] = z) -> Tensor:
            with use("triton"):
                return p.call(z, p.weights, p.mixed).loss

        assert saved_bytes(forward) <= logits + 4 * len(p.edges)
        assert logits * 2 + 8 * 8 == bytes_moved(8, 100, 3, dtype)  # read once, write once, the labels
        assert bytes_moved(8, 100, 3, dtype) <= 1.05 * (2 * logits + 8 * 8)


def test_the_launch_takes_little_more_than_logits_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal P4 at the shape of L1: all tensors of the one launch, partial sums written and read, are within 1.05 of the least."""
    taken: list[tuple[Any, ...]] = []
    monkeypatch.setattr(OP, "launch", lambda kernel, grid, device, *args, **named: taken.append(args))
    p = simple(1000, 1024, torch.bfloat16, 4)
    with use("triton"):
        p.call([v.requires_grad_() for v in p.z], p.weights, p.mixed)
    assert len(taken) == 1
    flat = [x for arg in taken[0] for x in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(x, Tensor)]
    moved = sum(x.numel() * x.element_size() for x in flat)
    moved += max(x.numel() * x.element_size() for x in flat if x.dtype == torch.float32)  # the partial sums are read again
    least = bytes_moved(1024, 1000, 5, torch.bfloat16)
    assert least == 2 * 5 * 1024 * 1000 * 2 + 8 * 1024
    assert least < moved <= 1.05 * least


def test_the_upstream_gradient_scales_in_place_and_1_changes_nothing() -> None:
    for dtype in DTYPES:
        grads = [torch.randn(6, 10).to(dtype) for _ in range(3)]
        before = [g.clone() for g in grads]
        _scale_op(grads, torch.ones(()))
        assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
        _scale_op(grads, torch.tensor(-2.0))
        assert all(torch.equal(a, -2 * b) for a, b in zip(grads, before, strict=True))


def test_the_same_input_gives_the_same_bits() -> None:
    p = simple(64, 70)

    def once() -> list[Tensor]:
        z = [v.clone().requires_grad_() for v in p.z]
        with use("triton"):
            out = p.call(z, p.weights, p.mixed)
        out.loss.backward()
        return [out.loss.detach(), out.ce, out.kl, *[v.grad for v in z if v.grad is not None]]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def arguments(p: Problem) -> tuple[Any, ...]:
    """What the operator takes for `simple` problems."""
    z = [v.clone().requires_grad_() for v in p.z]
    flat = ([h for h, _ in p.hard], [w for _, w in p.hard], [2, 0, 1, 2, 1, 1, 3, 2, 0], [3.0, 3.0, 2.0], [0.0, 0.0, 1e-3])
    rest = (p.mixed.get("labels2"), p.mixed.get("mix"), p.weights)
    return (z, p.y, *rest, *flat, [0, 1], [2], -100, p.mixed["smoothing"], [True] * 3)


def unlawful(op: Any) -> list[str]:
    """What an operator with distill_graph's arguments breaks: torch's own rules, the gradient, the second derivative."""
    said = []
    given = arguments(simple())
    z = given[0]
    try:
        torch.library.opcheck(op, given)
    except Exception as error:
        said.append(f"opcheck: {str(error).splitlines()[0]}")
    try:
        grads = torch.autograd.grad(-1.5 * op(*given)[0], z)
        exact = [v.detach().double().requires_grad_() for v in z]
        p = simple()
        want = torch.autograd.grad(-1.5 * p.call(exact, p.weights.double(), p.mixed, distill_graph_reference).loss, exact)
        if any(bool(((a - b).abs() > 1e-5 * b.abs().max()).any()) for a, b in zip(grads, want, strict=True)):
            said.append("wrong gradient")
    except Exception as error:
        said.append(f"gradient: {str(error).splitlines()[0]}")
    try:
        torch.autograd.grad(op(*given)[0], z, create_graph=True)
        said.append("a second derivative that is silently 0")
    except RuntimeError as error:
        if "double backward is not supported" not in str(error):
            said.append(f"double backward: {str(error).splitlines()[0]}")
    return said


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at its own copies
def test_opcheck() -> None:
    assert not unlawful(torch.ops.fastffl.distill_graph.default)
    torch.library.opcheck(torch.ops.fastffl.distill_graph.default, arguments(mixed(simple(20))))
    torch.library.opcheck(torch.ops.fastffl.scale_.default, ([torch.randn(4, 5), torch.randn(4, 5)], torch.tensor(2.0)))


LAWLESS = {
    "input mutated": "opcheck",
    "output aliases input": "opcheck",
    "fake of a wrong shape": "opcheck",
    "fake missing": "opcheck",
    "autograd not registered": "opcheck",
    "gradient 1 % too large": "wrong gradient",
    "double backward silently 0": "a second derivative",
    "upstream gradient taken as 1": "wrong gradient",
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf", "ignore::UserWarning")
@pytest.mark.parametrize("bug", LAWLESS)
def test_a_lawless_operator_is_seen(bug: str) -> None:
    """reliability.md 3.7: no single check sees every bug of a custom operator, all of them together do."""
    right = OP._graph_op._init_fn
    number = list(LAWLESS).index(bug)

    def forward(logits: list[Tensor], *rest: Any) -> Any:
        out = right(logits, *rest)
        if bug == "input mutated":
            logits[0].add_(1)
        if bug == "output aliases input":
            out[-1][0] = logits[0]
        return out

    forward.__signature__ = inspect.signature(right)  # type: ignore[attr-defined]
    schema = torch.library.infer_schema(right, mutates_args=())
    op = torch.library.custom_op(f"seeded::graph{number}", forward, mutates_args=(), schema=schema)

    def fake(logits: list[Tensor], *rest: Any) -> Any:
        out = OP._graph_fake(logits, *rest)
        return (*out[:3], out[3].new_empty(len(out[3]) + 1), *out[4:]) if bug == "fake of a wrong shape" else out

    def backward(ctx: Any, g: Tensor, *more: Any) -> Any:
        if bug == "double backward silently 0":
            with torch.no_grad():
                return OP._backward(ctx, g, *more)
        if bug == "upstream gradient taken as 1":
            return OP._backward(ctx, torch.ones_like(g), *more)
        return OP._backward(ctx, g * 1.01 if bug == "gradient 1 % too large" else g, *more)

    if bug != "fake missing":
        op.register_fake(fake)
    if bug != "autograd not registered":
        op.register_autograd(backward, setup_context=OP._keep)
    said = unlawful(getattr(torch.ops.seeded, f"graph{number}").default)
    assert any(text.startswith(LAWLESS[bug]) for text in said), said


def test_double_backward_and_a_second_backward_are_errors() -> None:
    p = simple()
    z = [v.requires_grad_() for v in p.z]
    with use("triton"):
        loss = p.call(z, p.weights, p.mixed).loss
    with pytest.raises(RuntimeError, match="double backward is not supported by the Triton path; FASTFFL_KERNELS=reference"):
        torch.autograd.grad(loss, z, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran through this loss already"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiles_whole(dtype: torch.dtype) -> None:
    p = simple(dtype=dtype)

    def run(z: list[Tensor], weights: Tensor) -> Tensor:
        return p.call(z, weights, p.mixed).loss

    grads = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        z = [v.clone().requires_grad_() for v in p.z]
        with use("triton"):
            loss = call(z, p.weights)
        (loss * 2).backward()
        grads.append([loss.detach(), *[v.grad for v in z]])
    for a, b in zip(*grads, strict=True):  # a traced backward scales in torch, which rounds where the interpreter truncates
        torch.testing.assert_close(a, b, rtol=EPS[dtype], atol=0)


@pytest.mark.parametrize("B", [0, 3])
@pytest.mark.parametrize("loop", [False, True])
def test_no_row_counts(B: int, loop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if loop:
        loops(monkeypatch)
    p = simple(B=4)
    z = [v[:B].clone().requires_grad_() for v in p.z]
    p = p._replace(y=torch.full((B,), -100))
    with use("triton"):
        out = p.call(z, p.weights, p.mixed)
    out.loss.backward()
    assert out.loss == 0 and int(out.rows) == 0 and not out.top1.any() and not out.ce.any() and not out.kl.any()
    assert all(v.grad is not None and v.grad.shape == v.shape and not v.grad.any() for v in z)


@pytest.mark.parametrize("loop", [False, True])
def test_special_rows(loop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite or NaN logit gives what torch gives, NaN, unless its row is ignored; so does a label that is no class, which
    the host does not see on a GPU. All-equal logits score class 0 only."""
    if loop:
        loops(monkeypatch)
    monkeypatch.setattr(OP, "check_labels", lambda *a: None)
    for bad in (math.inf, math.nan):
        p = simple()
        p.z[0][2, 3] = bad
        with use("triton"):
            assert math.isnan(p.call(p.z, p.weights, p.mixed).loss)
            p.y[2] = -100
            z = [v.requires_grad_() for v in p.z]
            out = p.call(z, p.weights, p.mixed)
        out.loss.backward()
        assert math.isfinite(out.loss.detach()) and all(bool(v.grad.isfinite().all()) for v in z if v.grad is not None)
    one = simple()
    one.z[0][1, 4] = -math.inf  # a class of probability 0 is no error where nobody teaches with it
    assert not differences(one._replace(edges=(), weights=torch.zeros(0)))
    for label in (-1, 10, 2**31, -(2**40)):
        p = simple()
        p.y[1] = label
        with use("triton"):
            out = p.call(p.z, p.weights, p.mixed)
            assert math.isnan(out.loss) and bool(out.ce.isnan().all())
        reference = p.call(p.z, p.weights, p.mixed, distill_graph_reference)
        assert math.isnan(reference.loss) and reference.top5.tolist() == out.top5.tolist()
    flat = torch.zeros(4, 10)
    with use("triton"):
        out = distill_graph((flat,), torch.tensor([0, 1, 4, 9]), ((0, 1.0),), (), torch.zeros(0))
    assert int(out.top1[0]) == 1 and int(out.top5[0]) == 3


@pytest.mark.parametrize("size", [1e4, 3e37])
def test_huge_logits(size: float) -> None:
    z = [torch.tensor([[size, 0.0, -size], [0.0, size, 0.0]], requires_grad=True) for _ in range(2)]
    with use("triton"):
        out = distill_graph(tuple(z), torch.tensor([0, 2]), ((0, 1.0),), (GraphEdge(0, 1, 3.0),), torch.ones(1))
    torch.testing.assert_close(out.ce[0], torch.tensor(size / 2), rtol=1e-6, atol=0)
    assert out.kl[0] == 0


def test_row_offsets_are_64_bit() -> None:
    """Rows 2^31 elements apart: the pages between are never touched, so the storage costs nothing."""
    far = torch.empty(2 * 2**31 + 64, dtype=torch.bfloat16)
    z = torch.as_strided(far, (3, 5), (2**31, 1))
    z.copy_(torch.randn(3, 5))
    p = simple(5, 3)._replace(z=[z, torch.randn(3, 5), torch.randn(3, 5)])
    near = p._replace(z=[z.clone(), *p.z[1:]])
    with use("triton"):
        assert torch.equal(p.call(p.z, p.weights, p.mixed).loss, near.call(near.z, p.weights, p.mixed).loss)


def test_strided_labels_and_weights() -> None:
    p = mixed(simple())
    with use("triton"):
        want = p.call(p.z, torch.full((3,), 0.7), p.mixed)
        apart = {k: torch.stack([v, v], 1)[:, 0] if isinstance(v, Tensor) else v for k, v in p.mixed.items()}
        p = p._replace(y=torch.stack([p.y, p.y * 0], 1)[:, 0])
        got = p.call(p.z, torch.tensor([0.7]).expand(3), apart)
    assert torch.equal(got.loss, want.loss) and got.top1.tolist() == want.top1.tolist()


def test_heatmaps_are_rows_of_pixels() -> None:
    """Two pose nets' maps (B, J, H, W): softmax over the pixels of each joint, as (B J, H W) rows give it."""
    shape = torch.Generator().manual_seed(3)
    maps = [torch.randn(2, 3, 5, 4, generator=shape) for _ in range(2)]
    y = torch.randint(0, 20, (2, 3), generator=shape)
    y[0, 1] = -100
    graph: Any = (((0, 1.0), (1, 1.0)), (GraphEdge(0, 1), GraphEdge(1, 0)), torch.ones(2))
    z = [m.clone().requires_grad_() for m in maps]
    rows = [m.reshape(6, 20).clone().requires_grad_() for m in maps]
    with use("triton"):
        got = distill_graph(tuple(z), y, *graph)
        want = distill_graph(tuple(rows), y.flatten(), *graph)
    got.loss.backward()
    want.loss.backward()
    assert torch.equal(got.loss, want.loss) and int(got.rows) == 5
    for a, b in zip(z, rows, strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad.reshape(6, 20), b.grad)


def test_a_kernel_that_cannot_be_compiled_is_replaced_once_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    from fastffl_kernels import _dispatch

    def refuse(*a: Any, **k: Any) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    p = simple()
    monkeypatch.setattr(_dispatch, "_unavailable", set())
    monkeypatch.setattr(_dispatch, "triton_path", lambda op, x: None if op in _dispatch._unavailable else _dispatch._TRITON[op])
    monkeypatch.setattr(type(jit.one_block_kernel), "run", refuse)
    with pytest.warns(RuntimeWarning, match=r"one_block_kernel can't be compiled.*runs as plain torch from now on"):
        out = p.call(p.z, p.weights, p.mixed)
    assert torch.equal(out.loss, p.call(p.z, p.weights, p.mixed, distill_graph_reference).loss)
    p.call(p.z, p.weights, p.mixed)  # no second warning: pytest would make it an error
    with use("triton"), pytest.raises(_launch.KernelUnavailable, match="one_block_kernel"):
        monkeypatch.setattr(_dispatch, "_unavailable", set())
        p.call(p.z, p.weights, p.mixed)


def test_a_configuration_serves_many_batch_sizes() -> None:
    """No more than two compilations over 20 batch sizes: what is constant to the compiler may not follow B."""
    constants = {jit.pick(B, 100, 4, False, False)[:-1] for B in range(1, 2000, 100)}
    scans = {jit.pick(B, 100, 4, False, False).scan for B in (*range(500, 1500, 50),)}
    assert len(constants) == 1 and len(scans) <= 2
