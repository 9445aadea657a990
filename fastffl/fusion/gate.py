"""ONE's gate: the shared stem's output decides, image by image, how much each peer's logits count."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transfer import normed


class Gate(nn.Module):
    """g = softmax(ReLU(BN(Linear(GAP(h))))), (B, D, H, W) -> (B, K); the teacher is sum_k g_k z_k.

    Lan, Zhu and Gong, Knowledge Distillation by On-the-Fly Native Ensemble, 2018; order of layers from its code.
    D K + 3 K parameters: 105 at D = 32, K = 3.
    """

    def __init__(self, channels: int, peers: int):
        super().__init__()
        self.fc = nn.Linear(channels, peers)
        self.bn = nn.BatchNorm1d(peers)

    def weights(self, h: Tensor) -> Tensor:
        return F.relu(normed(self.bn, self.fc(h.mean((2, 3))))).softmax(1)

    def forward(self, h: Tensor, z: Sequence[Tensor]) -> Tensor:
        g = self.weights(h)
        return (g[:, :, None] * torch.stack(tuple(z), 1)).sum(1)
