"""One face for every net: `features(x) -> (final, map)`, `classify(final) -> logits`, and where it can be cut, `stem` and `tail`.

`map` is the last feature map as NCHW, also for NHWC and token models; `final` is what the net's own head wants.
The plain net stays whole inside (`.plain`), so its state_dict is the plain model's and loads there with strict=True.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError


class Backbone(nn.Module):
    """What the cohort knows of a peer. `parts` names the submodules of `plain` that form the stem (empty: can't be cut)."""

    parts: tuple[str, ...] = ()

    def __init__(self, plain: nn.Module, name: str):
        super().__init__()
        self.plain: Any = plain
        self.name = name

    def stem(self, x: Tensor) -> Tensor:
        raise UsageError(f"{self.name} has no stages to share a stem by; use --set nets.share_stem=false")

    def tail(self, h: Tensor) -> tuple[Tensor, Tensor]:
        raise UsageError(f"{self.name} has no stages to share a stem by; use --set nets.share_stem=false")

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.tail(self.stem(x))

    def classify(self, final: Tensor) -> Tensor:
        return self.plain.classify(final)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x)[0])

    def share(self, other: "Backbone") -> None:
        """Use `other`'s stem modules in place of this net's own: one set of weights, still a whole plain net each."""
        for path in self.parts:
            parent, _, leaf = path.rpartition(".")
            self.plain.get_submodule(parent)._modules[leaf] = other.plain.get_submodule(path)


class ZooNet(Backbone):
    """A net of this package: it has `stem`, `tail`, `classify` and `stem_parts` itself."""

    def __init__(self, plain: nn.Module, name: str):
        super().__init__(plain, name)
        self.parts = self.plain.stem_parts

    def stem(self, x: Tensor) -> Tensor:
        return self.plain.stem(x)

    def tail(self, h: Tensor) -> tuple[Tensor, Tensor]:
        f = self.plain.tail(h)
        return f, f


class TimmNet(Backbone):
    """Any timm classification model, uncut: forward_intermediates gives final and map, forward_head the logits."""

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        final, maps = self.plain.forward_intermediates(x, indices=1, norm=True, output_fmt="NCHW")
        return final, maps[0]

    def classify(self, final: Tensor) -> Tensor:
        return self.plain.forward_head(final)


class CutTimmNet(TimmNet):
    """A timm model cut before its last stage."""

    def __init__(self, plain: nn.Module, name: str, cut: "Cut"):
        super().__init__(plain, name)
        self.parts, self._low, self._high = cut

    def stem(self, x: Tensor) -> Tensor:
        return self._low(self.plain, x)

    def tail(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self._high(self.plain, h)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.tail(self.stem(x))


class TappedNet(Backbone):
    """Any other nn.Module (B, channels, H, W) -> (B, classes): the map is what the submodule `tap` returns."""

    def __init__(self, plain: nn.Module, name: str, tap: str | None):
        super().__init__(plain, name)
        self.tap = tap
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


Cut = tuple[tuple[str, ...], Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], tuple[Tensor, Tensor]]]


def _chain(net: Any, paths: tuple[str, ...], x: Tensor) -> Tensor:
    for path in paths:
        x = net.get_submodule(path)(x)
    return x


def timm_cut(net: Any) -> Cut | None:
    """Where a timm model can be cut before its last stage, by the layout of its family; None where it has no stages.

    A guess by attribute names is no proof: `same_when_cut` compares both ways at build time.
    """
    has = dict(net.named_children())
    low: tuple[str, ...]
    stage: tuple[str, ...]
    after: tuple[str, ...] = ()  # what turns the map into `final`

    def inner(name: str) -> tuple[tuple[str, ...], str]:
        names = [f"{name}.{k}" for k, _ in has[name].named_children()]
        return tuple(names[:-1]), names[-1]

    if {"conv1", "layer1", "layer4"} <= set(has):  # ResNet and kin
        low = tuple(k for k in ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3") if k in has)
        stage = ("layer4",)
    elif {"conv_stem", "blocks"} <= set(has):  # EfficientNet, MobileNet
        first, last = inner("blocks")
        low, stage = tuple(k for k in ("conv_stem", "bn1", "act1") if k in has) + first, (last,)
        after = ("conv_head", "bn2") if "bn2" in has else ()
    elif {"stem", "s1", "s4"} <= set(has):  # RegNet
        low, stage = ("stem", "s1", "s2", "s3"), ("s4", "final_conv")
    elif {"stem", "stages"} <= set(has):  # ConvNeXt, RepVGG
        first, last = inner("stages")
        low = ("stem", *first)
        stage = (last, *(k for k in ("norm_pre", "final_conv") if k in has))
    elif {"features", "classifier"} <= set(has) and hasattr(net.features, "transition3"):  # DenseNet
        names = [k for k, _ in net.features.named_children()]
        at = names.index("transition3") + 1
        low = tuple(f"features.{k}" for k in names[:at])
        stage = tuple(f"features.{k}" for k in names[at:])
    elif {"patch_embed", "layers", "norm"} <= set(has):  # Swin: NHWC inside
        first, last = inner("layers")
        return (
            ("patch_embed", *first),
            lambda m, x: _chain(m, ("patch_embed", *first), x),
            lambda m, h: (f := _chain(m, (last, "norm"), h), f.permute(0, 3, 1, 2)),
        )
    else:
        return None

    def high(m: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        f = _chain(m, stage, h)
        return _chain(m, after, f), f

    return low, lambda m, x: _chain(m, low, x), high


@torch.no_grad()
def same_when_cut(net: nn.Module, cut: Cut, x: Tensor) -> bool:
    """Whether cutting changes nothing: map and logits equal to the uncut model's, bit for bit."""
    was = net.training
    net.eval()
    try:
        final, f = TimmNet(net, "").features(x)
        final_cut, f_cut = cut[2](net, cut[1](net, x))
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
