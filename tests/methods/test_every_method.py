"""What must hold for every method, unasked: a new file in fastffl/methods is tested here without a line being added."""

import io
from typing import Any

import pytest
import torch

from fastffl import methods
from fastffl.errors import UsageError
from fastffl.train import Learner

ALL = methods.names()


def learner(name: str, peers: int = 3, **options: Any) -> Learner:
    torch.manual_seed(0)
    kind = methods.load(name)
    config = kind.Config(name=name, **options)
    return Learner(["resnet8"] * max(peers, kind.min_peers), config, classes=5, size=8, channels=1)


def batch(n: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(n, 1, 8, 8), torch.arange(n) % 5, torch.tensor(0.7)


@pytest.mark.parametrize("name", ALL)
def test_names_and_facts(name: str) -> None:
    kind = methods.load(name)
    assert (
        kind.name == name
        and kind.paper
        and kind.summary.endswith(".")
        and kind.status in ("faithful", "partial", "reconstructed")
        and kind.deviations.endswith(".")
    )
    assert all(info.description or key == "name" for key, info in kind.Config.model_fields.items()), "every setting is explained"


@pytest.mark.parametrize("name", ALL)
def test_edges_join_real_nodes(name: str) -> None:
    model = learner(name)
    graph = model.graph
    x, y, w = batch()
    peers = model.cohort(x)
    made = model.method.nodes(peers)
    assert tuple(made) == graph.made
    assert all(z.shape == (16, 5) for z in made.values())
    for e in graph.edges:
        assert {e.teacher, e.student} <= set(graph.nodes)
    out = model(x, y, w)
    assert out.ce.shape == (len(graph.hard),) and out.kl.shape == (len(graph.edges),) and out.top1.shape == (len(graph.nodes),)
    votes = model.votes(x)
    assert tuple(votes) == graph.scored and graph.votes[0] in votes
    assert set(graph.peers) <= set(votes), "every peer is scored"


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_learns(name: str) -> None:
    model = learner(name)
    x, y, w = batch()
    model(x, y, w).loss.backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still, f"no gradient reaches {still}"


@pytest.mark.parametrize("name", ALL)
def test_fits_one_batch(name: str) -> None:
    model = learner(name)
    x, y, w = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        model(x, y, w).loss.backward()
        optimizer.step()
    out = model(x, y, w)
    assert out.top1.tolist() == [16] * len(model.graph.nodes)
    assert float(out.ce.detach().max()) < 0.1


@pytest.mark.parametrize("name", ALL)
def test_compiles_without_a_break(name: str) -> None:
    model = learner(name, peers=2)
    x, y, w = batch(4)
    want = model.eval()(x, y, w)
    torch._dynamo.reset()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x, y, w)
    torch.testing.assert_close(got.loss, want.loss)
    assert got.top1.tolist() == want.top1.tolist()


@pytest.mark.parametrize("name", ALL)
def test_state_goes_round(name: str) -> None:
    model, other = learner(name), learner(name)
    x, y, w = batch()
    model(x, y, w)  # running statistics move
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    a, b = model.eval().votes(x), other.eval().votes(x)
    assert all(torch.equal(a[v], b[v]) for v in a)


@pytest.mark.parametrize("name", ALL)
def test_the_ramp_scales_ramped_edges_and_nothing_else(name: str) -> None:
    model = learner(name).eval()
    x, y, _ = batch()
    low, high = model(x, y, torch.tensor(0.25)), model(x, y, torch.tensor(1.0))
    ramped = torch.tensor([float(e.ramp) * e.weight for e in model.graph.edges])
    torch.testing.assert_close(high.loss - low.loss, 0.75 * (ramped * low.kl).sum(), atol=1e-5, rtol=1e-5)
    assert torch.equal(low.kl, high.kl)


@pytest.mark.parametrize("name", ALL)
def test_too_few_peers_are_refused(name: str) -> None:
    kind = methods.load(name)
    if kind.min_peers > 1:
        with pytest.raises(UsageError, match=f"method {name} needs at least {kind.min_peers} peers, got 1"):
            Learner(["resnet8"], name, classes=5, size=8)


@pytest.mark.parametrize("name", ALL)
def test_a_method_fits_on_a_screen(name: str) -> None:
    import inspect

    lines = inspect.getsource(inspect.getmodule(methods.load(name))).count("\n")  # type: ignore[arg-type]
    assert lines <= 140


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="no method is called 'fll'; did you mean ffl"):
        methods.load("fll")
