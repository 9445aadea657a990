"""afd: peers in a ring; each learns its neighbour's predictions and, through a discriminator, to make maps like the neighbour's.

    L_k = CE(z_k) + T^2 KL(p_T(z_{k-1}) || p_T(z_k))                                      the peers' optimizer
    G_k = mean [1 - D_k(T_k(F_k))]^2            for what F_k comes from, and T_k           an Adam of its own
    D_k = mean [1 - D_k(T_{k-1}(F_{k-1}))]^2 + mean D_k(T_k(F_k))^2, maps detached         another
All gradients are taken at one point, then all step. Two peers: each is the other's neighbour.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ..fusion import Discriminator, sized, transfer
from ..recipe import MethodConfig
from ..values import CohortSpec, Edge, Graph, Objective, Peers
from ._base import Below, Method, shares


class AFD(Method):
    name = "afd"
    min_peers = 2
    stem = "separate"

    class Config(MethodConfig):
        name: Literal["afd"] = "afd"
        T: float = Field(3.0, gt=0)
        """temperature"""
        ramp: bool = False
        """whether the distillation weight ramps up"""
        lr: float = Field(2e-5, gt=0)
        """peak rate of the two adversarial optimizers, which follow the recipe's schedule"""
        weight_decay: float = Field(0.0, ge=0)
        """of the two adversarial optimizers"""

    def __init__(self, config: Config, spec: CohortSpec):
        super().__init__(config, spec)
        self.config, p = config, spec.peers
        width = min(m.channels for m in spec.maps)
        self.small = min(range(len(p)), key=lambda n: spec.maps[n].height)
        self.transfers = nn.ModuleList([transfer(m, width) for m in spec.maps])
        self.discriminators = nn.ModuleList([Discriminator(width) for _ in p])
        ring = tuple(Edge(p[n - 1], k, config.T, ramp=config.ramp) for n, k in enumerate(p))
        self.graph = Graph(peers=p, means={"mean": p}, hard=dict.fromkeys(p, 1.0), edges=ring, votes=(*p, "mean"))

    def objectives(self, below: Below) -> tuple[Objective, ...]:
        made = []
        for n, (k, own, tell) in enumerate(zip(self.graph.peers, self.transfers, self.discriminators, strict=True)):
            for name, params in (("generate", (*below(n), *own.parameters())), ("tell", tuple(tell.parameters()))):
                made.append(Objective(f"{name}/{k}", params, self.config.lr, self.config.weight_decay))
        return tuple(made)

    def others(self, peers: Peers, y: Tensor) -> dict[str, Tensor]:
        maps = [t(sized(f, peers.maps[self.small])) for t, f in zip(self.transfers, peers.maps, strict=True)]
        values, share = {}, shares(y)
        for n, (k, tell) in enumerate(zip(self.graph.peers, self.discriminators, strict=True)):
            values[f"generate/{k}"] = ((1 - tell(maps[n])).square() * share).sum()
            theirs, mine = tell(maps[n - 1].detach()), tell(maps[n].detach())
            values[f"tell/{k}"] = (((1 - theirs).square() + mine.square()) * share).sum()
        return values
