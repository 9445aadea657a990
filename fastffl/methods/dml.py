"""dml: every peer teaches every other.   L_k = CE(z_k) + 1/(K-1) sum_{l != k} KL_T(z_l -> z_k)   T = 1, no ramp.

All peers learn at once from one batch (the paper's algorithm updates them in turn); teachers are detached.
With T = 3 the edges carry T^2, the setting of the sibling methods.
"""

from typing import Literal

from pydantic import Field

from ..recipe import MethodConfig
from ..values import CohortSpec, Edge, Graph
from ._base import Method


class DML(Method):
    name = "dml"
    min_peers = 2

    class Config(MethodConfig):
        name: Literal["dml"] = "dml"
        T: float = Field(1.0, gt=0)
        """temperature (the paper: 1)"""
        ramp: bool = False
        """whether the distillation weight ramps up (the paper: no)"""

    def __init__(self, config: Config, spec: CohortSpec):
        super().__init__(config, spec)
        p = spec.peers
        pairs = [(a, b) for b in p for a in p if a != b]
        self.graph = Graph(
            peers=p,
            means={"mean": p},
            hard=dict.fromkeys(p, 1.0),
            edges=tuple(Edge(a, b, config.T, weight=1 / (len(p) - 1), ramp=config.ramp) for a, b in pairs),
            votes=(*p, "mean"),
        )
