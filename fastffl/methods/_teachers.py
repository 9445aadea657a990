"""Settings and earlier runs of the methods whose teachers are trained before."""

from typing import Any

from ..recipe import MethodConfig, Nets, Recipe


class TaughtConfig(MethodConfig):
    """Settings of methods with trained teachers."""

    teachers: tuple[str, ...] = ()
    """trained teachers: run folders (RUN or RUN:p1) or exported files; none: they are trained first, in RUN/before-1"""
    teacher_nets: tuple[str, ...] = ()
    """their architectures; none: those of `teachers`, else the method's habit"""


def run_before(recipe: Recipe, nets: tuple[str, ...], config: MethodConfig, number: int = 1) -> Recipe:
    """The recipe with other separate peers, another method and another seed: a run that is finished first."""
    return recipe.model_copy(
        update={
            "name": f"{recipe.name}-before-{number}",
            "nets": Nets(names=nets, share_stem=False, pretrained=recipe.nets.pretrained),
            "method": config,
            "run": recipe.run.model_copy(update={"seed": (recipe.run.seed + number) % 2**63, "max_steps": None}),
        }
    )


def alone(recipe: Recipe, nets: tuple[str, ...]) -> Recipe:
    """The run that trains `nets` by the labels only."""
    from .none import Alone

    config: Any = Alone.Config()
    return run_before(recipe, nets, config)
