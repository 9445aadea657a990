"""A resumed run is the uninterrupted one, bit for bit: at any cut, in any precision, with every part of its state needed."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastffl.errors import CheckpointError, Interrupted, NumericsError, UsageError
from fastffl.recipe import change
from fastffl.train import Learner, checkpoint
from fastffl.train.progress import Progress
from fastffl.train.resume import TRAINED, digest
from fastffl.train.rundir import RunDir, rows_of
from tests.train import tiny
from tests.train.tiny import EPOCHS, STEPS

MODES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"amp__enabled": True, "amp__dtype": "bf16", "optim__clip": 1.0},
    "fp16": {"amp__enabled": True, "amp__dtype": "fp16"},
    "average": {"ema__decay": 0.9},
    "accumulation": {"optim__accum": 3},
    "adamw": {"optim__name": "adamw", "optim__lr": 0.01, "sched__name": "cosine", "sched__warmup_epochs": 0.5},
    "all": {"amp__enabled": True, "amp__dtype": "fp16", "ema__decay": 0.9, "optim__accum": 2, "optim__clip": 1.0},
}
CUTS = (1, 4, STEPS, STEPS + 2, 2 * STEPS - 1, 2 * STEPS)  # steps done: mid-epoch, before and at an epoch's end


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Digest, results and rows of each mode's whole run."""
    torch.set_num_threads(1)
    made = {}
    for mode, changes in MODES.items():
        run = tmp_path_factory.mktemp(mode)
        result = tiny.train(run, tiny.recipe(**changes))
        made[mode] = (result.digest, result.results, tiny.plain_rows(run))
    assert len({digest for digest, _, _ in made.values()}) == len(MODES)
    return made


def scramble() -> None:
    """Another process has other random states: nothing of them may reach a resumed run."""
    torch.manual_seed(987)
    np.random.seed(654)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("mode", MODES)
def test_cut_and_resumed_equals_uninterrupted(tmp_path: Path, uninterrupted: dict[str, Any], mode: str, cut: int) -> None:
    made = tiny.recipe(**MODES[mode])
    tiny.train(tmp_path, change(made, "run.max_steps", cut))
    assert tiny.stored(tmp_path)["position"]["step"] == cut
    scramble()
    result = tiny.train(tmp_path, made, seed=5)  # another initialisation: all of it must come from the checkpoint
    digest, results, rows = uninterrupted[mode]
    assert result.digest == digest
    assert result.results == results
    assert tiny.plain_rows(tmp_path) == rows


