"""What a method is: modules of its own, extra predictions, and the graph that says who teaches whom."""

from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ..errors import UsageError
from ..recipe import MethodConfig
from ..values import CohortSpec, Graph, Peers


class Method(nn.Module):
    """One file, one method. A subclass sets the class variables, builds `self.graph`, and returns its made nodes.

    summary      the idea in two sentences           paper   authors, title, venue, year
    status       faithful: its code or full text was read; partial: parts of it; reconstructed: neither
    deviations   where this differs from the source, and what the source leaves open
    min_peers    fewest peers it makes sense for      stem    "either", "shared" or "separate"
    share        whether peers of equal architecture share their stem when the recipe does not say
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    status: ClassVar[Literal["faithful", "partial", "reconstructed"]]
    deviations: ClassVar[str]
    min_peers: ClassVar[int] = 1
    stem: ClassVar[Literal["either", "shared", "separate"]] = "either"
    share: ClassVar[bool] = False
    Config: ClassVar[type[MethodConfig]]

    graph: Graph

    def __init__(self, config: Any, spec: CohortSpec):
        super().__init__()
        if len(spec.nets) < self.min_peers:
            raise UsageError(
                f"method {self.name} needs at least {self.min_peers} peers, got {len(spec.nets)} "
                f"({', '.join(spec.nets)}); name more with --model A,B"
            )
        if self.stem == "shared" and spec.stem is None:
            raise UsageError(f"method {self.name} needs peers of one architecture with --set nets.share_stem=true")
        if self.stem == "separate" and spec.stem is not None:
            raise UsageError(f"method {self.name} trains separate nets; use --set nets.share_stem=false")

    def nodes(self, peers: Peers) -> dict[str, Tensor]:
        """The predictions besides the peers' and the means, (B, C) each, by the names in `graph.made`."""
        return {}

    def decay(self) -> float | None:
        """Weight decay of the method's own modules; None: the recipe's."""
        return None

    @classmethod
    def shares(cls, nets: tuple[str, ...], asked: bool | None) -> bool:
        """Whether these nets share a stem under this method: as asked, else the method's habit for equal nets."""
        return cls.share and len(nets) > 1 and len(set(nets)) == 1 if asked is None else asked
