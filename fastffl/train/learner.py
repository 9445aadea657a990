"""Learner: cohort + method as one module. What DDP wraps, what compile traces, what a CUDA graph will capture."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fastffl_kernels import GraphOut

from .. import methods
from ..errors import UsageError
from ..losses import GraphLoss, scores
from ..nets import Cohort, backbone, probe
from ..nets.adapter import Backbone
from ..recipe import MethodConfig, Recipe
from ..values import CohortSpec, Graph
from .device import Plan


class Learner(nn.Module):
    """Peers that learn together under a method.

        Learner(["resnet34", my_module], method="ffl", classes=7, size=224)

    nets        names (this package's, or any timm model) and nn.Modules (B, channels, size, size) -> (B, classes)
    method      a name, or a method's Config for other settings than the paper's
    share_stem  None: as the method has it for equal nets
    UsageError says which net or setting does not fit.
    """

    def __init__(
        self,
        nets: Sequence[str | nn.Module],
        method: str | MethodConfig = "ffl",
        *,
        classes: int,
        size: int = 32,
        channels: int = 3,
        share_stem: bool | None = None,
        pretrained: bool = False,
    ):
        super().__init__()
        kind = methods.load(method if isinstance(method, str) else method.name)
        self.config = kind.Config(name=kind.name) if isinstance(method, str) else method
        kinds = tuple(n if isinstance(n, str) else type(n).__name__ for n in nets)
        shared = kind.shares(kinds, share_stem)
        if share_stem is None and shared and not all(isinstance(n, str) for n in nets):
            shared = False
        peers: list[Backbone] = []
        for k, net in enumerate(nets):
            try:
                peers.append(backbone(net, classes, channels, size, pretrained=pretrained, cut=shared))
            except UsageError:
                if share_stem is not None or kind.stem == "shared" or not shared:
                    raise
                assert k == 0  # nets are equal: the first already tells that this architecture can't be cut
                shared = False
                peers.append(backbone(net, classes, channels, size, pretrained=pretrained))
        self.cohort = Cohort(peers, shared)
        probes = [probe(net, channels, size) for net in peers]
        for net, found in zip(peers, probes, strict=True):
            if found.classes != classes:
                raise UsageError(f"{net.name} gives {found.classes} logits; the data has {classes} classes")
        spec = CohortSpec(
            nets=self.cohort.names,
            classes=classes,
            maps=tuple(p.map for p in probes),
            stem=probes[0].stem if shared else None,
        )
        self.spec = spec
        self.method = kind(self.config, spec)
        self.loss = GraphLoss(self.method.graph)
        self.channels, self.size, self.pretrained = channels, size, pretrained
        self.amp_dtype: torch.dtype | None = None
        self.layout = torch.contiguous_format

    @classmethod
    def build(cls, recipe: Recipe, classes: int, channels: int, size: int) -> "Learner":
        """The learner of a recipe, initialised by its seed."""
        torch.manual_seed(recipe.run.seed)
        return cls(
            recipe.nets.names,
            recipe.method,
            classes=classes,
            size=size,
            channels=channels,
            share_stem=recipe.nets.share_stem,
            pretrained=recipe.nets.pretrained,
        )

    def place(self, where: Plan) -> "Learner":
        """Move to the plan's device, dtype of autocast and memory format, in place."""
        self.amp_dtype, self.layout = where.dtype, where.memory_format
        self.to(where.device)
        for part in (self.cohort, self.method):
            part.to(memory_format=where.memory_format)
        return self

    @property
    def graph(self) -> Graph:
        return self.method.graph

    def _autocast(self, x: Tensor) -> AbstractContextManager[None]:
        if self.amp_dtype is None or x.is_meta:  # torch casts no tensors without data; operations are counted on those
            return nullcontext()
        return torch.autocast(x.device.type, self.amp_dtype)

    def forward(self, x: Tensor, y: Tensor, ramp: Tensor, y2: Tensor | None = None, mix: Tensor | None = None) -> GraphOut:
        """x (B, channels, S, S), y (B,) int64, ramp () -> the step's loss, terms and counts. The loss is fp32.

        y2, mix   (B,) labels of the partners and weights of y, for a mixed batch
        """
        with self._autocast(x):
            peers = self.cohort(x)
            made = self.method.nodes(peers)
        return self.loss(peers, made, y, ramp, y2, mix)

    def votes(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (B, C) of every vote: each peer, the mean, and what the method makes."""
        with self._autocast(x):
            peers = self.cohort(x)
            made = self.method.nodes(peers)
        return scores(self.graph, peers, made)

    def vote(self, name: str) -> str:
        """`name`, if this learner has such a vote. UsageError with the votes it has."""
        if name not in self.graph.scored:
            raise UsageError(f"no vote is called {name!r}; this run has {', '.join(self.graph.scored)}")
        return name

    def net_of(self, vote: str) -> str:
        """What a vote is: a peer's architecture, or the vote's own name."""
        return self.cohort.names[int(vote[1:])] if vote in self.graph.peers else vote
