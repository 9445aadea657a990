"""ffsd: students learn from each other and are kept apart; what is fused from their maps teaches a leader, who is shipped.

students  CE(z_k) + 1/(m-1) sum_{j != k} KL_T(z_j -> z_k) + d [ div(F_k, F_{k-1}) + self(F_k; flip(F_{k-1})) ]   (not the first)
fused     CE(u) + KL_T(mean of the students -> u), u from their maps, detached (FFL's fusion module)
leader    CE(z_0) + KL_T(u -> z_0) + f [ att(F_0, fused map) + att(trans(F_0), students' maps) + self(F_0; fused map) ]
T = 2; att, div: squared distance of attention maps (mean square over channels, length 1); flip: attention where there was
little; self(F; M): attention of a net's earlier maps to what its decoder guesses from M. Decoders have an Adam each.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..fusion import ConvFusion, Decoder, apart, attention, drawn, flipped, sized
from ..recipe import MethodConfig
from ..values import CohortSpec, Edge, Graph, Needs, Objective, Peers
from ._base import Below, Method, Terms, shares


class FFSD(Method):
    name = "ffsd"
    min_peers = 3
    stem = "separate"

    class Config(MethodConfig):
        name: Literal["ffsd"] = "ffsd"
        T: float = Field(2.0, gt=0)
        """temperature"""
        diversity: float = Field(1e-5, ge=0)
        """d, weight of what keeps students apart"""
        fusion: float = Field(10.0, ge=0)
        """f, weight of the leader's attention"""
        ramp: bool = False
        """whether d and f ramp up (in the code over five epochs: recipe ffsd-cifar100-resnet32)"""
        decoders: float = Field(1000.0, ge=0)
        """factor of the decoders' own losses"""
        weight_decay: float | None = Field(1e-5, ge=0)
        """of the fusion module (the code's); none: as the peers"""

    def __init__(self, config: Config, spec: CohortSpec):
        super().__init__(config, spec)
        for net, taps in zip(spec.nets, spec.taps, strict=True):
            if len(taps) < 3:
                raise UsageError(
                    f"method ffsd needs nets of at least 3 stages, {net} has {len(taps)}; choose another with --model"
                )
        if len(set(spec.maps)) > 1:  # a decoder is given what another net made
            sizes = ", ".join("x".join(map(str, m)) for m in spec.maps)
            raise UsageError(
                f"method ffsd needs maps of one size, those of {', '.join(spec.nets)} are {sizes}; use --model A,A,A"
            )
        self.config = config
        self._held: tuple[Tensor, Tensor] | None = None
        self.lead, *self.students = spec.peers
        maps = spec.maps[1:]
        self.fuse = ConvFusion(maps, spec.classes)
        d, out = spec.maps[0].channels, sum(m.channels for m in maps)
        self.trans = nn.Sequential(
            *(nn.Conv2d(d, d, 3, 1, 1, groups=d, bias=False), nn.BatchNorm2d(d), nn.ReLU()),
            *(nn.Conv2d(d, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()),
        )
        drawn(self.trans)
        self.decoders = nn.ModuleDict({k: Decoder(taps[1:]) for k, taps in zip(spec.peers, spec.taps, strict=True) if k != "p1"})
        pairs = [(a, b) for b in self.students for a in self.students if a != b]
        more: Any = {"T": config.T, "ramp": False}
        self.graph = Graph(
            peers=spec.peers,
            made=("fused",),
            means={"peers": tuple(self.students), "mean": spec.peers},
            hard=dict.fromkeys((*spec.peers, "fused"), 1.0),
            edges=(
                *(Edge(a, b, weight=1 / (len(self.students) - 1), **more) for a, b in pairs),
                *(Edge("peers", "fused", **more), Edge("fused", self.lead, **more)),
            ),
            extra={"lead": config.fusion, **{f"apart/{k}": config.diversity for k in self.students[1:]}},
            ramped=config.ramp,
            votes=(*spec.peers, "fused", "peers", "mean"),
        )

    @classmethod
    def needs(cls, config: Config, nets: tuple[str, ...]) -> Needs:
        return Needs(taps=True)

    @classmethod
    def arranged(cls, nets: tuple[str, ...]) -> tuple[tuple[str, ...], MethodConfig]:
        return nets[:1] * max(len(nets), cls.min_peers), cls.Config()

    def nodes(self, peers: Peers, y: Tensor | None = None) -> dict[str, Tensor]:
        maps = self.fuse.align([f.detach() for f in peers.maps[1:]])
        fused = self.fuse.fused(maps)
        if y is not None:
            self._held = torch.cat(maps, 1), fused.detach()  # `extra` goes on with them
        return {"fused": self.fuse.fc(fused.mean((2, 3)))}

    def extra(self, peers: Peers, y: Tensor, ids: Tensor | None) -> Terms:
        assert self._held is not None
        (joined, fused), self._held = self._held, None
        f, share = peers.maps[0], shares(y)
        lead = apart(attention(f), attention(fused), share) + apart(attention(self.trans(f)), attention(joined), share)
        values = {"lead": lead + self._guessed(self.lead, peers, fused, share)}
        for n, k in enumerate(self.students[1:], 2):
            before = peers.maps[n - 1].detach()
            wanted, turned = flipped(before)
            seen = F.normalize(attention(peers.maps[n]), dim=1)
            away = ((seen - wanted).square().mean(1) * share).sum()
            values[f"apart/{k}"] = away + self._guessed(k, peers, turned, share)
        return Terms(values)

    def _guessed(self, peer: str, peers: Peers, f: Tensor, share: Tensor) -> Tensor:
        """Distance of a peer's earlier attention to what its decoder guesses from the map f."""
        with torch.no_grad():
            guessed = self.decoders[peer](f, still=True)
        mine = peers.taps[int(peer[1:])][-2:0:-1]
        parts = [apart(attention(a), attention(sized(b, a)), share) for a, b in zip(mine, guessed, strict=True)]
        return sum(parts[1:], parts[0])

    def objectives(self, below: Below) -> tuple[Objective, ...]:
        return tuple(Objective(f"decode/{k}", tuple(d.parameters()), 1e-3, 1e-4) for k, d in self.decoders.items())

    def others(self, peers: Peers, y: Tensor) -> dict[str, Tensor]:
        values, share = {}, shares(y)
        for k, decoder in self.decoders.items():
            taps = [t.detach() for t in peers.taps[int(k[1:])]]
            pairs = [(a, sized(b, a)) for a, b in zip(taps[-2:0:-1], decoder(taps[-1]), strict=True)]
            parts = [apart(b, a, share) + apart(attention(b), attention(a), share) for a, b in pairs]
            values[f"decode/{k}"] = self.config.decoders * sum(parts[1:], parts[0])
        return values

    def decay(self) -> float | None:
        return self.config.weight_decay
