"""Learner: cohort + method as one module. What DDP wraps, what compile traces, what a CUDA graph will capture."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import methods
from ..errors import UsageError, first_line
from ..losses import GraphLoss, scores
from ..nets import Cohort, Frozen, MeanTeacher, NoStages, backbone, known, probe
from ..nets.adapter import Backbone
from ..recipe import MethodConfig, Recipe
from ..values import CohortSpec, Graph, Needs
from . import teachers
from .device import Plan


class Out(NamedTuple):
    """A step's loss, all it is made of, its counts, and what goes beside it."""

    loss: Tensor  # () fp32
    ce: Tensor  # (len(graph.hard),)
    kl: Tensor  # (len(graph.edges),)
    top1: Tensor  # (len(graph.nodes),)
    rows: Tensor
    extra: tuple[Tensor, ...] = ()  # by graph.extra, not weighted
    others: tuple[Tensor, ...] = ()  # by Learner.objectives
    kept: tuple[Tensor, ...] = ()  # for Method.after_step


class Learner(nn.Module):
    """Peers that learn together under a method.

        Learner(["resnet34", my_module], method="ffl", classes=7, size=224)

    nets        names (this package's, or any timm model) and nn.Modules (B, channels, size, size) -> (B, classes)
    method      a name, or a method's Config for other settings than the paper's
    share_stem  None: as the method has it for equal nets
    private     last stages each peer has of its own where the stem is shared; None: as the method has it
    samples     number of training images, for methods that remember something of each
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
        private: int | None = None,
        pretrained: bool = False,
        samples: int = 0,
    ):
        super().__init__()
        kind = methods.load(method if isinstance(method, str) else method.name)
        config = kind.Config(name=kind.name) if isinstance(method, str) else method
        kinds = tuple(known(n) if isinstance(n, str) else type(n).__name__ for n in nets)
        self.config = config = teachers.settled(config, kinds, kind.name)
        needs = methods.ask(kind, "needs", config, kinds)
        if not isinstance(needs, Needs):
            raise UsageError(f"method {kind.name}: needs() gives {type(needs).__name__}; expected fastffl.values.Needs; mend it")
        shared = methods.ask(kind, "shares", kinds, share_stem)
        if share_stem is None and shared and not all(isinstance(n, str) for n in nets):
            shared = False
        peers: list[Backbone] = []
        for k, net in enumerate(nets):
            cut = shared or needs.taps
            try:
                peers.append(backbone(net, classes, channels, size, pretrained=pretrained, cut=cut))
            except NoStages as error:
                if kind.stem == "shared" or needs.taps:
                    text = f"method {kind.name} needs nets with stages: {str(error).partition(';')[0]}"
                    raise UsageError(f"{text}; name nets of this package or a staged timm model, --model resnet18") from None
                if share_stem is not None:
                    raise
                assert k == 0  # nets are equal: the first already tells that this architecture can't be cut
                shared = False
                peers.append(backbone(net, classes, channels, size, pretrained=pretrained))
        self.needs = needs
        options = {"tree": needs.tree, "rescale": needs.rescale, "taps": needs.taps, "joint": needs.joint}
        self.cohort = Cohort(peers, shared, private=private or needs.private, **options)  # type: ignore[arg-type]
        probes = [probe(net, channels, size) for net in peers]
        try:
            frozen = [backbone(net, classes, channels, size) for net in needs.frozen]
        except UsageError as error:
            raise UsageError(f"method {kind.name}: its teacher: {error}; choose a net with --set method.teacher_nets=A") from None
        taught = [probe(net, channels, size) for net in frozen]
        for net, found in zip([*peers, *frozen], [*probes, *taught], strict=True):
            if found.classes != classes:
                raise UsageError(f"{net.name} gives {found.classes} logits; the data has {classes} classes")
        stem = self.cohort.cut
        self.spec = CohortSpec(
            nets=self.cohort.names,
            classes=classes,
            maps=tuple(p.map for p in probes),
            stem=probes[0].stages[stem - 1] if shared else None,
            taps=tuple(p.stages[stem:] for p in probes) if needs.taps else (),
            teachers=tuple(p.map for p in taught),
            samples=samples,
        )
        self.method = self._made(kind)
        for k in self.method.fixed:
            self.cohort.nets[k].requires_grad_(False)
        self.teacher: Frozen | MeanTeacher | None = Frozen(frozen) if frozen else None
        if needs.average is not None:
            self.teacher = MeanTeacher(self.cohort, needs.average)
        self.channels, self.size, self.pretrained = channels, size, pretrained
        self.objectives = methods.ask(self.method, "objectives", self._below)
        if methods.foreign(kind):
            self._tried()
        self.loss = GraphLoss(self.method.graph)
        self.amp_dtype: torch.dtype | None = None
        self.layout = torch.contiguous_format

    def _made(self, kind: type[methods.Method]) -> methods.Method:
        """The method, built. UsageError, with its name, where another package's can't be."""
        try:
            made = kind(self.config, self.spec)
        except UsageError:
            raise
        except Exception as error:
            if not methods.foreign(kind):
                raise
            raise UsageError(f"method {kind.name} can't be built: {first_line(error)}; mend its package") from error
        if not isinstance(getattr(made, "graph", None), Graph):
            raise UsageError(f"method {kind.name} sets no self.graph, a fastffl.values.Graph; mend its package")
        return made

    @torch.no_grad()
    def _tried(self) -> None:
        """UsageError where another package's method gives no predictions, votes, terms or losses of this data's shape."""
        if self.needs.ids and self.spec.samples:
            self.prepare(torch.arange(self.spec.samples) % self.spec.classes)
        was = self.training
        self.eval()
        try:
            for rows in (2, 3):
                self._tried_on(rows)
        finally:
            self.train(was)

    def _tried_on(self, rows: int) -> None:
        graph, classes = self.graph, self.spec.classes
        x = torch.zeros(rows * self.needs.views, self.channels, self.size, self.size)
        y = torch.zeros(rows, dtype=torch.int64)
        peers = self.cohort(x, self.needs.views)
        if self.teacher is not None:
            peers = peers._replace(teacher=self.teacher(x, self.needs.views))
        made = methods.ask(self.method, "nodes", peers, y)
        self._gives("nodes", made, graph.made, (rows, classes), f"a row of {classes} logits for each of {rows} images")
        terms = methods.ask(self.method, "extra", peers, y, torch.zeros(rows, dtype=torch.int64))
        if not isinstance(terms, methods.Terms):
            raise UsageError(f"method {self.method.name}: extra() gives {type(terms).__name__}; expected Terms; mend its package")
        self._gives("extra", terms.values, tuple(graph.extra), (), "one number")
        if self.objectives:
            losses = methods.ask(self.method, "others", peers, y)
            self._gives("others", losses, tuple(o.name for o in self.objectives), (), "one number")
        x = x[:rows]
        peers = self.cohort(x)  # of one view, as in evaluation
        if self.teacher is not None:
            peers = peers._replace(teacher=self.teacher(x))
        votes = methods.ask(self.method, "nodes", peers)
        if not isinstance(votes, dict) or {n for n in graph.votes if n in graph.made} - {*votes}:
            raise UsageError(
                f"method {self.method.name}: nodes() gives {_named(votes)} without labels, as evaluation asks for them; "
                f"its votes are {graph.votes}; mend its package"
            )

    def _gives(self, hook: str, found: Any, names: tuple[str, ...], shape: tuple[int, ...], what: str) -> None:
        name = self.method.name
        if not isinstance(found, dict) or {*found} != {*names}:
            raise UsageError(f"method {name}: {hook}() gives {_named(found)}; its graph names {names}; mend its package")
        for key, value in found.items():
            if not isinstance(value, Tensor) or value.shape != shape:
                has = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
                raise UsageError(f"method {name}: {hook}() gives {key} of {has}; expected {shape}, {what}; mend its package")

    @classmethod
    def build(cls, recipe: Recipe, classes: int, channels: int, size: int, samples: int = 0) -> "Learner":
        """The learner of a recipe, initialised by its seed; `samples`: number of training images."""
        torch.manual_seed(recipe.run.seed)
        return cls(
            recipe.nets.names,
            recipe.method,
            classes=classes,
            size=size,
            channels=channels,
            share_stem=recipe.nets.share_stem,
            private=recipe.nets.private,
            pretrained=recipe.nets.pretrained,
            samples=samples,
        )

    def place(self, where: Plan) -> "Learner":
        """Move to the plan's device, dtype of autocast and memory format, in place."""
        self.amp_dtype, self.layout = where.dtype, where.memory_format
        self.to(where.device)
        for part in self.children():
            part.to(memory_format=where.memory_format)
        return self

    def train(self, mode: bool = True) -> "Learner":
        super().train(mode)
        for k in self.method.fixed:
            self.cohort.nets[k].eval()
        return self

    def _below(self, peer: int) -> tuple[nn.Parameter, ...]:
        """The parameters of a peer that its last map depends on."""
        net = self.cohort.nets[peer]
        was, params = net.training, [p for p in net.parameters() if p.requires_grad]
        _, f = net.eval().features(torch.zeros(2, self.channels, self.size, self.size))
        grads = torch.autograd.grad(f.sum(), params, allow_unused=True)
        net.train(was)
        return tuple(p for p, g in zip(params, grads, strict=True) if g is not None)

    @property
    def graph(self) -> Graph:
        return self.method.graph

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of all losses: the graph's terms, then the objectives."""
        return self.graph.terms + tuple(o.name for o in self.objectives)

    def _autocast(self, x: Tensor) -> AbstractContextManager[None]:
        if self.amp_dtype is None or x.is_meta:  # torch casts no tensors without data; operations are counted on those
            return nullcontext()
        return torch.autocast(x.device.type, self.amp_dtype)

    def forward(self, x: Tensor, y: Tensor, ramp: Tensor, *more: Tensor) -> Out:
        """x (views B, channels, S, S), y (B,) int64, ramp () -> the step's loss, terms and counts. The loss is fp32.

        more   y2 and mix, (B,) labels of the partners and weights of y, for a mixed batch; ids (B,) last where it needs them
        """
        mixed, ids = (more[:-1], more[-1]) if self.needs.ids else (more, None)
        views, graph = len(x) // len(y), self.graph
        with self._autocast(x):
            peers = self.cohort(x, views)
            if self.teacher is not None:
                peers = peers._replace(teacher=self.teacher(x, views))
            made = self.method.nodes(peers, y)
            extra = self.method.extra(peers, y, ids)
            others = self.method.others(peers, y) if self.objectives else {}
        out = self.loss(peers, made, y, ramp, *mixed)
        loss = out.loss
        for name, weight in graph.extra.items():
            loss = loss + (ramp * weight if graph.ramped else weight) * extra.values[name].float()
        return Out(
            *(loss, out.ce, out.kl, out.top1, out.rows),
            extra=tuple(extra.values[name].float() for name in graph.extra),
            others=tuple(others[o.name].float() for o in self.objectives),
            kept=extra.kept,
        )

    def votes(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (B, C) of every vote: each peer, the mean, and what the method makes."""
        with self._autocast(x):
            peers = self.cohort(x)
            if self.teacher is not None and any(n in self.graph.votes for n in self.graph.made):
                peers = peers._replace(teacher=self.teacher(x))
            made = self.method.nodes(peers)
        return scores(self.graph, peers, made)

    def prepare(self, labels: Tensor | None) -> None:
        """Before the first step: the labels of all training images, (N,) int64, by id; None where the data set does not say."""
        methods.ask(self.method, "prepare", labels)

    def begin(self, before: "Learner") -> None:
        """Start from the last of the runs that had to be finished first."""
        methods.ask(self.method, "inherit", self.cohort, self.teacher, before)

    def vote(self, name: str) -> str:
        """`name`, if this learner has such a vote. UsageError with the votes it has."""
        if name not in self.graph.scored:
            raise UsageError(f"no vote is called {name!r}; this run has {', '.join(self.graph.scored)}")
        return name

    def plain(self, vote: str) -> Backbone | None:
        """The net that a vote is by itself: a peer, or its moving average; None where it needs more than one."""
        if vote in self.graph.peers:
            return self.cohort.nets[int(vote[1:])]
        if vote in self.graph.copies and self.teacher is not None:
            return self.teacher.nets[self.graph.copies[vote]]
        return None

    def net_of(self, vote: str) -> str:
        """What a vote is: a net's architecture, or the vote's own name."""
        net = self.plain(vote)
        return net.name if net else vote


def _named(found: Any) -> str:
    """What a method gave, without its values."""
    return str(tuple(found)) if isinstance(found, dict) else type(found).__name__
