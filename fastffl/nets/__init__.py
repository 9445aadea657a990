"""Backbones by name: this package's CIFAR nets, or any timm classification model."""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UsageError, nearest
from ..values import MapSpec
from .adapter import Backbone, CutTimmNet, TappedNet, TimmNet, ZooNet, find_tap, same_when_cut, timm_cut
from .cohort import Cohort as Cohort
from .resnet import ResNet
from .wrn import WRN

ZOO: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    **{f"resnet{d}": (ResNet, (d,)) for d in (8, 20, 32, 56, 110)},
    "wrn16_2": (WRN, (16, 2)),
    "wrn40_2": (WRN, (40, 2)),
}
ALIASES = {"wrn-16-2": "wrn16_2", "wrn16-2": "wrn16_2", "wrn-40-2": "wrn40_2", "wrn40-2": "wrn40_2"}


def plain(name: str, classes: int, channels: int, size: int, pretrained: bool = False) -> nn.Module:
    """The plain net `name` for images (channels, size, size): of this package, else of timm. UsageError names the nearest."""
    name = ALIASES.get(name, name)
    if name in ZOO:
        if pretrained:
            raise UsageError(f"{name} has no published weights; use --set nets.pretrained=false, or a timm model")
        if size < 4:
            raise UsageError(f"{name} halves the image twice; size {size} is less than 4")
        make, args = ZOO[name]
        return make(*args, classes, channels)
    import timm

    if not timm.is_model(name):
        raise UsageError(f"no model is called {name!r}{nearest(name, [*ZOO, *timm.list_models()])}")
    more: dict[str, Any] = {}
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        more["img_size"] = size  # token models cut the image into patches when built
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm warns of renamed models and absent grad checkpoints
            return timm.create_model(name, pretrained=pretrained, num_classes=classes, in_chans=channels, **more)
    except Exception as error:  # any failure of a constructor or download of the 1,300 models, told by its own text
        if isinstance(error, UsageError):
            raise
        what = "with its published weights " if pretrained else ""
        raise UsageError(f"timm can't build {name} {what}at {size} px: {str(error).splitlines()[0]}") from error


def backbone(
    net: str | nn.Module,
    classes: int,
    channels: int,
    size: int,
    *,
    pretrained: bool = False,
    cut: bool = False,
    tap: str | None = None,
) -> Backbone:
    """A peer from a name or from any nn.Module (B, channels, size, size) -> (B, classes).

    cut    whether its stem will be shared: UsageError where the model has no stages to cut it by
    tap    nn.Modules that are neither ours nor timm's: the submodule whose output is the last feature map; None finds it
    """
    name = ALIASES.get(net, net) if isinstance(net, str) else type(net).__name__
    module = plain(net, classes, channels, size, pretrained) if isinstance(net, str) else net
    x = torch.zeros(2, channels, size, size)
    if hasattr(module, "stem_parts"):
        return ZooNet(module, name)
    if hasattr(module, "forward_intermediates") and hasattr(module, "forward_head"):
        if not cut:
            return TimmNet(module, name)
        where = timm_cut(module)
        if where is None or not same_when_cut(module, where, torch.linspace(-1, 1, x.numel()).view(x.shape)):
            raise UsageError(f"{name} has no stages to share a stem by; use --set nets.share_stem=false")
        return CutTimmNet(module, name, where)
    if cut:
        raise UsageError(f"{name} has no stem/tail split; share_stem needs a net of this package or a staged timm model")
    return TappedNet(module, name, tap or find_tap(module, x))


class Probe(NamedTuple):
    """Sizes of one peer for a given image: its map, and its stem's output where it can be cut."""

    map: MapSpec
    stem: MapSpec | None
    classes: int


@torch.no_grad()
def probe(net: Backbone, channels: int, size: int) -> Probe:
    """Run a zero image through `net` in eval mode. UsageError where the net can't take that size."""
    was = net.training
    net.eval()
    try:
        weight = next(net.parameters(), torch.zeros(()))
        x = torch.zeros(2, channels, size, size, device=weight.device)
        h: Tensor | None = net.stem(x) if net.parts else None
        final, f = net.features(x) if h is None else net.tail(h)
        z = net.classify(final)
    except UsageError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        why = (str(error).splitlines() or ["refused"])[0]
        raise UsageError(f"{net.name} can't take {channels} x {size} x {size} images: {why}") from error
    finally:
        net.train(was)
    if z.ndim != 2 or f.ndim != 4:
        raise UsageError(f"{net.name} gives logits {tuple(z.shape)}, map {tuple(f.shape)}; expected (B, classes), (B, D, H, W)")
    stem = MapSpec(*h.shape[1:]) if h is not None and h.ndim == 4 else None
    return Probe(MapSpec(*f.shape[1:]), stem, z.shape[1])


class NetFacts(NamedTuple):
    name: str
    source: str
    parameters: int
    macs: int
    feature: list[int]


def facts(name: str, classes: int, channels: int, size: int) -> NetFacts:
    """Parameters, multiply-adds of one image's forward pass (convolutions and matrix products) and the last map's size."""
    from torch.utils.flop_counter import FlopCounterMode

    net = backbone(name, classes, channels, size)
    net.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        final, f = net.features(torch.zeros(1, channels, size, size))
        net.classify(final)
    source = "fastffl" if isinstance(net, ZooNet) else "timm"
    count = sum(p.numel() for p in net.parameters())
    return NetFacts(net.name, source, count, counter.get_total_flops() // 2, list(f.shape[1:]))
