"""Very different timm models through the one adapter: map, logits, gradients, FFL beside a small net, shared stems, export."""

import pytest
import torch

from fastffl import nets
from fastffl.errors import UsageError
from fastffl.exporting import export
from fastffl.train import Learner

# family -> (model, image size). All but the last four can share a stem.
STAGED = {
    "ResNet": ("resnet18", 64),
    "RegNet": ("regnety_002", 64),
    "EfficientNet": ("efficientnet_b0", 64),
    "MobileNetV2": ("mobilenetv2_050", 64),
    "MobileNetV3": ("mobilenetv3_small_050", 64),
    "ConvNeXt": ("convnext_atto", 64),
    "RepVGG": ("repvgg_a0", 64),
    "DenseNet": ("densenet121", 64),
    "Swin": ("swin_tiny_patch4_window7_224", 224),
}
WHOLE = {
    "GhostNet": ("ghostnet_050", 64),
    "ViT": ("vit_tiny_patch16_224", 32),
    "Mixer": ("mixer_s32_224", 64),
    "SelecSLS": ("selecsls42", 64),
    "XCiT": ("xcit_nano_12_p16_224", 64),
    "PoolFormer": ("poolformerv2_s12", 64),
}
EVERY = {**STAGED, **WHOLE}


@pytest.mark.parametrize("family", EVERY)
def test_map_and_logits(family: str) -> None:
    name, size = EVERY[family]
    net = nets.backbone(name, 7, 3, size).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        final, f = net.features(x)
        assert torch.equal(net.classify(final), net.plain(x))
        spec = nets.probe(net, 3, size)
    assert f.ndim == 4 and tuple(spec.map) == f.shape[1:] and spec.classes == 7
    assert f.shape[1] >= f.shape[2], "channels come first"


@pytest.mark.parametrize("family", [f for f in EVERY if f not in ("Swin", "DenseNet")])
def test_every_parameter_learns_beside_a_small_net(family: str, tmp_path: object) -> None:
    name, size = EVERY[family]
    model = Learner([name, "resnet8"], "ffl", classes=5, size=size)
    with torch.no_grad():  # some families start residual branches at exactly 0, which hides parameters behind them
        for p in model.parameters():
            if not p.any():
                p.add_(0.01)
    model(torch.randn(4, 3, size, size), torch.arange(4) % 5, torch.tensor(1.0)).loss.backward()
    still = [n for n, p in model.named_parameters() if p.grad is None]
    assert not still, f"no gradient reaches {still[:3]}"
    path, off = export(model, "p0", f"{tmp_path}/m.safetensors")
    assert off == 0 and path.stat().st_size > 0


@pytest.mark.parametrize("family", [f for f in STAGED if f != "Swin"])
def test_stems_are_shared_where_there_are_stages(family: str) -> None:
    name, size = STAGED[family]
    model = Learner([name, name], "ffl", classes=5, size=size)
    assert model.cohort.shared, "equal nets share without being asked"
    a, b = (net.plain for net in model.cohort.nets)
    shared = {id(p) for p in a.parameters()} & {id(p) for p in b.parameters()}
    assert 0 < len(shared) < len(list(a.parameters()))
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        model.eval()
        z = model.cohort(x).z
        assert torch.equal(z[0], a(x)) and torch.equal(z[1], b(x))


@pytest.mark.parametrize("family", ["ViT", "Mixer"])
def test_stageless_models_stay_separate(family: str) -> None:
    name, size = WHOLE[family]
    assert not Learner([name, name], "ffl", classes=5, size=size).cohort.shared
    with pytest.raises(UsageError, match=f"{name} has no stages to share a stem by"):
        Learner([name, name], "ffl", classes=5, size=size, share_stem=True)


def test_the_issue_s_own_pair() -> None:
    model = Learner(["resnet34", "mobilenetv3_large_100"], "ffl", classes=7, size=64)
    assert [m.channels for m in model.spec.maps] == [512, 960]
    out = model(torch.randn(2, 3, 64, 64), torch.tensor([0, 6]), torch.tensor(1.0))
    assert bool(out.loss.isfinite())


class Own(torch.nn.Module):
    """A user's net, known to no library."""

    def __init__(self, classes: int = 5):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(12, 24, 3, 2, 1))
        self.head = torch.nn.Linear(24, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu().mean((2, 3)))


def test_any_module_is_a_peer(tmp_path: object) -> None:
    own = Own()
    model = Learner([own, "resnet8"], "ffl", classes=5, size=32)
    assert [tuple(m) for m in model.spec.maps] == [(24, 8, 8), (64, 8, 8)]
    x = torch.randn(4, 3, 32, 32)
    model(x, torch.arange(4), torch.tensor(1.0)).loss.backward()
    assert all(p.grad is not None for p in own.parameters())
    torch.testing.assert_close(model.eval().votes(x)["p0"], own(x))
    _, off = export(model, "p0", f"{tmp_path}/own.safetensors")
    assert off == 0
    with pytest.raises(UsageError, match="gives 5 logits; the data has 6 classes"):
        Learner([own, "resnet8"], "ffl", classes=6, size=32)


def test_a_size_a_net_can_t_take_is_named() -> None:
    with pytest.raises(UsageError, match="inception_v3 can't take 3 x 20 x 20 images"):
        Learner(["inception_v3", "resnet8"], "ffl", classes=5, size=20)
