"""one: a gate on the shared stem mixes the peers' logits into the teacher of all of them.

    z_g = sum_k g_k(h) z_k        L = sum_k CE(z_k) + CE(z_g) + w(e) sum_k KL_T(z_g -> z_k)
The teacher is detached, so the gate learns through CE(z_g) alone.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from ..fusion import Gate
from ..recipe import MethodConfig
from ..values import CohortSpec, Edge, Graph, Peers
from ._base import Method


class ONE(Method):
    name = "one"
    min_peers = 2
    stem = "shared"
    share = True

    class Config(MethodConfig):
        name: Literal["one"] = "one"
        T: float = Field(3.0, gt=0)
        """temperature"""
        ramp: bool = True
        """whether the distillation weight ramps up (the code: yes, the paper: no)"""
        eps: float = Field(0.0, ge=0)
        """added to the teacher's probabilities (official code: 1e-7)"""

    def __init__(self, config: Config, spec: CohortSpec):
        super().__init__(config, spec)
        assert spec.stem is not None
        p = spec.peers
        self.gate = Gate(spec.stem.channels, len(p))
        self.graph = Graph(
            peers=p,
            made=("gate",),
            means={"mean": p},
            hard=dict.fromkeys((*p, "gate"), 1.0),
            edges=tuple(Edge("gate", k, config.T, ramp=config.ramp, eps=config.eps) for k in p),
            votes=(*p, "gate", "mean"),
        )

    def nodes(self, peers: Peers, y: Tensor | None = None) -> dict[str, Tensor]:
        assert peers.stem is not None
        return {"gate": self.gate(peers.stem, peers.z)}
