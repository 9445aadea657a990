"""loo: each peer learns from the mean of the others.   L = sum_k [ CE(z_k) + T^2 KL(p_T(mean_{l != k} z_l) || p_T(z_k)) ]"""

from typing import Literal

from pydantic import Field

from fastffl.methods import Method
from fastffl.recipe import MethodConfig
from fastffl.values import CohortSpec, Edge, Graph


class LeaveOneOut(Method):
    name = "loo"
    paper = "an example of a method in a package of its own"
    year = 2026
    summary = "Each peer learns from the labels and from the mean of the others. Nothing is shared."
    status = "reconstructed"
    deviations = "There is no source: it is an example."
    min_peers = 2

    class Config(MethodConfig):
        name: Literal["loo"] = "loo"
        T: float = Field(3.0, gt=0)
        """temperature"""

    def __init__(self, config: Config, spec: CohortSpec):
        super().__init__(config, spec)
        p = spec.peers
        rest = {f"rest{k[1:]}": tuple(l for l in p if l != k) for k in p}
        self.graph = Graph(
            peers=p,
            means={**rest, "mean": p},
            hard=dict.fromkeys(p, 1.0),
            edges=tuple(Edge(r, k, config.T) for r, k in zip(rest, p, strict=True)),
            votes=(*p, "mean"),
        )
