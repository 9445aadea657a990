"""kdcl: the three targets against their definitions, a view for each peer, and a teacher that is no vote."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from routing import kl, net_parts, only, reached, same_as_by_hand
from torch import Tensor

from fastffl.cli import main
from fastffl.errors import UsageError
from fastffl.methods import kdcl
from fastffl.methods.kdcl import KDCL
from fastffl.train import Learner
from fastffl.values import UNLABELLED, Peers

HOW = ("naive", "linear", "minlogit")


def learner(peers: int = 3, **options: object) -> Learner:
    torch.manual_seed(0)
    return Learner(["resnet8"] * peers, KDCL.Config(**options), classes=5, size=8)  # type: ignore[arg-type]


def batch(views: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(6 * views, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(6) % 5, torch.tensor(0.25)


def teacher(how: str, z: list[Tensor], y: Tensor) -> Tensor:
    model = learner(len(z), teacher=how)
    return model.method.nodes(Peers(tuple(z), (), None), y)["teacher"]


def logits(peers: int, scale: float = 3.0, rows: int = 40, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Peers of different merit: each knows some labels better than the others."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 7, (rows,), generator=g)
    label = F.one_hot(y, 7).float()
    return [scale * (torch.randn(rows, 7, generator=g) + torch.rand((), generator=g) * label) for _ in range(peers)], y


@pytest.mark.parametrize("how", HOW)
def test_the_loss_by_hand(how: str) -> None:
    """L = sum_k CE(z_k) + lambda T^2 KL(t -> z_k), peer k of view k, no ramp. The teacher is taken as it comes, detached."""
    model = learner(teacher=how, T=2.0, weight=0.7).double()
    x, y, w = batch()

    def by_hand() -> Tensor:
        z = [net(v) for net, v in zip(model.cohort.nets, x.double().chunk(3), strict=True)]
        t = teacher(how, [v.detach() for v in z], y).double()
        return torch.stack([F.cross_entropy(v, y) + 0.7 * kl(v, t, 2.0) for v in z]).sum()

    same_as_by_hand(model, (x.double(), y, w), by_hand, rtol=1e-6)  # targets are made in fp32


def test_naive_takes_the_peer_that_knows_the_labels_best() -> None:
    z, y = logits(3)
    known = torch.stack([F.cross_entropy(v, y) for v in z])
    assert torch.equal(teacher("naive", z, y), z[int(known.argmin())])
    for best in range(3):
        better = [v + 9.0 * F.one_hot(y, 7) if k == best else v for k, v in enumerate(z)]
        assert torch.equal(teacher("naive", better, y), better[best])


def test_minlogit_is_the_least_of_the_logits_less_the_labels() -> None:
    z, y = logits(3)
    got = teacher("minlogit", z, y)
    for i, c in itertools.product(range(len(y)), range(7)):
        assert float(got[i, c]) == min(float(v[i, c] - v[i, y[i]]) for v in z)
    assert bool((got.gather(1, y[:, None]) == 0).all()), "of the label it is 0"
    for k in range(3):
        moved = [v + 4.0 if j == k else v for j, v in enumerate(z)]
        torch.testing.assert_close(teacher("minlogit", moved, y), got, rtol=0, atol=1e-5)
    assert all(F.cross_entropy(got, y) <= F.cross_entropy(v, y) for v in z), "surer of the label than any peer"


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 10.0, 30.0])
@pytest.mark.parametrize("peers", [2, 3])
def test_linear_is_the_best_mixture(peers: int, scale: float) -> None:
    """Within 1e-3 of the best of a grid of weights, and never worse than the best peer."""
    z, y = logits(peers, scale)
    got = teacher("linear", z, y).double()
    stacked = torch.stack(z).double()
    a = torch.linalg.lstsq(stacked.flatten(1).T, got.reshape(-1, 1)).solution[:, 0]
    torch.testing.assert_close((a[:, None, None] * stacked).sum(0), got, rtol=1e-4, atol=1e-4 * scale)
    assert float(a.min()) > -1e-5 and float(a.sum()) == pytest.approx(1, abs=1e-5), "a convex mixture"
    steps = torch.linspace(0, 1, 401 if peers == 2 else 61, dtype=torch.float64)
    grid = [(*c, 1 - sum(c)) for c in itertools.product(steps.tolist(), repeat=peers - 1) if sum(c) <= 1 + 1e-12]
    weights = torch.tensor(grid, dtype=torch.float64)
    mixed = torch.einsum("rk,kbc->rbc", weights, stacked).log_softmax(2)
    best = float(-mixed.gather(2, y.expand(len(grid), -1)[..., None]).mean((1, 2)).max())
    ce = float(F.cross_entropy(got, y))
    assert ce <= best + 1e-3
    assert ce <= min(float(F.cross_entropy(v, y)) for v in stacked) + 1e-6


def test_linear_is_no_worse_than_a_peer_however_long_it_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kdcl, "ROUNDS", 0)
    z, y = logits(2)
    z[1] = -9.0 * F.one_hot(y, 7)
    assert torch.equal(teacher("linear", z, y), z[0])


@pytest.mark.parametrize("how", HOW)
def test_what_has_no_label_has_no_say(how: str) -> None:
    z, y = logits(2, seed=4)
    hidden = torch.where(torch.arange(len(y)) % 3 == 0, UNLABELLED, y)
    kept = hidden >= 0
    alone = teacher(how, [v[kept] for v in z], y[kept])
    wild = [torch.where(kept[:, None], v, 50 * (k + 1) * v.flip(1)) for k, v in enumerate(z)]
    torch.testing.assert_close(teacher(how, wild, hidden)[kept], alone, rtol=1e-5, atol=1e-5)
    nothing = teacher(how, z, torch.full_like(y, UNLABELLED))
    assert bool(nothing.isfinite().all())


@pytest.mark.parametrize("how", HOW)
def test_gradient_routing(how: str) -> None:
    """A peer learns from its own terms alone: the teacher holds no gradient."""
    for term, parts in (("ce/p1", {"body1", "fc1"}), ("kl/teacher>p0", {"body0", "fc0"})):
        model = learner(teacher=how)
        only(model, term)(*batch()).loss.backward()
        assert reached(net_parts(model)) == parts
    z, y = logits(2)
    assert not teacher(how, [v.requires_grad_() for v in z], y).requires_grad, "nor is any kept for it"


def test_peers_see_a_view_each_or_the_same() -> None:
    assert learner(3).needs.views == 3 and learner(3, views=False).needs.views == 1
    model = learner(2, views=False)
    x, y, w = batch(1)
    z = model.eval().cohort(x).z
    assert all(torch.equal(v, net(x)) for v, net in zip(z, model.cohort.nets, strict=True))
    assert bool(model(x, y, w).loss.isfinite())


def test_the_teacher_knows_the_labels_so_it_is_no_vote() -> None:
    model = learner(2).eval()
    assert set(model.votes(batch(1)[0])) == {"p0", "p1", "mean"} == set(model.graph.votes)
    with pytest.raises(UsageError, match="no vote is called 'teacher'; this run has p0, p1, mean"):
        model.vote("teacher")
    with pytest.raises(UsageError, match=r"method kdcl trains separate nets; use --set nets\.share_stem=false"):
        Learner(["resnet8"] * 2, "kdcl", classes=5, size=8, share_stem=True)


@pytest.mark.parametrize("words", [("kdcl", "--set", "method.views=false"), ("mcl-okd",)])
@pytest.mark.parametrize("mixed", ["data.mixup=0.2", "data.cutmix=1"])
def test_images_of_two_labels_are_refused(
    words: tuple[str, ...], mixed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "digits", "--set", mixed, "--out", str(tmp_path / "run"), "--method", *words])
    assert ended.value.code == 2
    assert f"method {words[0]} goes by each image's one label" in capsys.readouterr().err
