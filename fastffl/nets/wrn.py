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
    """(B, channels, S, S) -> (B, classes). The last feature map is (B, 64k, S/4, S/4)."""

    stem_parts = ("conv1", "layer1", "layer2")

    def __init__(self, depth: int, widen: int, classes: int, channels: int = 3):
        super().__init__()
        m, rest = divmod(depth - 4, 6)
        if rest or m < 1:
            raise ValueError(f"wrn depth {depth}: expected 6m+4, for example 16, 28, 40")
        d = 16 * widen
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.layer1 = self._stage(16, d, m, 1)
        self.layer2 = self._stage(d, 2 * d, m, 2)
        self.layer3 = self._stage(2 * d, 4 * d, m, 2)
        self.bn = nn.BatchNorm2d(4 * d)
        self.fc = nn.Linear(4 * d, classes)
        init_convs(self)

    @staticmethod
    def _stage(d_in: int, d: int, m: int, stride: int) -> nn.Sequential:
        return nn.Sequential(WideBlock(d_in, d, stride), *[WideBlock(d, d, 1) for _ in range(m - 1)])

    def stem(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.conv1(x)))

    def tail(self, h: Tensor) -> Tensor:
        return norm_relu(self.bn, self.layer3(h))

    def classify(self, f: Tensor) -> Tensor:
        return self.fc(f.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.tail(self.stem(x)))
