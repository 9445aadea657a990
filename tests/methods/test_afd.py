"""afd: its losses by hand, the ring, and what each term reaches: the adversarial ones neither judges nor classifiers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from routing import net_parts, only, reached
from torch import Tensor

from fastffl.errors import UsageError
from fastffl.methods.afd import AFD
from fastffl.train import Learner


def build(*nets: str, **options: Any) -> Learner:
    torch.manual_seed(0)
    return Learner(nets or ("resnet8", "resnet8@0.5"), AFD.Config(**options), classes=5, size=8, channels=1)


def drawn(n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, 1, 8, 8), torch.arange(n) % 5, torch.tensor(0.25)


def kl(teacher: Tensor, student: Tensor, T: float) -> Tensor:
    q = F.softmax(teacher.detach() / T, 1)
    return T * T * (q * (q.log() - F.log_softmax(student / T, 1))).sum(1).mean()


def by_hand(model: Learner, x: Tensor, y: Tensor, T: float = 3.0) -> tuple[Tensor, dict[str, Tensor]]:
    """The peers' loss and the adversarial ones, of a ring in which k hears k - 1."""
    z, maps = [], []
    transfers: Any = model.method.transfers
    for net, t in zip(model.cohort.nets, transfers, strict=True):
        final, f = net.features(x)
        z.append(net.classify(final))
        maps.append(t(f))
    loss = sum((F.cross_entropy(z[k], y) + kl(z[k - 1], z[k], T) for k in range(len(z))), torch.zeros(()))
    judges: Any = model.method.discriminators
    more = {}
    for k, d in enumerate(judges):
        more[f"generate/p{k}"] = ((d(maps[k]) - 1) ** 2).mean()
        more[f"tell/p{k}"] = ((d(maps[k - 1].detach()) - 1) ** 2).mean() + (d(maps[k].detach()) ** 2).mean()
    return loss, more


@pytest.mark.parametrize("nets", [("resnet8", "resnet8@0.5"), ("resnet8@0.25", "resnet8", "resnet8@0.5")])
def test_the_losses_by_hand(nets: tuple[str, ...]) -> None:
    model = build(*nets, T=2.0).double()
    x, y, ramp = drawn()
    x = x.double()
    out = model(x, y, ramp)
    loss, more = by_hand(model, x, y, T=2.0)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=0)
    params = [p for p in model.cohort.parameters() if p.requires_grad]
    got = torch.autograd.grad(out.loss, params, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(loss, params, retain_graph=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert [o.name for o in model.objectives] == list(more)
    for o, value in zip(model.objectives, out.others, strict=True):
        torch.testing.assert_close(value, more[o.name], rtol=1e-6, atol=0)
        mine = torch.autograd.grad(value, o.params, retain_graph=True)
        for a, b in zip(mine, torch.autograd.grad(more[o.name], o.params, retain_graph=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def named_parts(model: Learner) -> dict[str, list[torch.nn.Parameter]]:
    parts = net_parts(model)
    for name in ("transfers", "discriminators"):
        for k, module in enumerate(model.method.get_submodule(name)):  # type: ignore[arg-type]
            parts[f"{name[:-1]}{k}"] = list(module.parameters())
    return parts


def test_what_the_adversarial_terms_learn_for() -> None:
    """generate/p_k: the net below its classifier and its transfer layer. tell/p_k: the discriminator; it touches no net."""
    model = build("resnet8", "resnet8@0.5", "resnet8")
    parts = named_parts(model)
    out = model(*drawn())
    for o, value in zip(model.objectives, out.others, strict=True):
        k = o.name[-1]
        own = {f"body{k}", f"transfer{k}"} if o.name.startswith("generate") else {f"discriminator{k}"}
        wanted = {id(p) for name in own for p in parts[name]}
        assert {id(p) for p in o.params} == wanted and len(o.params) == len(wanted)
        assert all(bool(g.any()) for g in torch.autograd.grad(value, o.params, retain_graph=True))
        if o.name.startswith("tell"):
            nets = [p for name, ps in parts.items() if not name.startswith("disc") for p in ps]
            assert not any(g is not None for g in torch.autograd.grad(value, nets, retain_graph=True, allow_unused=True))
    assert [len(parts[f"transfer{k}"]) for k in range(3)] == [3, 0, 3], "brought to the smallest width"


@pytest.mark.parametrize("term", ["ce/p0", "ce/p1", "kl/p1>p0", "kl/p0>p1"])
def test_gradient_routing(term: str) -> None:
    model = build()
    assert {t for t in model.terms if t[:2] in ("ce", "kl")} == {"ce/p0", "ce/p1", "kl/p1>p0", "kl/p0>p1"}
    only(model, term)(*drawn()).loss.backward()
    assert reached(named_parts(model)) == {f"body{term[-1]}", f"fc{term[-1]}"}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_one_discriminator_each_in_a_ring(count: int) -> None:
    model = build(*["resnet8"] * count)
    assert len(model.method.get_submodule("discriminators")) == count  # type: ignore[arg-type]
    assert [e.name for e in model.graph.edges] == [f"p{(k - 1) % count}>p{k}" for k in range(count)]
    assert len(model.objectives) == 2 * count


def test_a_ring_of_two_is_both_ways() -> None:
    """The paper's equations of two nets, in which the other is the peer."""
    model = build("resnet8", "resnet8").eval()
    x, y, ramp = drawn()
    out = model(x, y, ramp)
    (z1, z2), (f1, f2) = model.cohort(x)[:2]
    d1, d2 = model.method.get_submodule("discriminators")  # type: ignore[misc]
    want = {
        "generate/p0": (1 - d1(f1)).square().mean(),
        "tell/p0": (1 - d1(f2)).square().mean() + d1(f1).square().mean(),
        "generate/p1": (1 - d2(f2)).square().mean(),
        "tell/p1": (1 - d2(f1)).square().mean() + d2(f2).square().mean(),
    }
    torch.testing.assert_close(out.others, tuple(want.values()))
    torch.testing.assert_close(out.kl, torch.stack([kl(z2, z1, 3.0), kl(z1, z2, 3.0)]).detach())


def test_maps_of_unequal_sizes_meet_at_the_smallest() -> None:
    """resnet18's map of 32 pixels is 512 x 1 x 1, resnet8's 64 x 8 x 8."""
    model = Learner(["resnet18", "resnet8"], "afd", classes=5, size=32)
    out = model(torch.randn(2, 3, 32, 32), torch.arange(2), torch.tensor(1.0))
    assert all(bool(v.isfinite()) for v in out.others)


def test_peers_that_share_are_refused() -> None:
    with pytest.raises(UsageError, match=r"method afd trains separate nets; use --set nets\.share_stem=false"):
        Learner(["resnet8"] * 2, "afd", classes=5, size=8, share_stem=True)
