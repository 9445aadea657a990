"""none: every peer learns from the labels alone.   L = sum_k CE(z_k)   The baseline of every table."""

from typing import Literal

from ..recipe import MethodConfig
from ..values import CohortSpec, Graph
from ._base import Method


class Alone(Method):
    name = "none"
    stem = "separate"

    class Config(MethodConfig):
        name: Literal["none"] = "none"

    def __init__(self, config: Config, spec: CohortSpec):
        super().__init__(config, spec)
        p = spec.peers
        mean = {"mean": p} if len(p) > 1 else {}
        self.graph = Graph(peers=p, means=mean, hard=dict.fromkeys(p, 1.0), votes=(*p, *mean))
