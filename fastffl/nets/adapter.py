"""One face for every net: `features(x) -> (final, map)`, `classify(final) -> logits`, and where it has stages `between`, `tail`.

`map` is the last feature map as NCHW, also for NHWC and token models; `final` is what the net's own head wants.
The plain net stays whole inside (`.plain`), so its state_dict is the plain model's and loads there with strict=True.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UsageError

Stages = tuple[tuple[str, ...], ...]


class Backbone(nn.Module):
    """What the cohort knows of a peer. `stages` names the submodules of `plain` that form each of them (none: can't be cut)."""

    stages: Stages = ()

    def __init__(self, plain: nn.Module, name: str):
        super().__init__()
        self.plain: Any = plain
        self.name = name

    def between(self, h: Tensor, first: int, last: int) -> Tensor:
        """What comes out of stages `first` to `last` - 1, the last one of all left out."""
        raise UsageError(f"{self.name} has no stages to share a stem by; use --set nets.share_stem=false")

    def tail(self, h: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """(final, map) from what stage `first` - 1 gave."""
        raise UsageError(f"{self.name} has no stages to share a stem by; use --set nets.share_stem=false")

    def tap(self, h: Tensor) -> Tensor:
        """What a stage gave as NCHW."""
        return h

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.tail(x, 0)

    def classify(self, final: Tensor) -> Tensor:
        return self.plain.classify(final)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x)[0])

    def share(self, other: "Backbone", first: int, last: int) -> None:
        """Use `other`'s modules of these stages in place of this net's own: one set of weights, still a whole plain net each."""
        for path in (path for stage in self.stages[first:last] for path in stage):
            parent, _, leaf = path.rpartition(".")
            self.plain.get_submodule(parent)._modules[leaf] = other.plain.get_submodule(path)


class ZooNet(Backbone):
    """A net of this package: it has `stages`, `between` and `classify` itself."""

    def __init__(self, plain: nn.Module, name: str):
        super().__init__(plain, name)
        self.stages = self.plain.stages

    def between(self, h: Tensor, first: int, last: int) -> Tensor:
        return self.plain.between(h, first, last)

    def tail(self, h: Tensor, first: int) -> tuple[Tensor, Tensor]:
        f = self.plain.between(h, first, len(self.stages))
        return f, f


class TimmNet(Backbone):
    """Any timm classification model, uncut: forward_intermediates gives final and map, forward_head the logits."""

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        final, maps = self.plain.forward_intermediates(x, indices=1, norm=True, output_fmt="NCHW")
        return final, maps[0]

    def classify(self, final: Tensor) -> Tensor:
        return self.plain.forward_head(final)


class Cut(NamedTuple):
    """The stages of a timm model, what turns its map into `final`, and whether maps are NHWC inside."""

    stages: Stages
    after: tuple[str, ...] = ()
    nhwc: bool = False


class CutTimmNet(TimmNet):
    """A timm model cut into its stages."""

    def __init__(self, plain: nn.Module, name: str, cut: Cut):
        super().__init__(plain, name)
        self.stages, self._after, self._nhwc = cut

    def between(self, h: Tensor, first: int, last: int) -> Tensor:
        for path in (path for stage in self.stages[first:last] for path in stage):
            h = self.plain.get_submodule(path)(h)
        return h

    def tail(self, h: Tensor, first: int) -> tuple[Tensor, Tensor]:
        f = final = self.between(h, first, len(self.stages))
        for path in self._after:
            final = self.plain.get_submodule(path)(final)
        return final, self.tap(f)

    def tap(self, h: Tensor) -> Tensor:
        return h.permute(0, 3, 1, 2) if self._nhwc else h

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.tail(x, 0)


class TappedNet(Backbone):
    """Any other nn.Module (B, channels, H, W) -> (B, classes): the map is what the submodule `tap` returns."""

    def __init__(self, plain: nn.Module, name: str, tap: str | None):
        super().__init__(plain, name)
        self._seen: Tensor | None = None
        if tap is not None:
            plain.get_submodule(tap).register_forward_hook(self._see)

    def _see(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self._seen = out

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.plain(x)
        f, self._seen = self._seen, None
        return z, z[:, :, None, None] if f is None else f

    def classify(self, final: Tensor) -> Tensor:
        return final


def timm_cut(net: Any) -> Cut | None:
    """The stages of a timm model by the layout of its family; None where it has none.

    A guess by attribute names is no proof: `same_when_cut` compares both ways at build time.
    """
    has = dict(net.named_children())

    def inner(name: str) -> list[tuple[str, ...]]:
        return [(f"{name}.{k}",) for k, _ in has[name].named_children()]

    def present(*names: str) -> tuple[str, ...]:
        return tuple(k for k in names if k in has)

    if {"conv1", "layer1", "layer4"} <= set(has):  # ResNet and kin
        return Cut((present("conv1", "bn1", "act1", "maxpool"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)))
    if {"conv_stem", "blocks"} <= set(has):  # EfficientNet, MobileNet
        return Cut((present("conv_stem", "bn1", "act1"), *inner("blocks")), ("conv_head", "bn2") if "bn2" in has else ())
    if {"stem", "s1", "s4"} <= set(has):  # RegNet
        return Cut((("stem",), ("s1",), ("s2",), ("s3",), ("s4", "final_conv")))
    if {"stem", "stages"} <= set(has):  # ConvNeXt, RepVGG
        *first, last = inner("stages")
        return Cut((("stem",), *first, (*last, *present("norm_pre", "final_conv"))))
    if {"features", "classifier"} <= set(has) and hasattr(net.features, "transition3"):  # DenseNet
        names = [f"features.{k}" for k, _ in net.features.named_children()]
        ends = [k + 1 for k, name in enumerate(names) if "transition" in name]
        return Cut(tuple(tuple(names[a:b]) for a, b in zip([0, *ends], [*ends, len(names)], strict=True)))
    if {"patch_embed", "layers", "norm"} <= set(has):  # Swin
        *first, last = inner("layers")
        return Cut((("patch_embed",), *first, (*last, "norm")), nhwc=True)
    return None


@torch.no_grad()
def same_when_cut(net: nn.Module, cut: Cut, x: Tensor) -> bool:
    """Whether cutting changes nothing: map and logits equal to the uncut model's, bit for bit."""
    was = net.training
    net.eval()
    try:
        final, f = TimmNet(net, "").features(x)
        final_cut, f_cut = CutTimmNet(net, "", cut).features(x)
        return torch.equal(final, final_cut) and torch.equal(f, f_cut)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False  # not the layout its attribute names suggested
    finally:
        net.train(was)


@torch.no_grad()
def find_tap(net: nn.Module, x: Tensor) -> str | None:
    """The submodule that makes the last (B, D, H, W) map with H*W > 1 of a forward pass; None where there is none."""
    found: list[str] = []
    handles = []
    for name, part in net.named_modules():

        def see(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
            if name and isinstance(out, Tensor) and out.ndim == 4 and out.shape[2] * out.shape[3] > 1:
                found.append(name)

        handles.append(part.register_forward_hook(see))
    was = net.training
    try:
        net.eval()(x)
    finally:
        net.train(was)
        for h in handles:
            h.remove()
    return found[-1] if found else None
