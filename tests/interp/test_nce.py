"""nce's kernels, interpreted: the formula in float64, the CPU's negatives, guard bands, offsets past 2^31, seeded bugs."""

import importlib
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastinterp import fast
from kernelkit import draws, guarded
from ncecase import Case, make, wrong
from torch import Tensor

from fastffl_kernels import _launch, class_order, nce, negatives, use
from fastffl_kernels.jit import nce as jit

file: Any = importlib.import_module("fastffl_kernels.nce")  # the file, not the function of that name
KERNELS = ["draw_kernel", "sums_kernel", "terms_kernel", "finish_kernel"]


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with fast():
        yield


def check(c: Case, upstream: float) -> str:
    """What is wrong with the Triton path's answer to a guarded copy of `c`; inputs must not change."""
    with guarded() as g, use("triton"):
        tensors = [g.put(x) for x in (c.banks, c.v.detach(), c.ids, c.labels, *c.classes, c.counter)]
        before = [x.clone() for x in tensors]
        mine = Case(*tensors[:4], type(c.classes)(*tensors[4:7]), tensors[7], c.options)
        mine.v.requires_grad_()
        out = nce(*mine.given, **mine.options)
        (grad,) = torch.autograd.grad(out.loss * upstream, mine.v)
        assert all(torch.equal(a.detach(), b) for a, b in zip(tensors, before, strict=True)), "an input was changed"
    return wrong(c, out, grad, upstream)


@pytest.mark.parametrize("part", range(3))
def test_equals_the_formula(part: int) -> None:
    """Rows of odd lengths and whole tiles, one part and several, samples that weigh nothing, draws that repeat."""
    for k, r in enumerate(draws(part, 16)):
        M, D, R = r.choice(
            ((2, 130, 140), (2, 33, 70), (2, 3, 15), (3, 17, 31), (3, 1, 70), (4, 3, 2), (4, 130, 9), (2, 16, 127))
        )
        N, B, R = r.choice((12, 40, 300)), r.choice((1, 2, 3)) if D < 100 else 1, max(1, R + r.randrange(-1, 3))
        c = make(M, N, D, B, R, r.choice((2, 3, 5)), r, tau=r.choice((0.07, 0.1, 1.0)), eps=r.choice((0.0, 1e-7, 0.1)))
        assert not (said := check(c, r.choice((1.0, -0.3)))), (part, k, M, N, D, B, R, said)


@pytest.mark.parametrize(("M", "D", "R"), [(2, 2048, 20), (8, 40, 20), (4, 128, 200)])
def test_equals_the_formula_at_the_sizes_it_is_made_for(M: int, D: int, R: int) -> None:
    assert not (said := check(make(M, 400, D, 1, R, 3), 0.025)), said


def index_of(c: Case) -> Tensor:
    """What the first kernel writes: a sample's own row and its negatives."""
    found = []
    real = _launch.launch

    def spy(kernel: Any, *args: Any, **named: Any) -> None:
        real(kernel, *args, **named)
        found.append(dict(zip(kernel.arg_names, args[2:], strict=False)).get("index"))

    with pytest.MonkeyPatch.context() as patch, use("triton"), torch.no_grad():
        patch.setattr(_launch, "launch", spy)
        nce(*c.given, **c.options)
    return found[0][:, : c.options["count"] + 1]


@pytest.mark.parametrize("sizes", [[1, 1], [3, 1, 1], [9, 7, 20], [300, 400, 5], [2, 70_000]], ids=str)
def test_negatives_are_those_of_the_cpu(sizes: list[int]) -> None:
    """Pools of 1 to 70,000, with and without replacement, one program a sample and several, any counter."""
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])[torch.randperm(sum(sizes))]
    classes = class_order(labels, len(sizes))
    ids = torch.cat([(labels == c).nonzero()[:2, 0] for c in range(len(sizes))])
    banks = F.normalize(torch.ones(2, len(labels), 1), dim=2)
    for r in draws(len(labels), 2):
        counter, R = torch.tensor(r.choice((0, -1, 2**63 - 1, r.randrange(2**40)))), r.choice((1, 30, 1023, 1500))
        c = Case(banks, torch.ones(2, len(ids), 1), ids, labels[ids], classes, counter, {"count": R, "tau": 0.1})
        got = index_of(c)
        assert torch.equal(got[:, 0].long(), ids)
        assert torch.equal(got[:, 1:], negatives(ids, labels[ids], classes, R, counter))


