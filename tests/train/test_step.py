"""One step: mixed precision, accumulation, clipping, averages, fused updates, and what a non-finite step leaves alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastffl.errors import NumericsError
from fastffl.recipe import Recipe
from fastffl.train import Learner, checkpoint, optim
from fastffl.train.step import LIMIT, NormBuffers, Step
from fastffl.values import Batch
from fastffl_kernels import GraphOut
from fastffl_kernels.guard import EVERY
from tests.train import tiny

CPU = torch.device("cpu")
FP16 = {"amp__enabled": True, "amp__dtype": "fp16"}


def step_of(made: Recipe | None = None, dtype: torch.dtype | None = None, seed: int = 0, **more: Any) -> Step:
    """A Step as the trainer makes it."""
    made = made or tiny.recipe()
    learner = tiny.learner(seed, **more)
    learner.amp_dtype = dtype
    learner.train()
    return Step(learner, optim.build(learner, made.optim), made, CPU)


def batch(n: int = 8, at: int = 0) -> Batch:
    x, y = tiny.arrays().train
    ids = torch.arange(at, at + n) % len(y)
    return Batch((x[ids].float() / 255 - 0.5) * 4, y[ids], ids)


def whole(step: Step) -> str:
    return checkpoint.digest(step.state())


class HostReads(TorchDispatchMode):
    """Counts the operations by which the host waits for the device to tell it a value or a size."""

    NAMES = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.casts: list[torch.Size] = []  # shapes of what was cast to another dtype
        self.all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        name = func._schema.name.removeprefix("aten::")
        if name == "_to_copy" and (kwargs or {}).get("dtype") not in (None, args[0].dtype):
            self.casts.append(args[0].shape)
        copied = name == "_to_copy" and (kwargs or {}).get("device") not in (None, CPU)
        masked = name in ("index", "index_put", "index_put_") and any(
            isinstance(k, Tensor) and k.dtype == torch.bool for k in args[1]
        )
        if name in self.NAMES or copied or masked:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


CASES: list[tuple[dict[str, Any], torch.dtype | None]] = [
    ({}, None),
    ({"ema__decay": 0.9, "optim__clip": 1.0, "optim__accum": 3}, torch.bfloat16),
    ({"ema__decay": 0.9, "optim__clip": 1.0}, torch.float16),
    ({"optim__name": "adamw", "ema__decay": 0.9}, torch.float16),
]


@pytest.mark.parametrize(("changes", "dtype"), CASES, ids=["plain", "bf16+all", "fp16+all", "adamw"])
def test_the_host_reads_nothing_in_a_step(changes: dict[str, Any], dtype: torch.dtype | None) -> None:
    step = step_of(tiny.recipe(**changes), dtype)
    for _ in range(2):  # the first step may allocate, the second is every later one
        with HostReads() as seen:
            step.ramp(0.5)
            step.rate(0.01)
            step(batch())
        assert seen.found == []
        assert seen.all > 200  # forward, backward and update went through the counter


@pytest.mark.parametrize("read", [lambda t: t.item(), lambda t: bool(t > 0), lambda t: t[None].nonzero(), float])
def test_the_counter_of_host_reads_sees_one(read: Callable[[Tensor], Any]) -> None:
    step = step_of()
    plain = step.learner.forward

    def forward(*args: Tensor) -> GraphOut:
        out = plain(*args)
        read(out.loss.detach())
        return out

    step.learner.forward = forward  # type: ignore[method-assign]
    with HostReads() as seen:
        step(batch())
    assert seen.found


def test_the_loop_reads_the_device_only_where_it_logs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    check = Step.check

    def counted(self: Step) -> int:
        reads.append(1)
        return check(self)

    monkeypatch.setattr(Step, "check", counted)
    tiny.train(tmp_path / "run", tiny.recipe(sched__epochs=1, run__log_every=100))
    assert len(reads) == 1  # at the epoch's end


def test_one_norms_update_is_no_change_of_anothers_statistics() -> None:
    """They lie in one tensor; with one version for all, autograd would refuse a backward in which some norms are ops of ours,
    which change their statistics in place, and some are torch's, which saved theirs."""
    learner = tiny.learner()
    buffers = NormBuffers(learner)
    one, other = [m.running_mean for m in learner.modules() if isinstance(m, torch.nn.BatchNorm2d)][:2]
    assert one is not None and other is not None
    before = other._version
    one.add_(1)
    assert other._version == before
    assert any(bool((flat == 1).any()) for flat in buffers.flat), "and they do lie there"


