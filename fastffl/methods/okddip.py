"""okddip: auxiliary peers attend to each other and learn from what each of them makes of all; a leader learns from their mean.

    A_ab = softmax_b((W_L h_a) . (W_E h_b))      t_a = sum_b A_ab z_b      h: GAP of the last maps
    L = CE(z_0) + sum_a CE(z_a) + w(e) [ sum_a KL_T(t_a -> z_a) + KL_T(mean_a z_a -> z_0) ]      T = 3
Teachers are not detached: W_L and W_E learn through t_a alone.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UsageError
from ..fusion import Attend, pooled
from ..recipe import MethodConfig
from ..values import CohortSpec, Edge, Graph, Peers
from ._base import Method


class OKDDip(Method):
    name = "okddip"
    min_peers = 3
    share = True

    class Config(MethodConfig):
        name: Literal["okddip"] = "okddip"
        T: float = Field(3.0, gt=0)
        """temperature"""
        detach: Literal["nothing", "attention_only"] = "nothing"
        """nothing: gradients flow into all teachers (the code's); attention_only: into the attention weights, not the peers"""
        eps: float = Field(0.0, ge=0)
        """added to the teachers' probabilities (official code: 1e-7)"""

    def __init__(self, config: Config, spec: CohortSpec):
        super().__init__(config, spec)
        widths = {m.channels for m in spec.maps[1:]}
        if len(widths) > 1:
            raise UsageError(f"method okddip attends over maps of equal width, the peers but p0 have {sorted(widths)} channels")
        self.flows = config.detach == "nothing"
        self.attend = Attend(spec.maps[1].channels)
        lead, *aux = spec.peers
        mixed = tuple(f"t{a[1:]}" for a in aux)
        more: Any = {"T": config.T, "eps": config.eps}
        self.graph = Graph(
            peers=spec.peers,
            made=mixed,
            means={"peers": tuple(aux), "mean": spec.peers},
            hard=dict.fromkeys(spec.peers, 1.0),
            edges=(
                *(Edge(t, a, detach=False, **more) for t, a in zip(mixed, aux, strict=True)),
                Edge("peers", lead, detach=not self.flows, **more),
            ),
            votes=(*spec.peers, "peers", "mean"),
        )

    @classmethod
    def arranged(cls, nets: tuple[str, ...]) -> tuple[tuple[str, ...], MethodConfig]:
        return nets[:1] * max(3, len(nets)), cls.Config()

    def nodes(self, peers: Peers, y: Tensor | None = None) -> dict[str, Tensor]:
        seen = [*zip(peers.maps[1:], peers.z[1:], strict=True)]
        if not self.flows:
            seen = [(f.detach(), z.detach()) for f, z in seen]
        weights = self.attend([pooled(f) for f, _ in seen])
        z = torch.stack([z.float() for _, z in seen], 1)
        mixed = (weights[..., None] * z[:, None]).sum(2)  # autocast would take a matrix product in half precision
        return dict(zip(self.graph.made, mixed.unbind(1), strict=True))
