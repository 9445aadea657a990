"""ffl: parameter counts of the paper's nets, the gradient-routing table, ablations, unequal nets."""

from typing import Any

import pytest
import torch
from routing import only

from fastffl import recipes
from fastffl.errors import UsageError
from fastffl.methods.ffl import FFL
from fastffl.train import Learner


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("nets", "classes", "peers", "fusion"),
    [
        (["resnet32"] * 2, 100, 832_920, 16_228),
        (["resnet32"] * 3, 100, 1_193_084, 21_028),
        (["resnet56"] * 2, 100, 1_517_720, 16_228),
        (["resnet56"] * 3, 100, 2_173_820, 21_028),
        (["wrn16_2"] * 2, 100, 1_241_624, 48_740),
        (["wrn16_2"] * 3, 100, 1_779_964, 66_532),
        (["wrn40_2"] * 2, 100, 3_975_192, 48_740),
        (["wrn40_2"] * 3, 100, 5_695_228, 66_532),
        (["resnet32", "wrn16_2"], 100, 472_756 + 703_284, 39_844),
    ],
)
def test_parameter_counts(nets: list[str], classes: int, peers: int, fusion: int) -> None:
    """methods-core sections 2.1 and 5; equal nets share stem, layer1 and layer2 without being asked."""
    model = Learner(nets, "ffl", classes=classes, size=32)
    assert count(model.cohort) == peers
    assert count(model.method) == fusion
    assert model.cohort.shared == (len(set(nets)) == 1)


def test_the_official_preset_is_the_official_run() -> None:
    recipe = recipes.load("ffl-cifar100-resnet32")
    assert (recipe.sched.epochs, recipe.data.batch_size, recipe.data.eval_batch_size) == (301, 128, 500)
    assert recipe.method.model_dump() == {
        **FFL.Config().model_dump(),
        "T": 3.0,
        "eps": 1e-7,
        "weight_decay": 1e-5,
    }
    assert (recipe.optim.weight_decay, recipe.optim.decay_norm_bias, recipe.optim.nesterov) == (1e-4, True, True)
    assert (recipe.data.pad, recipe.data.pad_mode, recipe.sched.warmup_epochs, recipe.sched.ramp) == (4, "reflect", 0, 80)


def build(**options: Any) -> Learner:
    return Learner(["resnet8"] * 2, FFL.Config(**options), classes=5, size=16, share_stem=True)


PARTS = ("trunk", "body0", "fc0", "body1", "fc1", "fusion")


def parts(model: Learner) -> dict[str, list[torch.nn.Parameter]]:
    p0, p1 = (net.plain for net in model.cohort.nets)
    trunk = [*p0.conv1.parameters(), *p0.bn1.parameters(), *p0.layer1.parameters(), *p0.layer2.parameters()]
    return {
        "trunk": trunk,
        "body0": list(p0.layer3.parameters()),
        "fc0": list(p0.fc.parameters()),
        "body1": list(p1.layer3.parameters()),
        "fc1": list(p1.fc.parameters()),
        "fusion": list(model.method.parameters()),
    }


ROUTES = {
    "ce/p0": {"trunk", "body0", "fc0"},
    "ce/p1": {"trunk", "body1", "fc1"},
    "ce/fused": {"trunk", "body0", "body1", "fusion"},
    "kl/mean>fused": {"trunk", "body0", "body1", "fusion"},
    "kl/fused>p0": {"trunk", "body0", "fc0"},
    "kl/fused>p1": {"trunk", "body1", "fc1"},
}


@pytest.mark.parametrize("term", ROUTES)
def test_gradient_routing(term: str) -> None:
    """methods-core 2.1: fusion maps are not detached, both teachers are, so EKD never touches a peer's classifier."""
    model = build()
    assert set(model.graph.terms) == set(ROUTES)
    only(model, term)(torch.randn(8, 3, 16, 16), torch.arange(8) % 5, torch.tensor(1.0)).loss.backward()
    reached = {name for name, ps in parts(model).items() if any(p.grad is not None and bool(p.grad.any()) for p in ps)}
    assert reached == ROUTES[term]


