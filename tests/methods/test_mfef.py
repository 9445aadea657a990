"""mfef: the loss by hand, its modules at odd widths, and the routing of FFL's with the maps' way in between."""

import pytest
import torch
import torch.nn.functional as F
from routing import kl, net_parts, only, reached, same_as_by_hand
from torch import Tensor, nn

from fastffl import methods
from fastffl.exporting import export, load
from fastffl.fusion import DualAttention, MultiScale
from fastffl.methods.mfef import MFEF
from fastffl.train import Learner, optim, recipe_of
from tests.train import tiny


def learner(**options: object) -> Learner:
    torch.manual_seed(0)
    return Learner(["resnet8"] * 2, MFEF.Config(**options), classes=5, size=8)  # type: ignore[arg-type]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 5, torch.tensor(0.25)


def test_the_loss_by_hand() -> None:
    """methods-more 8.1: FFL's loss, its fusion fed with maps that were seen at several scales and attended to."""
    model = learner(T=3.0).double()
    x, y, w = batch()

    def seen(f: Tensor, k: int) -> Tensor:
        """Sixteen channels at a time, each but the first after a convolution of it and the one before; then the two gates."""
        scales, gates = model.method.get_submodule(f"see.{k}.0"), model.method.get_submodule(f"see.{k}.1")
        parts = [f[:, :16]]
        for n in range(1, 4):
            parts.append(scales.blocks[n - 1](f[:, 16 * n : 16 * n + 16] + parts[-1]))  # type: ignore[index, operator, union-attr]
        f = scales.join(torch.cat(parts, 1))  # type: ignore[operator]
        mlp, conv = gates.channel, gates.place
        c = 1 / (1 + torch.exp(-(mlp(f.mean((2, 3))) + mlp(f.flatten(2).max(2).values))))  # type: ignore[operator]
        g = f * c[..., None, None]
        s = 1 / (1 + torch.exp(-conv(torch.stack([g.mean(1), g.max(1).values], 1))))  # type: ignore[operator]
        return f + g * s

    def by_hand() -> Tensor:
        peers = [net.plain for net in model.cohort.nets]
        maps = [p.between(x.double(), 0, 4) for p in peers]
        z = [p.fc(f.mean((2, 3))) for p, f in zip(peers, maps, strict=True)]
        fuse = model.method.get_submodule("fuse")
        f = torch.cat([seen(f, k) for k, f in enumerate(maps)], 1)
        f = torch.relu(fuse.bn2(fuse.pw(torch.relu(fuse.bn1(fuse.dw(f))))))  # type: ignore[operator]
        u = fuse.fc(f.mean((2, 3)))  # type: ignore[operator]
        terms = [F.cross_entropy(v, y) for v in (*z, u)] + [0.25 * kl(v, u.detach(), 3.0) for v in z]
        terms += [0.25 * kl(u, torch.stack(z).mean(0).detach(), 3.0)]
        return torch.stack(terms).sum()

    same_as_by_hand(model, (x.double(), y, w), by_hand, rtol=1e-7)


ROUTES = {
    "ce/p0": {"body0", "fc0"},
    "ce/fused": {"body0", "body1", "see0", "see1", "fuse"},
    "kl/mean>fused": {"body0", "body1", "see0", "see1", "fuse"},
    "kl/fused>p0": {"body0", "fc0"},
    "kl/fused>p1": {"body1", "fc1"},
}


@pytest.mark.parametrize("term", ROUTES)
@pytest.mark.parametrize("detach", [False, True])
def test_gradient_routing(term: str, detach: bool) -> None:
    model = learner(detach_features=detach)
    only(model, term)(*batch()).loss.backward()
    own = {
        k: list(model.method.get_submodule(m).parameters()) for k, m in (("see0", "see.0"), ("see1", "see.1"), ("fuse", "fuse"))
    }
    want = ROUTES[term]
    assert reached({**net_parts(model), **own}) == (want - {"body0", "body1"} if detach and "fuse" in want else want)


@pytest.mark.parametrize(
    ("channels", "groups", "widths"),
    [(64, 4, [16] * 4), (10, 4, [3, 3, 2, 2]), (51, 4, [13, 13, 13, 12]), (3, 4, [1, 1, 1]), (7, 1, [7]), (9, 2, [5, 4])],
)
def test_channels_are_divided_and_concatenated(channels: int, groups: int, widths: list[int]) -> None:
    """Each group sees one pixel further than the one before it, which is added to it as far as it is as wide."""
    made = MultiScale(channels, groups).double().eval()
    assert made.widths == widths and sum(widths) == channels
    with torch.no_grad():
        for p in made.parameters():
            p.abs_()  # so that no ReLU closes
    f = torch.rand(1, channels, 9, 9, dtype=torch.float64).requires_grad_()
    assert made(f).shape == f.shape
    made.join = nn.Sequential()  # the groups as they are
    out, start = made(f), 0
    assert torch.equal(out[:, : widths[0]], f[:, : widths[0]])
    for n, width in enumerate(widths):
        (reach,) = torch.autograd.grad(out[:, start : start + width, 4, 4].sum(), f, retain_graph=True)
        assert int(reach.abs().sum((0, 1)).gt(0).sum()) == (2 * n + 1) ** 2
        seen = reach[0].abs().sum((1, 2)).nonzero()[:, 0]
        assert int(seen.max()) == start + width - 1 and int(seen.min()) == 0, "from the first group to its own, none after it"
        start += width


@pytest.mark.parametrize("channels", [64, 10, 1])
def test_gates_are_between_nothing_and_all(channels: int) -> None:
    """f + s c f with both gates in (0, 1): every value grows, by less than itself."""
    made = DualAttention(channels)
    f = torch.rand(3, channels, 5, 5) + 0.1
    share = made(f) / f - 1
    assert made(f).shape == f.shape and bool((share > 0).all()) and bool((share < 1).all())
    assert torch.allclose(share / share[:, :1], (share / share[:, :1])[:, :, :1, :1], atol=1e-4), (
        "a gate of channels times one of places"
    )
    assert not torch.allclose(share[0], share[1], atol=1e-4), "image by image"


def test_odd_and_unequal_nets_and_a_larger_image() -> None:
    model = Learner(["resnet8@0.6", "resnet18"], "mfef", classes=5, size=32)
    assert [m.channels for m in model.spec.maps] == [38, 512]
    for size in (32, 64):
        x = torch.randn(4, 3, size, size)
        model(x, torch.arange(4), torch.tensor(1.0)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_added_modules_have_a_decay_of_their_own() -> None:
    model = learner()
    made = optim.groups(model, recipe_of(model, tiny.data()).optim.model_copy(update={"weight_decay": 5e-4}))
    assert {g["name"]: g["weight_decay"] for g in made if "norm" not in str(g["name"])} == {"peers": 5e-4, "method": 1e-5}
    assert learner(weight_decay=None).method.decay() is None


def test_the_card_says_that_it_is_a_reconstruction() -> None:
    kind = methods.load("mfef")
    assert kind.status == "reconstructed" and "unverified" in kind.deviations and not kind.published


@pytest.mark.parametrize("vote", ["fused", "p1"])
def test_votes_come_back_from_their_files(vote: str, tmp_path: object) -> None:
    model = learner()
    model(*batch())
    path, off = export(model, vote, f"{tmp_path}/x.safetensors")
    assert off == 0
    with torch.no_grad():
        assert torch.equal(load(path)[0](batch()[0]), model.eval().votes(batch()[0])[vote])
