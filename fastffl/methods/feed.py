"""feed: trained nets stand still, and a translator each turns the peer's last map into theirs.

    L = CE(z_k) + beta sum_n mean | x_n / ||x_n|| - NTL_n(F_k) / ||NTL_n(F_k)|| |        x_n: map of teacher n
parallel: several teachers at once. sequential: a chain, each net taught by the one before it, all of one architecture.
"""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from ..fusion import sized, translator, unit
from ..recipe import MethodConfig, Recipe
from ..values import CohortSpec, Graph, Needs, Peers
from ._base import Method, Terms, shares
from ._teachers import TaughtConfig, alone, run_before


class FEED(Method):
    name = "feed"

    class Config(TaughtConfig):
        name: Literal["feed"] = "feed"
        schedule: Literal["parallel", "sequential"] = "parallel"
        """parallel: pFEED, several teachers; sequential: sFEED, a chain of generations"""
        count: int = Field(3, ge=1)
        """parallel: teachers that are trained first where none are named; sequential: generations before the last"""
        beta: float = Field(500.0, ge=0)
        """weight of the maps"""

    def __init__(self, config: Config, spec: CohortSpec):
        super().__init__(config, spec)
        self.translators = nn.ModuleList([nn.ModuleList([translator(m, t) for t in spec.teachers]) for m in spec.maps])
        p = spec.peers
        self.graph = Graph(peers=p, hard=dict.fromkeys(p, 1.0), extra={f"feed/{k}": config.beta for k in p}, votes=p)

    @classmethod
    def needs(cls, config: Config, nets: tuple[str, ...]) -> Needs:
        count = config.count if config.schedule == "parallel" else 1
        return Needs(frozen=config.teacher_nets or nets[:1] * count)

    @classmethod
    def arranged(cls, nets: tuple[str, ...]) -> tuple[tuple[str, ...], MethodConfig]:
        return nets[:1], cls.Config()

    @classmethod
    def earlier(cls, recipe: Recipe) -> tuple[Recipe, ...]:
        config: Any = recipe.method
        first = alone(recipe, cls.needs(config, recipe.nets.names).frozen)
        if config.schedule == "parallel":
            return (first,)
        return first, *(run_before(recipe, first.nets.names, config, k) for k in range(2, config.count + 1))

    def extra(self, peers: Peers, y: Tensor, ids: Tensor | None) -> Terms:
        values, share = {}, shares(y)
        for k, f, translators in zip(self.graph.peers, peers.maps, self.translators, strict=True):
            pairs = zip(peers.teacher.maps, translators, strict=True)  # type: ignore[union-attr, call-overload]
            parts = [((unit(sized(x, f)) - unit(ntl(f))).abs().mean(1) * share).sum() for x, ntl in pairs]
            values[f"feed/{k}"] = sum(parts[1:], parts[0])
        return Terms(values)
