"""ffl: the ensemble teaches the fused classifier, the fused classifier teaches each peer.

    L = sum_k CE(z_k) + CE(u) + w(e) [ KL_T(mean -> u)  +  sum_k KL_T(u -> z_k) ]
                                       EKD                 FKD
u = fusion(F_1..F_K) from the peers' last feature maps; these maps are not detached, the teachers are. No 1/K.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from ..fusion import ConvFusion, MeanFusion
from ..fusion.conv import Align
from ..recipe import MethodConfig
from ..values import CohortSpec, Edge, Graph, Peers
from ._base import Method


class FFL(Method):
    name = "ffl"
    min_peers = 2
    share = True

    class Config(MethodConfig):
        name: Literal["ffl"] = "ffl"
        T: float = Field(3.0, gt=0)
        """temperature of both distillations"""
        fusion: Literal["dwpw", "mean"] = "dwpw"
        """dwpw: depthwise 3x3 then pointwise (the paper's); mean: average of the maps (ablation)"""
        ekd: bool = True
        """whether the mean of the peers teaches the fused classifier"""
        fkd: bool = True
        """whether the fused classifier teaches the peers"""
        width: int | None = Field(None, ge=1)
        """channels of the fused map; none: the widest peer's"""
        align: Align = "auto"
        """how maps of unequal size are brought together"""
        detach_features: bool = False
        """stop the fused classifier's gradient at the peers' maps (FFSD does)"""
        weight_decay: float | None = Field(None, ge=0)
        """of the fusion module; none: as the peers (official code: 1e-5)"""
        eps: float = Field(0.0, ge=0)
        """added to the teachers' probabilities (official code: 1e-7)"""

    def __init__(self, config: Config, spec: CohortSpec):
        super().__init__(config, spec)
        self.config = config
        p, mean, fused = spec.peers, "mean", "fused"
        self.fuse = (
            ConvFusion(spec.maps, spec.classes, config.width, config.align)
            if config.fusion == "dwpw"
            else MeanFusion(spec.maps, spec.classes, config.align)
        )
        ekd = [Edge(mean, fused, config.T, eps=config.eps)] if config.ekd else []
        fkd = [Edge(fused, k, config.T, eps=config.eps) for k in p] if config.fkd else []
        self.graph = Graph(
            peers=p,
            made=(fused,),
            means={mean: p},
            hard=dict.fromkeys((*p, fused), 1.0),
            edges=(*ekd, *fkd),
            votes=(fused, *p, mean),
        )

    def nodes(self, peers: Peers, y: Tensor | None = None) -> dict[str, Tensor]:
        maps = [f.detach() for f in peers.maps] if self.config.detach_features else peers.maps
        return {"fused": self.fuse(maps)}

    def decay(self) -> float | None:
        return self.config.weight_decay
