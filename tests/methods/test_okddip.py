"""okddip: attention of the auxiliary peers to each other, what learns through it and what does not, and a leader apart."""

import pytest
import torch
import torch.nn.functional as F
from routing import kl, only, reached, same_as_by_hand, shared_parts
from torch import Tensor

from fastffl.errors import UsageError
from fastffl.exporting import export, load
from fastffl.methods.okddip import OKDDip
from fastffl.train import Learner
from fastffl.values import Peers

SIDES = ("nothing", "attention_only")


def learner(peers: int = 4, **options: object) -> Learner:
    torch.manual_seed(0)
    model = Learner(["resnet8"] * peers, OKDDip.Config(**options), classes=5, size=8)  # type: ignore[arg-type]
    with torch.no_grad():  # attention far from uniform, so that its gradient is not small
        for p in model.method.parameters():
            p.mul_(6)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 5, torch.tensor(0.5)


def targets(model: Learner, peers: Peers, detach: bool) -> tuple[Tensor, list[Tensor]]:
    """The attention (B, a, b) and t_a, image by image and peer by peer."""
    left, right = (model.method.get_parameter(f"attend.{side}.weight") for side in ("left", "right"))
    h = [f.mean((2, 3)) for f in peers.maps[1:]]
    z = list(peers.z[1:])
    if detach:
        h, z = [x.detach() for x in h], [x.detach() for x in z]
    rows, mixed = [], []
    for a in range(len(z)):
        scores = torch.stack([((h[a] @ left.T) * (h[b] @ right.T)).sum(1) for b in range(len(z))], 1)
        rows.append(scores.softmax(1))
        mixed.append(torch.stack([rows[a][:, b, None] * z[b] for b in range(len(z))]).sum(0))
    return torch.stack(rows, 1), mixed


@pytest.mark.parametrize("detach", SIDES)
def test_the_loss_by_hand(detach: str) -> None:
    """methods-core 2.7: no target is detached; with attention_only the values, the features and the leader's target are."""
    model = learner(detach=detach, T=3.0).double()
    x, y, w = batch()

    def by_hand() -> Tensor:
        peers = model.cohort(x.double())
        _, t = targets(model, peers, detach != "nothing")
        lead = torch.stack(peers.z[1:]).mean(0)
        terms = [F.cross_entropy(z, y) for z in peers.z]
        terms += [0.5 * kl(z, teacher, 3.0) for z, teacher in zip(peers.z[1:], t, strict=True)]
        terms += [0.5 * kl(peers.z[0], lead if detach == "nothing" else lead.detach(), 3.0)]
        return torch.stack(terms).sum()

    same_as_by_hand(model, (x.double(), y, w), by_hand, rtol=2e-5)  # the attention is taken in fp32


def test_every_image_weighs_the_peers_itself_included() -> None:
    model = learner()
    peers = model.cohort(batch()[0])
    weights = model.method.attend([f.mean((2, 3)) for f in peers.maps[1:]])  # type: ignore[operator]
    assert weights.shape == (6, 3, 3) and bool((weights > 0).all()), "nobody is masked, the diagonal neither"
    torch.testing.assert_close(weights.sum(2), torch.ones(6, 3))
    assert not torch.allclose(weights, weights.mT, atol=1e-3), "two projections: who looks at whom matters"
    assert not torch.allclose(weights[0], weights[1], atol=1e-3), "image by image"
    want, mixed = targets(model, peers, False)
    torch.testing.assert_close(weights, want)
    for k, t in enumerate(model.method.nodes(peers).values()):
        torch.testing.assert_close(t, mixed[k], rtol=1e-4, atol=1e-5)


def test_defaults_are_the_codes() -> None:
    assert OKDDip.Config().model_dump() == {"name": "okddip", "T": 3.0, "detach": "nothing", "eps": 0.0}
    graph = learner().graph
    assert {e.name: e.detach for e in graph.edges} == {"t1>p1": False, "t2>p2": False, "t3>p3": False, "peers>p0": False}
    assert all(e.ramp and e.T == 3 and e.weight == 1 for e in graph.edges) and graph.votes[0] == "p0"
    assert graph.means == {"peers": ("p1", "p2", "p3"), "mean": ("p0", "p1", "p2", "p3")}
    assert sum(p.numel() for p in learner().method.parameters()) == 2 * 64 * 8, "two maps of 64 to 8 without bias"


EVERY = {f"{part}{k}" for part in ("body", "fc") for k in (1, 2, 3)}
OWN = {"stem", "body1", "fc1"}
ROUTES = {
    ("nothing", "ce/p0"): {"stem", "body0", "fc0"},
    ("nothing", "kl/t1>p1"): {"stem", "method"} | EVERY,
    ("nothing", "kl/peers>p0"): {"stem", "body0", "fc0"} | EVERY,
    ("attention_only", "kl/t1>p1"): OWN | {"method"},
    ("attention_only", "kl/peers>p0"): {"stem", "body0", "fc0"},
}


@pytest.mark.parametrize(("detach", "term"), ROUTES)
def test_gradient_routing(detach: str, term: str) -> None:
    """W_L and W_E learn through the targets alone; with attention_only nothing else does."""
    model = learner(detach=detach)
    only(model, term)(*batch()).loss.backward()
    assert reached(shared_parts(model)) == ROUTES[detach, term]


def test_detached_targets_would_leave_the_attention_as_it_is() -> None:
    model = learner()
    graph = model.graph
    object.__setattr__(graph, "edges", tuple(e._replace(detach=True) for e in graph.edges))
    model.loss = type(model.loss)(graph)
    model(*batch()).loss.backward()
    assert "method" not in reached(shared_parts(model))


def test_targets_are_not_mixed_in_half_precision() -> None:
    model = learner()
    x, *_ = batch()
    with torch.autocast("cpu", torch.bfloat16):
        peers = model.cohort(x)
        t = model.method.nodes(peers)
        weights = model.method.attend([f.mean((2, 3)) for f in peers.maps[1:]])  # type: ignore[operator]
    want = (weights.double() @ torch.stack(peers.z[1:], 1).double()).unbind(1)
    for mine, theirs in zip(t.values(), want, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)


def test_who_may_learn_together() -> None:
    with pytest.raises(UsageError, match="method okddip needs at least 3 peers, got 2"):
        learner(2)
    with pytest.raises(UsageError, match=r"okddip attends over maps of equal width, the peers but p0 have \[64, 128\] channels"):
        Learner(["resnet8", "resnet8", "wrn16_2"], "okddip", classes=5, size=8)
    mixed = Learner(["wrn16_2", "resnet8", "resnet20"], "okddip", classes=5, size=8)
    assert not mixed.cohort.shared and [m.channels for m in mixed.spec.maps] == [128, 64, 64], "the leader may be another"


@pytest.mark.parametrize("vote", ["peers", "p0", "mean"])
def test_votes_come_back_from_their_files(vote: str, tmp_path: object) -> None:
    model = learner()
    model(*batch())
    path, off = export(model, vote, f"{tmp_path}/x.safetensors")
    module, _ = load(path)
    with torch.no_grad():
        assert off == 0 and torch.equal(module(batch()[0]), model.eval().votes(batch()[0])[vote])