def test_cut_three_times_equals_uninterrupted(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    made = tiny.recipe(**MODES["all"])
    for cut in (2, 3, STEPS + 1):
        tiny.train(tmp_path, change(made, "run.max_steps", cut))
        scramble()
    assert tiny.train(tmp_path, made).digest == uninterrupted["all"][0]


@pytest.mark.parametrize("mode", ["fp32", "all"])
def test_a_crash_goes_back_to_the_last_checkpoint(tmp_path: Path, uninterrupted: dict[str, Any], mode: str) -> None:
    """Nothing is saved on the way out, as with kill -9; rows written since are replaced."""
    made = tiny.recipe(**MODES[mode])
    with pytest.raises(tiny.Stop):
        tiny.train(tmp_path, made, data=tiny.StopAt(tiny.data(), 2 * STEPS + 3))
    assert tiny.stored(tmp_path)["position"]["step"] == 2 * STEPS
    scramble()
    assert tiny.train(tmp_path, made).digest == uninterrupted[mode][0]
    assert tiny.plain_rows(tmp_path) == uninterrupted[mode][2]


def test_the_same_command_after_the_end_repeats_the_result(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    first = tiny.train(tmp_path)
    again = tiny.train(tmp_path, seed=3)
    assert again.digest == first.digest == uninterrupted["fp32"][0] and again.results == first.results
    assert tiny.plain_rows(tmp_path) == uninterrupted["fp32"][2]


@pytest.mark.parametrize("cut", [4, STEPS, STEPS + 2])
def test_max_steps_repeated_gives_the_same_scores(tmp_path: Path, cut: int) -> None:
    made = tiny.recipe(run__max_steps=cut)
    first, again = tiny.train(tmp_path, made), tiny.train(tmp_path, made)
    assert first.steps == again.steps == cut and first.results == again.results and first.digest == again.digest
    assert [r.get("stopped_early", False) for r in rows_of(tmp_path)] == [False] * (cut // STEPS) + [True]


# ---- every part of the state is needed

FULL = {**MODES["all"], "amp__dtype": "fp16"}
LEFT_OUT = {
    "momentum": lambda s: [b["momentum_buffer"].zero_() for b in s["optimizer"]["state"].values()],
    "weights": lambda s: s["learner"]["cohort.p0.plain.fc.weight"].zero_(),
    "BatchNorm": lambda s: [v.zero_() for k, v in s["learner"].items() if "running_mean" in k],
    "scale": lambda s: s["scaler"]["scale"].fill_(65536.0),
    "good steps": lambda s: s["scaler"]["good"].zero_(),
    "average": lambda s: [v.copy_(s["learner"][k]) for k, v in s["average"]["model"].items() if k == "cohort.p1.plain.fc.weight"],
    "average's count": lambda s: s["average"]["count"].zero_(),
    "meters": lambda s: [v.zero_() for v in s["meters"].values()],
    "skips": lambda s: s["skips"]["skipped"].zero_(),
    "batch": lambda s: s["position"].update(batch=s["position"]["batch"] - 1),
    "step": lambda s: s["position"].update(step=s["position"]["step"] - 1),
    "epoch": lambda s: s["position"].update(epoch=0),
    "best": lambda s: s["best"].clear(),
    "torch's random state": lambda s: s["rng"].update(torch=torch.Generator().manual_seed(1).get_state()),
    "python's random state": lambda s: s["rng"]["python"][:624].copy_(s["rng"]["python"][:624].flip(0)),
    "numpy's random state": lambda s: s["rng"]["numpy"].copy_(s["rng"]["numpy"].roll(1)),
}


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run stopped in its second epoch by a full state: momentum, average, scale backed off once; and its whole digest."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("omit")
    made = tiny.recipe(**FULL)
    whole = tiny.train(root / "whole", made).digest
    tiny.train(root / "cut", change(made, "run.max_steps", STEPS + 3))
    state = tiny.stored(root / "cut")
    # make every part say something: a start value could not be told from one left out
    state["scaler"]["scale"].fill_(512.0)
    state["skips"]["skipped"].fill_(4)
    checkpoint.save(root / "cut" / "last", state, state["position"]["step"], {})
    return root / "cut", whole


def resumed(run: Path, out: Path, change_state: Any) -> tuple[str, list[dict[str, Any]]]:
    """Digest and rows of the rest of `run`, begun from a state changed by `change_state`."""
    state = tiny.stored(run)
    change_state(state)
    (out / "last").mkdir(parents=True)
    checkpoint.save(out / "last", state, STEPS + 3, {})
    return tiny.train(out, tiny.recipe(**FULL)).digest, tiny.plain_rows(out)


def test_leaving_out_any_part_is_seen(tmp_path: Path, cut_run: tuple[Path, str]) -> None:
    run, _ = cut_run
    kept = resumed(run, tmp_path / "kept", lambda s: None)
    assert resumed(run, tmp_path / "again", lambda s: None) == kept
    unseen = []
    for k, (name, omit) in enumerate(LEFT_OUT.items()):
        try:
            if resumed(run, tmp_path / str(k), omit) == kept:
                unseen.append(name)
        except Exception as error:  # a run that can't go on has noticed as well
            assert name in ("batch", "epoch", "step"), (name, error)
    assert unseen == []


def test_a_streak_of_bad_steps_goes_on_after_resume(tmp_path: Path) -> None:
    """Nine before the cut and one after it are ten; a streak left out would need ten more."""
    with pytest.raises(tiny.Stop):
        tiny.train(tmp_path, data=tiny.StopAt(tiny.data(), STEPS + 1))
    state = tiny.stored(tmp_path)
    for streak in (8, 9):
        run = tmp_path / str(streak)
        state["skips"]["streak"].fill_(streak)
        (run / "last").mkdir(parents=True)
        checkpoint.save(run / "last", state, STEPS, {})
        source = tiny.NaNAt(tiny.data(), STEPS)
        if streak == 9:
            with pytest.raises(NumericsError, match="loss not finite for 10 steps in a row"):
                tiny.train(run, data=source)
        else:
            assert tiny.train(run, data=source).skipped == 1


def test_the_digest_is_of_every_part_that_is_trained(cut_run: tuple[Path, str]) -> None:
    state = tiny.stored(cut_run[0])
    facts = {"recipe", "classes", "samples", "ids", "shape", "normal", "time"}
    assert set(TRAINED) - {"ranks", "objectives"} == set(state) - facts
    assert set(state["optimizer"]) == {"state", "param_groups"} and state["scaler"] and state["average"]


# ---- rows


def test_a_row_cut_short_does_not_swallow_the_next(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    made = tiny.recipe()
    tiny.train(tmp_path, change(made, "run.max_steps", STEPS + 2))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"epoch": 2, "step": 12, "lo')  # killed while writing
    tiny.train(tmp_path, made)
    assert tiny.plain_rows(tmp_path) == uninterrupted["fp32"][2]
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == EPOCHS and all(json.loads(line) for line in lines)


def test_an_epoch_evaluated_twice_has_one_row(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    """Killed after the row and before the checkpoint, of an epoch that had been stopped in its evaluation before."""
    run, made = tmp_path, tiny.recipe()
    tiny.train(run, made)
    state = tiny.stored(run)
    rows = rows_of(run)
    for path in run.glob("*/step-*"):
        path.unlink()
    with pytest.raises(Interrupted):
        tiny.train(run, made, data=tiny.EvaluationSignal(tiny.data(), at=1))
    before = tiny.stored(run)
    assert before["position"] == {"epoch": 0, "batch": STEPS, "step": STEPS}
    with contextlib.closing(RunDir(run)) as folder:
        folder.row(rows[0])
    assert tiny.train(run, made).digest == digest(state)
    assert tiny.plain_rows(run) == uninterrupted["fp32"][2]


def test_rows_hold_what_the_design_says(uninterrupted: dict[str, Any]) -> None:
    rows = uninterrupted["all"][2]
    assert [(r["epoch"], r["step"]) for r in rows] == [(1, STEPS), (2, 2 * STEPS), (3, 3 * STEPS)]
    assert [r["ramp"] for r in rows] == pytest.approx([0.006738, 0.2865, 1.0], rel=1e-3)
    for row in rows:
        assert set(row["terms"]) == {"ce/p0", "ce/p1", "ce/fused", "kl/mean>fused", "kl/fused>p0", "kl/fused>p1"}
        assert set(row["val"]) == {"p0", "p1", "mean", "fused"} and row["rows"] == tiny.SAMPLES
        w, t = row["ramp"], row["terms"]
        total = sum(v if k.startswith("ce") else w * v for k, v in t.items())
        assert row["loss"] == pytest.approx(total, rel=1e-5)


# ---- refusals


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("optim.lr", 0.2, r"optim\.lr 0\.05 -> 0\.2"),
        ("data.batch_size", 4, r"data\.batch_size 8 -> 4"),
        ("sched.epochs", 9, r"sched\.epochs 3 -> 9"),
        ("run.seed", 1, r"run\.seed 0 -> 1"),
        ("amp.enabled", True, r"amp\.enabled False -> True"),
        ("ema.decay", 0.5, r"ema\.decay 0\.0 -> 0\.5"),
        ("method.T", 2.0, r"method\.T 3\.0 -> 2\.0"),
        ("optim.accum", 2, r"optim\.accum 1 -> 2"),
    ],
)
def test_resume_refuses_another_recipe_and_names_the_change(tmp_path: Path, path: str, value: Any, text: str) -> None:
    tiny.train(tmp_path, tiny.recipe(run__max_steps=2))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    made = change(tiny.recipe(), path, value)
    learner = Learner([tiny.Small(), tiny.Small()], made.method, classes=3, size=8, channels=1)
    with pytest.raises(CheckpointError, match=text):
        tiny.train(tmp_path, made, learner=learner)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_resume_lists_several_changes(tmp_path: Path) -> None:
    tiny.train(tmp_path, tiny.recipe(run__max_steps=2))
    with pytest.raises(CheckpointError, match=r"data\.pad 1 -> 0; optim\.lr 0\.05 -> 0\.2; run\.seed 0 -> 4"):
        tiny.train(tmp_path, tiny.recipe(optim__lr=0.2, run__seed=4, data__pad=0))
    with pytest.raises(CheckpointError, match=r"; and 1 more\)"):
        tiny.train(tmp_path, tiny.recipe(optim__lr=0.2, run__seed=4, data__pad=0, data__train_fraction=0.5, ema__decay=0.5))


@pytest.mark.parametrize(
    ("path", "value"), [("run.log_every", 2), ("run.save_every", 2), ("run.threads", 1), ("data.root", "/elsewhere")]
)
def test_resume_allows_what_changes_no_number(tmp_path: Path, uninterrupted: dict[str, Any], path: str, value: Any) -> None:
    tiny.train(tmp_path, tiny.recipe(run__max_steps=STEPS + 2))
    assert tiny.train(tmp_path, change(tiny.recipe(), path, value)).digest == uninterrupted["fp32"][0]


def test_resume_refuses_other_classes_and_another_learner(tmp_path: Path) -> None:
    tiny.train(tmp_path, tiny.recipe(run__max_steps=2))
    with pytest.raises(CheckpointError, match="other classes"):
        tiny.train(tmp_path, data=tiny.data(names=("a", "c", "b")))
    with pytest.raises(CheckpointError, match="trained on 44 images and there are 43 now"):
        tiny.train(tmp_path, data=tiny.data(samples=43))
    with pytest.raises(CheckpointError, match="does not hold this learner's state"):
        tiny.train(tmp_path, learner=tiny.learner(width=7))


def test_never_needs_a_folder_without_a_run(tmp_path: Path) -> None:
    tiny.train(tmp_path, tiny.recipe(run__max_steps=2))
    with pytest.raises(UsageError, match="already holds a run"):
        tiny.train(tmp_path, resume="never")
    fresh = tmp_path / "fresh"
    assert tiny.train(fresh, tiny.recipe(run__max_steps=2), resume="never").steps == 2


# ---- going on elsewhere


def test_going_on_in_another_folder(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    tiny.train(a, tiny.recipe(run__max_steps=STEPS + 2))
    before = sorted(a.rglob("*.pt"))
    with pytest.raises(Interrupted):
        tiny.train(b, resume=str(a), data=tiny.SignalAt(STEPS + 4))
    assert tiny.stored(b)["position"]["step"] == STEPS + 5
    said = io.StringIO()
    assert tiny.train(b, resume=str(a), progress=Progress(said)).digest == uninterrupted["fp32"][0]
    assert f"resumed at epoch 2, step {STEPS + 5} of" in said.getvalue()  # the same command: goes on from b, not from a
    assert sorted(a.rglob("*.pt")) == before
    assert tiny.plain_rows(b) == uninterrupted["fp32"][2][1:]


def test_going_on_from_the_best(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    tiny.train(tmp_path)
    best = checkpoint.newest(tmp_path / "best")
    assert best is not None
    result = tiny.train(tmp_path, resume=str(tmp_path / "best"))
    assert result.digest == uninterrupted["fp32"][0] and tiny.plain_rows(tmp_path) == uninterrupted["fp32"][2]


def test_a_missing_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no run there"):
        tiny.train(tmp_path / "a", resume=str(tmp_path / "nothing"))
    (tmp_path / "empty" / "last").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        tiny.train(tmp_path / "a", resume=str(tmp_path / "empty"))


def test_auto_goes_on_with_the_newest_unfinished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Interrupted):
        tiny.train(None, data=tiny.SignalAt(2))  # type: ignore[arg-type]
    first = tiny.train(None)  # type: ignore[arg-type]
    second = tiny.train(None)  # type: ignore[arg-type]
    other = tiny.train(None, tiny.recipe(run__seed=1))  # type: ignore[arg-type]
    assert [first.run, second.run, other.run] == [f"runs/tiny-000{k}" for k in (1, 2, 3)]
    assert first.digest == second.digest != other.digest


def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    held = RunDir(tmp_path / "run")
    try:
        with pytest.raises(UsageError, match=r"another process is training in .*run; wait for it or choose another --out DIR"):
            tiny.train(tmp_path / "run")
    finally:
        held.close()
    tiny.train(tmp_path / "run", tiny.recipe(run__max_steps=1))


def test_a_run_can_be_moved(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    tiny.train(tmp_path / "here", tiny.recipe(run__max_steps=STEPS + 2))
    (tmp_path / "here").rename(tmp_path / "there")
    assert str(tmp_path).encode() not in b"".join(p.read_bytes() for p in (tmp_path / "there").rglob("*") if p.is_file())
    assert tiny.train(tmp_path / "there").digest == uninterrupted["fp32"][0]
