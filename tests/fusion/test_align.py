"""AlignMaps at other image sizes than it was built for: the grid follows the maps, and nothing changes at the built size."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastffl.errors import UsageError
from fastffl.exporting import export
from fastffl.fusion.conv import Align, AlignMaps, ConvFusion
from fastffl.train import Learner
from fastffl.values import MapSpec

UNEQUAL = (MapSpec(6, 7, 7), MapSpec(4, 14, 14), MapSpec(5, 9, 7))
HOWS = [how for how in get_args(Align) if how != "none"]


def maps(*sizes: tuple[int, int, int]) -> list[Tensor]:
    return [torch.randn(2, *size) for size in sizes]


def built_size(net: AlignMaps, given: list[Tensor], how: str) -> list[Tensor]:
    """What the module did while its grid was fixed: at the built size nothing may differ from it."""
    out = []
    for f, m, conv in zip(given, UNEQUAL, net.convs, strict=True):
        if (m.height, m.width) != (7, 7):
            if how == "interpolate":
                f = F.interpolate(f, (7, 7), mode="bilinear", align_corners=False, antialias=True)
            else:
                f = F.adaptive_avg_pool2d(conv(f), (7, 7))
        out.append(f)
    return out


@pytest.mark.parametrize("how", HOWS)
def test_at_the_built_size_nothing_changes(how: Align) -> None:
    net = AlignMaps(UNEQUAL, how).eval()
    given = maps(*UNEQUAL)
    want = built_size(net, given, how)
    assert all(torch.equal(a, b) for a, b in zip(net(given), want, strict=True))
    assert net(given)[0] is not None and net(given)[0].shape[2:] == (7, 7)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    ("sizes", "grid"),
    [
        (((5, 5), (10, 10), (6, 5)), (5, 5)),
        (((4, 6), (8, 12), (5, 7)), (4, 6)),
        (((12, 12), (24, 24), (11, 13)), (11, 12)),
        (((3, 3), (2, 5), (4, 4)), (2, 3)),
        (((6, 6), (6, 6), (6, 6)), (6, 6)),
        (((1, 1), (2, 2), (1, 1)), (1, 1)),
    ],
)
def test_the_grid_is_the_smallest_of_the_maps_given(
    how: Align, sizes: tuple[tuple[int, int], ...], grid: tuple[int, int]
) -> None:
    net = AlignMaps(UNEQUAL, how)
    given = [m.requires_grad_() for m in maps(*((s.channels, *size) for s, size in zip(UNEQUAL, sizes, strict=True)))]
    out = net(given)
    assert [tuple(f.shape) for f in out] == [(2, s.channels, *grid) for s in UNEQUAL]
    for f, g, conv in zip(out, given, net.convs, strict=True):
        if not len(conv) and tuple(g.shape[2:]) == grid:
            assert f is g, "a map that has the size already is left alone"
    torch.stack([f.square().mean() for f in out]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in given)


def test_averages_stay_averages() -> None:
    """Pooling to the grid is torch's adaptive average, whatever size the module was built for."""
    net = AlignMaps((MapSpec(3, 7, 7), MapSpec(3, 7, 7)), "auto")
    a, b = maps((3, 4, 4), (3, 8, 8))
    assert torch.allclose(net([a, b])[1], b.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)), atol=1e-6)


def test_equal_maps_pass_through_at_every_size() -> None:
    net = AlignMaps((MapSpec(3, 7, 7), MapSpec(4, 7, 7)), "auto")
    for side in (1, 2, 5, 7, 9, 16):
        given = maps((3, side, side), (4, side, side))
        assert all(a is b for a, b in zip(net(given), given, strict=True))


def test_none_refuses_unequal_maps_when_built_and_later() -> None:
    with pytest.raises(UsageError, match=r"maps are 7x7, 14x14, 9x7; --set method.align=adaptive_avg"):
        AlignMaps(UNEQUAL, "none")
    net = AlignMaps((MapSpec(3, 7, 7), MapSpec(4, 7, 7)), "none")
    assert len(net(maps((3, 5, 5), (4, 5, 5)))) == 2
    with pytest.raises(UsageError, match=r"maps are 5x5, 6x6; --set method.align=adaptive_avg"):
        net(maps((3, 5, 5), (4, 6, 6)))


@pytest.mark.parametrize("how", HOWS)
def test_the_fusion_module_learns_at_growing_sizes(how: Align) -> None:
    net = ConvFusion((MapSpec(6, 4, 4), MapSpec(5, 8, 8)), 3, align=how)
    for side in (2, 3, 4, 5):
        net(maps((6, side, side), (5, 2 * side, 2 * side))).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("pair", [("resnet18", "resnet18"), ("resnet18", "mobilenetv3_small_050"), ("resnet18", "resnet8")])
def test_a_learner_trains_at_sizes_it_was_not_built_for_and_exports_at_its_own(pair: tuple[str, str], tmp_path: object) -> None:
    """Progressive resizing: 64 pixels built, 32 to 80 trained; then the fused classifier is exported."""
    model = Learner(pair, "ffl", classes=5, size=64)
    for side in (32, 48, 64, 80):
        model(torch.randn(4, 3, side, side), torch.arange(4), torch.tensor(1.0)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    path, off = export(model, "fused", f"{tmp_path}/m.safetensors")
    assert off == 0 and path.stat().st_size > 0
