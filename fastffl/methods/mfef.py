"""mfef: FFL with a richer fusion: each peer's map goes through several scales and two attentions before it is fused.

u = fusion(A_1(S_1(F_1)), ..., A_K(S_K(F_K)))      S: multi-scale extraction      A: channel and spatial attention
L = sum_k CE(z_k) + CE(u) + w(e) [ KL_T(mean -> u) + sum_k KL_T(u -> z_k) ]        T = 3
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ..fusion import ConvFusion, DualAttention, MultiScale
from ..recipe import MethodConfig
from ..values import CohortSpec, Edge, Graph, Peers
from ._base import Method


class MFEF(Method):
    name = "mfef"
    min_peers = 2

    class Config(MethodConfig):
        name: Literal["mfef"] = "mfef"
        T: float = Field(3.0, gt=0)
        """temperature of both distillations"""
        groups: int = Field(4, ge=1)
        """groups of channels, each at a larger scale"""
        detach_features: bool = False
        """stop the fused classifier's gradient at the peers' maps"""
        weight_decay: float | None = Field(1e-5, ge=0)
        """of the added modules (FFL's code: 1e-5); none: as the peers"""

    def __init__(self, config: Config, spec: CohortSpec):
        super().__init__(config, spec)
        self.config, p = config, spec.peers
        widths = [m.channels for m in spec.maps]
        self.see = nn.ModuleList([nn.Sequential(MultiScale(d, config.groups), DualAttention(d)) for d in widths])
        self.fuse = ConvFusion(spec.maps, spec.classes)
        self.graph = Graph(
            peers=p,
            made=("fused",),
            means={"mean": p},
            hard=dict.fromkeys((*p, "fused"), 1.0),
            edges=(Edge("mean", "fused", config.T), *(Edge("fused", k, config.T) for k in p)),
            votes=("fused", *p, "mean"),
        )

    def nodes(self, peers: Peers, y: Tensor | None = None) -> dict[str, Tensor]:
        maps = [f.detach() for f in peers.maps] if self.config.detach_features else peers.maps
        return {"fused": self.fuse([see(f) for see, f in zip(self.see, maps, strict=True)])}

    def decay(self) -> float | None:
        return self.config.weight_decay
