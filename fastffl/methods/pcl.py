"""pcl: every peer sees its own augmentation; a classifier on all their features teaches them, and so does each other's average.

z_E = W [e_1; ...; e_m] + b      e_k: GAP of peer k's map      ema_j: peer j of the moving average of the whole cohort
L = CE(z_E) + sum_k { CE(z_k) + w(e) [ KL_T(z_E -> z_k) + 1/(m-1) sum_{j != k} KL_T(ema_j -> z_k) ] }      T = 3
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..fusion import pooled
from ..recipe import MethodConfig
from ..values import CohortSpec, Edge, Graph, Needs, Peers
from ._base import Method


class PCL(Method):
    name = "pcl"
    min_peers = 2
    stem = "shared"
    share = True

    class Config(MethodConfig):
        name: Literal["pcl"] = "pcl"
        T: float = Field(3.0, gt=0)
        """temperature"""
        decay: float = Field(0.999, ge=0, lt=1)
        """of the moving average, reached after as many steps as it needs"""
        joint_bn: bool = False
        """whether the stem normalises all views together; no: each view by its own statistics"""

    def __init__(self, config: Config, spec: CohortSpec):
        super().__init__(config, spec)
        p = spec.peers
        averaged = {f"ema{n}": n for n in range(len(p))}
        self.fc = nn.Linear(sum(m.channels for m in spec.maps), spec.classes)
        mates = [(a, k) for n, k in enumerate(p) for a, j in averaged.items() if j != n]
        self.graph = Graph(
            peers=p,
            made=("ens", *averaged),
            means={"mean": p},
            hard=dict.fromkeys((*p, "ens"), 1.0),
            edges=(
                *(Edge("ens", k, config.T) for k in p),
                *(Edge(a, k, config.T, weight=1 / (len(p) - 1)) for a, k in mates),
            ),
            copies=averaged,
            votes=("ema0", *p, "ens", *list(averaged)[1:], "mean"),
        )

    @classmethod
    def needs(cls, config: Config, nets: tuple[str, ...]) -> Needs:
        return Needs(views=len(nets), joint=config.joint_bn, average=config.decay)

    def nodes(self, peers: Peers, y: Tensor | None = None) -> dict[str, Tensor]:
        assert peers.teacher is not None
        ens = self.fc(torch.cat([pooled(f) for f in peers.maps], 1))
        return {"ens": ens, **dict(zip(self.graph.copies, peers.teacher.z, strict=True))}
