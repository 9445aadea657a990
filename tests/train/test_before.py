"""Runs that a method needs finished first: made by one command, resumed to the same bits wherever they stopped, then left."""

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fastffl import runs
from fastffl.errors import CheckpointError, UsageError
from fastffl.exporting import export
from fastffl.methods.dualnet import DualNet
from fastffl.methods.feed import FEED
from fastffl.methods.kd import KD
from fastffl.recipe import MethodConfig, Nets, Recipe
from fastffl.train import Learner, Result, fit
from fastffl.train.progress import Progress
from fastffl.train.rundir import rows_of
from tests.cli.conftest import TINY_DIGITS, command
from tests.train import tiny
from tests.train.tiny import STEPS

CHAIN = FEED.Config(schedule="sequential", count=2)


def recipe(method: MethodConfig, **changes: Any) -> Recipe:
    made = tiny.recipe(**{"sched__epochs": 2, "sched__milestones": (1,), **changes})
    return made.model_copy(update={"method": method, "nets": Nets(names=("resnet8@0.25",))})


def train(out: Path, method: MethodConfig, data: Any = None, **changes: Any) -> Result:
    made = recipe(method, **{k: v for k, v in changes.items() if k != "resume"})
    more = {"resume": changes["resume"]} if "resume" in changes else {}
    return tiny.train(out, made, learner=Learner.build(made, 3, 1, 8), data=data or tiny.data(), **more)


class Counted(tiny.StopAt):
    """A source that counts its batches over all runs, and stops when batch `at` is asked for."""

    def __init__(self, at: int = -1):
        super().__init__(tiny.data(), at)
        self.given = 0

    def train(self, batch_size: int, seed: int, epoch: int, start: int = 0) -> Any:
        for batch in self._source.train(batch_size, seed, epoch, start):
            if self.given == self._at:
                raise self._error("stopped by the test")
            self.given += 1
            yield batch


def weights(run: Path, start: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(start): v for k, v in tiny.stored(run)["learner"].items() if k.startswith(start)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and len(a) > 0 and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted runs: kd, and a chain of three generations."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("whole")
    train(root / "kd", KD.Config())
    train(root / "chain", CHAIN)
    return root


def digest(run: Path) -> Any:
    from fastffl.train.resume import digest

    return digest(tiny.stored(run))


def test_the_teacher_is_the_net_of_the_run_before(whole: Path) -> None:
    run = whole / "kd"
    assert sorted(p.name for p in run.glob("before-*")) == ["before-1"]
    assert same(weights(run / "before-1", "cohort.p0."), weights(run, "teacher.p0."))
    assert not same(weights(run / "before-1", "cohort.p0."), weights(run, "cohort.p0."))
    assert [r["epoch"] for r in rows_of(run / "before-1")] == [r["epoch"] for r in rows_of(run)] == [1, 2]
    assert rows_of(run)[-1]["val"]["teacher"] == rows_of(run / "before-1")[-1]["val"]["p0"]


def test_each_generation_is_taught_by_the_one_before(whole: Path) -> None:
    chain = [whole / "chain" / "before-1", whole / "chain" / "before-2", whole / "chain"]
    assert len(list((whole / "chain").glob("before-*"))) == 2
    for before, after in pairwise(chain):
        assert same(weights(before, "cohort.p0."), weights(after, "teacher.p0."))
    assert not any("teacher" in k for k in tiny.stored(chain[0])["learner"])
    assert not same(weights(chain[1], "method."), weights(chain[2], "method.")), "a translator anew"


def test_parallel_teachers_are_trained_in_one_run(tmp_path: Path) -> None:
    train(tmp_path, FEED.Config(count=2), sched__epochs=1)
    assert [p.name for p in tmp_path.glob("before-*")] == ["before-1"]
    for k in range(2):
        assert same(weights(tmp_path / "before-1", f"cohort.p{k}."), weights(tmp_path, f"teacher.p{k}."))
    assert not same(weights(tmp_path, "teacher.p0."), weights(tmp_path, "teacher.p1."))


@pytest.mark.parametrize(
    ("name", "method", "at"),
    [
        ("kd", KD.Config(), 4),
        ("kd", KD.Config(), STEPS + 2),
        ("kd", KD.Config(), 2 * STEPS),
        ("kd", KD.Config(), 3 * STEPS + 1),
        ("chain", CHAIN, 3 * STEPS + 1),
    ],
)
def test_stopped_anywhere_it_ends_in_the_same_digest(
    name: str, method: MethodConfig, at: int, whole: Path, tmp_path: Path
) -> None:
    """In the first run before its checkpoint and after, between the runs, in the last run, and in the middle of a chain."""
    with pytest.raises(tiny.Stop):
        train(tmp_path, method, Counted(at))
    torch.manual_seed(99)
    train(tmp_path, method)
    assert digest(tmp_path) == digest(whole / name)
    for k in (1, 2)[: 1 if name == "kd" else 2]:
        assert digest(tmp_path / f"before-{k}") == digest(whole / name / f"before-{k}")


def test_finished_chains_are_not_trained_again(tmp_path: Path) -> None:
    with pytest.raises(tiny.Stop):
        train(tmp_path, KD.Config(), Counted(2 * STEPS + 1))
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "before-1").rglob("*.pt")}
    source = Counted()
    train(tmp_path, KD.Config(), source)
    assert source.given == 2 * STEPS, "all of the last run, nothing of the first"
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "before-1").rglob("*.pt")} == files
    source = Counted()
    train(tmp_path, KD.Config(), source)
    assert source.given == 0


