"""oem-kd: widths and parameter counts of the compressed students, the loss by hand, and what the maps teach whom."""

import io
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from routing import kl, only, reached, same_as_by_hand, shared_parts
from torch import Tensor

from fastffl import cli, nets
from fastffl.errors import UsageError
from fastffl.exporting import export, load
from fastffl.methods.oem_kd import OEMKD
from fastffl.train import Learner
from fastffl.values import UNLABELLED

SHARES = ("", "@0.8", "@0.6", "@0.4", "@0.2")


def learner(*names: str, **options: Any) -> Learner:
    torch.manual_seed(0)
    return Learner(names or ("resnet8", "resnet8@0.6", "resnet8@0.2"), OEMKD.Config(**options), classes=5, size=8)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 5, torch.tensor(0.25)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_widths_are_the_papers() -> None:
    """methods-more 7.1: cut to whole channels, behind a first convolution of full width."""
    want = [[16, 32, 64], [12, 25, 51], [9, 19, 38], [6, 12, 25], [3, 6, 12]]
    for share, widths in zip(SHARES, want, strict=True):
        net = nets.plain(f"resnet32{share}", 10, 3, 32)
        assert [getattr(net, f"layer{k}")[-1].bn2.num_features for k in (1, 2, 3)] == widths
        assert net.conv1.out_channels == 16 and [len(getattr(net, f"layer{k}")) for k in (1, 2, 3)] == [5, 5, 5]


def hand_count(depth: int, widths: list[int], classes: int, projections: bool) -> int:
    """Parameters of a CIFAR ResNet of these widths behind a first convolution of 16."""
    m, total, d_in = (depth - 2) // 6, 3 * 16 * 9 + 32, 16
    for stage, d in enumerate(widths):
        for block in range(m):
            total += 9 * d_in * d + 9 * d * d + 4 * d
            if projections and block == 0 and (stage or d_in != d):
                total += d_in * d + 2 * d
            d_in = d
    return total + d_in * classes + classes


PRINTED = {
    20: (62.95, 35.61, 15.50, 3.95),
    32: (62.87, 35.43, 15.33, 3.80),
    44: (62.84, 35.36, 15.25, 3.74),
    110: (62.79, 35.26, 15.15, 3.64),
}


@pytest.mark.parametrize("depth", PRINTED)
def test_parameters_beside_the_widest(depth: int) -> None:
    """methods-more 7.1, in %: the paper's are those of nets with projections, as ours have, and 10 classes."""
    shares = (1.0, 0.8, 0.6, 0.4, 0.2)
    widths = [[int(d * s) for d in (16, 32, 64)] for s in shares]
    ours = [hand_count(depth, w, 10, True) for w in widths]
    if f"resnet{depth}" in nets.ZOO:
        assert [count(nets.plain(f"resnet{depth}{s}", 10, 3, 32)) for s in SHARES] == ours
    assert tuple(round(100 * mine / ours[0], 2) for mine in ours[1:]) == PRINTED[depth]


@pytest.mark.parametrize(("hard", "maps", "soft"), [(0.7, 0.15, 0.15), (0.5, 0.3, 0.2)])
def test_the_loss_by_hand(hard: float, maps: float, soft: float) -> None:
    """methods-more 7.2: mean of the squares of each map, summed over students and stages; no ramp."""
    model = learner(hard=hard, maps=maps, soft=soft, T=2.0).double()
    x, y, w = batch()

    def by_hand() -> Tensor:
        stem = model.cohort.nets[0].between(x.double(), 0, 1)
        taps, z = [], []
        for net in model.cohort.nets:
            h, seen = stem, []
            for layer in (net.plain.layer1, net.plain.layer2, net.plain.layer3):
                h = layer(h)
                seen.append(h)
            taps.append(seen)
            z.append(net.plain.fc(h.mean((2, 3))))
        mean = torch.stack(z).mean(0).detach()
        terms = [hard * F.cross_entropy(v, y) + soft * kl(v, mean, 2.0) for v in z]
        for k in (1, 2):
            for s in range(3):
                conv = model.method.get_submodule(f"adapters.{k - 1}.{s}")
                terms.append(maps * F.mse_loss(conv(taps[k][s]), taps[0][s].detach()))
        return torch.stack(terms).sum()

    same_as_by_hand(model, (x.double(), y, w), by_hand, rtol=1e-5)  # squares are taken in fp32


def test_defaults_are_the_papers() -> None:
    assert OEMKD.Config().model_dump() == {"name": "oem-kd", "T": 2.0, "hard": 0.7, "maps": 0.15, "soft": 0.15}
    names, _ = OEMKD.arranged(("resnet32", "resnet32"))
    assert names == tuple(f"resnet32{s}" for s in SHARES)
    model = Learner(names, "oem-kd", classes=10, size=8)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.method.modules()) == 3 * 4, "3 (K - 1) adapters"
    assert model.graph.votes == ("p0", "p1", "p2", "p3", "p4", "mean")


ROUTES = {
    "ce/p0": {"stem", "body0", "fc0"},
    "ce/p2": {"stem", "body2", "fc2"},
    "kl/mean>p0": {"stem", "body0", "fc0"},
    "kl/mean>p1": {"stem", "body1", "fc1"},
    "maps/p1": {"stem", "body1", "method"},
    "maps/p2": {"stem", "body2", "method"},
}


