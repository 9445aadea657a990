"""The Python interface of the README: names or modules, a method, a source, fit, evaluate, export."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastffl import Learner, evaluate, export, fit, source
from fastffl.errors import FastFFLError, UsageError
from fastffl.train.progress import Progress


class Small(torch.nn.Module):
    """A user's own net."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 16, 3, padding=1)
        self.head = torch.nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


def test_ten_lines(tmp_path: Path) -> None:
    data = source("digits")
    mine = Small()
    learner = Learner(["resnet8", mine], method="ffl", classes=10, channels=1, size=8)
    result = fit(learner, data, epochs=2, batch_size=64, lr=0.05, seed=3, out=tmp_path / "run", progress=Progress(quiet=True))
    assert set(result.results) == {"p0", "p1", "mean", "fused"} and result.results["p1"]["net"] == "Small"
    scored = evaluate(learner, data, "test")
    assert round(scored["p0"]["top1"], 4) == result.results["p0"]["last"] and scored["p0"]["samples"] == 450
    path, off = export(learner, "p1", tmp_path / "small.safetensors")
    assert off == 0
    fresh = Small()
    fresh.load_state_dict(load_file(path), strict=True)
    batch = next(iter(data.evaluate("test", 50)))
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(batch.x), learner.eval().votes(batch.x)["p1"])


def test_the_learner_is_trained_in_place_and_again_from_the_run(tmp_path: Path) -> None:
    data = source("digits", train_fraction=0.2)

    def build() -> Learner:
        torch.manual_seed(5)
        return Learner(["resnet8", Small()], classes=10, channels=1, size=8)

    whole = fit(build(), data, epochs=3, out=tmp_path / "a", progress=Progress(quiet=True))
    fit(build(), data, epochs=3, run__max_steps=4, out=tmp_path / "b", progress=Progress(quiet=True))
    again = fit(build(), data, epochs=3, out=tmp_path / "b", progress=Progress(quiet=True))
    assert again.digest == whole.digest and again.results == whole.results


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    data = source("digits")
    learner = Learner(["resnet8"], "none", classes=10, channels=1, size=8)
    with pytest.raises(UsageError, match=r"sched\.epochz"):
        fit(learner, data, sched__epochz=3, out=tmp_path / "x")
    with pytest.raises(FastFFLError, match="10 classes"):
        fit(Learner(["resnet8"], "none", classes=9, channels=1, size=8), data, epochs=1, out=tmp_path / "y")
    with pytest.raises(UsageError, match="no vote is called 'fused'; this run has p0"):
        export(learner, "fused", tmp_path / "z.safetensors")
    with pytest.raises(FastFFLError, match="digitz"):
        source("digitz")
