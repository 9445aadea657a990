"""A moving average of the cohort as a teacher: its formula over steps, what leaves it alone, and runs with it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastffl.evaluation import evaluate
from fastffl.methods.pcl import PCL
from fastffl.nets import MeanTeacher
from fastffl.recipe import Recipe, change
from fastffl.train import Learner, checkpoint, optim
from fastffl.train.step import Step
from fastffl.values import Batch
from tests.train import rankrun, tiny
from tests.train.test_step import HostReads

CPU = torch.device("cpu")
DECAY = 0.7  # reached in the fourth step
VIEWS = 2


class Staged(nn.Module):
    """A net of two stages, as this package's are."""

    stages = (("low", "norm"), ("high",))

    def __init__(self, norm: bool = True):
        super().__init__()
        self.low = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.high = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8, 3)

    def between(self, h: Tensor, first: int, last: int) -> Tensor:
        if first == 0:
            h = torch.relu(self.norm(self.low(h)))
        return torch.relu(self.high(h)) if last == 2 else h

    def classify(self, f: Tensor) -> Tensor:
        return self.fc(f.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.between(x, 0, 2))


def learner(seed: int = 0, norm: bool = True) -> Learner:
    torch.manual_seed(seed)
    nets = [Staged(norm) for _ in range(VIEWS)]
    return Learner(nets, PCL.Config(decay=DECAY), classes=3, size=8, channels=1, share_stem=True)


def step_of(made: Recipe | None = None, dtype: torch.dtype | None = None, flat: bool = False, norm: bool = True) -> Step:
    made = made or tiny.recipe()
    model = learner(norm=norm)
    model.amp_dtype = dtype
    model.train()
    return Step(model, optim.build(model, made.optim, flat=flat), made, CPU)


def batch(n: int = 8, at: int = 0) -> Batch:
    x, y = tiny.arrays().train
    ids = torch.arange(at, at + n) % len(y)
    x = (x[ids].float() / 255 - 0.5) * 4
    return Batch(torch.cat([x, x.flip(3)]), y[ids], ids)


def teacher(step: Step) -> MeanTeacher:
    assert isinstance(step.learner.teacher, MeanTeacher)
    return step.learner.teacher


def state(module: nn.Module) -> dict[str, Tensor]:
    """Weights and running statistics."""
    return {k: v.detach().double().clone() for k, v in module.state_dict().items() if v.is_floating_point() and "count" not in k}


@pytest.mark.parametrize("flat", [False, True])
def test_the_average_is_its_formula(flat: bool) -> None:
    """phi = min(1 - 1/(g + 1), decay): a copy in the first step, the mean of all until the decay is reached; statistics alike."""
    step = step_of(flat=flat)
    mine = state(step.learner.cohort)
    for g in range(7):
        before = state(teacher(step).cohort)
        step(batch(at=8 * g))
        theirs, phi = state(step.learner.cohort), min(1 - 1 / (g + 1), DECAY)
        mine = {k: phi * mine[k] + (1 - phi) * v for k, v in theirs.items()}
        found = state(teacher(step).cohort)
        for k, v in mine.items():
            torch.testing.assert_close(found[k], v, rtol=1e-5, atol=1e-6)
            if g == 0:
                torch.testing.assert_close(found[k], theirs[k], rtol=1e-6, atol=1e-7)
        moved = [k for k in found if not torch.equal(found[k], before[k])]
        assert {"p0.plain.norm.running_mean", "p0.plain.low.weight", "p1.plain.fc.bias"} <= set(moved)
    assert float(teacher(step).count) == 7


