"""Wide ResNet WRN-6m+4-k (Zagoruyko and Komodakis 2016): pre-activation basic blocks, widths 16k/32k/64k.

The feature map for fusion is taken after the final BN and ReLU.
"""

from torch import Tensor, nn

from .fused_norm import norm_relu, norm_relu_fork
from .resnet import init_convs


class WideBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv + shortcut; the shortcut of a changing shape starts after the first BN-ReLU."""

    def __init__(self, d_in: int, d: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(d_in)
        self.conv1 = nn.Conv2d(d_in, d, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(d)
        self.conv2 = nn.Conv2d(d, d, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(d_in, d, 1, stride, bias=False) if d_in != d or stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        a, skip = norm_relu_fork(self.bn1, x) if self.shortcut is not None else (norm_relu(self.bn1, x), x)
        h = self.conv2(norm_relu(self.bn2, self.conv1(a)))
        h += skip if self.shortcut is None else self.shortcut(skip)  # in place: backward of conv does not need its output
        return h


class WRN(nn.Module):
    """(B, channels, S, S) -> (B, classes). The last feature map is (B, 64k, S/4, S/4). `width` as for ResNet."""

    stages = (("conv1",), ("layer1",), ("layer2",), ("layer3", "bn"))

    def __init__(self, depth: int, widen: int, classes: int, channels: int = 3, *, width: float = 1.0):
        super().__init__()
        m, rest = divmod(depth - 4, 6)
        if rest or m < 1:
            raise ValueError(f"wrn depth {depth}: expected 6m+4, for example 16, 28, 40")
        d1, d2, d3 = (int(d * widen * width) for d in (16, 32, 64))
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.layer1 = self._stage(16, d1, m, 1)
        self.layer2 = self._stage(d1, d2, m, 2)
        self.layer3 = self._stage(d2, d3, m, 2)
        self.bn = nn.BatchNorm2d(d3)
        self.fc = nn.Linear(d3, classes)
        init_convs(self)

    @staticmethod
    def _stage(d_in: int, d: int, m: int, stride: int) -> nn.Sequential:
        return nn.Sequential(WideBlock(d_in, d, stride), *[WideBlock(d, d, 1) for _ in range(m - 1)])

    def between(self, h: Tensor, first: int, last: int) -> Tensor:
        """Stages `first` to `last` - 1 of what comes before them."""
        for stage in (self.conv1, self.layer1, self.layer2, self.layer3)[first:last]:
            h = stage(h)
        return norm_relu(self.bn, h) if last == 4 else h

    def classify(self, f: Tensor) -> Tensor:
        return self.fc(f.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.between(x, 0, 4))
