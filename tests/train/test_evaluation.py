"""Evaluation counts every sample once, at any batch size, and refuses when a source gives too few or too many."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastffl.errors import DataError
from fastffl.evaluation import evaluate
from fastffl.values import Batch
from tests.train import tiny


def by_hand(learner: Any, split: str = "val") -> dict[str, dict[str, Any]]:
    """Sample by sample, with the plainest code there is."""
    learner.eval()
    sums: dict[str, list[float]] = {}
    n = 0
    with torch.no_grad():
        for batch in tiny.data().evaluate(split, 1):
            n += 1
            for vote, z in learner.votes(batch.x).items():
                p = z[0].double().softmax(0)
                order = p.argsort(descending=True)[:5].tolist()
                y = int(batch.y)
                s = sums.setdefault(vote, [0.0, 0.0, 0.0])
                s[0] += order[0] == y
                s[1] += y in order
                s[2] -= float(p[y].log())
    return {v: {"top1": 100 * a / n, "top5": 100 * b / n, "nll": c / n, "samples": n} for v, (a, b, c) in sums.items()}


@pytest.mark.parametrize("size", [1, 7, 20, 250])
@pytest.mark.parametrize("split", ["val", "train"])
def test_scores_are_those_of_a_loop_over_samples(size: int, split: str) -> None:
    learner = tiny.learner()
    found, want = evaluate(learner, tiny.data(), split, size), by_hand(learner, split)
    assert list(found) == ["p0", "p1", "mean", "fused"]
    for vote, score in found.items():
        assert score["samples"] == {"val": 20, "train": tiny.SAMPLES}[split]
        assert score == pytest.approx(want[vote], rel=1e-5), vote


def test_top5_of_many_classes() -> None:
    class Fixed(torch.nn.Module):
        class graph:
            scored = ("p0",)

        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.arange(8.0))  # class 7 is always first, class 0 last

        def votes(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"p0": self.w.expand(len(x), 8)}

    found = evaluate(Fixed(), tiny.data(classes=8), "val", 6)["p0"]  # type: ignore[arg-type]
    labels = tiny.arrays(classes=8).test[1]
    assert found["top1"] == pytest.approx(100 * float((labels == 7).float().mean()))
    assert found["top5"] == pytest.approx(100 * float((labels >= 3).float().mean()))


class Wrong:
    """A source whose evaluation loses or repeats a batch."""

    def __init__(self, change: int):
        self._source, self._change = tiny.data(), change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        batches = list(self._source.evaluate(split, batch_size))
        yield from batches[: self._change] if self._change < 0 else [*batches, *batches[: self._change]]


@pytest.mark.parametrize(("change", "seen"), [(-1, 14), (1, 27)])
def test_a_source_with_too_few_or_too_many_samples_is_refused(change: int, seen: int) -> None:
    with pytest.raises(DataError, match=f"tiny val gave {seen} of 20 samples; refusing"):
        evaluate(tiny.learner(), Wrong(change), "val", 7)  # type: ignore[arg-type]


def test_evaluation_changes_nothing() -> None:
    learner = tiny.learner().train()
    before = {k: v.clone() for k, v in learner.state_dict().items()}
    rng = torch.get_rng_state()
    evaluate(learner, tiny.data())
    assert learner.training and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in learner.state_dict().items())
    with pytest.raises(DataError):
        evaluate(learner, Wrong(-1), "val", 7)  # type: ignore[arg-type]
    assert learner.training


def test_a_nan_row_is_never_right() -> None:
    learner = tiny.learner()
    with torch.no_grad():
        learner.cohort.p0.plain.fc.bias.fill_(float("nan"))  # type: ignore[union-attr]
    found = evaluate(learner, tiny.data())
    assert found["p0"]["top1"] == 0
    assert found["p1"]["top1"] > 0
