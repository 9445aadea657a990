"""Backbones by name: this package's CIFAR nets, or any timm classification model."""

import re
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UsageError, nearest
from ..values import MapSpec
from .adapter import Backbone, CutTimmNet, TappedNet, TimmNet, ZooNet, find_tap, same_when_cut, timm_cut
from .cohort import Cohort as Cohort
from .cohort import Frozen as Frozen
from .cohort import MeanTeacher as MeanTeacher
from .resnet import ResNet
from .wrn import WRN

ZOO: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    **{f"resnet{d}": (ResNet, (d,)) for d in (8, 20, 32, 56, 110)},
    "wrn16_2": (WRN, (16, 2)),
    "wrn40_2": (WRN, (40, 2)),
}
ALIASES = {"wrn-16-2": "wrn16_2", "wrn16-2": "wrn16_2", "wrn-40-2": "wrn40_2", "wrn40-2": "wrn40_2"}


class NoStages(UsageError):
    """A net that can't be cut where its stages are asked for."""


def known(name: str) -> str:
    """The name a net goes by here: wrn-16-2@0.5 is wrn16_2@0.5."""
    base, at, width = name.partition("@")
    return ALIASES.get(base, base) + at + width


def plain(name: str, classes: int, channels: int, size: int, pretrained: bool = False) -> nn.Module:
    """The plain net `name` for images (channels, size, size): of this package, else of timm. UsageError names the nearest.

    `resnet32@0.6` is resnet32 with 0.6 of the channels behind its first convolution.
    """
    name = known(name)
    base, at, share = name.partition("@")
    if base in ZOO and size < 4:
        raise UsageError(f"{name} halves the image twice; size {size} is less than 4")
    if at:
        width = float(share) if re.fullmatch(r"0?\.\d+|1(\.0+)?", share) else 0.0
        if base not in ZOO or width < 1 / 16:
            raise UsageError(f"{name}: expected NET@WIDTH, a net of this package ({', '.join(ZOO)}) and a width in 0.0625 to 1")
        if pretrained:
            raise UsageError(f"{name} has no published weights; use --set nets.pretrained=false")
        make, args = ZOO[base]
        return make(*args, classes, channels, width=width)
    if name in ZOO:
        if pretrained:
            raise UsageError(f"{name} has no published weights; use --set nets.pretrained=false, or a timm model")
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

    cut    whether its stages are asked for, to share some or to tap them: NoStages where the model has none
    tap    nn.Modules that are neither ours nor timm's: the submodule whose output is the last feature map; None finds it
    """
    name = known(net) if isinstance(net, str) else type(net).__name__
    module = plain(net, classes, channels, size, pretrained) if isinstance(net, str) else net
    x = torch.zeros(2, channels, size, size)
    if hasattr(module, "stages") and hasattr(module, "between"):
        return ZooNet(module, name)
    if hasattr(module, "forward_intermediates") and hasattr(module, "forward_head"):
        if not cut:
            return TimmNet(module, name)
        where = timm_cut(module)
        if where is None or not same_when_cut(module, where, torch.linspace(-1, 1, x.numel()).view(x.shape)):
            raise NoStages(f"{name} has no stages to share a stem by; use --set nets.share_stem=false")
        return CutTimmNet(module, name, where)
    if cut:
        raise NoStages(f"{name} has no stem/tail split; share_stem needs a net of this package or a staged timm model")
    return TappedNet(module, name, tap or find_tap(module, x))


class Probe(NamedTuple):
    """Sizes of one peer for a given image: its map, and what each stage gives where it has any."""

    map: MapSpec
    stages: tuple[MapSpec, ...]
    classes: int


@torch.no_grad()
def probe(net: Backbone, channels: int, size: int) -> Probe:
    """Run a zero image through `net` in eval mode. UsageError where the net can't take that size."""
    was = net.training
    net.eval()
    try:
        weight = next(net.parameters(), torch.zeros(()))
        x = torch.zeros(2, channels, size, size, device=weight.device)
        taps: list[Tensor] = []
        h = x
        for stage in range(len(net.stages) - 1):
            h = net.between(h, stage, stage + 1)
            taps.append(net.tap(h))
        final, f = net.tail(h, len(taps)) if taps else net.features(x)
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
    # a stage may give tokens (B, N, D), of which nobody takes a map
    maps = tuple(MapSpec(*t.shape[1:]) if t.ndim == 4 else MapSpec(t.shape[-1], 0, 0) for t in (*taps, f))
    return Probe(MapSpec(*f.shape[1:]), maps if taps else (), z.shape[1])


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
