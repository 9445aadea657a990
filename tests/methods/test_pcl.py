"""pcl: the loss by hand with a view per peer, who is taught by whose average, and the average that is shipped."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from routing import kl, only, reached, same_as_by_hand, shared_parts
from torch import Tensor

from fastffl import nets
from fastffl.exporting import _state, export, load
from fastffl.methods.pcl import PCL
from fastffl.train import Learner, schedule


def learner(peers: int = 3, **options: object) -> Learner:
    torch.manual_seed(0)
    model = Learner(["resnet8"] * peers, PCL.Config(**options), classes=5, size=8)  # type: ignore[arg-type]
    assert model.teacher is not None
    with torch.no_grad():  # an average unlike the peers
        for p in model.teacher.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def batch(peers: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(4 * peers, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(4) % 5, torch.tensor(0.25)


@pytest.mark.parametrize("peers", [2, 3, 4])
def test_the_loss_by_hand(peers: int) -> None:
    """methods-more 4.2. Peer k and average j see their own view alone; average k never teaches peer k."""
    model = learner(peers, T=3.0).double()
    x, y, w = batch(peers)
    views = x.double().chunk(peers)

    def by_hand() -> Tensor:
        z, e = [], []
        for net, v in zip(model.cohort.nets, views, strict=True):
            f = net.plain.between(net.plain.between(v, 0, 3), 3, 4)
            e.append(f.mean((2, 3)))
            z.append(net.plain.fc(e[-1]))
        assert model.teacher is not None
        with torch.no_grad():
            ema = [net.plain(v) for net, v in zip(model.teacher.nets, views, strict=True)]
        fc = model.method.get_submodule("fc")
        ens = torch.cat(e, 1) @ fc.weight.T + fc.bias  # type: ignore[operator, union-attr]
        terms = [F.cross_entropy(ens, y)]
        for k in range(peers):
            others = [kl(z[k], ema[j], 3.0) for j in range(peers) if j != k]
            terms += [F.cross_entropy(z[k], y), 0.25 * kl(z[k], ens.detach(), 3.0), 0.25 * torch.stack(others).mean()]
        return torch.stack(terms).sum()

    same_as_by_hand(model, (x.double(), y, w), by_hand, rtol=1e-8)


def test_defaults_are_the_papers() -> None:
    assert PCL.Config().model_dump() == {"name": "pcl", "T": 3.0, "decay": 0.999, "joint_bn": False}
    model = learner(4)
    edges = {e.name: e.weight for e in model.graph.edges}
    assert edges == {
        **{f"ens>p{k}": 1.0 for k in range(4)},
        **{f"ema{j}>p{k}": pytest.approx(1 / 3) for j in range(4) for k in range(4) if j != k},
    }
    assert all(e.ramp and e.detach and e.T == 3 for e in model.graph.edges)
    assert sum(p.numel() for p in model.method.parameters()) == 4 * 64 * 5 + 5, "m D -> C and a bias"
    assert model.needs.views == 4 and model.needs.average == 0.999 and model.graph.votes[0] == "ema0"
    assert schedule.ramp(80, 80) == 1.0 and schedule.ramp(79, 80) < 1.0 and round(schedule.ramp(0, 80), 5) == 0.00674


def test_peers_begin_unlike_each_other() -> None:
    """Copies of one branch would, in what is not drawn anew, teach each other nothing."""
    peers = [net.plain for net in learner().cohort.nets]
    assert not torch.equal(peers[0].fc.weight, peers[1].fc.weight)
    assert not torch.equal(peers[0].layer3[0].conv1.weight, peers[2].layer3[0].conv1.weight)


EVERY = {"stem", "method", "body0", "body1", "body2"}
ROUTES = {
    "ce/p1": {"stem", "body1", "fc1"},
    "ce/ens": EVERY,
    "kl/ens>p0": {"stem", "body0", "fc0"},
    "kl/ema1>p0": {"stem", "body0", "fc0"},
    "kl/ema0>p2": {"stem", "body2", "fc2"},
}


@pytest.mark.parametrize("term", ROUTES)
def test_gradient_routing(term: str) -> None:
    """The ensemble trains its own classifier and all features, no peer's classifier; averages get nothing."""
    model = learner()
    only(model, term)(*batch()).loss.backward()
    assert reached(shared_parts(model)) == ROUTES[term]
    assert model.teacher is not None and all(p.grad is None for p in model.teacher.parameters())