def test_a_step_in_double_precision_counts_as_any_other() -> None:
    """What parity with other code is measured in."""
    wide, plain = step_of(drop=0.0), step_of(drop=0.0)
    wide.learner.double()
    wide = Step(wide.learner, optim.build(wide.learner, tiny.recipe().optim), tiny.recipe(), CPU)
    x, y, at = batch()[:3]
    for _ in range(2):
        wide(Batch(x.double(), y, at)), plain(Batch(x, y, at))
    a, b = wide.meters.read(), plain.meters.read()
    assert a["rows"] == 16 and a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["loss"] != b["loss"]


# ---- mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_follows_fp32(dtype: torch.dtype) -> None:
    exact, low = step_of(drop=0.0), step_of(dtype=dtype, drop=0.0)
    for k in range(4):
        exact(batch(at=8 * k))
        low(batch(at=8 * k))
    a, b = exact.meters.read(), low.meters.read()
    assert a["rows"] == b["rows"] == 32
    assert b["loss"] == pytest.approx(a["loss"], rel=0.02) and b["loss"] != a["loss"]
    for p, q in zip(exact.params, low.params, strict=True):
        assert q.dtype == torch.float32
        torch.testing.assert_close(p, q, rtol=0.05, atol=0.02)


def test_fp16_gradients_are_scaled_inside_and_true_outside() -> None:
    """The update does not depend on the scale, up to fp16's rounding: powers of two are exact."""
    weights = []
    for scale in (1024.0, 4096.0):
        step = step_of(dtype=torch.float16, drop=0.0)
        assert step.scaler is not None
        step.scaler.scale.fill_(scale)
        step(batch())
        assert int(step.skipped) == 0
        weights.append([p.detach().clone() for p in step.params])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_overflow_backs_off_and_good_steps_grow_the_scale() -> None:
    step = step_of(tiny.recipe(**FP16), torch.float16)
    assert step.scaler is not None
    step.scaler.scale.fill_(2.0**40)
    before, scale = whole_but(step, "scaler", "skips"), 2.0**40
    while int(step.skipped) < 5:
        step(batch())
        scale /= 2
        assert float(step.scaler.scale) == scale
        assert whole_but(step, "scaler", "skips") == before
    assert step.check() == 5 and int(step.streak) == 0  # the scaler's own business: no streak
    step.scaler.scale.fill_(8.0)
    step.scaler.good.fill_(EVERY - 2)
    for want, good in ((8.0, 1999), (16.0, 0), (16.0, 1)):
        step(batch())
        assert (float(step.scaler.scale), int(step.scaler.good)) == (want, good)
    assert whole_but(step, "scaler", "skips") != before


def whole_but(step: Step, *left_out: str) -> str:
    return checkpoint.digest({k: v for k, v in step.state().items() if k not in left_out})


def test_endless_overflow_stops_long_before_the_scale_is_zero() -> None:
    """Only the gradient is NaN, so the scaler first backs off; 400 such steps."""
    step = step_of(tiny.recipe(**FP16), torch.float16)
    assert step.scaler is not None
    before = whole_but(step, "scaler", "skips")
    poison(step, "gradient")
    stopped = None
    for k in range(400):
        step(batch())
        assert float(step.scaler.scale) >= 1
        if stopped is None and int(step.streak) >= LIMIT:
            stopped = k + 1
    assert stopped == 16 + LIMIT  # 65536 halves to 1 in 16 steps
    with pytest.raises(NumericsError, match=r"10 steps in a row, first bad term: gradient;"):
        step.check()
    assert whole_but(step, "scaler", "skips") == before


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * float("nan")


# ---- non-finite steps


def poison(step: Step, term: str, value: float = float("nan")) -> None:
    """Make one term of the loss `value` from now on and its gradient too; of "gradient" the loss stays finite."""
    step.clean = clean = step.learner.forward  # type: ignore[attr-defined]
    terms = step.learner.graph.terms
    hard = sum(t.startswith("ce/") for t in terms)
    mask = torch.tensor([value if t == term else 0.0 for t in terms])

    def forward(*args: Tensor) -> GraphOut:
        out = clean(*args)
        if term == "gradient":
            return out._replace(loss=_BadGradient.apply(out.loss))
        return out._replace(loss=out.loss * value, ce=out.ce + mask[:hard], kl=out.kl + mask[hard:])

    step.learner.forward = forward  # type: ignore[method-assign]


TERMS = ["ce/p0", "ce/p1", "ce/fused", "kl/mean>fused", "kl/fused>p0", "kl/fused>p1", "gradient"]