def test_it_teaches_by_the_batch_and_leaves_its_statistics_alone() -> None:
    model = learner().train()
    given = model.teacher
    assert isinstance(given, MeanTeacher)
    norm, x = given.nets[0].plain.norm, batch().x
    norm.running_mean.fill_(3.0)  # not what a batch has
    with torch.no_grad():
        low = given.nets[0].plain.low(x[:8])
        h = (low - low.mean((0, 2, 3), keepdim=True)) / (low.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        want = given.nets[0].plain.classify(torch.relu(given.nets[0].plain.high(torch.relu(h))))
        said = given(x, 2)
        torch.testing.assert_close(said.z[0], want, rtol=1e-4, atol=1e-5)
        assert norm.running_mean.tolist() == [3.0] * 6 and norm.running_var.tolist() == [1.0] * 6
        model.eval()
        assert not torch.allclose(given(x, 2).z[0], said.z[0], rtol=0.1), "an evaluation is by running statistics"
        assert torch.equal(given(x[:8]).z[1], given.nets[1].plain(x[:8]))


def test_nobody_trains_it() -> None:
    step = step_of()
    own = {id(p) for p in teacher(step).parameters()}
    assert own and not own & {id(p) for p in step.params} and not any(p.requires_grad for p in teacher(step).parameters())
    step(batch())
    assert all(p.grad is None for p in teacher(step).parameters())


@pytest.mark.parametrize("flat", [False, True])
def test_a_step_that_is_not_finite_does_not_move_it(flat: bool) -> None:
    step = step_of(tiny.recipe(ema__decay=0.9), flat=flat)
    for k in range(2):
        step(batch(at=8 * k))
    before = {k: checkpoint.digest(v) for k, v in step.state().items()}
    bad = batch()
    bad.x[9, 0, 2, 2] = float("nan")  # of the second view
    step(bad)
    after = {k: checkpoint.digest(v) for k, v in step.state().items()}
    assert {k for k in before if before[k] != after[k]} == {"skips"} and float(teacher(step).count) == 2
    other = step_of(tiny.recipe(ema__decay=0.9), flat=flat)
    for k in range(3):
        other(batch(at=8 * k))
    step(batch(at=16))
    assert checkpoint.digest(step.state()["learner"]) == checkpoint.digest(other.state()["learner"]), "as if it had not been"


def test_the_host_reads_nothing_for_it() -> None:
    step = step_of(tiny.recipe(ema__decay=0.9, optim__accum=2))
    for _ in range(2):
        with HostReads() as seen:
            step(batch())
        assert seen.found == [] and seen.all > 200


@pytest.mark.parametrize("flat", [False, True])
def test_parts_of_a_batch_keep_their_views(flat: bool) -> None:
    """Four parts of one batch, each with both its views, are the batch: nets without statistics."""
    one, four = step_of(norm=False, flat=flat), step_of(tiny.recipe(optim__accum=4), norm=False, flat=flat)
    for k in range(3):
        one(batch(at=8 * k)), four(batch(at=8 * k))
        uneven = batch(7, at=3)
        one(uneven), four(uneven)
    a, b = state(one.learner), state(four.learner)
    for k, v in a.items():
        torch.testing.assert_close(b[k], v, rtol=1e-4, atol=1e-6)
    assert one.meters.read()["terms"] == pytest.approx(four.meters.read()["terms"], rel=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_flat_steps_are_plain_ones(dtype: torch.dtype | None) -> None:
    plain, flat = step_of(dtype=dtype), step_of(dtype=dtype, flat=True)
    for k in range(4):
        plain(batch(at=8 * k)), flat(batch(at=8 * k))
    a, b = state(plain.learner), state(flat.learner)
    loose = {"rtol": 2e-2, "atol": 4e-3} if dtype else {"rtol": 1e-4, "atol": 1e-5}
    for k, v in a.items():
        torch.testing.assert_close(b[k], v, **loose)


# ---- beside the moving average of a whole run


@pytest.mark.parametrize("flat", [False, True])
def test_a_runs_average_holds_the_same_teacher(flat: bool) -> None:
    """It is an average already; a copy made before the first step, which nobody steps, would be shipped in its place."""
    step = step_of(tiny.recipe(ema__decay=0.9), flat=flat)
    assert step.average is not None
    for k in range(3):
        step(batch(at=8 * k))
    mine, theirs = step.learner.state_dict(), step.average.model.state_dict()
    kept = [k for k in mine if k.startswith("teacher.") and torch.equal(mine[k], theirs[k])]
    assert kept == [k for k in mine if k.startswith("teacher.")]
    assert not torch.equal(mine["cohort.p0.plain.fc.weight"], theirs["cohort.p0.plain.fc.weight"])
    x = batch().x[:8]
    step.learner.eval()
    with torch.no_grad():
        votes, averaged = step.learner.votes(x), step.average.model.votes(x)
    assert torch.equal(votes["ema0"], averaged["ema0"]) and not torch.equal(votes["p0"], averaged["p0"])


def test_a_run_ends_with_the_teacher_it_scored(tmp_path: Path) -> None:
    model = learner()
    result = tiny.train(tmp_path, tiny.recipe(ema__decay=0.8), learner=model)
    assert result.steps == 18 and set(result.results) == {"p0", "p1", "mean", "ens", "ema0", "ema1"}
    assert isinstance(model.teacher, MeanTeacher) and float(model.teacher.count) == 18
    again = evaluate(model, tiny.data(), "val", 7)
    assert {v: r["last"] for v, r in result.results.items()} == {v: pytest.approx(s["top1"], abs=1e-3) for v, s in again.items()}
    assert tiny.plain_rows(tmp_path)[-1]["ships"] == "ema0"


# ---- runs


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"ema__decay": 0.9, "optim__accum": 2, "amp__enabled": True, "amp__dtype": "bf16"},
}


