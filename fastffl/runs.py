"""Open a finished or unfinished run folder again: its recipe, data, learner and weights."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from . import recipes
from .data import Place, Source, source
from .errors import CheckpointError, UsageError
from .recipe import Recipe, change, differences
from .train import Learner, Plan, checkpoint
from .train.device import plan


class OpenRun(NamedTuple):
    recipe: Recipe
    data: Source | None
    learner: Learner
    where: Plan
    position: dict[str, int]
    classes: list[str]
    normal: tuple[list[float], list[float]]  # per-channel mean and std the images were normalised by


def open_run(path: str, *, which: str = "last", root: str | None = None, device: str | None = None, data: bool = True) -> OpenRun:
    """The run in folder `path` with the weights of its `last` or `best` checkpoint (the moving average where it has one).

    root    where its data lies now, None: where it lay          data    whether the data set is opened too
    """
    run = Path(path)
    if not (run / "recipe.json").is_file():
        raise UsageError(f"{path} is no run folder: there is no recipe.json in it; expected what `fastffl train` printed as run")
    recipe = recipes.read(run / "recipe.json")
    if root:
        recipe = change(recipe, "data.root", root)
    if device:
        recipe = change(recipe, "run.device", device)
    where = plan(recipe)
    state: dict[str, Any] | None = checkpoint.newest(run / which, where.device)
    if state is None:
        raise CheckpointError(f"{path} holds no {which} checkpoint yet; train it first")
    try:
        stored, classes, position = json.loads(state["recipe"]), list(state["classes"]), dict(state["position"])
        channels, size = (int(n) for n in state["shape"])
        changed = differences(stored, recipe)
        mean, std = ([float(v) for v in part] for part in state["normal"])
        weights = state["average"]["model"] if recipe.ema.decay else state["learner"]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{path}: its {which} checkpoint is not one of this version of fastffl; train the run again"
        ) from None
    if changed:  # its numbers would be those of another run
        raise CheckpointError(
            f"{path}: its {which} checkpoint is of another recipe than its recipe.json ({'; '.join(changed[:4])}); put back "
            "the one it was trained with"
        )
    opened = None
    if data:
        opened = source(recipe.data, Place(where.device, where.memory_format, where.images))
        if list(opened.classes) != classes:
            raise CheckpointError(
                f"{path} was trained on other classes than those of {opened.name}; give its data with --data DIR"
            )
        if (opened.channels, opened.size) != (channels, size):
            raise CheckpointError(
                f"{path} was trained on {channels} x {size} x {size} images, and {opened.name} gives {opened.channels} x "
                f"{opened.size} x {opened.size}; give its data with --data DIR"
            )
    weightless = change(recipe, "nets.pretrained", False)
    learner = Learner.build(weightless, len(classes), channels, size, int(state.get("ids", 0)))
    try:
        learner.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path}: its weights do not fit its recipe: {(str(error).splitlines() or [''])[0]}") from None
    return OpenRun(recipe, opened, learner.place(where).eval(), where, position, classes, (mean, std))
