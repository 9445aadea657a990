"""Cohorts that are no plain row of peers: trees of stems, averaged gradients, views, taps; and the names they share a stem by."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastffl import nets
from fastffl.errors import UsageError
from fastffl.nets import Cohort
from fastffl.nets.cohort import Frozen

TREES = {2: (0, 0), 3: (0, 0, 2), 4: (0, 0, 2, 2)}


def cohort(peers: int = 3, name: str = "resnet8", size: int = 8, **options: Any) -> Cohort:
    torch.manual_seed(0)
    return Cohort([nets.backbone(name, 5, 3, size, cut=True) for _ in range(peers)], shared=True, **options)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- trees


@pytest.mark.parametrize("peers", TREES)
def test_a_tree_has_one_stem_a_middle_per_pair_and_a_tail_each(peers: int) -> None:
    made, plain = cohort(peers, private=2, tree=TREES[peers]), nets.plain("resnet8", 5, 3, 8)
    parts = [count(plain.get_submodule(p)) for p in ("conv1", "bn1", "layer1", "layer2", "layer3", "fc")]
    assert sum(parts) == count(plain)
    stem, middle, tail = sum(parts[:3]), parts[3], parts[4] + parts[5]
    assert count(made) == stem + -(-peers // 2) * middle + peers * tail
    for k, net in enumerate(made.nets):
        assert count(net.plain) == count(plain), "each is still a whole plain net"
        assert net.plain.layer2 is made.nets[k - k % 2].plain.layer2 and net.plain.layer1 is made.nets[0].plain.layer1


@pytest.mark.parametrize("name", ["resnet8", "wrn16_2", "resnet18"])
def test_a_tree_gives_what_its_whole_nets_give(name: str) -> None:
    made = cohort(4, name, size=32, private=2, tree=TREES[4], rescale=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert all(torch.equal(z, net.plain(x)) for z, net in zip(made(x).z, made.nets, strict=True))


def halves(z: Tensor) -> Tensor:
    return (z * torch.linspace(-1, 1, z.numel()).view(z.shape)).sum()


def gradients(made: Cohort, weights: tuple[float, ...]) -> dict[str, Tensor]:
    """Of a loss of each peer's logits, those of the same weights."""
    made.eval().zero_grad()
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    sum((w * halves(z) for w, z in zip(weights, made(x).z, strict=True)), torch.zeros(())).backward()
    return {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}


def stage_of(name: str) -> int:
    """0 stem, 1 what some share, 2 a peer's own, of a parameter p0.plain.layer2.0.conv1.weight."""
    last = {"layer2": 1, "layer3": 2, "fc": 2}
    return last.get(name.split(".")[2], 0)


@pytest.mark.parametrize("peers", TREES)
def test_gradients_are_averaged_by_the_real_number_of_branches(peers: int) -> None:
    """A gradient passes two splits on its way down; it is worth one by the number of branches at each of them."""
    options: dict[str, Any] = {"private": 2, "tree": TREES[peers]}
    plain = cohort(peers, **options)
    alone = [gradients(plain, tuple(float(j == k) for j in range(peers))) for k in range(peers)]
    got = gradients(cohort(peers, rescale=True, **options), (1.0,) * peers)
    tree = TREES[peers]
    branches = [tree.count(owner) for owner in tree]
    for name, grad in got.items():
        want = torch.zeros_like(grad)
        for k in range(peers):
            share = {2: 1.0, 1: 1 / branches[k], 0: 1 / branches[k] / len(set(tree))}[stage_of(name)]
            want += share * alone[k].get(name, torch.zeros_like(grad))
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-6)


def test_a_flat_split_averages_over_all() -> None:
    summed, mean = (gradients(cohort(3, rescale=r), (1.0, 2.0, -0.5)) for r in (False, True))
    for name, grad in mean.items():
        own = name.split(".")[2] in ("layer3", "fc")
        torch.testing.assert_close(grad, summed[name] / (1 if own else 3), rtol=1e-4, atol=1e-6)


def test_a_tree_needs_a_stage_behind_the_shared_one() -> None:
    """With one private stage there is nothing to pair: a flat split."""
    made = cohort(4, private=1, tree=TREES[4], rescale=True)
    assert made.tree is None and len({id(net.plain.layer3) for net in made.nets}) == 4
    assert len(made(torch.randn(2, 3, 8, 8)).z) == 4
    deep = cohort(4, private=3, tree=TREES[4]).eval()
    a, b, *_ = (net.plain for net in deep.nets)
    assert a.layer1 is b.layer1 and a.layer2 is not b.layer2 and deep.cut == 1
    x = torch.randn(2, 3, 8, 8)
    assert all(torch.equal(z, net.plain(x)) for z, net in zip(deep(x).z, deep.nets, strict=True))