@pytest.mark.parametrize("cut", [4, 6, 9])
@pytest.mark.parametrize("mode", MODES)
def test_cut_and_resumed_equals_uninterrupted(tmp_path: Path, mode: str, cut: int) -> None:
    made = tiny.recipe(**MODES[mode])
    whole = tiny.train(tmp_path / "whole", made, learner=learner())
    tiny.train(tmp_path / "cut", change(made, "run.max_steps", cut), learner=learner())
    torch.manual_seed(987)
    again = tiny.train(tmp_path / "cut", made, learner=learner(seed=5))  # all of it must come from the checkpoint
    assert again.digest == whole.digest and again.results == whole.results


@pytest.mark.parametrize(
    "part", ["teacher.count", "teacher.cohort.p1.plain.fc.weight", "teacher.cohort.p0.plain.norm.running_var"]
)
def test_leaving_out_a_part_of_it_is_seen(tmp_path: Path, part: str) -> None:
    made = tiny.recipe()
    tiny.train(tmp_path, change(made, "run.max_steps", 2), learner=learner())
    ends = []
    for k, harm in enumerate((1.0, 0.5)):
        stored = tiny.stored(tmp_path)
        stored["learner"][part].mul_(harm)
        (tmp_path / str(k) / "last").mkdir(parents=True)
        checkpoint.save(tmp_path / str(k) / "last", stored, 2, {})
        ends.append(tiny.train(tmp_path / str(k), made, learner=learner()).digest)
    assert ends[0] != ends[1]


def of_several_ranks(rank: int, size: int, port: int, folder: str, options: dict[str, Any]) -> None:
    tiny.learner = partial(learner, norm=False)  # type: ignore[assignment]
    rankrun.one(rank, size, port, folder, options)


def test_ranks_train_as_one_process(tmp_path: Path) -> None:
    """41 samples in batches of 8: of the last one, a single sample, one of two ranks has no share."""
    run: Callable[..., rankrun.Ended] = partial(rankrun.run, target=of_several_ranks, samples=41)
    one, two = run(tmp_path / "1", 1).result(), run(tmp_path / "2", 2)
    for name, v in one["weights"].items():
        torch.testing.assert_close(torch.tensor(two.result()["weights"][name]), torch.tensor(v), rtol=1e-4, atol=2e-6)
    assert two.result(1)["digest"] == two.result()["digest"] and "teacher.cohort.p1.plain.fc.weight" in one["weights"]
