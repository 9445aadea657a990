"""The nouns that cross the floors: Batch -> Peers -> Graph. They compute nothing.

Shapes: B samples, K peers, C classes, D channels of a feature map.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

UNLABELLED = -100


class Batch(NamedTuple):
    """Samples on the device: x (B, channels, H, W) normalised, y (B,) int64, id (B,) int64 (the sample's place in its set).

    A sample with label UNLABELLED weighs nothing: an image that can't be read, or one that fills a rank's empty share (id -1).
    """

    x: Tensor
    y: Tensor
    id: Tensor
    y2: Tensor | None = None  # (B,) int64, mixed batches only: the partners' labels
    mix: Tensor | None = None  # (B,) fp32, mixed batches only: the weight of a sample's own label

    @property
    def labels(self) -> tuple[Tensor, ...]:
        """y, and for a mixed batch y2 and mix: what the loss takes beside x."""
        return (self.y,) if self.y2 is None or self.mix is None else (self.y, self.y2, self.mix)


class Peers(NamedTuple):
    """What the cohort says of a batch. Widths may differ between peers, logits never do."""

    z: tuple[Tensor, ...]  # K logits (B, C)
    maps: tuple[Tensor, ...]  # K last feature maps (B, D_k, H_k, W_k), always NCHW
    stem: Tensor | None  # (B, D, H, W) output of the shared stem, None where the peers share nothing
    taps: tuple[tuple[Tensor, ...], ...] = ()  # per peer: what each stage of its own gave, the last map included; where asked
    teacher: "Peers | None" = None  # of the averaged or frozen cohort, without gradients; where asked


class Needs(NamedTuple):
    """What a method asks of the cohort and of the batches."""

    views: int = 1  # augmentations of every image: peer k sees view k; 1 or as many as there are peers
    joint: bool = False  # a shared stem normalises all views together, not each by its own statistics
    private: int = 1  # last stages each peer has of its own where the stem is shared
    tree: tuple[int, ...] | None = None  # with two private stages: the peer whose first of them each peer uses
    rescale: bool = False  # gradients that meet where the stem is shared are averaged, not summed
    taps: bool = False  # Peers.taps
    ids: bool = False  # the samples' ids, for a memory; the data set must give its labels
    unmixed: bool = False  # images of one label each: no mixup, no cutmix
    average: float | None = None  # decay of an averaged copy of the cohort, whose answers are Peers.teacher
    frozen: tuple[str, ...] = ()  # nets of trained teachers, whose answers are Peers.teacher


class Objective(NamedTuple):
    """A loss with an optimizer of its own: only `params` get its gradient. Parameters of the method that are in one learn
    from nothing else."""

    name: str
    params: tuple[nn.Parameter, ...]
    lr: float  # times the schedule's share of its peak
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)  # Adam's


class Edge(NamedTuple):
    """`teacher` teaches `student`: weight * T^2 * KL(p_T(teacher) || p_T(student)); `ramp` multiplies it by w(epoch)."""

    teacher: str
    student: str
    T: float = 3.0
    weight: float = 1.0
    ramp: bool = True
    detach: bool = True  # no gradient into the teacher through this edge
    eps: float = 0.0  # added to the teacher's probabilities; 1e-7 in the official FFL and ONE code

    @property
    def name(self) -> str:
        return f"{self.teacher}>{self.student}"


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Who predicts, who meets the labels, who teaches whom: fixed when the method is built.

    peers   p0..pK-1          made    further nodes, returned by Method.nodes
    means   node -> the nodes whose mean logits it is
    hard    node -> weight of its cross-entropy
    extra   further terms, returned by Method.extra -> their weights; `ramped`: w(epoch) multiplies them
    copies  made nodes that are a peer of the averaged copy of the cohort: a plain net, too
    votes   the nodes evaluation scores; the first is what the method ships
    """

    peers: tuple[str, ...]
    votes: tuple[str, ...]
    made: tuple[str, ...] = ()
    means: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hard: Mapping[str, float] = field(default_factory=dict)
    edges: tuple[Edge, ...] = ()
    extra: Mapping[str, float] = field(default_factory=dict)
    ramped: bool = False
    copies: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = self.nodes
        if len(set(known)) != len(known):
            raise ValueError(f"nodes {known} are not all different")
        given = set(self.peers + self.made)
        for mean, members in self.means.items():
            if not members or not set(members) <= given:
                raise ValueError(f"mean node {mean!r} is formed from {members}; expected some of {sorted(given)}")
        for e in self.edges:
            if e.teacher not in known or e.student not in known or e.teacher == e.student:
                raise ValueError(f"edge {e.name} must join two of the nodes {known}")
            if not (e.T > 0 and math.isfinite(e.T)):
                raise ValueError(f"edge {e.name} has temperature {e.T}; expected a finite number above 0")
        for name in (*self.hard, *self.votes, *self.copies):
            if name not in known:
                raise ValueError(f"{name!r} is labelled or scored but is not one of the nodes {known}")
        if not self.votes:
            raise ValueError("no node is a vote; the first of `votes` is what the method ships")

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every node in the order in which the kernel numbers them."""
        return self.peers + self.made + tuple(self.means)

    @property
    def scored(self) -> tuple[str, ...]:
        """The votes as tables show them: peers, means, then what the method makes."""
        return tuple(n for n in (*self.peers, *self.means, *self.made) if n in self.votes)

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms: ce/p0, ..., kl/mean>fused, ..., then the extra ones under their own."""
        return tuple(f"ce/{h}" for h in self.hard) + tuple(f"kl/{e.name}" for e in self.edges) + tuple(self.extra)

    def text(self) -> str:
        """The graph drawn as lines of text."""
        lines = [f"labels > {', '.join(n if w == 1 else f'{w:g} {n}' for n, w in self.hard.items())}"]
        lines += [f"{mean} = mean({', '.join(members)})" for mean, members in self.means.items()]
        for e in self.edges:
            facts = [f"T={e.T:g}", f"weight {e.weight:g}"] + ["ramp"] * e.ramp
            facts += [] if e.detach else ["teacher learns too"]
            lines.append(f"{e.teacher} > {e.student}   {', '.join(facts)}")
        lines += [f"and {name}   weight {w:g}{', ramp' * self.ramped}" for name, w in self.extra.items()]
        return "\n".join(lines)


class MapSpec(NamedTuple):
    """Size of one peer's last feature map."""

    channels: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class CohortSpec:
    """What a method may know of the cohort it is built for."""

    nets: tuple[str, ...]
    classes: int
    maps: tuple[MapSpec, ...]
    stem: MapSpec | None  # the shared stem's output, None where the peers share nothing
    taps: tuple[tuple[MapSpec, ...], ...] = ()  # per peer, of each stage of its own; where the method asks
    teachers: tuple[MapSpec, ...] = ()  # last maps of the frozen teachers
    samples: int = 0  # training images, 0 where that is not known

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(f"p{k}" for k in range(len(self.nets)))