# ---- views


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("joint", [True, False])
def test_peer_k_sees_view_k_alone(shared: bool, joint: bool) -> None:
    torch.manual_seed(0)
    made = Cohort([nets.backbone("resnet8", 5, 3, 8) for _ in range(3)], shared, joint=joint).eval()
    x = torch.randn(3 * 2, 3, 8, 8)
    want = made(x, 3)
    for k, net in enumerate(made.nets):
        torch.testing.assert_close(want.z[k], net(x[2 * k : 2 * k + 2]), rtol=1e-5, atol=1e-6)
    for j in range(3):
        moved = x.clone()
        moved[2 * j : 2 * j + 2] += 1
        got = made(moved, 3)
        for k in range(3):
            assert torch.equal(got.z[k], want.z[k]) == (j != k) == torch.equal(got.maps[k], want.maps[k])


def test_each_view_goes_through_the_stem_by_its_own_statistics() -> None:
    """As if the stem had run once per view; together they would be normalised by one mean."""
    x = torch.randn(3 * 4, 3, 8, 8) * torch.tensor([1.0, 3.0, 0.2]).repeat_interleave(4)[:, None, None, None]
    apart, hand, joint = cohort(), cohort(), cohort(joint=True)
    got = apart(x, 3)
    stems = [hand.nets[0].between(v, 0, 3) for v in x.chunk(3)]
    for k, net in enumerate(hand.nets):
        final, f = net.tail(stems[k], 3)
        assert torch.equal(got.z[k], net.classify(final)) and torch.equal(got.maps[k], f)
    bn, same, one = (c.nets[0].plain.bn1 for c in (apart, hand, joint))
    assert torch.equal(bn.running_mean, same.running_mean) and torch.equal(bn.running_var, same.running_var)
    assert int(bn.num_batches_tracked) == 3 and got.stem is not None and torch.equal(got.stem, stems[0])
    together = joint(x, 3)
    whole = cohort().nets[0].between(x, 0, 3)
    assert int(one.num_batches_tracked) == 1 and not torch.allclose(one.running_var, same.running_var)
    assert together.stem is not None and torch.equal(together.stem, whole[:4])
    assert not torch.allclose(together.z[1], got.z[1], rtol=1e-2)


def test_frozen_teachers_see_the_first_view_in_evaluation_mode() -> None:
    made = Frozen([nets.backbone("resnet8", 5, 3, 8) for _ in range(2)])
    made.train()
    assert not any(m.training for m in made.modules()) and not any(p.requires_grad for p in made.parameters())
    x = torch.randn(6, 3, 8, 8)
    got = made(x, 3)
    assert all(torch.equal(z, net(x[:2])) and not z.requires_grad for z, net in zip(got.z, made.nets, strict=True))


# ---- taps and unequal widths


def hooked(net: Any, names: tuple[str, ...]) -> tuple[list[Tensor], Callable[[], None]]:
    seen: list[Tensor] = []
    handles = [net.get_submodule(n).register_forward_hook(lambda m, a, out: seen.append(out)) for n in names]
    return seen, lambda: [h.remove() for h in handles] and None


@pytest.mark.parametrize(("name", "private"), [("resnet8", 1), ("resnet8", 3), ("wrn16_2", 2), ("resnet18", 3)])
def test_taps_are_what_the_stages_of_a_peer_gave(name: str, private: int) -> None:
    made = cohort(2, name, size=32, private=private, taps=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        got = made(x)
        for k, net in enumerate(made.nets):
            stages = net.stages[made.cut :]
            seen, end = hooked(net.plain, tuple(stage[0] for stage in stages))
            net.plain(x)
            end()
            assert len(got.taps[k]) == private == len(stages) and got.taps[k][-1] is got.maps[k]
            assert [f.shape for f in got.taps[k]] == [f.shape for f in seen]
            assert all(torch.equal(*pair) for pair in zip(got.taps[k][:-1], seen[:-1], strict=True))
            assert torch.equal(got.z[k], net.plain(x))


def test_taps_of_nets_that_share_nothing() -> None:
    made = Cohort([nets.backbone(n, 5, 3, 8) for n in ("resnet8", "wrn16_2")], shared=False, taps=True)
    got = made(torch.randn(2, 3, 8, 8))
    assert [[f.shape[1] for f in taps] for taps in got.taps] == [[16, 16, 32, 64], [16, 32, 64, 128]]
    sizes = [nets.probe(net, 3, 8) for net in made.nets]
    for taps, size in zip(got.taps, sizes, strict=True):
        assert [tuple(f.shape[1:]) for f in taps] == [tuple(s) for s in size.stages]


def test_widths_share_their_first_stage_only() -> None:
    def named(*names: str, private: int) -> Cohort:
        return Cohort([nets.backbone(n, 5, 3, 8) for n in names], shared=True, private=private)

    made = named("wrn-16-2", "wrn16_2@0.5", private=3)
    assert made.names == ("wrn16_2", "wrn16_2@0.5") and made.nets[0].plain.conv1 is made.nets[1].plain.conv1
    with pytest.raises(UsageError, match=r"a stem can only be shared by equal nets, not wrn16_2, wrn16_2@0\.5"):
        named("wrn-16-2", "wrn16_2@0.5", private=2)
    with pytest.raises(UsageError, match=r"equal nets, not resnet8, resnet20"):
        named("resnet8", "resnet20", private=3)
    with pytest.raises(UsageError, match="resnet8 has 4 stages: 4 of them can't be each peer's own beside a stem"):
        named("resnet8", "resnet8", private=4)
