"""nce's reference: the formula in float64, who is drawn and how evenly, what it allocates; and what a memory bank remembers."""

import gc
import importlib
import re
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernelkit import draws
from ncecase import Case, make, wrong
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastffl.bench import kernels, problems
from fastffl_kernels import _launch, class_order, explain, nce, nce_reference, negatives, remember

file: Any = importlib.import_module("fastffl_kernels.nce")  # the file, not the function of that name
CASES = ((2, 40, 5, 4, 7), (3, 90, 16, 5, 33), (4, 60, 8, 3, 90), (2, 30, 3, 1, 1), (3, 50, 1, 6, 200))  # M, N, D, B, R


def evaluate(c: Case, upstream: float = 1.0) -> tuple[Any, Tensor]:
    out = nce(*c.given, **c.options)
    return out, torch.autograd.grad(out.loss * upstream, c.v)[0]


@pytest.mark.parametrize("way", ["dense", "gather"])
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_equals_the_formula(way: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of finding scores, in one piece and in many; some samples weigh nothing, some draws repeat."""
    monkeypatch.setattr(file, "route", lambda N, R: way)
    for k, r in enumerate(draws(sum(sizes), 6)):
        c = make(*sizes, C=r.choice((2, 3, 7)), r=r, tau=r.choice((0.05, 0.1, 1.0)), eps=r.choice((0.0, 1e-7, 0.1)))
        monkeypatch.setattr(file, "BLOCK", dict.fromkeys(("dense", "gather"), 1 << 20 if k % 2 else 700))
        monkeypatch.setattr(file, "DRAWN", 1 << 17 if k % 2 else 50)
        upstream = r.choice((1.0, -0.3))
        assert not (said := wrong(c, *evaluate(c, upstream), upstream)), (k, said)
        fine = c._replace(banks=c.banks.double(), v=c.v.detach().double().requires_grad_())
        assert not (said := wrong(fine, *evaluate(fine, upstream), upstream, rtol=1e-12)), (k, said)


def test_the_route_is_taken_by_shape() -> None:
    """CIFAR with 16,384 negatives by GEMM, with 256, and ImageNet, by rows."""
    assert [file.route(N, R) for N, R in ((50_000, 16_384), (50_000, 256), (1_281_167, 16_384))] == ["dense", "gather", "gather"]
    for way, N, size in (("dense", 130_000, 3 * 130_000), ("gather", 10**6, 512)):  # no more at once than 16 MiB, however large
        samples, columns = file._blocks(way, 3, N, 512, 16_384, 4)
        assert 4 * samples * (size if way == "dense" else columns * size) <= 16 << 20 and 1 <= columns <= 16_385
    assert explain("nce", torch.zeros(1)).startswith("nce on cpu: reference")


def test_a_sample_that_weighs_nothing_is_as_if_it_were_not_there() -> None:
    c = make(3, 60, 8, 6, 20, 3)
    less = c._replace(v=c.v.detach()[:, [0, 2, 5]].clone().requires_grad_(), ids=c.ids[[0, 2, 5]], labels=c.labels[[0, 2, 5]])
    ids, labels, v = c.ids.clone(), c.labels.clone(), c.v.detach().clone()
    ids[1], labels[3], ids[4], labels[4], v[:, 1] = -1, -100, -1, -1, torch.nan
    (got, grad), (want, few) = evaluate(c._replace(ids=ids, labels=labels, v=v.requires_grad_())), evaluate(less)
    torch.testing.assert_close(got.pairs, want.pairs)
    torch.testing.assert_close(grad[:, [0, 2, 5]], few)
    assert not grad[:, [1, 3, 4]].any()
    none, zero = evaluate(c._replace(ids=torch.full_like(ids, -1)))
    assert none.loss == 0 and not none.pairs.any() and not zero.any()
    empty, nothing = evaluate(c._replace(ids=ids[:0], labels=labels[:0], v=v.detach()[:, :0].requires_grad_()))
    assert empty.loss == 0 and nothing.shape == (3, 0, 8)


# ---- who is drawn -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1, 1], [1, 2, 1], [5, 90, 3], [40, 0, 23, 1], [300, 301, 302, 1], [2000, 47]], ids=str)
def test_without_replacement_all_others_and_nobody_twice(sizes: list[int]) -> None:
    """With as many draws as there are others, each is drawn once; fewer draws are the first of them."""
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])[torch.randperm(sum(sizes))]
    classes, counter = class_order(labels, len(sizes)), torch.tensor(3)
    for c, size in enumerate(sizes):
        ids = (labels == c).nonzero()[:, 0][:3]
        pool = len(labels) - size
        if size and pool:
            others = (labels != c).nonzero()[:, 0]
            got = negatives(ids, labels[ids], classes, pool, counter)
            assert got.dtype == torch.int32 and torch.equal(got.long().sort(1).values, others.expand(len(ids), -1))
            if len(others) > 1:
                assert torch.equal(negatives(ids, labels[ids], classes, pool // 2, counter), got[:, : pool // 2])
            more = negatives(ids, labels[ids], classes, pool + 1, counter)  # now with replacement
            assert (labels[more.long()] != c).all()


def test_draws_are_of_counter_and_id_alone() -> None:
    labels = torch.arange(1000) % 7
    classes, ids, counter = class_order(labels, 7), torch.randperm(1000)[:20], torch.tensor(8)
    whole = negatives(ids, labels[ids], classes, 50, counter)
    some = torch.tensor([7, 2])
    assert torch.equal(negatives(ids[some], labels[ids[some]], classes, 50, counter), whole[some])
    for other in (9, -8, 8 + 2**32):
        assert (negatives(ids, labels[ids], classes, 50, torch.tensor(other)) == whole).float().mean() < 0.02
    assert len({tuple(row) for row in whole.sort(1).values.tolist()}) == 20


@pytest.mark.parametrize("pool", [16, 31, 100, 255, 1023])
def test_draws_are_as_even_as_draws_by_chance(pool: int) -> None:
    """20,000 permutations. chi^2 of a place's draw and of the distance of two draws lie within 6 and 8 standard deviations of its
    mean (not distances among 16 places); draws in a quarter of the pool vary as the hypergeometric distribution has it."""
    T, places = 20_000, torch.full((20_000, 1), pool)
    keys = file._keys(torch.tensor(1), torch.arange(T))

    def far(x: Tensor, bins: int) -> float:
        counts, df = torch.bincount(x, minlength=bins).double(), bins - 1
        return float(((counts - T / bins) ** 2 / (T / bins)).sum() - df) / (2 * df) ** 0.5

    x = file._places(torch.tensor([[0, 1, 2, pool // 2, pool - 2, pool - 1]]), places, keys)
    assert max(abs(far(x[:, k], pool)) for k in range(6)) < 6
    if pool > 16:
        apart = [(x[:, i] - x[:, j]) % pool - 1 for i, j in ((0, 1), (0, 2), (0, 3), (3, 5), (4, 5))]
        assert max(abs(far(d, pool - 1)) for d in apart) < 8
    half, quarter = pool // 2, pool // 4
    hits = (file._places(torch.arange(half)[None], places[:4000], keys[:4000]) < quarter).sum(1).double()
    share = quarter / pool
    assert abs(hits.mean() / (half * share) - 1) < 0.02
    assert abs(hits.var() / (half * share * (1 - share) * (pool - half) / (pool - 1)) - 1) < 0.12


def test_draws_with_replacement_are_even_too() -> None:
    labels = torch.tensor([0] * 3 + [1] * 5)
    got = negatives(torch.arange(3), labels[:3], class_order(labels, 2), 5000, torch.tensor(2))
    counts = torch.stack([(got == k).sum(1) for k in range(8)])
    assert not counts[:3].any() and (counts[3:] - 1000).abs().max() < 140, "5 standard deviations"


def test_the_order_of_classes() -> None:
    labels = torch.tensor([2, 0, -100, 2, 1, 0, 4])
    order, start, count = class_order(labels, 5)
    assert order.tolist() == [1, 5, 4, 0, 3, 6] and start.tolist() == [0, 2, 3, 5, 5] and count.tolist() == [2, 1, 2, 0, 1]
    with pytest.raises(ValueError, match=re.escape("labels[6] is 4; expected a class 0..3 or -100")):
        class_order(labels, 4)
    for one in (torch.zeros(5, dtype=torch.int64), torch.full((3,), -100)):
        with pytest.raises(ValueError, match="of one class; negatives are of other classes"):
            class_order(one, 2)


# ---- what it allocates --------------------------------------------------------------------------------------------------------


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that a call has allocated at once, what torch's own operations allocate inside included."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize(("way", "M", "B", "N"), [("dense", 2, 64, 20_000), ("gather", 2, 8, 140_000)])
def test_allocates_a_twentieth_of_the_gathered_rows(way: str, M: int, B: int, N: int) -> None:
    """16,384 negatives of 512 numbers, forward and backward, beside the rows of one bank; and the counter sees those."""
    R, D = 16_384, 512
    banks = torch.zeros(M, N, D)
    c = Case(
        *(banks, F.normalize(torch.randn(M, B, D), dim=2).requires_grad_(), torch.arange(B), torch.arange(B) % 100),
        *(class_order(torch.arange(N) % 100, 100), torch.tensor(1), {"count": R, "tau": 0.1}),
    )
    assert file.route(N, R) == way
    gathered = 4 * B * (R + 1) * D
    assert peak_bytes(lambda: evaluate(c)) < 0.05 * gathered
    few = 64
    index = negatives(c.ids, c.labels, c.classes, few, c.counter).long()
    assert peak_bytes(lambda: banks[0][index]) >= 4 * B * few * D


@pytest.mark.parametrize("M", [2, 4, 8])
def test_the_kernels_allocate_a_twentieth_too(M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is theirs over a call, gradient included; that torch allocates nothing besides, test_meta says."""
    pytest.importorskip("triton")
    B, R, D, made = 64, 16_384, 512, []
    real = _launch.empty
    monkeypatch.setattr(_launch, "empty", lambda *args: made.append(real(*args)) or made[-1])
    monkeypatch.setattr(_launch, "launch", lambda *_, **__: None)
    new = lambda *shape, dtype=torch.int64: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    f32, i32 = torch.float32, torch.int32
    classes = new(50_000, dtype=i32), new(100), new(100)
    given = new(M, 50_000, D, dtype=f32), new(M, B, D, dtype=f32), new(B), new(B), *classes, new()
    _, _, grads = file._nce._init_fn(*given, R, 0.1, 1e-7, True)
    assert grads.shape == (M, B, D) and sum(x.nbytes for x in made) < 0.05 * 4 * B * (R + 1) * D


# ---- how it is called ---------------------------------------------------------------------------------------------------------


def test_compiles_whole() -> None:
    c = make(2, 40, 6, 4, 30, 4)

    def call(v: Tensor, counter: Tensor) -> Tensor:
        return nce(c.banks, v * 1.0, c.ids, c.labels, c.classes, counter, **c.options).loss

    whole = torch.compile(call, fullgraph=True, backend="aot_eager")
    for counter in (c.counter, c.counter + 1):
        got, want = whole(c.v, counter), call(c.v, counter)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, c.v), torch.autograd.grad(want, c.v))


