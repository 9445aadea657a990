"""The step as a GPU takes it - flat buffers, half-precision shadows, kernels' references - equals the plain step, on the CPU."""

import copy
from typing import Any

import pytest
import torch

from fastffl.recipe import Recipe
from fastffl.train import Learner, checkpoint, optim
from fastffl.train.step import Step
from fastffl_kernels.sgd_flat import FlatSGD
from tests.train import tiny
from tests.train.test_step import CPU, FP16, HostReads, batch

BF16 = torch.bfloat16
CASES: dict[str, tuple[dict[str, Any], torch.dtype | None]] = {
    "fp32": ({}, None),
    "bf16": ({}, BF16),
    "fp16": (FP16, torch.float16),
    "accum": ({"optim__accum": 2}, None),
    "accum bf16": ({"optim__accum": 4}, BF16),
    "no nesterov, no decay of norms": ({"optim__nesterov": False, "optim__decay_norm_bias": False}, BF16),
    "no momentum": ({"optim__momentum": 0.0}, None),
    "adamw": ({"optim__name": "adamw", "optim__lr": 1e-3}, BF16),
    "adamw fp16": ({"optim__name": "adamw", "optim__lr": 1e-3, **FP16}, torch.float16),
    "clip": ({"optim__clip": 0.5}, BF16),
    "clip fp16": ({"optim__clip": 0.5, **FP16}, torch.float16),
    "ema": ({"ema__decay": 0.9}, BF16),
}


def pair(made: Recipe, dtype: torch.dtype | None) -> tuple[Step, Step]:
    """The plain step and the flat one from the same weights."""
    steps = []
    for flat in (False, True):
        learner = tiny.learner(drop=0.0)
        learner.amp_dtype = dtype
        learner.train()
        steps.append(Step(learner, optim.build(learner, made.optim, flat), made, CPU))
    assert steps[0].flat is None and steps[1].flat is not None
    return steps[0], steps[1]


def run(step: Step, steps: int = 5) -> None:
    for k in range(steps):
        step.rate(0.05 / (k + 1))
        step.ramp(k / steps)
        step(batch(at=8 * k))


@pytest.mark.parametrize("name", CASES)
def test_the_flat_step_equals_the_plain_one(name: str) -> None:
    changes, dtype = CASES[name]
    plain, flat = pair(tiny.recipe(**changes), dtype)
    run(plain), run(flat)
    # bit for bit in the weights would ask torch's fused SGD to round as the reference does; it contracts a * b + c
    tight = {"rtol": 2e-5, "atol": 2e-6}
    loose = {"rtol": 2e-2, "atol": 2e-3} if dtype else tight  # a weight on a rounding edge flips a half-precision shadow
    for p, q in zip(plain.params, flat.params, strict=True):
        torch.testing.assert_close(q, p, **(loose if dtype else tight))
    assert flat.meters.read()["loss"] == pytest.approx(plain.meters.read()["loss"], rel=5e-3 if dtype else 1e-5)
    assert flat.meters.read()["rows"] == plain.meters.read()["rows"] == 40
    if plain.average and flat.average:
        assert plain.average.count == flat.average.count == 5
        for p, q in zip(plain.average.model.parameters(), flat.average.model.parameters(), strict=True):
            torch.testing.assert_close(q, p, **loose)
        assert all(a.untyped_storage().data_ptr() != flat.flat.p.data_ptr() for a in flat.average.model.parameters())  # type: ignore[union-attr]
    if plain.scaler and flat.scaler:
        assert plain.scaler.scale == flat.scaler.scale


@pytest.mark.parametrize("dtype", [None, BF16, torch.float16])
def test_the_first_gradients_are_the_same_bits(dtype: torch.dtype | None) -> None:
    """A shadow is the weight rounded as autocast would round it, so the first forward and backward agree to the bit."""
    plain, flat = pair(tiny.recipe(), dtype)
    plain._gradients(batch().x, batch().labels, []), flat._gradients(batch().x, batch().labels, [])
    for p, q in zip(plain.params, flat.params, strict=True):
        assert p.grad is not None and q.grad is not None and q.grad.dtype == torch.float32
        assert torch.equal(p.grad, q.grad)


