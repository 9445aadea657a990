"""Loggers: the numbers of a run reach TensorBoard as they stand in rows.jsonl; wandb gets them too; a missing one is named."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastffl import Learner, fit, source
from fastffl.errors import UsageError
from fastffl.train import loggers
from fastffl.train.progress import Progress
from fastffl.train.rundir import rows_of


def run(out: Path, name: str) -> None:
    learner = Learner(["resnet8", "resnet8"], "ffl", classes=10, channels=1, size=8)
    data = source("digits", train_fraction=0.1)
    fit(learner, data, epochs=2, batch_size=64, out=out, run__loggers=[name], progress=Progress(quiet=True))


def test_tensorboard_holds_the_rows(tmp_path: Path) -> None:
    run(tmp_path, "tb")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    rows = rows_of(tmp_path)
    got = [(e.step, e.value) for e in events.Scalars("val/fused/top1")]
    assert got == [(r["step"], pytest.approx(r["val"]["fused"]["top1"])) for r in rows] and len(got) == 2
    assert {"loss", "lr", "ramp", "terms/kl/mean>fused", "train_top1/p0"} <= set(events.Tags()["scalars"])


def test_wandb_gets_the_rows_and_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with wandb's init, log and finish: the real one wants an account."""
    seen: dict[str, Any] = {"rows": [], "finished": 0}

    def init(**facts: Any) -> SimpleNamespace:
        seen["init"] = facts
        return SimpleNamespace(
            log=lambda row, step: seen["rows"].append((step, row)), finish=lambda: seen.update(finished=seen["finished"] + 1)
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=object()))
    run(tmp_path / "w", "wandb")
    assert seen["finished"] == 1 and [s for s, _ in seen["rows"]] == [r["step"] for r in rows_of(tmp_path / "w")]
    assert seen["rows"][1][1]["loss"] == rows_of(tmp_path / "w")[1]["loss"]
    assert seen["init"]["name"] == "w" and "root" not in seen["init"]["config"]["data"]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'run.loggers=tb needs tensorboard: pip install "fastffl\[tb\]"'):
        run(tmp_path, "tb")
