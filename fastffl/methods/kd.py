"""kd: a trained teacher stands still and teaches every peer.   L = a CE(z_k) + b T^2 KL(p_T(teacher) || p_T(z_k))   no ramp."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from ..errors import UsageError
from ..recipe import MethodConfig, Recipe
from ..values import CohortSpec, Edge, Graph, Needs, Peers
from ._base import Method
from ._teachers import TaughtConfig, alone


class KD(Method):
    name = "kd"

    class Config(TaughtConfig):
        name: Literal["kd"] = "kd"
        T: float = Field(3.0, gt=0)
        """temperature"""
        hard: float = Field(1.0, ge=0)
        """a, weight of the labels"""
        soft: float = Field(1.0, ge=0)
        """b, weight of the teacher"""
        first: str | None = None
        """architecture of the teacher that is trained first where none is named; none: the last peer's"""
        eps: float = Field(0.0, ge=0)
        """added to the teacher's probabilities (OKDDip's code: 1e-7)"""

    def __init__(self, config: Config, spec: CohortSpec):
        super().__init__(config, spec)
        p = spec.peers
        mean = {"mean": p} if len(p) > 1 else {}
        self.graph = Graph(
            peers=p,
            made=("teacher",),
            means=mean,
            hard=dict.fromkeys(p, config.hard),
            edges=tuple(Edge("teacher", k, config.T, weight=config.soft, ramp=False, eps=config.eps) for k in p),
            votes=(*p, *mean, "teacher"),
        )

    @classmethod
    def needs(cls, config: Config, nets: tuple[str, ...]) -> Needs:
        if len(config.teacher_nets) > 1:
            got = ", ".join(config.teachers or config.teacher_nets)
            raise UsageError(f"method kd takes one teacher, got {got}; name one with --set method.teachers=RUN")
        return Needs(frozen=config.teacher_nets or (config.first or nets[-1],))

    @classmethod
    def arranged(cls, nets: tuple[str, ...]) -> tuple[tuple[str, ...], MethodConfig]:
        return nets[:1], cls.Config(first=nets[-1])

    @classmethod
    def earlier(cls, recipe: Recipe) -> tuple[Recipe, ...]:
        return (alone(recipe, cls.needs(recipe.method, recipe.nets.names).frozen),)  # type: ignore[arg-type]

    def nodes(self, peers: Peers, y: Tensor | None = None) -> dict[str, Tensor]:
        return {"teacher": peers.teacher.z[0]}  # type: ignore[union-attr]
