"""Whole runs as a GPU takes them, with stand-ins for CUDA: steps and evaluations captured, batches made ahead."""

from pathlib import Path
from typing import Any

import pytest

from fastffl.errors import Interrupted
from fastffl.recipe import Recipe
from fastffl.train import loop, optim
from fastffl.train.graph import Evaluator, Stepper
from tests.train import tiny
from tests.train.recorder import Recorder
from tests.train.test_graph import WHERE, FakeCuda

OPTIONS: dict[str, Any] = {"sched__epochs": 7, "ema__decay": 0.9}


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[FakeCuda]:
    """Trainers made in the test take the path of a GPU: flat buffers, captures, side streams."""
    fakes: list[FakeCuda] = []
    build, init = optim.build, loop.Trainer.__init__

    def made(self: loop.Trainer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        fakes.extend([FakeCuda({"parallel": 0.5}), FakeCuda()])
        self.streams = Recorder()  # type: ignore[assignment]
        self.stepper = Stepper(self.step, WHERE, backend=fakes[-2], say=self._say)
        self.evaluator = Evaluator(self.step, WHERE, backend=fakes[-1])

    monkeypatch.setattr(loop.optim, "build", lambda learner, cfg: build(learner, cfg, True))
    monkeypatch.setattr(loop.Trainer, "__init__", made)
    monkeypatch.setattr("fastffl.train.graph.Streams", lambda device: Recorder())
    return fakes


def train(out: Path, made: Recipe, **more: Any) -> loop.Result:
    """Without dropout, which on a CPU draws on the host and so forbids a capture."""
    return tiny.train(out, made, learner=tiny.learner(drop=0.0), **more)


def test_a_captured_run_learns_what_a_plain_flat_one_does(
    tmp_path: Path, on_a_gpu: list[FakeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = train(tmp_path / "captured", tiny.recipe(**OPTIONS))
    assert on_a_gpu[0].captures >= 2 and on_a_gpu[0].replays > 15 and on_a_gpu[1].replays > 0
    log = (tmp_path / "captured" / "log.txt").read_text()
    assert "step captured as one CUDA graph, peers in parallel" in log and "2.00 x as fast" in log
    monkeypatch.setattr(Stepper, "__call__", lambda self, batch: self.step(batch))
    monkeypatch.setattr(Evaluator, "add", property(lambda self: self._add, lambda self, value: None), raising=False)
    plain = train(tmp_path / "plain", tiny.recipe(**OPTIONS))
    assert plain.digest == captured.digest
    assert plain.results == captured.results
    assert tiny.plain_rows(tmp_path / "plain") == tiny.plain_rows(tmp_path / "captured")


def test_an_interrupted_captured_run_goes_on_to_the_same_bits(tmp_path: Path, on_a_gpu: list[FakeCuda]) -> None:
    whole = train(tmp_path / "whole", tiny.recipe(**OPTIONS))
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", tiny.recipe(**OPTIONS), data=tiny.SignalAt(15))
    resumed = train(tmp_path / "cut", tiny.recipe(**OPTIONS))
    assert resumed.digest == whole.digest


def test_a_bad_batch_stops_a_captured_run_as_a_plain_one(tmp_path: Path, on_a_gpu: list[FakeCuda]) -> None:
    with pytest.raises(tiny.Stop):
        train(tmp_path / "run", tiny.recipe(**OPTIONS), data=tiny.StopAt(tiny.data(), 14))
    resumed = train(tmp_path / "run", tiny.recipe(**OPTIONS))
    assert resumed.digest == train(tmp_path / "whole", tiny.recipe(**OPTIONS)).digest


@pytest.mark.parametrize("graph", ["auto", "off"])
def test_the_recipe_can_turn_graphs_off(tmp_path: Path, graph: str) -> None:
    """They are not what a run computes: a run goes on with other settings of these."""
    train(tmp_path, tiny.recipe(sched__epochs=2, run__max_steps=8))
    train(tmp_path, tiny.recipe(sched__epochs=2, run__graph=graph, run__streams="off"))
