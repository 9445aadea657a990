"""dualnet: its losses by hand, who learns in which phase, what is shipped, and the three runs of the iterative schedule."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from routing import net_parts, only, reached
from torch import Tensor

from fastffl.errors import UsageError
from fastffl.methods.dualnet import DualNet
from fastffl.recipe import Nets, Recipe
from fastffl.train import Learner
from tests.train import tiny


def build(*nets: str, **options: Any) -> Learner:
    torch.manual_seed(0)
    return Learner(nets or ("resnet8", "resnet8"), DualNet.Config(**options), classes=5, size=8, channels=1)


def drawn(n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, 1, 8, 8), torch.arange(n) % 5, torch.tensor(0.25)


WEIGHTS = {  # of p0, p1
    "joint": ({}, (1.0, 1.0)),
    "second": ({"schedule": "iterative", "phase": "second"}, (0.0, 0.3)),
    "last": ({"schedule": "iterative"}, (0.0, 0.0)),
    "own": ({"aux": 0.5}, (0.5, 0.5)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_loss_by_hand(name: str) -> None:
    """CE of the classifier on the mean map, and of the nets' own at the phase's weights: value and gradients in float64."""
    options, weights = WEIGHTS[name]
    model = build(**options).double()  # type: ignore[arg-type]
    x, y, ramp = drawn()
    x = x.double()
    loss = model(x, y, ramp).loss
    params = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(loss, params)
    (final0, f0), (final1, f1) = (net.features(x) for net in model.cohort.nets)
    fc = model.method.get_submodule("fuse.fc")
    u = fc(((f0 + f1) / 2).mean((2, 3)))
    z = [net.classify(f) for net, f in zip(model.cohort.nets, (final0, final1), strict=True)]
    want = F.cross_entropy(u, y) + sum(w * F.cross_entropy(a, y) for w, a in zip(weights, z, strict=True))
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    for a, b in zip(got, torch.autograd.grad(want, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    said = model.eval().votes(x)
    torch.testing.assert_close(said["dual"], said["fused"] + 0.3 * (said["p0"] + said["p1"]))
    assert model.graph.votes[0] == "dual"


LEARNS = {  # of schedule and phase: what has a gradient of the whole loss
    "joint": {"body0", "fc0", "body1", "fc1", "fuse"},
    "second": {"body1", "fc1", "fuse"},
    "last": {"fuse"},
}


@pytest.mark.parametrize("name", LEARNS)
def test_who_learns(name: str) -> None:
    model = build(**WEIGHTS[name][0]).train()  # type: ignore[arg-type]
    statistics = {k: v.clone() for k, v in model.cohort.named_buffers()}
    parts = net_parts(model) | {"fuse": list(model.method.parameters())}
    model(*drawn()).loss.backward()
    assert reached(parts) == LEARNS[name]
    moved = {k[:2] for k, v in model.cohort.named_buffers() if not torch.equal(v, statistics[k])}
    assert moved == {f"p{part[-1]}" for part in LEARNS[name] if part.startswith("body")}
    assert [net.training for net in model.cohort.nets] == [f"body{k}" in LEARNS[name] for k in (0, 1)]


@pytest.mark.parametrize(
    ("term", "want"),
    [("ce/p0", {"body0", "fc0"}), ("ce/p1", {"body1", "fc1"}), ("ce/fused", {"body0", "body1", "fuse"})],
)
def test_gradient_routing(term: str, want: set[str]) -> None:
    model = build()
    assert set(model.graph.terms) == {"ce/p0", "ce/p1", "ce/fused"}
    only(model, term)(*drawn()).loss.backward()
    assert reached(net_parts(model) | {"fuse": list(model.method.parameters())}) == want


def test_nets_that_do_not_fit_are_told() -> None:
    with pytest.raises(UsageError, match=r"method dualnet takes at most 2 peers, got 3 \(.*\); name fewer with --model A,B$"):
        build("resnet8", "resnet8", "resnet8")
    with pytest.raises(UsageError, match=r"method dualnet averages maps of equal width, those of resnet8 and wrn16_2 have 64"):
        build("resnet8", "wrn16_2")
    assert DualNet.arranged(("resnet8", "wrn16_2"))[0] == ("resnet8", "resnet8")


# ---- the iterative schedule


def run(out: Path, **changes: Any) -> Learner:
    made: Recipe = tiny.recipe(sched__epochs=1, sched__milestones=(), sched__ramp_epochs=0, **changes)
    config = DualNet.Config(schedule="iterative")
    made = made.model_copy(update={"method": config, "nets": Nets(names=("resnet8", "resnet8"))})
    learner = Learner.build(made, 3, 1, 8)
    tiny.train(out, made, learner=learner)
    return learner


def part(state: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and len(a) > 0 and all(torch.equal(v, b[k]) for k, v in a.items())


def test_three_runs_of_which_each_begins_where_the_one_before_ended(tmp_path: Path) -> None:
    learner = run(tmp_path)
    alone, second, last = (tiny.stored(p)["learner"] for p in (tmp_path / "before-1", tmp_path / "before-2", tmp_path))
    assert same(part(alone, "cohort.p0."), part(second, "cohort.p0.")), "weights and statistics stand still"
    assert same(part(second, "cohort."), part(last, "cohort."))
    assert not same(part(second, "method."), part(last, "method.")), "only the fused classifier learns last"
    assert not same(part(alone, "cohort.p0."), part(second, "cohort.p1."))
    assert same(learner.state_dict(), last)


def test_the_fused_classifier_begins_as_the_first_nets() -> None:
    made = tiny.recipe(nets__names=("resnet8",), nets__share_stem=False)
    before = Learner.build(made.model_copy(update={"method": Learner(["resnet8"], "none", classes=3).config}), 3, 1, 8)
    model = Learner(["resnet8"] * 2, DualNet.Config(schedule="iterative", phase="second"), classes=3, size=8, channels=1)
    model.begin(before)
    first: Any = before.cohort.nets[0].plain
    fc: Any = model.method.get_submodule("fuse.fc")
    assert torch.equal(fc.weight, first.fc.weight) and torch.equal(fc.bias, first.fc.bias)
    assert same(model.cohort.nets[0].plain.state_dict(), first.state_dict())
    assert not same(model.cohort.nets[1].plain.state_dict(), first.state_dict())


def test_averages_and_shadows_are_of_the_weights_it_begins_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What copies weights when training begins must come after the runs before: flat as on a GPU, averaged, half precision."""
    from functools import partial

    from fastffl.train import loop, optim

    seen = []
    monkeypatch.setattr(optim, "build", partial(optim.build, flat=True))
    plain = loop.Trainer.fit

    def fit(self: loop.Trainer) -> Any:
        flat = self.step.flat
        assert flat is not None and flat.shadow is not None
        seen.append(torch.equal(flat.shadow, flat.p.bfloat16()))
        return plain(self)

    monkeypatch.setattr(loop.Trainer, "fit", fit)
    learner = run(tmp_path, ema__decay=0.5, amp__enabled=True, amp__dtype="bf16")
    assert seen == [True] * 3
    alone = part(tiny.stored(tmp_path / "before-1")["average"]["model"], "cohort.p0.")
    assert same(alone, part(tiny.stored(tmp_path)["average"]["model"], "cohort.p0."))
    assert same(alone, part(learner.state_dict(), "cohort.p0."))
