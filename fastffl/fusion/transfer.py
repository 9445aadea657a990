"""What brings one net's map into another's space while training (adapters, transfer layers, translators), tells maps apart (the
discriminator) or measures how far apart they are (attention, lengths)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..values import MapSpec


def adapter(given: MapSpec, wanted: MapSpec) -> nn.Module:
    """1x1 convolution, (B, D, H, W) -> (B, D', H, W). Walawalkar, Shen and Savvides, Online Ensemble Model Compression, 2020."""
    return nn.Conv2d(given.channels, wanted.channels, 1)


def transfer(given: MapSpec, channels: int) -> nn.Module:
    """1x1 convolution + BN, nothing where the widths are equal. AFD's T_k; its layers are not published."""
    if given.channels == channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(given.channels, channels, 1, bias=False), nn.BatchNorm2d(channels))


def translator(given: MapSpec, wanted: MapSpec) -> nn.Module:
    """Three 3x3 convolutions, LeakyReLU 0.1 after each, (B, D, H, W) -> (B, D', H, W). FEED's NTL; layers of factor transfer's
    code (Kim, Park and Kwak 2018)."""
    d, out = given.channels, wanted.channels
    widths = ((d, d), (d, out), (out, out))
    return nn.Sequential(*[part for a, b in widths for part in (nn.Conv2d(a, b, 3, 1, 1), nn.LeakyReLU(0.1))])


def sized(f: Tensor, like: Tensor) -> Tensor:
    """f averaged to the height and width of `like`."""
    return f if f.shape[2:] == like.shape[2:] else F.adaptive_avg_pool2d(f, (like.shape[2], like.shape[3]))


def unit(f: Tensor) -> Tensor:
    """(B, ...) -> (B, n) in fp32, each row of length 1."""
    return F.normalize(f.float().flatten(1), dim=1)


def attention(f: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, H W) fp32: mean square over the channels (Zagoruyko and Komodakis 2017)."""
    return f.float().square().mean(1).flatten(1)


def apart(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """() mean squared difference of two batches of vectors or maps, each brought to length 1; share (B,): each sample's part."""
    return ((unit(a) - unit(b)).square().mean(1) * share).sum()


def flipped(f: Tensor) -> tuple[Tensor, Tensor]:
    """Attention turned over above its lowest third, (B, H W), and the map changed by as much, (B, D, H, W). FFSD's code."""
    a = attention(f)
    size, seen = a.norm(dim=1, keepdim=True), F.normalize(a, dim=1)
    low = seen.topk(max(1, seen.shape[1] // 3), largest=False).values[:, -1:]
    wanted = (size / 2 - seen) * torch.sign(seen - low) + size / 2
    change = ((wanted - seen) * size / f.shape[1]).view(-1, 1, *f.shape[2:])
    return wanted, f + change.to(f.dtype)


def normed(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x); of a batch norm by its running statistics where a channel has one value, which has no variance: the last batch
    of an epoch, or a rank's or an accumulation part's share of it, may be one image. Not of one over all ranks."""
    if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d) and layer.training and x.numel() == x.shape[1]:
        bn: Any = layer
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training=False, eps=bn.eps)
    return layer(x)


class Discriminator(nn.Module):
    """(B, D, H, W) -> (B,) in (0, 1), fp32. conv 3x3, BN, LeakyReLU; conv 3x3 stride 2 to 2 D, BN, LeakyReLU; 1x1 to one; mean;
    sigmoid. AFD does not publish its layers; these are ours."""

    def __init__(self, channels: int):
        super().__init__()
        d = channels
        self.layers = nn.Sequential(
            *(nn.Conv2d(d, d, 3, 1, 1, bias=False), nn.BatchNorm2d(d), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(d, 2 * d, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * d), nn.LeakyReLU(0.2)),
            nn.Conv2d(2 * d, 1, 1),
        )

    def forward(self, f: Tensor) -> Tensor:
        for layer in self.layers:
            f = normed(layer, f)
        return torch.sigmoid(f.float().mean((1, 2, 3)))
