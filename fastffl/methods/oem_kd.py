"""oem-kd: one net at several widths on a common base; the mean of all teaches all, the widest one's maps teach the narrow ones.

L = a sum_k CE(z_k) + g sum_k T^2 KL(p_T(mean z) || p_T(z_k)) + b sum_{l != w} sum_s mean (F_w^s - A_l^s(F_l^s))^2
a = 0.7, b = g = 0.15, T = 2, no ramp; F^s: output of private stage s, that of the widest net w detached; A: 1x1 adapters.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..fusion import adapter
from ..nets import ZOO, known
from ..recipe import MethodConfig
from ..values import CohortSpec, Edge, Graph, Needs, Peers
from ._base import Method, Terms, shares


class OEMKD(Method):
    name = "oem-kd"
    min_peers = 2
    stem = "shared"
    share = True

    class Config(MethodConfig):
        name: Literal["oem-kd"] = "oem-kd"
        T: float = Field(2.0, gt=0)
        """temperature"""
        hard: float = Field(0.7, ge=0)
        """a, weight of the labels"""
        maps: float = Field(0.15, ge=0)
        """b, weight of the maps"""
        soft: float = Field(0.15, ge=0)
        """g, weight of the mean's predictions"""

    def __init__(self, config: Config, spec: CohortSpec):
        super().__init__(config, spec)
        p = spec.peers
        self.widest = max(range(len(p)), key=lambda k: spec.maps[k].channels)  # the first of equals
        wide, self.narrow = spec.taps[self.widest], [k for k in range(len(p)) if k != self.widest]
        self.adapters = nn.ModuleList(
            [nn.ModuleList([adapter(m, w) for m, w in zip(spec.taps[k], wide, strict=True)]) for k in self.narrow]
        )
        self.graph = Graph(
            peers=p,
            means={"mean": p},
            hard=dict.fromkeys(p, config.hard),
            edges=tuple(Edge("mean", k, config.T, weight=config.soft, ramp=False) for k in p),
            extra={f"maps/{p[k]}": config.maps for k in self.narrow},
            votes=(*p, "mean"),
        )

    @classmethod
    def needs(cls, config: Config, nets: tuple[str, ...]) -> Needs:
        return Needs(private=3, taps=True)

    @classmethod
    def shares(cls, nets: tuple[str, ...], asked: bool | None) -> bool:
        return len({n.partition("@")[0] for n in nets}) == 1 if asked is None else asked

    @classmethod
    def arranged(cls, nets: tuple[str, ...]) -> tuple[tuple[str, ...], MethodConfig]:
        base, _, share = known(nets[0]).partition("@")
        width, count = float(share or 1), 5
        if base not in ZOO or width < count / 16:
            raise UsageError(
                f"method oem-kd trains one net at five widths, down to a fifth of its own, and {nets[0]} does not come in these; "
                f"choose one of {', '.join(ZOO)} with --model"
            )
        return (nets[0], *(f"{base}@{width * (count - k) / count:g}" for k in range(1, count))), cls.Config()

    def extra(self, peers: Peers, y: Tensor, ids: Tensor | None) -> Terms:
        share = shares(y)
        wide = [f.detach().float() for f in peers.taps[self.widest]]
        values = {}
        for k, adapters in zip(self.narrow, self.adapters, strict=True):
            trios = zip(wide, peers.taps[k], adapters, strict=True)  # type: ignore[call-overload]
            parts = [((w - a(f).float()).square().mean((1, 2, 3)) * share).sum() for w, f, a in trios]
            values[f"maps/{self.graph.peers[k]}"] = sum(parts[1:], parts[0])
        return Terms(values)