def test_the_terms_are_all_of_the_graphs() -> None:
    assert [*tiny.learner().graph.terms, "gradient"] == TERMS


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("term", TERMS)
def test_a_bad_term_changes_nothing_and_is_named(term: str, value: float) -> None:
    step = step_of(tiny.recipe(ema__decay=0.9, optim__clip=1.0))
    for k in range(3):
        step(batch(at=8 * k))
    before = whole_but(step, "skips")
    poison(step, term, value)
    for k in range(LIMIT - 1):
        step(batch(at=4 * k))
        assert step.check() == k + 1
        assert whole_but(step, "skips") == before
    for k in range(5):  # the host looks late: the state must stay
        step(batch(at=4 * k))
    step.learner.forward = step.clean  # type: ignore[attr-defined, method-assign]
    step(batch())  # finite again, too late
    assert whole_but(step, "skips") == before
    with pytest.raises(NumericsError, match=rf"loss not finite for 10 steps in a row, first bad term: {term};"):
        step.check()


def test_a_good_step_ends_the_streak() -> None:
    step = step_of()
    for k in range(3):
        poison(step, "ce/p0")
        for _ in range(LIMIT - 1):
            step(batch())
        step.learner.forward = step.clean  # type: ignore[attr-defined, method-assign]
        before = whole(step)
        step(batch())
        assert whole(step) != before and int(step.streak) == 0
        assert step.check() == (k + 1) * (LIMIT - 1)
    assert step.meters.read()["rows"] == 24  # the three good batches


@pytest.mark.parametrize("where", ["input", "weights"])
def test_real_nans_leave_the_batchnorm_statistics_alone(where: str) -> None:
    step = step_of(tiny.recipe(ema__decay=0.9 if where == "input" else 0.0))
    step(batch())
    net: Any = step.learner.cohort.p0
    bad = batch()
    if where == "input":
        bad.x[3] = float("inf")
    else:
        net.plain.low.weight.data[0, 0, 0, 0] = float("nan")
    before = whole_but(step, "skips")
    step(bad)
    assert whole_but(step, "skips") == before and step.check() == 1
    assert torch.isfinite(net.plain.norm.running_mean).all()
    if where == "weights":
        for _ in range(LIMIT):
            step(bad)
        with pytest.raises(NumericsError, match="first bad term: ce/p0, ce/fused, kl/mean>fused, kl/fused>p0, kl/fused>p1;"):
            step.check()


def test_a_plain_step_would_have_changed_the_statistics() -> None:
    """The control of the test above: without the step's care a NaN input does reach them."""
    step = step_of()
    bad = batch()
    bad.x[3] = float("inf")
    step.learner(bad.x, bad.y, step.w)
    assert not torch.isfinite(step.learner.cohort.p0.plain.norm.running_mean).all()  # type: ignore[union-attr]


# ---- fused updates


