"""The CIFAR nets: exact parameter counts, multiply-adds and maps, shared stems, and the names official checkpoints map to."""

import pytest
import torch

from fastffl import nets
from fastffl.errors import UsageError


@pytest.mark.parametrize(
    ("name", "classes", "parameters", "macs", "feature"),
    [
        ("resnet8", 100, 83_892, None, [64, 8, 8]),
        ("resnet20", 100, 278_324, None, [64, 8, 8]),
        ("resnet32", 100, 472_756, 69.1, [64, 8, 8]),
        ("resnet32", 10, 466_906, None, [64, 8, 8]),
        ("resnet56", 100, 861_620, 125.8, [64, 8, 8]),
        ("resnet110", 100, 1_736_564, 253.2, [64, 8, 8]),
        ("wrn16_2", 100, 703_284, 101.1, [128, 8, 8]),
        ("wrn16_2", 10, 691_674, None, [128, 8, 8]),
        ("wrn40_2", 100, 2_255_156, 327.6, [128, 8, 8]),
    ],
)
def test_sizes(name: str, classes: int, parameters: int, macs: float | None, feature: list[int]) -> None:
    """methods-core 0.4."""
    found = nets.facts(name, classes, 3, 32)
    assert found.parameters == parameters and found.feature == feature and found.source == "fastffl"
    if macs:
        assert round(found.macs / 1e6, 1) == macs


@pytest.mark.parametrize("name", nets.ZOO)
def test_cut_equals_whole(name: str) -> None:
    net = nets.backbone(name, 10, 3, 32).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(x), net.plain(x))
    assert torch.equal(net.tail(net.between(x, 0, 3), 3)[1], net.features(x)[1])


def test_official_names() -> None:
    """The names of the published FFL checkpoints, less their branch numbers (methods-core section 5)."""
    names = {k.split(".")[0] for k in nets.plain("resnet32", 100, 3, 32).state_dict()}
    assert names == {"conv1", "bn1", "layer1", "layer2", "layer3", "fc"}


def test_shared_stem_is_one_set_of_weights_and_every_peer_stays_whole() -> None:
    cohort = nets.Cohort([nets.backbone("resnet8", 10, 3, 16) for _ in range(3)], shared=True).eval()
    p0, _, p2 = (net.plain for net in cohort.nets)
    assert p0.layer1 is p2.layer1 and p0.layer3 is not p2.layer3
    x = torch.randn(2, 3, 16, 16)
    peers = cohort(x)
    fresh = nets.plain("resnet8", 10, 3, 16).eval()
    fresh.load_state_dict(p2.state_dict(), strict=True)
    assert torch.equal(fresh(x), peers.z[2])
    assert peers.stem is not None and torch.equal(peers.stem, cohort.nets[0].between(x, 0, 3))


@pytest.mark.parametrize(
    ("name", "text"), [("resnet33", "did you mean resnet"), ("mobilenet_v3_large", "did you mean mobilenet")]
)
def test_unknown_names(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"no model is called '{name}'.*{text}"):
        nets.plain(name, 10, 3, 32)


def test_too_small_images_and_absent_weights() -> None:
    with pytest.raises(UsageError, match="size 3 is less than 4"):
        nets.plain("resnet20", 10, 3, 3)
    with pytest.raises(UsageError, match="no published weights"):
        nets.plain("resnet20", 10, 3, 32, pretrained=True)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("resnet8@1", [16, 32, 64]),
        ("resnet8@1.0", [16, 32, 64]),
        ("resnet8@0.8", [12, 25, 51]),
        ("resnet8@.5", [8, 16, 32]),
        ("resnet8@0.0625", [1, 2, 4]),
        ("wrn-16-2@0.5", [16, 32, 64]),
    ],
)
def test_widths(name: str, want: list[int]) -> None:
    """A share of the channels behind the first convolution; of all of them it is the net itself."""
    net = nets.plain(name, 10, 3, 16)
    assert [net.get_submodule(f"layer{k}")[-1].conv2.out_channels for k in (1, 2, 3)] == want  # type: ignore[index]
    assert net.conv1.out_channels == 16 and net(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
    if name.startswith("resnet8@1"):
        whole = nets.plain("resnet8", 10, 3, 16).state_dict()
        assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in whole.items()}


BAD_WIDTHS = ["resnet8@", "resnet8@0", "resnet8@0.06", "resnet8@1.5", "resnet8@-0.5", "resnet8@0.5@0.5", "resnet8@1e-1"]


@pytest.mark.parametrize("name", [*BAD_WIDTHS, "resnet8@half", "resnet18@0.5", "resnet33@0.5", "@0.5"])
def test_widths_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match=r"expected NET@WIDTH, a net of this .* \(resnet8, .*\) and a width in 0\.0625 to 1$"):
        nets.plain(name, 10, 3, 32)


def test_narrow_nets_have_no_weights_and_no_tiny_images_either() -> None:
    with pytest.raises(UsageError, match=r"resnet8@0\.5 has no published weights; use --set nets\.pretrained=false"):
        nets.plain("resnet8@0.5", 10, 3, 32, pretrained=True)
    with pytest.raises(UsageError, match=r"resnet8@0\.5 halves the image twice; size 3 is less than 4"):
        nets.plain("resnet8@0.5", 10, 3, 3)
    assert nets.backbone("wrn-40-2@0.5", 10, 3, 16).name == "wrn40_2@0.5"
