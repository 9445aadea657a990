"""cl-ilr: heads on a tree of shared layers; each head learns from the mean of the others.

    L = sum_k [ b CE(z_k) + (1 - b) T^2 KL(p_T(mean_{l != k} z_l) || p_T(z_k)) ]      b = 0.5, T = 2, no ramp
Where the tree branches, backward divides the summed gradient by the number of branches.
"""

from typing import Literal

from pydantic import Field

from ..recipe import MethodConfig
from ..values import CohortSpec, Edge, Graph, Needs
from ._base import Method


class CLILR(Method):
    name = "cl-ilr"
    min_peers = 2
    stem = "shared"
    share = True

    class Config(MethodConfig):
        name: Literal["cl-ilr"] = "cl-ilr"
        T: float = Field(2.0, gt=0)
        """temperature"""
        b: float = Field(0.5, ge=0, le=1)
        """weight of the labels; the other heads have 1 - b"""
        ramp: bool = False
        """whether the distillation weight ramps up (the paper: no)"""

    def __init__(self, config: Config, spec: CohortSpec):
        super().__init__(config, spec)
        p = spec.peers
        rest = {f"rest{n}": tuple(k for k in p if k != p[n]) for n in range(len(p))}
        self.graph = Graph(
            peers=p,
            means={**rest, "mean": p},
            hard=dict.fromkeys(p, config.b),
            edges=tuple(Edge(r, k, config.T, weight=1 - config.b, ramp=config.ramp) for r, k in zip(rest, p, strict=True)),
            votes=(*p, "mean"),
        )

    @classmethod
    def needs(cls, config: Config, nets: tuple[str, ...]) -> Needs:
        return Needs(private=2, tree=tuple(k - k % 2 for k in range(len(nets))), rescale=True)