def test_parts_of_a_batch_are_summed_in_fp32() -> None:
    """Sums in bf16 would lose bits that the plain step, whose gradients autocast casts back one by one, keeps."""
    plain, flat = pair(tiny.recipe(optim__accum=4), BF16)
    plain._gradients(batch().x, batch().labels, []), flat._gradients(batch().x, batch().labels, [])
    for p, q in zip(plain.params, flat.params, strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-6, atol=1e-7)


def test_no_weight_is_cast_in_a_step_and_the_net_holds_its_own_afterwards() -> None:
    _, flat = pair(tiny.recipe(), BF16)
    flat(batch())
    before = {n: id(p) for n, p in flat.learner.named_parameters()}
    with HostReads() as seen:
        flat(batch(7))  # no weight has a 7 in its shape
    assert seen.found == []
    weights = {p.shape for p in flat.params}
    assert not [shape for shape in seen.casts if shape in weights]
    assert {n: id(p) for n, p in flat.learner.named_parameters()} == before
    assert all(p.dtype == torch.float32 for p in flat.learner.parameters())
    optimizer = flat.optimizer
    assert isinstance(optimizer, FlatSGD)
    for p in flat.params:
        assert torch.equal(optimizer.shadow_of(p), p.bfloat16())


def test_casts_are_seen_where_there_are_no_shadows() -> None:
    plain, _ = pair(tiny.recipe(), BF16)
    with HostReads() as seen:
        plain(batch(7))
    weights = {p.shape for p in plain.params}
    assert [shape for shape in seen.casts if shape in weights]


def test_a_net_keeps_its_weights_when_its_forward_fails() -> None:
    _, flat = pair(tiny.recipe(), BF16)
    before = {n: id(p) for n, p in flat.learner.named_parameters()}
    with pytest.raises(RuntimeError):
        flat(batch()._replace(x=torch.zeros(8, 2, 8, 8)))
    assert {n: id(p) for n, p in flat.learner.named_parameters()} == before


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_that_is_not_finite_changes_nothing(name: str) -> None:
    _, flat = pair(tiny.recipe(optim__name=name, ema__decay=0.9), BF16)
    run(flat, 2)
    before = copy.deepcopy(flat.state())
    bad = batch()
    bad.x[1, 0, 2, 2] = float("nan")
    flat(bad)
    after = flat.state()
    for part in ("learner", "optimizer", "average", "meters"):
        assert checkpoint.digest(before[part]) == checkpoint.digest(after[part]), part
    assert int(flat.skipped) == 1


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [None, BF16, torch.float16])
def test_a_clipped_run_goes_on_after_a_step_that_is_not_finite(name: str, dtype: torch.dtype | None) -> None:
    """Gradients are multiplied by the clipping factor in one buffer: of a bad step NaN stayed where no parameter lies, and no
    later step was finite."""
    _, flat = pair(tiny.recipe(optim__name=name, optim__lr=1e-3, optim__clip=5.0), dtype)
    bad = batch()
    bad.x[1, 0, 2, 2] = float("nan")
    flat(bad)
    run(flat, 2)
    assert int(flat.skipped) == 1 and int(flat.streak) == 0
    assert flat.flat is not None and bool(flat.flat.g.isfinite().all())


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("back", [False, True])
def test_states_go_between_flat_and_plain_steps(name: str, back: bool) -> None:
    """A run that began on a GPU goes on on a CPU, and the other way round."""
    made = tiny.recipe(optim__name=name, optim__lr=1e-3, ema__decay=0.9)
    one, two = pair(made, None)[:: -1 if back else 1]
    run(one, 3)
    two.load(copy.deepcopy(one.state()))
    assert checkpoint.digest(one.state()["learner"]) == checkpoint.digest(two.state()["learner"])
    assert all(isinstance(g["lr"], float) for g in one.state()["optimizer"]["param_groups"])
    run(one, 3), run(two, 3)
    for p, q in zip(one.params, two.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_rate_is_one_value_on_the_device() -> None:
    _, flat = pair(tiny.recipe(), None)
    assert all(g["lr"] is flat.lr for g in flat.optimizer.param_groups)
    flat.rate(0.0)
    before = [p.detach().clone() for p in flat.params]
    flat(batch())
    assert all(torch.equal(p, q) for p, q in zip(flat.params, before, strict=True))
    flat.load(copy.deepcopy(flat.state()))
    assert all(g["lr"] is flat.lr for g in flat.optimizer.param_groups)
    assert isinstance(flat.learner, Learner)
