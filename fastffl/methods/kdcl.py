"""kdcl: every peer sees its own distortion of the image; a teacher made of all their logits, with the labels' help, teaches all.

    L = sum_k [ CE(z_k) + lambda T^2 KL(p_T(z_t) || p_T(z_k)) ]
naive     z_t = the peer with the least CE on the batch          linear   z_t = sum_k a_k z_k, a on the simplex, least CE
minlogit  z_t[c] = min_k (z_k[c] - z_k[label]), class by class
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..recipe import MethodConfig
from ..values import CohortSpec, Edge, Graph, Needs, Peers
from ._base import Method, shares

ROUNDS = 24  # of the search for the weights of `linear`: within 1e-3 of the least cross-entropy for 2 to 5 peers of any scale


class KDCL(Method):
    name = "kdcl"
    min_peers = 2
    stem = "separate"

    class Config(MethodConfig):
        name: Literal["kdcl"] = "kdcl"
        teacher: Literal["naive", "linear", "minlogit"] = "minlogit"
        """how the target is made of the peers' logits"""
        T: float = Field(2.0, gt=0)
        """temperature"""
        weight: float = Field(1.0, ge=0)
        """lambda, of the distillation"""
        views: bool = True
        """whether every peer sees its own augmentation"""

    def __init__(self, config: Config, spec: CohortSpec):
        super().__init__(config, spec)
        p, self.how = spec.peers, config.teacher
        self.graph = Graph(
            peers=p,
            made=("teacher",),
            means={"mean": p},
            hard=dict.fromkeys(p, 1.0),
            edges=tuple(Edge("teacher", k, config.T, weight=config.weight, ramp=False) for k in p),
            votes=(*p, "mean"),
        )

    @classmethod
    def needs(cls, config: Config, nets: tuple[str, ...]) -> Needs:
        return Needs(views=len(nets) if config.views else 1, unmixed=True)

    @torch.no_grad()
    def nodes(self, peers: Peers, y: Tensor | None = None) -> dict[str, Tensor]:
        if y is None:
            return {}
        z = torch.stack([z.float() for z in peers.z])  # (K, B, C)
        label = F.one_hot(y.clamp(min=0), z.shape[2]).float()
        if self.how == "minlogit":
            return {"teacher": (z - (z * label).sum(2, keepdim=True)).amin(0)}
        share = shares(y)[:, None]
        if self.how == "naive":
            return {"teacher": _best(_mixed(torch.eye(len(z), device=z.device), z), label * share)}
        return {"teacher": _linear(z, label, share)}


def _mixed(a: Tensor, z: Tensor) -> Tensor:
    """(R, K) weights of logits (K, B, C) -> (R, B, C). A matrix product would be in half precision under autocast."""
    return (a[:, :, None, None] * z).sum(1)


def _best(z: Tensor, target: Tensor, of: Tensor | None = None) -> Tensor:
    """That of z (R, B, C), or of what stands beside each, with the least cross-entropy; target (B, C) holds a row's weight."""
    ce = -(z.log_softmax(2) * target).sum((1, 2))
    return (z if of is None else of).index_select(0, ce.argmin()[None])[0]


def _linear(z: Tensor, label: Tensor, share: Tensor) -> Tensor:
    """(B, C): the convex mixture of logits z (K, B, C) with the least cross-entropy. Multiplicative updates of the weights, each
    of the best of some lengths, so that it never gets worse; in the end no peer alone is better."""
    target, corners = label * share, torch.eye(len(z), device=z.device)
    rates = torch.exp2(torch.arange(-8, 8, 2, device=z.device))[:, None]
    a = corners.mean(0)
    for _ in range(ROUNDS):
        slope = ((_mixed(a[None], z)[0].softmax(1) * share - target) * z).sum((1, 2))
        tries = torch.cat([a[None], (a.clamp(min=1e-6).log() - rates * slope).softmax(1)])
        a = _best(_mixed(tries, z), target, tries)
    return _best(_mixed(torch.cat([a[None], corners]), z), target)