@pytest.mark.parametrize("term", ROUTES)
def test_gradient_routing(term: str) -> None:
    """The maps teach the narrow ones, their adapters and the base, never the widest; no classifier is above a map."""
    model = learner()
    only(model, term)(*batch()).loss.backward()
    assert reached(shared_parts(model)) == ROUTES[term]
    if term == "maps/p1":
        adapters = list(model.method.get_submodule("adapters.1").parameters())
        assert not any(p.grad is not None and p.grad.any() for p in adapters), "another student's"


def test_images_without_a_label_teach_no_maps() -> None:
    """The terms of a batch of which some can't be read are those of the others; statistics apart, so in evaluation mode."""
    model = learner().eval()
    x, y, w = batch()
    y = torch.where(torch.arange(6) < 2, UNLABELLED, y)
    with torch.no_grad():
        whole, some = model(x, y, w), model(x[2:], y[2:], w)
    torch.testing.assert_close(torch.stack(whole.extra), torch.stack(some.extra))
    torch.testing.assert_close(whole.loss, some.loss)


def test_the_base_is_the_first_stage_of_ours_and_two_of_timms() -> None:
    wide, narrow = (net.plain for net in learner("resnet8", "resnet8@0.6").cohort.nets)
    assert wide.conv1 is narrow.conv1 and wide.bn1 is narrow.bn1 and wide.layer1 is not narrow.layer1
    model = Learner(["resnet18"] * 2, "oem-kd", classes=5, size=32)
    a, b = (net.plain for net in model.cohort.nets)
    assert a.conv1 is b.conv1 and a.layer1 is b.layer1 and a.layer2 is not b.layer2
    assert [m.channels for m in model.spec.taps[1]] == [128, 256, 512]
    with pytest.raises(UsageError, match=r"resnet18@0\.8: expected NET@WIDTH, a net of this package \(resnet8, .*\) and a width"):
        Learner(["resnet18", "resnet18@0.8"], "oem-kd", classes=5, size=32)
    with pytest.raises(UsageError, match="method oem-kd needs nets with stages: vit_tiny_patch16_224 has no stages"):
        Learner(["vit_tiny_patch16_224"] * 2, "oem-kd", classes=5, size=32)
    with pytest.raises(UsageError, match="method oem-kd needs peers of one architecture"):
        Learner(["resnet8", "resnet20@0.5"], "oem-kd", classes=5, size=8)


@pytest.mark.parametrize("vote", ["p1", "mean"])
def test_a_narrow_net_comes_back_from_its_file(vote: str, tmp_path: object) -> None:
    model = learner()
    model(*batch())
    path, off = export(model, vote, f"{tmp_path}/x.safetensors")
    module, about = load(path)
    assert off == 0 and about["net"] == {"p1": "resnet8@0.6", "mean": "mean"}[vote]
    with torch.no_grad():
        assert torch.equal(module(batch()[0]), model.eval().votes(batch()[0])[vote])
    if vote == "p1":
        plain = nets.plain("resnet8@0.6", 5, 3, 8)
        assert list(module.state_dict()) == list(plain.state_dict()) and plain.layer3[0].conv1.out_channels == 38


def test_the_command_line_shows_a_width() -> None:
    """At the size of its net without one."""
    said = io.StringIO()
    with redirect_stdout(said), pytest.raises(SystemExit) as ended:
        cli.main(["models", "resnet32@0.8", "--classes", "10"])
    facts = nets.facts("resnet32@0.8", 10, 3, 32)
    assert ended.value.code == 0 and facts.feature == [51, 8, 8] and facts.parameters == hand_count(32, [12, 25, 51], 10, True)
    assert f"resnet32@0.8 (fastffl)   {facts.parameters:,} parameters   {facts.macs / 1e6:,.1f} M" in said.getvalue()
    assert "51 x 8 x 8" in said.getvalue()


@pytest.mark.parametrize("names", [("resnet8", "resnet8@0.6", "resnet8@0.2"), ("resnet8@0.2", "resnet8", "resnet8@0.6")])
def test_the_widest_teaches_by_its_maps_wherever_it_stands(names: tuple[str, ...]) -> None:
    model, widest = learner(*names), names.index("resnet8")
    terms = {f"maps/p{k}" for k in range(3) if k != widest}
    only(model, *terms)(*batch()).loss.backward()
    assert {name for name in reached(shared_parts(model)) if name.startswith("body")} == {f"body{t[-1]}" for t in terms}


def test_widths_are_shares_of_the_first_net() -> None:
    assert OEMKD.arranged(("resnet32",))[0] == ("resnet32", *(f"resnet32{s}" for s in SHARES[1:]))
    assert OEMKD.arranged(("wrn-16-2@0.5", "x"))[0] == ("wrn-16-2@0.5", *(f"wrn16_2@{s}" for s in (0.4, 0.3, 0.2, 0.1)))


@pytest.mark.parametrize("net", ["resnet18", "resnet8@0.25"])
def test_a_net_without_these_widths_is_refused(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "digits", "--method", "oem-kd", "--model", net])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"method oem-kd trains one net at five widths, down to a fifth of its own, and {net} does not" in said
    assert "resnet32" in said and "--model" in said