def test_samples_there_are_none_of() -> None:
    c = make(2, 30, 5, 3, 9, 3)
    with use("triton"):
        for ids, labels in ((c.ids * 0 - 1, c.labels), (c.ids, c.labels * 0 - 100)):
            out = nce(c.banks, c.v, ids, labels, *c.given[4:], **c.options)
            assert out.loss == 0 and not out.pairs.any() and not torch.autograd.grad(out.loss, c.v)[0].any()
        out = nce(c.banks, c.v.detach()[:, :0].requires_grad_(), c.ids[:0], c.labels[:0], *c.given[4:], **c.options)
        assert out.loss == 0
        for at, value in (("ids", 30), ("labels", 3), ("labels", -1)):
            bad = getattr(c, at).clone()
            bad[1] = value
            case = c._replace(**{at: bad})
            index = index_of_unchecked(case)
            assert index[1, 0] == file.WRONG and (index[[0, 2], 0] == c.ids[[0, 2]]).all()
            assert file._triton(*case.given, **case.options, eps=1e-7).loss.isnan()


def index_of_unchecked(c: Case) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)  # the host does not look
        return index_of(c)


def test_rows_past_2_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two banks of 2^31 elements each, of memory that is there only where it is touched."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)  # would copy all of it onto itself
    D, N = 2048, (1 << 20) + 50
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE: nothing is set aside for it
    banks = torch.frombuffer(mmap.mmap(-1, 2 * N * D * 4, flags=flags), dtype=torch.float32).view(2, N, D)
    some = torch.tensor([0, 1, 2, 77, (1 << 20) - 1, 1 << 20, N - 2, N - 1])
    labels = torch.full((N,), -100)
    labels[some] = torch.arange(8) % 2
    banks[:, some] = F.normalize(torch.randn(2, 8, D), dim=2)
    ids = torch.tensor([N - 1, 77])
    v = F.normalize(torch.randn(2, 2, D), dim=2).requires_grad_()
    c = Case(banks, v, ids, labels[ids], class_order(labels, 2), torch.tensor(1), {"count": 4, "tau": 0.1})
    with use("triton"):
        got = nce(*c.given, **c.options)
        (grad,) = torch.autograd.grad(got.loss, v)
    at = {int(id): k for k, id in enumerate(some)}
    drawn = negatives(ids, c.labels, c.classes, 4, c.counter)
    assert drawn.max() > 1 << 20
    few = Case(banks[:, some].clone(), v, torch.tensor([at[int(i)] for i in ids]), *c[3:])
    index = torch.tensor([[at[int(i)] for i in row] for row in drawn])
    assert not (said := wrong(few, got, grad, 1.0, N=N, drawn=index)), said


def test_four_launches_and_one_to_scale() -> None:
    """That torch does nothing besides, tests/kernels/test_meta.py says."""
    c = make(4, 50, 8, 1, 200, 3)
    with use("triton"), _launch.recorded() as seen:
        torch.autograd.grad(nce(*c.given, **c.options).loss, c.v, torch.tensor(0.025))
    assert [k.kernel for k in seen] == [*KERNELS, "scale_kernel"] and _launch.LAUNCHES["fastffl::nce"] == len(KERNELS)
    assert [k.grid for k in seen[:4]] == [(1,), (4,), (4,), (5,)]
    with use("triton"), torch.no_grad(), _launch.recorded() as seen:
        nce(*c.given, **c.options)
    assert [k.kernel for k in seen] == KERNELS and seen[-1].grid == (1,)


