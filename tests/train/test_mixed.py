"""Mixed batches, smoothed labels and samples without a label, through a whole step: the loss is that of the formulas."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastffl.data import Place
from fastffl.data.resident import Resident
from fastffl.recipe import Data, Recipe
from fastffl.train import optim
from fastffl.train.graph import Graphed
from fastffl.train.step import Step
from fastffl.values import UNLABELLED, Batch
from tests.train import tiny
from tests.train.test_graph import FakeCuda

CPU = torch.device("cpu")
NORMLESS: dict[str, Any] = {"norm": False, "drop": 0.0}


def step_of(made: Recipe, **more: Any) -> Step:
    learner = tiny.learner(**{**NORMLESS, **more})
    learner.loss.smoothing = made.data.smoothing
    learner.train()
    return Step(learner, optim.build(learner, made.optim), made, CPU)


def batch(n: int = 8, mix: float = 0.3, bad: tuple[int, ...] = ()) -> Batch:
    x, y = tiny.arrays().train
    x, y = (x[:n].float() / 255 - 0.5) * 4, y[:n].clone()
    y[list(bad)] = UNLABELLED
    return Batch(x, y, torch.arange(n), y.flip(0), torch.full((n,), mix))


def expected(step: Step, b: Batch, smoothing: float = 0.0) -> Tensor:
    """The loss of FFL with ramp 1, every term a mean over the samples whose labels are both known."""
    learner = step.learner
    keep = b.y != UNLABELLED
    if b.y2 is not None:
        keep &= b.y2 != UNLABELLED
    peers = learner.cohort(b.x[keep])
    nodes = [*peers.z, learner.method.nodes(peers)["fused"]]
    loss = torch.zeros(())
    for z in nodes:
        ce = F.cross_entropy(z, b.y[keep], reduction="none", label_smoothing=smoothing)
        if b.y2 is not None and b.mix is not None:
            other = F.cross_entropy(z, b.y2[keep], reduction="none", label_smoothing=smoothing)
            ce = b.mix[keep] * ce + (1 - b.mix[keep]) * other
        loss = loss + ce.mean()
    mean, fused = torch.stack(peers.z).mean(0), nodes[-1]
    for teacher, student in [(mean, fused), *((fused, z) for z in peers.z)]:
        q = F.softmax(teacher.detach() / 3, 1)
        loss = loss + 9 * F.kl_div(F.log_softmax(student / 3, 1), q, reduction="batchmean")
    return loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bad", [(), (1, 4)])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("accum", [1, 2, 3])
def test_the_gradient_is_that_of_the_formula(smoothing: float, bad: tuple[int, ...], mixed: bool, accum: int) -> None:
    """Two bad samples of eight lie in unequal numbers in the parts of an accumulated step: each still weighs one in six."""
    step = step_of(tiny.recipe(data__smoothing=smoothing, optim__accum=accum))
    b = batch(bad=bad)
    if not mixed:
        b = b._replace(y2=None, mix=None)
    want = expected(step, b, smoothing)
    wanted = torch.autograd.grad(want, step.params)
    loss, *_ = step._gradients(b.x, b.labels, [])
    assert float(loss) == pytest.approx(float(want.detach()), rel=1e-5)
    for p, g in zip(step.params, wanted, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, g, rtol=2e-4, atol=2e-6)


def test_a_batch_without_any_label_changes_nothing_but_momentum() -> None:
    for accum in (1, 2):
        step = step_of(tiny.recipe(optim__accum=accum, optim__weight_decay=0.0))
        before = [p.detach().clone() for p in step.params]
        step(batch(bad=tuple(range(8))))
        assert all(torch.equal(a, b) for a, b in zip(before, step.params, strict=True))
        assert step.check() == 0, "no step is lost: it had nothing to learn"


def test_mixed_batches_are_captured_with_their_labels() -> None:
    step, plain = (step_of(tiny.recipe(), drop=0.0) for _ in range(2))
    run = Graphed(step.update, FakeCuda())
    for k in range(6):
        b = batch(mix=0.1 * k)
        run(b.x, *b.labels)
        plain(b)
    for a, b_ in zip(step.params, plain.params, strict=True):
        assert torch.equal(a, b_)


def test_a_run_that_mixes_and_smooths(tmp_path: Path) -> None:
    made = tiny.recipe(data__mixup=0.4, data__cutmix=1.0, data__smoothing=0.1)
    source = Resident(tiny.arrays(), Data(name="custom", pad=1, mixup=0.4, cutmix=1.0), Place())
    assert all(b.y2 is not None and b.mix is not None for b in source.train(8, 0, 0))
    result = tiny.train(tmp_path, made, data=source)
    assert result.steps == 18 and result.skipped == 0
    rows = tiny.plain_rows(tmp_path)
    assert all(torch.isfinite(torch.tensor(r["loss"])) for r in rows)


def test_the_rate_grows_with_the_batch() -> None:
    made = tiny.recipe(optim__lr=0.1, optim__lr_batch=4)
    assert made.peak_lr == pytest.approx(0.2) and tiny.recipe().peak_lr == tiny.recipe().optim.lr