def unfused(learner: Learner, made: Recipe) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if made.optim.name == "adamw" else torch.optim.SGD
    more = {} if made.optim.name == "adamw" else {"momentum": made.optim.momentum, "nesterov": made.optim.nesterov}
    return kind(optim.groups(learner, made.optim), lr=made.optim.lr, foreach=False, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("skip_first", [True, False])
def test_fused_updates_equal_unfused_ones(name: str, nesterov: bool, skip_first: bool) -> None:
    """Also where the very first step is an overflow, as with fp16 it normally is."""
    made = tiny.recipe(optim__name=name, optim__nesterov=nesterov, optim__weight_decay=0.01)
    step = step_of(made, drop=0.0, norm=False)  # a bias before BatchNorm has gradient 0, of which AdamW enlarges the rounding
    step.learner.method.eval()
    rival = copy.deepcopy(step.learner)
    stock = unfused(rival, made)
    if skip_first:
        poison(step, "gradient")
        step(batch())
        step.learner.forward = step.clean  # type: ignore[attr-defined, method-assign]
    for k in range(3):
        step(batch(at=8 * k))
        b = batch(at=8 * k)
        rival(b.x, b.y, step.w).loss.backward()
        stock.step()
        stock.zero_grad()
    for p, q in zip(step.learner.parameters(), rival.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_momentum_left_to_torch_would_be_marked_written_when_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why optim.build fills momentum itself: after a skipped first step torch holds memory that nothing wrote.

    The fresh memory is filled with 1e6 here, so that the fault does not depend on what it happens to contain.
    """
    empty_like = torch.empty_like

    def dirty(*args: Any, **kwargs: Any) -> Tensor:
        return empty_like(*args, **kwargs).fill_(1e6)

    monkeypatch.setattr(torch, "empty_like", dirty)

    def after(prefilled: bool) -> float:
        step = step_of(drop=0.0)
        if not prefilled:
            step.optimizer.state.clear()
        poison(step, "gradient")
        step(batch())
        step.learner.forward = step.clean  # type: ignore[attr-defined, method-assign]
        step(batch())
        return max(float(p.detach().abs().max()) for p in step.params)

    assert after(prefilled=True) < 10
    if after(prefilled=False) < 10:
        pytest.skip("this torch writes the momentum of a skipped first step: optim.build need not fill it")


# ---- accumulation and clipping


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_four_parts_equal_one_batch(dtype: torch.dtype | None) -> None:
    one = step_of(tiny.recipe(), dtype, norm=False, drop=0.0)
    four = step_of(tiny.recipe(optim__accum=4), dtype, norm=False, drop=0.0)
    # the fusion module has BatchNorm of its own: in evaluation mode it is a fixed map
    for step in (one, four):
        step.learner.method.eval()
        if step.scaler:
            step.scaler.scale.fill_(256.0)
    calls = []
    forward = four.learner.forward
    four.learner.forward = lambda *a: (calls.append(len(a[1])), forward(*a))[1]  # type: ignore[method-assign, func-returns-value]
    updates = []
    plain = four.optimizer.step
    four.optimizer.step = lambda *a: (updates.append(1), plain(*a))[1]  # type: ignore[method-assign, func-returns-value]
    for k in range(3):
        for step in (one, four):
            step(batch(14, at=14 * k))  # 4 + 4 + 4 + 2
    assert calls == [4, 4, 4, 2] * 3 and len(updates) == 3
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is None else {"rtol": 1e-2, "atol": 1e-3}
    for p, q in zip(one.params, four.params, strict=True):
        torch.testing.assert_close(p, q, **tolerance)  # type: ignore[arg-type]
    a, b = one.meters.read(), four.meters.read()
    assert b["rows"] == a["rows"] == 42 and b["train_top1"] == pytest.approx(a["train_top1"], abs=5 if dtype else 1e-9)
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-2 if dtype else 1e-5)
    assert b["terms"] == pytest.approx(a["terms"], rel=2e-2 if dtype else 1e-4, abs=1e-4)


def test_a_batch_smaller_than_the_parts_still_counts_once() -> None:
    step = step_of(tiny.recipe(optim__accum=4), norm=False, drop=0.0)
    one = step_of(norm=False, drop=0.0)
    for s in (step, one):
        s.learner.method.eval()
        s(batch(3))
    for p, q in zip(step.params, one.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_clipping_bounds_the_norm_and_keeps_the_direction(dtype: torch.dtype | None) -> None:
    def gradient(clip: float | None) -> list[Tensor]:
        changes: dict[str, Any] = {"optim__momentum": 0.0, "optim__weight_decay": 0.0, "optim__lr": 1.0, "optim__clip": clip}
        step = step_of(tiny.recipe(**changes), dtype, drop=0.0)
        if step.scaler:
            step.scaler.scale.fill_(256.0)
        before = [p.detach().clone() for p in step.params]
        step(batch())
        return [b - p.detach() for b, p in zip(before, step.params, strict=True)]

    free = gradient(None)
    norm = float(torch.nn.utils.get_total_norm(free))
    assert norm > 0.2
    for clip in (0.1, norm * 1.5):
        found = gradient(clip)
        share = min(1.0, clip / norm)
        assert float(torch.nn.utils.get_total_norm(found)) == pytest.approx(norm * share, rel=1e-3)
        for a, b in zip(free, found, strict=True):
            torch.testing.assert_close(b, a * share, rtol=1e-3, atol=1e-5)


# ---- moving average


def test_the_moving_average_is_its_formula() -> None:
    step = step_of(tiny.recipe(ema__decay=0.3))
    assert step.average is not None
    mine = {k: v.double().clone() for k, v in step.learner.named_parameters()}
    for n in range(6):
        step(batch(at=8 * n))
        d = min(0.3, (1 + n) / (10 + n))
        for k, v in step.learner.named_parameters():
            mine[k] = mine[k] + (1 - d) * (v.detach().double() - mine[k])
    for k, v in step.average.model.named_parameters():
        torch.testing.assert_close(v.double(), mine[k], rtol=1e-5, atol=1e-6)
        assert not v.requires_grad
    held = dict(step.average.model.named_buffers())
    for k, v in step.learner.named_buffers():
        assert torch.equal(v, held[k]), k
        assert v.data_ptr() != held[k].data_ptr() or k.startswith("loss."), "a norm's statistics are the average's own"


def test_flat_norm_statistics_are_those_of_torch() -> None:
    step = step_of(drop=0.0)
    rival = copy.deepcopy(step.learner)
    with torch.no_grad():
        for k in range(3):
            b = batch(at=8 * k)
            rival(b.x, b.y, step.w)
            step.learner(b.x, b.y, step.w)
    for (k, v), (_, w) in zip(step.learner.named_buffers(), rival.named_buffers(), strict=True):
        assert torch.equal(v, w), k
    flat = {f.data_ptr() for f in step.buffers.flat}
    stored = {v.untyped_storage().data_ptr() for m in step.learner.modules() for v in m.buffers(False) if "norm" in repr(type(m))}
    assert stored == flat
