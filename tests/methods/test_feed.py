"""feed: distances of directions, so no length matters; the loss by hand, who learns from what, the two ways to its teachers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from routing import net_parts, only, reached
from torch import Tensor

from fastffl.errors import UsageError
from fastffl.methods.feed import FEED
from fastffl.train import Learner
from fastffl.values import Peers
from tests.train import tiny


def build(*nets: str, **options: Any) -> Learner:
    torch.manual_seed(0)
    return Learner(nets or ("resnet8",), FEED.Config(**options), classes=5, size=8, channels=1)


def drawn(n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, 1, 8, 8), torch.arange(n) % 5, torch.tensor(0.25)


def test_the_loss_by_hand() -> None:
    """CE + beta x the mean absolute difference of unit vectors, summed over teachers of other widths: value and gradients."""
    model = build("resnet8", "resnet8", beta=50.0, teacher_nets=("resnet8", "resnet8@0.5")).double()
    x, y, ramp = drawn()
    x = x.double()
    params = [p for p in model.parameters() if p.requires_grad]
    loss = model(x, y, ramp).loss
    got = torch.autograd.grad(loss, params)
    assert model.teacher is not None
    teachers = [net.features(x)[1].flatten(1) for net in model.teacher.nets]
    want = torch.zeros((), dtype=torch.float64)
    translators: Any = model.method.translators
    for net, row in zip(model.cohort.nets, translators, strict=True):
        final, f = net.features(x)
        want = want + F.cross_entropy(net.classify(final), y)
        for t, ntl in zip(teachers, row, strict=True):
            s = ntl(f).flatten(1)
            unlike = t / t.norm(dim=1, keepdim=True) - s / s.norm(dim=1, keepdim=True)
            want = want + 50 * unlike.abs().sum() / unlike.numel()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    for a, b in zip(got, torch.autograd.grad(want, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert FEED.Config().beta == 500


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_nothing_is_lost_where_the_translation_is_proportional(scale: float) -> None:
    model = build(count=2)
    f, given = torch.randn(3, 64, 2, 2), torch.rand(3, 64, 2, 2)
    row: Any = model.method.translators
    for n, ntl in enumerate(row[0]):
        ntl.forward = lambda _, n=n: scale * (n + 1) * given

    def loss(*maps: Tensor) -> float:
        peers = Peers((torch.zeros(3, 5),), (f,), None, teacher=Peers((), maps, None))
        return float(model.method.extra(peers, torch.zeros(3).long(), None).values["feed/p0"])

    assert loss(given, given) < 1e-7
    assert loss(given, 2 * given) < 1e-7
    assert loss(given, given.flip(1)) > 1e-3


def test_no_length_changes_anything() -> None:
    """Neither the teacher's nor, in the value, the translator's."""
    model = build(count=1).eval()
    last: Any = model.method.translators
    before = model(*(args := drawn())).extra[0]
    with torch.no_grad():
        last[0][0][4].weight *= 7
        last[0][0][4].bias *= 7
        assert model.teacher is not None
    torch.testing.assert_close(model(*args).extra[0], before, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("term", ["ce/p0", "ce/p1", "feed/p0", "feed/p1"])
def test_gradient_routing(term: str) -> None:
    model = build("resnet8", "resnet8", count=2)
    only(model, term)(*drawn()).loss.backward()
    peer = term[-1]
    rows: Any = model.method.translators
    assert model.teacher is not None
    parts = net_parts(model) | {"teacher": list(model.teacher.parameters())}
    parts |= {f"translator{k}{n}": list(t.parameters()) for k, row in enumerate(rows) for n, t in enumerate(row)}
    own = {f"body{peer}", f"translator{peer}0", f"translator{peer}1"}
    assert reached(parts) == (own if term.startswith("feed") else {f"body{peer}", f"fc{peer}"})


def test_teachers_keep_their_statistics_in_training() -> None:
    model = build(count=2).train()
    assert model.teacher is not None and not any(m.training for m in model.teacher.modules())
    before = {k: v.clone() for k, v in model.teacher.state_dict().items()}
    model(*drawn()).loss.backward()
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.state_dict().items())
    assert all(p.grad is not None for p in model.method.parameters())


@pytest.mark.parametrize("teacher", ["resnet8", "resnet18"])
def test_maps_of_other_sizes(teacher: str) -> None:
    """resnet18 gives 512 x 1 x 1 of 32 pixels, resnet8 64 x 8 x 8: teachers' maps are brought to the peer's."""
    model = Learner(["resnet18" if teacher == "resnet8" else "resnet8"], FEED.Config(teacher_nets=(teacher,)), classes=5, size=32)
    out = model(torch.randn(2, 3, 32, 32), torch.arange(2), torch.tensor(1.0))
    assert bool(out.loss.isfinite()) and float(out.extra[0].detach()) > 0


def test_the_runs_before() -> None:
    """parallel: `count` nets at once; sequential: a chain of `count`, one net each, of which only the first is alone."""
    made = tiny.recipe(nets__names=("resnet8", "resnet20"))
    (first,) = FEED.earlier(made.model_copy(update={"method": FEED.Config(count=4)}))
    assert first.nets.names == ("resnet8",) * 4 and first.method.name == "none" and not first.nets.share_stem
    config = FEED.Config(schedule="sequential", count=3, teacher_nets=("resnet20",))
    chain = FEED.earlier(made.model_copy(update={"method": config}))
    assert [r.method.name for r in chain] == ["none", "feed", "feed"]
    assert all(r.nets.names == ("resnet20",) for r in chain)
    assert len({r.run.seed for r in (made, *chain)}) == 4, "no two generations begin alike"
    with pytest.raises(UsageError, match="no model is called"):
        build(teacher_nets=("resnet9",))