def test_a_stopped_run_is_found_by_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --out the newest unfinished run is gone on with, also one that never came to its own first step."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tiny.Stop):
        train(None, KD.Config(), Counted(STEPS + 1))  # type: ignore[arg-type]
    assert train(None, KD.Config()).run == "runs/tiny-0001"  # type: ignore[arg-type]
    assert train(None, KD.Config(T=2.0)).run == "runs/tiny-0002"  # type: ignore[arg-type]


def test_never_takes_no_run_before_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(tiny.Stop):
        train(tmp_path / "a", KD.Config(), Counted(STEPS + 1), resume="never")
    with pytest.raises(UsageError, match="before-1 already holds a run; --resume never needs a folder without one"):
        train(tmp_path / "a", KD.Config(), resume="never")
    result = train(tmp_path / "b", KD.Config(), resume="never", sched__epochs=1)
    assert result.epochs == 1 and (tmp_path / "b" / "before-1" / "last").is_dir()


def test_other_settings_of_the_run_before_are_told(tmp_path: Path) -> None:
    with pytest.raises(tiny.Stop):
        train(tmp_path, KD.Config(), Counted(STEPS + 1))
    with pytest.raises(CheckpointError, match=r"before-1 was trained with other settings \(optim\.lr 0\.05 -> 0\.1\)"):
        train(tmp_path, KD.Config(), optim__lr=0.1)


def test_max_steps_are_of_the_last_run(tmp_path: Path) -> None:
    assert train(tmp_path, KD.Config(), run__max_steps=2).steps == 2
    assert tiny.stored(tmp_path / "before-1")["position"]["step"] == 2 * STEPS


# ---- one command


@pytest.fixture(scope="module")
def commanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("commanded") / "run"
    answer = command("train", *TINY_DIGITS, "--method", "kd", "--out", str(run), "--json")
    assert answer.code == 0, answer.err
    assert "run 1 of 2: none resnet8, in " in answer.err and "run 2 of 2: kd" in answer.err
    return run


@pytest.mark.parametrize("where", ["RUN", "RUN:p1", "FILE"])
def test_named_teachers_are_taken_and_nothing_is_trained_before(where: str, commanded: Path, tmp_path: Path) -> None:
    """Then the teacher goes and the run folder moves: it is evaluated and exported all the same."""
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(commanded, source)
    want = weights(source, "cohort.p1.plain." if where == "RUN:p1" else "cohort.p0.plain.")
    if where == "FILE":
        assert command("export", str(source), "--vote", "p0", "--out", str(tmp_path / "teacher.safetensors")).code == 0
        shutil.rmtree(source)
    teacher = {"RUN": source, "RUN:p1": f"{source}:p1", "FILE": tmp_path / "teacher.safetensors"}[where]
    answer = command("train", *TINY_DIGITS, "--method", "kd", "--set", f"method.teachers={teacher}", "--out", str(run))
    assert answer.code == 0, answer.err
    assert not list(run.glob("before-*")) and same(weights(run, "teacher.p0.plain."), want)
    shutil.rmtree(source, ignore_errors=True)
    (tmp_path / "teacher.safetensors").unlink(missing_ok=True)
    moved = run.rename(tmp_path / "moved")
    scored = command("evaluate", str(moved), "--json")
    assert scored.code == 0, scored.err
    opened = runs.open_run(str(moved), data=False)
    assert opened.learner.teacher is not None and same(opened.learner.teacher.nets[0].plain.state_dict(), want)
    path, off = export(opened.learner, "p0", tmp_path / "student.safetensors")
    assert off == 0 and path.is_file()


def test_a_run_that_trained_its_teacher_is_whole_without_it(commanded: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(commanded, moved, ignore=shutil.ignore_patterns("before-*"))
    before = command("evaluate", str(commanded), "--json")
    after = command("evaluate", str(moved), "--json")
    assert before.code == after.code == 0, after.err
    assert command("evaluate", str(commanded / "before-1"), "--json").code == 0
    assert command("export", str(moved), "--vote", "p1", "--out", str(tmp_path / "p1.safetensors")).code == 0
    again = command("train", *TINY_DIGITS, "--method", "kd", "--out", str(moved), "--json")
    assert again.code == 0 and not list(moved.glob("before-*")), "finished: nothing is trained again"


def test_settings_of_the_method_are_the_learners(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"method\.T=2\.0: a learner is built with its method's settings; give them to Learner"):
        tiny.train(tmp_path, method__T=2.0)


def test_python_and_the_command_line_train_the_same(commanded: Path, tmp_path: Path) -> None:
    """fit of a Learner built from the run's recipe ends in the bits of the command."""
    from fastffl import data, fit, recipes

    made = recipes.read(commanded / "recipe.json")
    source = data.source(made.data)
    learner = Learner.build(made, len(source.classes), source.channels, source.size, len(source.labels))  # type: ignore[attr-defined]
    result = fit(learner, source, made, out=tmp_path, progress=Progress(quiet=True))
    assert result.digest == digest(commanded)
    assert digest(tmp_path / "before-1") == digest(commanded / "before-1")


def test_nets_without_a_name_are_refused_by_the_method_that_builds_them_again(tmp_path: Path) -> None:
    nets = [tiny.Small(drop=0.0), tiny.Small(drop=0.0)]
    made = Learner(nets, DualNet.Config(schedule="iterative"), classes=3, size=8, channels=1)
    with pytest.raises(
        UsageError, match="method dualnet trains Small first, and builds it by its name: no model is called 'Small'"
    ):
        fit(made, tiny.data(), epochs=1, out=tmp_path / "run")