def test_the_same_bits_and_once() -> None:
    c = make(2, 50, 8, 2, 90, 3)
    found = []
    with use("triton"):
        for _ in range(2):
            out = nce(*c.given, **c.options)
            found.append((out.loss.detach(), out.pairs, *torch.autograd.grad(out.loss, c.v)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        with torch.no_grad():
            still = nce(*c.given, **c.options)
        assert torch.equal(still.loss, found[0][0]) and not still.loss.requires_grad
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            torch.autograd.grad(nce(*c.given, **c.options).loss, c.v, create_graph=True)
        out = nce(*c.given, **c.options)
        out.loss.backward()
        with pytest.raises(RuntimeError, match="nce: backward ran through this loss already"):
            out.loss.backward()


def test_wide_rows_and_many_branches_take_the_reference_or_are_refused() -> None:
    for M, D in ((2, 2049), (9, 4)):
        c = make(M, 12, D, 1, 3, 2)
        with use("triton"), pytest.raises(ValueError, match=rf"{M} branches of {D} numbers; the kernels take at most 8 of 2048"):
            nce(*c.given, **c.options)
        monkey = pytest.MonkeyPatch()
        monkey.setattr(file, "choice", lambda: "auto")
        with use("triton"):
            assert torch.equal(nce(*c.given, **c.options).loss, file.nce_reference(*c.given, **c.options).loss)
        monkey.undo()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at its own copies
def test_opcheck() -> None:
    c = make(2, 30, 5, 1, 9, 3)
    torch.library.opcheck(torch.ops.fastffl.nce.default, (*c.given[:4], *c.classes, c.counter, 9, 0.1, 1e-7, True))


def test_every_index_belongs_to_one_part() -> None:
    for r in draws(1, 500):
        M, B, R, D = r.randrange(2, 9), r.randrange(1, 2000), r.randrange(1, 1 << r.randrange(1, 18)), r.randrange(1, 2049)
        p = jit.pick(M, B, R, D)
        assert (p.parts - 1) * p.per < R + 1 <= p.parts * p.per and p.per % (2 * p.rows) == 0
        assert p.wide >= D and p.rows & (p.rows - 1) == 0 and p.warps <= 16
        assert p.rows * p.wide * max(M - 1, 1) <= 32 * 32 * p.warps * max(1, (M - 1) // 4 + 1)


def _swap(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda a: a.update({name: value(a[name]) if callable(value) else value}) if name in a else None


BUGS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a negative too few": _swap("R", lambda n: n - 1),
    "another temperature": _swap("sharp", lambda x: x * 1.001),
    "eps left out": _swap("eps", 0.0),
    "c of other N": _swap("c", lambda x: x * 1.01),
    "Z of R scores": _swap("ratio", lambda x: x * 0.99),
    "another counter": _swap("counter", lambda x: x + 1),
    "classes start late": _swap("start", lambda x: x + 1),
    "a pool too large": _swap("count", lambda x: x - 1),
    "fewer turns": _swap("TURNS", 3),
    "labels shifted": _swap("labels", lambda x: (x + 1) % 3),
    "parts of half": _swap("per", lambda n: n // 2),
    "rows too short": _swap("D", lambda n: n - 1),
    "banks shifted": _swap("N", lambda n: n - 1),
    "another stream": _swap("STREAM", 0),
    "none": lambda _: None,
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_comparison_sees_seeded_bugs(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _launch.launch

    def broken(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **more: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False))
        for part in (given, more):
            BUGS[bug](part)
        real(kernel, grid, device, *given.values(), **more)

    monkeypatch.setattr(_launch, "launch", broken)
    try:
        seen = check(make(2, 200, 130, 2, 130, 3, eps=0.01), 1.0)
    except AssertionError as error:
        seen = str(error)
    assert bool(seen) == (bug != "none")
