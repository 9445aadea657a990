"""Peers that attend to each other, and maps that attend to their own channels and places."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..values import MapSpec


class Attend(nn.Module):
    """A[a, b] = softmax_b((W_L h_a) . (W_E h_b)) for every image, from K pooled features (B, D) -> (B, K, K).

    Chen et al., Online Knowledge Distillation with Diverse Peers, 2020; as its code: D -> D/8 without bias, self included, no
    1/sqrt(D).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.left = nn.Linear(channels, max(1, channels // 8), bias=False)
        self.right = nn.Linear(channels, max(1, channels // 8), bias=False)

    def forward(self, h: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(tuple(h), 1)
        return (self.left(stacked).float() @ self.right(stacked).float().mT).softmax(2)


class MultiScale(nn.Module):
    """Channels in `groups`, each but the first through conv 3x3-BN-ReLU after the one before it is added, joined by 1x1-BN-ReLU:
    (B, D, H, W) -> (B, D, H, W), receptive fields growing from group to group. A reconstruction: MFEF's layers are not known."""

    def __init__(self, channels: int, groups: int = 4):
        super().__init__()
        self.widths = [len(part) for part in torch.arange(channels).tensor_split(groups) if len(part)]
        blocks = [_conv(w, w, 3) for w in self.widths[1:]]
        self.blocks, self.join = nn.ModuleList(blocks), _conv(channels, channels, 1)

    def forward(self, f: Tensor) -> Tensor:
        first, *rest = f.split(self.widths, 1)
        made = [first]
        for x, block in zip(rest, self.blocks, strict=True):
            before = made[-1]
            if before.shape[1] > x.shape[1]:  # widths may differ by one
                before = before[:, : x.shape[1]]
            made.append(block(x + before))
        return self.join(torch.cat(made, 1))


class DualAttention(nn.Module):
    """f + s(f) c(f) f: a gate over the channels from their mean and maximum, then one over places (Woo et al., CBAM, 2018)."""

    def __init__(self, channels: int, ratio: int = 16):
        super().__init__()
        inner = max(1, channels // ratio)
        self.channel = nn.Sequential(nn.Linear(channels, inner), nn.ReLU(), nn.Linear(inner, channels))
        self.place = nn.Conv2d(2, 1, 7, 1, 3, bias=False)

    def forward(self, f: Tensor) -> Tensor:
        gate = torch.sigmoid(self.channel(f.mean((2, 3))) + self.channel(f.amax((2, 3))))
        g = f * gate[:, :, None, None]
        place = torch.sigmoid(self.place(torch.cat([g.mean(1, keepdim=True), g.amax(1, keepdim=True)], 1)))
        return f + g * place


class Decoder(nn.Module):
    """Guesses a net's earlier maps from its last one, (B, D, H, W) -> one map per stage before it, deepest first: transposed
    conv 3x3, BN, ReLU each. `still`: with the norms' running statistics, which stay as they are.

    maps   sizes of a net's maps, first to last. Li et al., Distilling a Powerful Student Model via Online KD, as its code.
    """

    def __init__(self, maps: Sequence[MapSpec]):
        super().__init__()
        pairs = list(pairwise(reversed(maps)))
        steps = [max(1, -(-b.height // max(a.height, 1))) for a, b in pairs]  # odd maps were halved upwards
        convs = [
            nn.ConvTranspose2d(a.channels, b.channels, 3, s, 1, output_padding=s - 1, bias=False)
            for (a, b), s in zip(pairs, steps, strict=True)
        ]
        self.convs, self.norms = nn.ModuleList(convs), nn.ModuleList([nn.BatchNorm2d(b.channels) for _, b in pairs])

    def forward(self, f: Tensor, still: bool = False) -> list[Tensor]:
        made = []
        norms: Any = self.norms
        for conv, bn in zip(self.convs, norms, strict=True):
            f = conv(f)
            f = F.batch_norm(f, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps) if still else bn(f)
            made.append(f := F.relu(f))
        return made


def _conv(d: int, out: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(d, out, kernel, 1, kernel // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU())


def pooled(f: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, D): the mean over places."""
    return F.adaptive_avg_pool2d(f, 1).flatten(1)
