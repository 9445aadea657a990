"""Recipes by name: functions that return one complete Recipe. Every recipe has a `none-` twin: the same peers alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .. import methods
from ..errors import UsageError, nearest
from ..recipe import MethodConfig, Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {}


def recipe(make: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """Register a recipe function under its name, `_` as `-`. A name is taken once."""
    name = make.__name__.replace("_", "-")
    if name in RECIPES:
        raise ValueError(f"two recipes are called {name!r}")
    RECIPES[name] = make
    return make


def names() -> list[str]:
    """Every recipe, each followed by its twin."""
    return [n for name in RECIPES for n in (name, f"none-{name}")]


def load(name: str) -> Recipe:
    """The recipe `name`. UsageError with the nearest name where there is none."""
    base = name.removeprefix("none-")
    if base not in RECIPES:
        raise UsageError(f"no recipe is called {name!r}{nearest(name, names())}")
    made = RECIPES[base]()
    assert made.name == base, f"recipe function {base} returns a recipe called {made.name}"
    if base == name:
        return made
    twin = with_method(made, "none")
    return twin.model_copy(
        update={"name": name, "summary": f"The peers of {base}, each alone: its baseline.", "expect": "not reproduced"}
    )


def with_method(made: Recipe, name: str) -> Recipe:
    """The recipe with another method at that method's own defaults."""
    if made.method.name == name:
        return made
    config = methods.load(name).Config(name=name)
    nets = made.nets.model_copy(update={"share_stem": None})
    return made.model_copy(update={"method": config, "nets": nets})


def from_dict(stored: Any, where: str) -> Recipe:
    """A recipe from what `Recipe.model_dump(mode="json")` gave. UsageError names `where` and what does not fit."""
    try:
        method = stored["method"]
        config: MethodConfig = methods.load(method["name"]).Config.model_validate(method)
        return Recipe.model_validate({**stored, "method": config})
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(p) for p in first["loc"])
        raise UsageError(f"{where} is no recipe of this version: {f'{path}: ' if path else ''}{first['msg']}") from None
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    except (KeyError, TypeError, RecursionError):
        raise UsageError(f"{where} is no recipe: expected the JSON of a run's recipe.json") from None


def read(path: Path) -> Recipe:
    """The recipe stored in a file (a run's recipe.json)."""
    try:
        stored = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} can't be read as a recipe: {error.strerror}; expected a run's recipe.json") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} can't be read as a recipe: it is not JSON ({error}); expected a run's recipe.json") from None
    return from_dict(stored, str(path))


from . import cifar, folder, imagenet, tiny  # noqa: E402, F401  their functions register themselves
