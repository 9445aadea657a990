"""oem-kd: one net at several widths on a common base; the mean of all teaches all, the widest one's maps teach the narrow ones.

L = a sum_k CE(z_k) + g sum_k T^2 KL(p_T(mean z) || p_T(z_k)) + b sum_{l >= 1} sum_s mean (F_0^s - A_l^s(F_l^s))^2
a = 0.7, b = g = 0.15, T = 2, no ramp; F^s: output of private stage s, the widest one's detached; A: 1x1 adapters.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ..fusion import adapter
from ..recipe import MethodConfig
from ..values import CohortSpec, Edge, Graph, Needs, Peers
from ._base import Method, Terms


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
        p, wide = spec.peers, spec.taps[0]
        self.adapters = nn.ModuleList(
            [nn.ModuleList([adapter(m, w) for m, w in zip(taps, wide, strict=True)]) for taps in spec.taps[1:]]
        )
        self.graph = Graph(
            peers=p,
            means={"mean": p},
            hard=dict.fromkeys(p, config.hard),
            edges=tuple(Edge("mean", k, config.T, weight=config.soft, ramp=False) for k in p),
            extra={f"maps/{k}": config.maps for k in p[1:]},
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
        base, count = nets[0].partition("@")[0], 5
        return (nets[0], *(f"{base}@{(count - k) / count:g}" for k in range(1, count))), cls.Config()

    def extra(self, peers: Peers, y: Tensor, ids: Tensor | None) -> Terms:
        keep = (y >= 0).float()
        share = keep / keep.sum().clamp(min=1)  # a sample without a label weighs nothing here, too
        wide = [f.detach().float() for f in peers.taps[0]]
        values = {}
        for k, taps, adapters in zip(self.graph.peers[1:], peers.taps[1:], self.adapters, strict=True):
            trios = zip(wide, taps, adapters, strict=True)  # type: ignore[call-overload]
            parts = [((w - a(f).float()).square().mean((1, 2, 3)) * share).sum() for w, f, a in trios]
            values[f"maps/{k}"] = sum(parts[1:], parts[0])
        return Terms(values)
