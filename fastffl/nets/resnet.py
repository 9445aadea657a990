"""CIFAR ResNet-6m+2 of basic blocks (He et al. 2016, section 4.2), as the official FFL code builds it.

3x3 stem of 16, three stages of m blocks at 16/32/64 channels, 1x1-conv + BN shortcut where the shape changes.
"resnet110" is the basic-block net (1.74 M parameters at 100 classes), not the bottleneck nets other papers call so.
"""

from typing import Any

from torch import Tensor, nn

from .fused_norm import hooked, norm_relu, norm_relu_fork


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN + shortcut, ReLU. `skip` is x once more, for the shortcut; with `fork` what comes out comes so too."""

    def __init__(self, d_in: int, d: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(d_in, d, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(d)
        self.conv2 = nn.Conv2d(d, d, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(d)
        self.downsample = None
        if stride != 1 or d_in != d:
            self.downsample = nn.Sequential(nn.Conv2d(d_in, d, 1, stride, bias=False), nn.BatchNorm2d(d))

    def forward(self, x: Tensor, skip: Tensor | None = None, fork: bool = False) -> Any:
        skip = x if skip is None else skip
        h = self.conv2(norm_relu(self.bn1, self.conv1(x)))
        residual = skip if self.downsample is None else self.downsample(skip)
        return (norm_relu_fork if fork else norm_relu)(self.bn2, h, residual)


def through(stages: tuple[nn.Module, ...], x: Tensor, skip: Tensor) -> Tensor:
    """Stages one after the other. Between blocks a map goes on in two, so that the gradients of its two uses are added in a
    norm's backward; where somebody listens to a stage or a block, or put something else in its place, it goes on in one."""
    blocks = [block for stage in stages if type(stage) is nn.Sequential for block in stage]
    if any(type(s) is not nn.Sequential or hooked(s) for s in stages) or any(type(b) is not Block or hooked(b) for b in blocks):
        for stage in stages:
            x = stage(x)
        return x
    for block in blocks[:-1]:
        x, skip = block(x, skip, fork=True)
    return blocks[-1](x, skip)


class ResNet(nn.Module):
    """(B, channels, S, S) -> (B, classes). The last feature map is (B, 64, S/4, S/4), after its ReLU.

    width   share of the channels in the three stages, cut to whole ones; conv1 keeps its 16 (OEM-KD's compressed students)
    """

    stages = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",))

    def __init__(self, depth: int, classes: int, channels: int = 3, *, width: float = 1.0):
        super().__init__()
        m, rest = divmod(depth - 2, 6)
        if rest or m < 1:
            raise ValueError(f"resnet depth {depth}: expected 6m+2, for example 20, 32, 56, 110")
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        d1, d2, d3 = (int(d * width) for d in (16, 32, 64))
        self.layer1 = self._stage(16, d1, m, 1)
        self.layer2 = self._stage(d1, d2, m, 2)
        self.layer3 = self._stage(d2, d3, m, 2)
        self.fc = nn.Linear(d3, classes)
        init_convs(self)

    @staticmethod
    def _stage(d_in: int, d: int, m: int, stride: int) -> nn.Sequential:
        return nn.Sequential(Block(d_in, d, stride), *[Block(d, d, 1) for _ in range(m - 1)])

    def between(self, h: Tensor, first: int, last: int) -> Tensor:
        """Stages `first` to `last` - 1 of what comes before them."""
        inner = (self.layer1, self.layer2, self.layer3)[max(first - 1, 0) : last - 1]
        if first > 0:
            return through(inner, h, h)
        h = self.conv1(h)
        return through(inner, *norm_relu_fork(self.bn1, h)) if inner else norm_relu(self.bn1, h)

    def classify(self, f: Tensor) -> Tensor:
        return self.fc(f.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.between(x, 0, 4))


def init_convs(net: nn.Module) -> None:
    """Every conv N(0, sqrt(2 / (k k C_out))), BN 1 and 0, Linear as torch has it: the initialisation of FFL and ONE."""
    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