def test_no_gradient_where_none_is_asked_for() -> None:
    c = make(3, 60, 8, 6, 20, 3)
    with torch.no_grad():
        still = nce(*c.given, **c.options)
    loud = nce(*c.given, **c.options)
    assert torch.equal(still.loss, loud.loss) and not still.loss.requires_grad and not loud.pairs.requires_grad
    (g,) = torch.autograd.grad(loud.loss, c.v, create_graph=False, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loud.loss, c.v)[0], g)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(nce(*c.given, **c.options).loss, c.v, create_graph=True)


def test_a_sample_there_is_not_makes_the_loss_nan_where_the_host_does_not_look() -> None:
    c = make(2, 40, 5, 4, 7, 3)
    for at, value in (("ids", 40), ("labels", 3), ("labels", -1)):
        bad = getattr(c, at).clone()
        bad[2] = value
        case = c._replace(**{at: bad})
        assert nce_reference(*case.given, **case.options).loss.isnan()
        with pytest.raises(ValueError, match=r"sample 2 has id \d+ and label -?\d+; expected an id below 40 and a class 0..2"):
            nce(*case.given, **case.options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: {"banks": c.banks[0]}, "banks are (40, 5)"),
        (lambda c: {"banks": c.banks[:1]}, "at least 2 branches"),
        (lambda c: {"banks": c.banks.half()}, "torch.float16"),
        (lambda c: {"banks": c.banks.transpose(1, 2)}, "expected contiguous fp32"),
        (lambda c: {"v": c.v[:, :, :4]}, "v is (2, 4, 4) torch.float32 on cpu; expected (2, B, 5)"),
        (lambda c: {"v": c.v.double()}, "torch.float64 on cpu; expected (2, B, 5) torch.float32"),
        (lambda c: {"ids": c.ids[:3]}, "ids: (3,) torch.int64 on cpu; expected (4,)"),
        (lambda c: {"labels": c.labels.int()}, "labels: (4,) torch.int32"),
        (lambda c: {"counter": torch.tensor([1])}, "counter: (1,)"),
        (lambda c: {"classes": c.classes._replace(order=c.classes.order.long())}, "classes.order: (40,) torch.int64"),
        (lambda c: {"banks": c.banks[:, :30].contiguous()}, "classes are of 40 samples in 3 classes; expected 1 to 30"),
        (lambda c: {"options": {"count": 0, "tau": 0.1}}, "count=0"),
        (lambda c: {"options": {"count": 7, "tau": 0.01}}, "tau=0.01"),
        (lambda c: {"options": {"count": 7, "tau": 0.1, "eps": -1.0}}, "eps=-1.0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(change: Callable[[Case], dict[str, Any]], said: str) -> None:
    c = make(2, 40, 5, 4, 7, 3)
    case = c._replace(**change(c))
    with pytest.raises(ValueError, match=re.escape(said)):
        nce(*case.given, **case.options)


# ---- what a memory bank remembers ---------------------------------------------------------------------------------------------


def remembered(c: Case, keep: float, ok: bool) -> Tensor:
    """Sample by sample."""
    want = c.banks.clone()
    for i, (id, label) in enumerate(zip(c.ids.tolist(), c.labels.tolist(), strict=True)):
        if ok and id >= 0 and label != -100:
            for m in range(len(want)):
                row = keep * c.banks[m, id] + (1 - keep) * c.v.detach()[m, i]
                want[m, id] = row / row.norm()
    return want


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_a_bank_remembers_those_that_count(keep: float) -> None:
    """Row 0 is written by its own sample while others that weigh nothing have no row; the first sample may be one of those."""
    for k, r in enumerate(draws(3, 12)):
        c = make(3, 20, 6, 8, 5, 3, r)
        c.ids[torch.where(c.ids == 0)[0]] = 19 if 19 not in c.ids else -1
        c.ids[r.randrange(8)] = 0
        banks, ok = c.banks.clone(), (None, torch.tensor(True), torch.tensor(False))[k % 3]
        remember(banks, c.v, c.ids, c.labels, keep, ok)
        want = remembered(c, keep, ok is None or bool(ok))
        torch.testing.assert_close(banks, want, rtol=1e-6, atol=1e-6)
        same = (want == c.banks).all(2)
        assert torch.equal(banks[same], c.banks[same]), "rows of others keep their bits"
        torch.testing.assert_close(banks.norm(dim=2), torch.ones(3, 20))


def test_a_bank_keeps_what_nobody_may_change() -> None:
    c = make(2, 20, 6, 4, 5, 3)
    banks = c.banks.clone()
    remember(banks, c.v, torch.full_like(c.ids, -1), c.labels)
    remember(banks, c.v, c.ids, torch.full_like(c.labels, -100))
    remember(banks, c.v[:, :0], c.ids[:0], c.labels[:0])
    assert torch.equal(banks, c.banks)
    with pytest.raises(ValueError, match=r"keep=1\.5; expected a share 0\.\.1"):
        remember(banks, c.v, c.ids, c.labels, 1.5)
    remember(banks.to("meta"), c.v.to("meta"), c.ids.to("meta"), c.labels.to("meta"), ok=torch.ones((), device="meta").bool())


def test_the_bench_compares_like_with_like() -> None:
    """Each way to compute a problem gives the answer in float64; the rival that gathers once a bank gives the same."""
    found = {}
    for problem in problems.SMALL["nce"]():
        want = problems.truth(problem, problem.draw(torch.device("cpu"), 0))
        for style in (s for s in problem.styles if not s.mode):
            got = problems.solved(style.forward, problem.wrt, problem.draw(torch.device("cpu"), 0))
            found[problem.case, style.name] = kernels.verdict(problem, style, got, want)["state"]
    assert len(found) == 12 and set(found.values()) == {"ok"}
