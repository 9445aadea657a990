"""dualnet: two nets see complementary things; a classifier on the mean of their maps is what counts. Labels only.

    L = CE(u) + a [CE(z_0) + CE(z_1)]      u = fc(GAP((F_0 + F_1) / 2))      shipped: u + e (z_0 + z_1)
iterative: p0 alone; then p1 beside a p0 that stands still, u begun from p0's classifier; then u's classifier alone.
"""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..fusion import MeanFusion
from ..recipe import MethodConfig, Recipe
from ..values import CohortSpec, Graph, Peers
from ._base import Method
from ._teachers import alone, run_before


class DualNet(Method):
    name = "dualnet"
    min_peers = max_peers = 2
    stem = "separate"
    alike = True

    class Config(MethodConfig):
        name: Literal["dualnet"] = "dualnet"
        schedule: Literal["joint", "iterative"] = "joint"
        """joint: one run; iterative: the paper's, three runs one after the other"""
        phase: Literal["last", "second"] = "last"
        """of the iterative schedule; its earlier runs are made from the last"""
        aux: float | None = Field(None, ge=0)
        """a, weight of the nets' own classifiers; none: 1 joint, 0.3 iterative (the code's)"""
        own: float = Field(0.3, ge=0)
        """e, share of the nets' own classifiers in what is shipped (the code's 0.3)"""

    def __init__(self, config: Config, spec: CohortSpec):
        super().__init__(config, spec)
        widths = [m.channels for m in spec.maps]
        if len(set(widths)) > 1:
            raise UsageError(
                f"method dualnet averages maps of equal width, those of {' and '.join(spec.nets)} have {widths[0]} and "
                f"{widths[1]} channels; name two nets of one width with --model A,A"
            )
        self.own, p = config.own, spec.peers
        joint = config.schedule == "joint"
        aux = (1.0 if joint else 0.3) if config.aux is None else config.aux
        self.fixed = () if joint else (0,) if config.phase == "second" else (0, 1)
        self.fuse = MeanFusion(spec.maps, spec.classes)
        self.graph = Graph(
            peers=p,
            made=("fused", "dual"),
            means={"mean": p},
            hard={k: aux for n, k in enumerate(p) if n not in self.fixed} | {"fused": 1.0},
            votes=("dual", *p, "fused", "mean"),
        )

    @classmethod
    def earlier(cls, recipe: Recipe) -> tuple[Recipe, ...]:
        config: Any = recipe.method
        if config.schedule == "joint":
            return ()
        second = config.model_copy(update={"phase": "second"})
        return alone(recipe, recipe.nets.names[:1]), run_before(recipe, recipe.nets.names, second, 2)

    def inherit(self, cohort: Any, teacher: Any, before: Any) -> None:
        if len(before.cohort.nets) == 2:
            cohort.load_state_dict(before.cohort.state_dict())
            self.load_state_dict(before.method.state_dict())
            return
        first = before.cohort.nets[0].plain
        cohort.nets[0].plain.load_state_dict(first.state_dict())
        heads = [m for m in first.modules() if isinstance(m, nn.Linear) and m.weight.shape == self.fuse.fc.weight.shape]
        if heads:
            self.fuse.fc.load_state_dict(heads[-1].state_dict(), strict=False)

    def nodes(self, peers: Peers, y: Tensor | None = None) -> dict[str, Tensor]:
        u = self.fuse(peers.maps)
        return {"fused": u, "dual": u + self.own * (peers.z[0] + peers.z[1])}
