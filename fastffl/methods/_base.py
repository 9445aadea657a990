"""What a method is: modules of its own, extra predictions, and the graph that says who teaches whom."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from ..errors import UsageError
from ..recipe import MethodConfig, Recipe
from ..values import CohortSpec, Graph, Needs, Objective, Peers


class Published(NamedTuple):
    """One published result: `setting` says data, nets and what was scored; `value` top-1 %, error or accuracy as printed."""

    setting: str
    value: str
    source: str


@cache
def _cards() -> dict[str, dict[str, Any]]:
    return tomllib.loads(Path(__file__).with_name("cards.toml").read_text(encoding="utf-8"))


Below = Callable[[int], tuple[nn.Parameter, ...]]  # the parameters of peer k that its last map depends on: not its classifier's


def shares(y: Tensor) -> Tensor:
    """(B,) fp32: what each sample counts for in a mean over those with a label."""
    keep = (y >= 0).float()
    return keep / keep.sum().clamp(min=1)


class Terms(NamedTuple):
    """What `Method.extra` gives: terms by name, () each, and what `after_step` wants of the batch, detached, (B, ...) each."""

    values: dict[str, Tensor]
    kept: tuple[Tensor, ...] = ()


class Method(nn.Module):
    """One file, one method. A subclass sets the class variables, builds `self.graph`, and returns its made nodes.

    Its card, for the methods here in cards.toml:
    summary      the idea in two sentences           paper   authors, title, venue          year   of it
    status       faithful: its code or full text was read; partial: parts of it; reconstructed: neither
    deviations   where this differs from the source, and what the source leaves open
    parts        what its made nodes, extra terms and objectives are, by name; * stands for a peer's number
    published    what its authors and others report
    Its habits:
    min_peers    fewest peers it makes sense for     max_peers   most, None: any number
    stem         "either", "shared" or "separate"
    alike        whether a recipe's unlike nets become copies of the first where it does not need a shared stem either
    share        whether peers of equal architecture share their stem when the recipe does not say
    fixed        numbers of the peers that do not learn
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    year: ClassVar[int]
    summary: ClassVar[str]
    status: ClassVar[Literal["faithful", "partial", "reconstructed"]]
    deviations: ClassVar[str]
    parts: ClassVar[Mapping[str, str]] = MappingProxyType({})
    published: ClassVar[tuple[Published, ...]] = ()
    min_peers: ClassVar[int] = 1
    max_peers: ClassVar[int | None] = None
    stem: ClassVar[Literal["either", "shared", "separate"]] = "either"
    alike: ClassVar[bool] = False
    share: ClassVar[bool] = False
    Config: ClassVar[type[MethodConfig]]

    graph: Graph
    fixed: tuple[int, ...] = ()

    def __init_subclass__(cls, **more: Any):
        super().__init_subclass__(**more)
        for key, value in _cards().get(cls.__dict__.get("name", ""), {}).items():
            if key not in cls.__dict__:
                setattr(cls, key, tuple(Published(**p) for p in value) if key == "published" else value)

    def __init__(self, config: Any, spec: CohortSpec):
        super().__init__()
        if len(spec.nets) < self.min_peers:
            raise UsageError(
                f"method {self.name} needs at least {self.min_peers} peers, got {len(spec.nets)} "
                f"({', '.join(spec.nets)}); name more with --model A,B"
            )
        if self.max_peers is not None and len(spec.nets) > self.max_peers:
            raise UsageError(
                f"method {self.name} takes at most {self.max_peers} peers, got {len(spec.nets)} ({', '.join(spec.nets)}); "
                "name fewer with --model A,B"
            )
        if self.stem == "shared" and spec.stem is None:
            if len({n.partition("@")[0] for n in spec.nets}) == 1:
                raise UsageError(f"method {self.name} needs peers that share their stem; use --set nets.share_stem=true")
            got = f"got {', '.join(spec.nets)}; name equal ones with --model"
            raise UsageError(f"method {self.name} needs peers of one architecture, {got}")
        if self.stem == "separate" and spec.stem is not None:
            raise UsageError(f"method {self.name} trains separate nets; use --set nets.share_stem=false")

    # ---- before it is built

    @classmethod
    def needs(cls, config: Any, nets: tuple[str, ...]) -> Needs:
        """What it asks of a cohort of `nets`."""
        return Needs()

    @classmethod
    def shares(cls, nets: tuple[str, ...], asked: bool | None) -> bool:
        """Whether these nets share a stem under this method: as asked, else the method's habit for equal nets."""
        return cls.share and len(nets) > 1 and len(set(nets)) == 1 if asked is None else asked

    @classmethod
    def arranged(cls, nets: tuple[str, ...]) -> tuple[tuple[str, ...], MethodConfig]:
        """The peers and settings for a recipe that was written for another method and names `nets`: as many, all of the
        first one's architecture where the stem must be shared. The first peer stays the same net under every method."""
        made = ((nets[0],) * len(nets) if cls.stem == "shared" or cls.alike else nets)[: cls.max_peers]
        return made + made[:1] * (cls.min_peers - len(made)), cls.Config(name=cls.name)

    @classmethod
    def earlier(cls, recipe: Recipe) -> tuple[Recipe, ...]:
        """Runs that have to be finished first, in this order; each begins where the one before it ended (see `inherit`)."""
        return ()

    # ---- in a step

    def nodes(self, peers: Peers, y: Tensor | None = None) -> dict[str, Tensor]:
        """The predictions besides the peers' and the means, (B, C) each, by the names in `graph.made`.

        y   (B,) labels, in training only: without them nodes that are no votes may be left out
        """
        return {}

    def extra(self, peers: Peers, y: Tensor, ids: Tensor | None) -> Terms:
        """The terms besides cross-entropies and edges, by the names in `graph.extra`: means over samples with a label (`shares`);
        ids (B,) where it needs them."""
        return Terms({})

    def objectives(self, below: Below) -> tuple[Objective, ...]:
        """Losses with optimizers of their own; asked once, when the learner is built."""
        return ()

    def others(self, peers: Peers, y: Tensor) -> dict[str, Tensor]:
        """Their values, () each, by their names: means over samples with a label. All gradients of a step are taken at one point,
        then all optimizers step."""
        return {}

    def after_step(self, kept: Sequence[Tensor], y: Tensor, ids: Tensor, ok: Tensor) -> None:
        """Change the method's own state after a step, by what it kept of the batch; not where `ok`, a device bool, is false.

        The rows are those of all ranks; a row with label UNLABELLED or an id below 0 counts for nothing.
        """

    # ---- around a run

    def prepare(self, labels: Tensor | None) -> None:
        """Before the first step: the labels of all training images, (N,) int64, by id; None where the data set does not say."""

    def inherit(self, cohort: Any, teacher: Any, before: Any) -> None:
        """Begin where the learner `before`, of the last of the `earlier` runs, ended: frozen teachers become its peers."""
        if teacher is not None:
            for mine, theirs in zip(teacher.nets, before.cohort.nets, strict=True):
                mine.plain.load_state_dict(theirs.plain.state_dict())

    def decay(self) -> float | None:
        """Weight decay of the method's own modules; None: the recipe's."""
        return None
