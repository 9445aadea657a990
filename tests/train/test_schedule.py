"""Learning rates, warm-up, ramp, and the parameter groups and counts of the official recipe."""

import itertools
import math

import pytest
import torch

from fastffl import recipes
from fastffl.recipe import Optim, Sched
from fastffl.train import Learner, optim, schedule


def test_the_official_recipe_has_the_papers_rates_and_length() -> None:
    r = recipes.load("ffl-cifar100-resnet32")
    assert r.sched.epochs == 301
    rates = [schedule.rate(r.sched, r.peak_lr, e, s, 391) for e in (149, 150, 224, 225, 300) for s in (0, 390)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.01, 0.01, 0.001, 0.001, 0.001, 0.001], rel=1e-12)


def test_the_official_recipe_has_the_papers_parameters_and_decays() -> None:
    r = recipes.load("ffl-cifar100-resnet32")
    learner = Learner.build(r, 100, 3, 32)
    assert sum(p.numel() for p in learner.cohort.parameters()) == 832_920
    assert sum(p.numel() for p in learner.method.parameters()) == 16_228
    made = optim.build(learner, r.optim)
    assert [(g["name"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in made.param_groups] == [
        ("peers", 1e-4, 832_920),
        ("method", 1e-5, 16_228),
    ]
    assert all(g["momentum"] == 0.9 and g["nesterov"] and g["fused"] for g in made.param_groups)


def test_norm_and_bias_can_be_spared_the_decay() -> None:
    learner = Learner(["resnet8", "resnet8"], "ffl", classes=5, size=8, channels=1)
    made = optim.groups(learner, Optim(weight_decay=0.01, decay_norm_bias=False))
    assert [(g["name"], g["weight_decay"]) for g in made] == [
        ("peers", 0.01),
        ("peers norm+bias", 0.0),
        ("method", 0.01),
        ("method norm+bias", 0.0),
    ]
    grouped = [p for g in made for p in g["params"]]  # type: ignore[attr-defined]
    assert len({id(p) for p in grouped}) == len(grouped) == len(list(learner.parameters()))
    assert all((p.ndim > 1) == ("norm" not in g["name"]) for g in made for p in g["params"])  # type: ignore[attr-defined, operator]


def test_frozen_parameters_are_in_no_group() -> None:
    learner = Learner(["resnet8", "resnet8"], "ffl", classes=5, size=8, channels=1)
    frozen = next(learner.cohort.parameters()).requires_grad_(False)
    grouped = [p for g in optim.groups(learner, Optim()) for p in g["params"]]  # type: ignore[attr-defined]
    assert all(p is not frozen for p in grouped)


def test_ramp_is_the_papers() -> None:
    told = {0: 0.00674, 10: 0.0218, 20: 0.0601, 40: 0.2865, 60: 0.7316, 79: 0.9992}
    for epoch, w in told.items():
        assert schedule.ramp(epoch, 80) == pytest.approx(w, rel=5e-3), epoch
    assert [schedule.ramp(e, 80) for e in (80, 81, 300)] == [1.0, 1.0, 1.0]
    assert [schedule.ramp(e, 0) for e in (0, 5)] == [1.0, 1.0]


@pytest.mark.parametrize("name", ["step", "cosine", "constant"])
def test_warm_up_rises_evenly_to_the_rate(name: str) -> None:
    sched = Sched(name=name, epochs=10, warmup_epochs=2)  # type: ignore[arg-type]
    rates = [schedule.rate(sched, 0.4, e, s, 5) for e in range(2) for s in range(5)]
    steps = [b - a for a, b in itertools.pairwise(rates)]
    assert rates[0] == pytest.approx(steps[0]) and steps == pytest.approx([steps[0]] * 9)
    assert rates[0] > 0 and max(rates) < 0.4
    assert schedule.rate(sched, 0.4, 2, 0, 5) == pytest.approx(0.4)


def test_cosine_falls_with_every_step_to_its_floor() -> None:
    sched = Sched(name="cosine", epochs=4, min_lr=0.01)
    rates = [schedule.rate(sched, 0.4, e, s, 5) for e in range(4) for s in range(5)]
    assert all(a > b for a, b in itertools.pairwise(rates))
    want = [0.01 + 0.39 * 0.5 * (1 + math.cos(math.pi * k / 20)) for k in range(20)]
    assert rates == pytest.approx(want)


def test_milestones_are_shares_or_epochs() -> None:
    shares = Sched(epochs=40, milestones=(0.5, 0.75))
    epochs = Sched(epochs=40, milestones=(20, 30))
    for e in range(40):
        assert schedule.rate(shares, 0.1, e, 3, 5) == schedule.rate(epochs, 0.1, e, 3, 5)
    assert schedule.rate(shares, 1.0, 19, 4, 5) == 1.0
    assert schedule.rate(shares, 1.0, 30, 0, 5) == pytest.approx(0.01)


def test_momentum_starts_as_written_zeros() -> None:
    learner = Learner(["resnet8", "resnet8"], "ffl", classes=5, size=8, channels=1)
    made = optim.build(learner, Optim())
    assert all(torch.equal(made.state[p]["momentum_buffer"], torch.zeros_like(p)) for p in learner.parameters())
    assert not optim.build(learner, Optim(momentum=0.0)).state