def test_the_routing_test_sees_an_edge_that_is_not_detached() -> None:
    model = build()
    graph = model.graph
    object.__setattr__(graph, "edges", tuple(e._replace(detach=False) for e in graph.edges))
    model.loss = type(model.loss)(graph)
    only(model, "kl/mean>fused")(torch.randn(8, 3, 16, 16), torch.arange(8) % 5, torch.tensor(1.0)).loss.backward()
    assert all(bool(p.grad.any()) for p in parts(model)["fc0"] if p.grad is not None)
    assert any(p.grad is not None for p in parts(model)["fc0"])


def test_detached_features_keep_the_peers_out_of_the_fused_loss() -> None:
    model = build(detach_features=True)
    only(model, "ce/fused")(torch.randn(8, 3, 16, 16), torch.arange(8) % 5, torch.tensor(1.0)).loss.backward()
    assert not any(p.grad is not None and bool(p.grad.any()) for name in PARTS[:5] for p in parts(model)[name])


@pytest.mark.parametrize("ekd", [True, False])
@pytest.mark.parametrize("fkd", [True, False])
@pytest.mark.parametrize("fusion", ["dwpw", "mean"])
def test_ablations(ekd: bool, fkd: bool, fusion: str) -> None:
    model = build(ekd=ekd, fkd=fkd, fusion=fusion)
    names = {e.name for e in model.graph.edges}
    assert names == (({"mean>fused"} if ekd else set()) | ({"fused>p0", "fused>p1"} if fkd else set()))
    assert bool(model(torch.randn(4, 3, 16, 16), torch.arange(4), torch.tensor(1.0)).loss.isfinite())


def test_mean_fusion_is_the_average_of_the_maps() -> None:
    model = build(fusion="mean").eval()
    x = torch.randn(4, 3, 16, 16)
    maps = model.cohort(x).maps
    fc = model.method.get_submodule("fuse.fc")
    want = fc(((maps[0] + maps[1]) / 2).mean((2, 3)))
    torch.testing.assert_close(model.votes(x)["fused"], want)
    with pytest.raises(UsageError, match="equal width"):
        Learner(["resnet8", "wrn16_2"], FFL.Config(fusion="mean"), classes=5, size=16)


@pytest.mark.parametrize("align", ["auto", "adaptive_avg", "interpolate", "conv"])
def test_unequal_maps_are_aligned(align: str) -> None:
    """resnet8 gives 64 x 8 x 8 from 32 pixels, resnet18 512 x 1 x 1."""
    model = Learner(["resnet8", "resnet18"], FFL.Config(align=align), classes=5, size=32)
    assert [tuple(m) for m in model.spec.maps] == [(64, 8, 8), (512, 1, 1)]
    out = model(torch.randn(4, 3, 32, 32), torch.arange(4), torch.tensor(1.0))
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(UsageError, match="8x8, 1x1"):
        Learner(["resnet8", "resnet18"], FFL.Config(align="none"), classes=5, size=32)


def test_any_number_of_peers_and_separate_stems() -> None:
    model = Learner(["resnet8"] * 4, "ffl", classes=5, size=16, share_stem=False)
    assert len(model.graph.edges) == 5 and not model.cohort.shared
    assert count(model.cohort) == 4 * count(model.cohort.nets[0])
    with pytest.raises(UsageError, match="only be shared by equal nets"):
        Learner(["resnet8", "resnet20"], "ffl", classes=5, size=16, share_stem=True)


def test_against_a_second_implementation_of_the_whole_step() -> None:
    """The loss written out by hand from the equations, on the same modules: same value, same gradients."""
    import torch.nn.functional as F

    model = build(eps=1e-7).double()
    x, y, w, T = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.arange(6) % 5, 0.5, 3.0
    model(x, y, torch.tensor(w)).loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.reset_running_stats()
    peers = model.cohort(x)
    u = model.method.nodes(peers)["fused"]

    def kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        q = F.softmax(teacher.detach() / T, 1) + 1e-7
        return T * T * (q * (q.log() - F.log_softmax(student / T, 1))).sum() / len(x)

    loss = sum(F.cross_entropy(z, y) for z in (*peers.z, u)) + w * (
        kl(u, (peers.z[0] + peers.z[1]) / 2) + kl(peers.z[0], u) + kl(peers.z[1], u)
    )
    loss.backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, got[n], rtol=1e-9, atol=1e-12)
