"""Feature fusion: K last feature maps in, the fused classifier's logits out.

    F = concat_ch(align(F_k))      A = ReLU(BN(DW3x3(F)))      F_f = ReLU(BN(PW1x1(A)))      u = fc(GAP(F_f))

Kim et al., Feature Fusion Learning (arXiv 1904.09058), as in the official code, for K >= 2 and any widths.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastffl_kernels._launch import Norm
from fastffl_kernels.fuse_conv import fuse_conv

from ..errors import UsageError
from ..values import MapSpec

Align = Literal["auto", "none", "adaptive_avg", "interpolate", "conv"]
ALIGNMENTS = get_args(Align)


class AlignMaps(nn.Module):
    """Bring K maps to the smallest height and width among them, (B, D_k, H_k, W_k) -> (B, D_k, H, W).

    auto          adaptive_avg where the sizes differ, nothing where they are equal
    none          refuse unequal sizes
    adaptive_avg  average pooling          interpolate  bilinear          conv  strided 3x3 + BN + ReLU, then average

    The grid is that of the maps given, not of those it was built for: images may grow while training goes on. Which maps have
    a convolution, and its stride, is settled when it is built.
    """

    def __init__(self, maps: Sequence[MapSpec], how: Align):
        super().__init__()
        self.how = how
        sizes = [(m.height, m.width) for m in maps]
        rows, columns = self._grid(sizes)
        convs = []
        for m in maps:
            if how == "conv" and (m.height, m.width) != (rows, columns):
                stride = max(1, m.height // rows)
                conv = nn.Conv2d(m.channels, m.channels, 3, stride, 1, bias=False)
                convs.append(nn.Sequential(conv, nn.BatchNorm2d(m.channels), nn.ReLU()))
            else:
                convs.append(nn.Sequential())
        self.convs = nn.ModuleList(convs)

    def _grid(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """The common height and width. UsageError where maps of these sizes are not to be aligned."""
        grid = min(h for h, _ in sizes), min(w for _, w in sizes)
        if self.how == "none" and any(size != grid for size in sizes):
            shown = ", ".join(f"{h}x{w}" for h, w in sizes)
            raise UsageError(f"the peers' maps are {shown}; --set method.align=adaptive_avg brings them to one size")
        return grid

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        grid = self._grid([(f.shape[2], f.shape[3]) for f in maps])
        out = []
        for f, conv in zip(maps, self.convs, strict=True):
            f = conv(f)
            if (f.shape[2], f.shape[3]) != grid:
                if self.how == "interpolate":
                    f = F.interpolate(f, grid, mode="bilinear", align_corners=False, antialias=True)
                else:
                    f = F.adaptive_avg_pool2d(f, grid)
            out.append(f)
        return out


def drawn(part: nn.Module) -> None:
    """Draw a module's convolutions as the official codes of FFL and FFSD do: N(0, sqrt(2 / (k k C_out))), a depthwise one with
    C_out = all channels."""
    for conv in part.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


class ConvFusion(nn.Module):
    """The paper's fusion module. `width` is the fused map's channels; None: the widest peer's. Parameters at K = 2,
    64 channels, 100 classes: 16,228."""

    def __init__(self, maps: Sequence[MapSpec], classes: int, width: int | None = None, align: Align = "auto"):
        super().__init__()
        d = sum(m.channels for m in maps)
        width = width or max(m.channels for m in maps)
        self.align = AlignMaps(maps, align)
        self.dw = nn.Conv2d(d, d, 3, 1, 1, groups=d, bias=False)
        self.bn1 = nn.BatchNorm2d(d)
        self.pw = nn.Conv2d(d, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)
        drawn(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        aligned = self.align(maps)
        if not self._as_built(aligned):
            return self.fc(self.fused(aligned).mean((2, 3)))
        norms, counts = [], []
        for bn in (self.bn1, self.bn2):
            assert bn.momentum is not None and bn.running_mean is not None and bn.num_batches_tracked is not None
            counts.append(bn.num_batches_tracked)
            norms.append(Norm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.momentum, bn.eps))
        if self.training:
            torch._foreach_add_(counts, 1)
        weights = self.dw.weight, norms[0], self.pw.weight, norms[1], self.fc.weight, self.fc.bias
        return fuse_conv(tuple(aligned), *weights, training=self.training)

    def fused(self, aligned: Sequence[Tensor]) -> Tensor:
        """The fused map, (B, width, H, W), of maps of one size: for who needs more than the logits."""
        a = F.relu(self.bn1(self.dw(torch.cat(tuple(aligned), 1))), inplace=True)
        return F.relu(self.bn2(self.pw(a)), inplace=True)

    def _as_built(self, maps: Sequence[Tensor]) -> bool:
        """Whether the parts still are what __init__ made: one call may stand for them. Not where a user replaced, froze,
        hooked or parametrised one, or where the maps or weights have several types."""
        kinds = (
            (self.dw, nn.Conv2d),
            (self.pw, nn.Conv2d),
            (self.bn1, nn.BatchNorm2d),
            (self.bn2, nn.BatchNorm2d),
            (self.fc, nn.Linear),
        )
        for part, kind in kinds:
            hooks = part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
            if type(part) is not kind or hooks or part.weight is None or part.weight.dtype not in (maps[0].dtype, torch.float32):
                return False
        for bn in (self.bn1, self.bn2):
            if bn.momentum is None or bn.running_mean is None or bn.training != self.training:
                return False
        return all(m.dtype == maps[0].dtype and m.shape[2:] == maps[0].shape[2:] for m in maps)


class MeanFusion(nn.Module):
    """The plain fusion of the ablation (FFL slides, cases B and D; DualNet): average of equal maps, one classifier."""

    def __init__(self, maps: Sequence[MapSpec], classes: int, align: Align = "auto"):
        super().__init__()
        widths = [m.channels for m in maps]
        if len(set(widths)) > 1:
            raise UsageError(f"method.fusion=mean averages maps of equal width, these have {widths}; use method.fusion=dwpw")
        self.align = AlignMaps(maps, align)
        self.fc = nn.Linear(widths[0], classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        aligned = self.align(maps)
        return self.fc(sum(aligned[1:], aligned[0]).mean((2, 3)) / len(aligned))