def test_a_view_reaches_its_own_peer_and_average() -> None:
    """Changing view j changes what p_j and ema_j say, and of the others only the ensemble."""
    model = learner().eval()
    x, y, _ = batch()

    def said(x: Tensor) -> dict[str, Tensor]:
        assert model.teacher is not None
        peers = model.cohort(x, 3)._replace(teacher=model.teacher(x, 3))
        return {**dict(zip(model.graph.peers, peers.z, strict=True)), **model.method.nodes(peers, y)}

    before = said(x)
    for j in range(3):
        other = x.clone()
        other[4 * j : 4 * j + 4] += 1
        after = said(other)
        assert {n for n in before if not torch.equal(before[n], after[n])} == {f"p{j}", f"ema{j}", "ens"}


@pytest.mark.parametrize("joint", [False, True])
def test_the_stem_normalises_each_view_apart_or_all_together(joint: bool) -> None:
    model = learner(joint_bn=joint)
    x, y, w = batch()
    x[:4] *= 5
    model(x, y, w)
    assert model.teacher is not None and model.teacher.cohort.joint == joint == model.cohort.joint
    bn, private = model.cohort.nets[0].plain.bn1, model.cohort.nets[0].plain.layer3[0].bn1
    assert int(bn.num_batches_tracked) == (1 if joint else 3) and int(private.num_batches_tracked) == 1
    conv = model.cohort.nets[0].plain.conv1
    parts = [conv(x)] if joint else [conv(v) for v in x.chunk(3)]
    mean, var = torch.zeros(16), torch.ones(16)
    for h in parts:
        mean, var = 0.9 * mean + 0.1 * h.mean((0, 2, 3)), 0.9 * var + 0.1 * h.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(bn.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bn.running_var, var, rtol=1e-4, atol=1e-5)


def test_the_average_is_shipped_as_a_plain_net(tmp_path: Path) -> None:
    model = learner()
    model(*batch())
    x = batch()[0]
    path, off = export(model, "ema0", tmp_path / "x.safetensors")
    module, about = load(path)
    assert off == 0 and about["net"] == "resnet8" and about["vote"] == "ema0"
    plain = nets.plain("resnet8", 5, 3, 8).eval()
    plain.load_state_dict(module.state_dict(), strict=True)
    assert list(module.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        votes = model.eval().votes(x)
        assert torch.equal(plain(x), votes["ema0"]) and torch.equal(model.teacher.nets[0].plain(x), votes["ema0"])  # type: ignore[union-attr]
    assert not torch.equal(votes["ema0"], votes["p0"])
    assert model.net_of("ema2") == "resnet8" and model.net_of("ens") == "ens" and list(votes) == list(model.graph.scored)


@pytest.mark.parametrize("vote", ["p1", "ema2", "ens", "mean"])
def test_votes_come_back_from_their_files(vote: str, tmp_path: Path) -> None:
    model = learner()
    model(*batch())
    path, off = export(model, vote, tmp_path / "x.safetensors")
    x = batch()[0]
    with torch.no_grad():
        assert off == 0 and torch.equal(load(path)[0](x), model.eval().votes(x)[vote])
    assert not any(k.startswith("teacher.") for k in _state(model, vote)), "nobody asks the averages here"
    if vote == "ens":
        assert not any(".fc." in k for k in _state(model, vote) if k.startswith("cohort.")), "nor the peers' classifiers"
