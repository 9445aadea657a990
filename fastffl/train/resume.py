"""resume: which checkpoint a run may go on from, what its digest covers, and what each rank has in it of its own."""

import json
from pathlib import Path
from typing import Any

import torch

from ..data import Source
from ..data.rng import mix
from ..errors import CheckpointError
from ..recipe import Recipe, differences
from . import checkpoint
from .randomness import rng_state, seed_all, set_rng_state
from .ranks import Ranks
from .step import Step

TRAINED = (
    "learner",
    "optimizer",
    "objectives",
    "scaler",
    "average",
    "meters",
    "skips",
    "position",
    "last",
    "best",
    "rng",
    "ranks",
)


def digest(state: dict[str, Any]) -> str:
    """One SHA-256 over everything trained: equal for an interrupted and resumed run and for the uninterrupted one."""
    return checkpoint.digest({k: state[k] for k in TRAINED if k in state})


def check(state: dict[str, Any], recipe: Recipe, data: Source, run: Path) -> None:
    """CheckpointError where a checkpoint belongs to another recipe or data set."""
    old = json.loads(state["recipe"])
    changed = differences(old, recipe)
    if old.get("name") != recipe.name and not changed:
        changed = [f"recipe {old.get('name')} -> {recipe.name}"]
    if changed:
        shown = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
        raise CheckpointError(f"{run} was trained with other settings ({shown}); give the same, or begin anew with another --out")
    if state["classes"] != list(data.classes):
        raise CheckpointError(
            f"{run} was trained on {len(state['classes'])} other classes than the {len(data.classes)} of {data.name}; give the "
            "data it was trained on"
        )

    have = data.samples("train")
    if (had := state.get("samples", have)) != have:
        raise CheckpointError(
            f"{run} was trained on {had:,} images and there are {have:,} now, so its place in the epoch means other ones; give "
            "the data it was trained on, or begin anew with another --out"
        )


def own(step: Step, ranks: Ranks) -> dict[str, Any]:
    """Random numbers and, where there are several, every rank's running statistics: these differ within an epoch."""
    if ranks.alone:
        return {"rng": rng_state()}
    return {"ranks": ranks.gather({"rng": rng_state(), "buffers": [f.cpu() for f in step.buffers.flat]})}


def load_own(state: dict[str, Any], step: Step, ranks: Ranks, seed: int) -> str:
    """The inverse of `own`; a line for people where that is not exact.

    Order and position are those of whole batches, so another number of ranks goes on with the same images; random numbers are
    then drawn anew, from `seed`, and statistics are the mean over the former ranks.
    """
    stored = state.get("ranks", [])
    if ranks.alone and not stored:
        set_rng_state(state["rng"])
        return ""
    if len(stored) == ranks.size:
        set_rng_state(stored[ranks.rank]["rng"])
        buffers, text = stored[ranks.rank]["buffers"], ""
    else:
        seed_all(mix(seed, state["position"]["step"]), ranks.rank)
        made = zip(*(r["buffers"] for r in stored), strict=True)
        buffers = [torch.stack(b).mean(0) if b[0].is_floating_point() else b[0] for b in made]
        text = f"{ranks.size} rank(s) go on where {max(len(stored), 1)} stopped: with the same images and other random numbers"
    if buffers:
        for mine, theirs in zip(step.buffers.flat, buffers, strict=True):
            mine.copy_(theirs)
    return text
