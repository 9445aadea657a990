"""Recipes by name: functions that return one complete Recipe. A recipe has a `none-` twin, the same peers alone, but for those
that are a comparison already."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .. import methods
from ..errors import UsageError, nearest
from ..recipe import MethodConfig, Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {}
ALONE: set[str] = set()  # those without a twin


def register(name: str, make: Callable[[], Recipe], twin: bool = True) -> None:
    """Make `make` the recipe `name`. A name is taken once."""
    if name in RECIPES:
        raise ValueError(f"two recipes are called {name!r}")
    RECIPES[name] = make
    if not twin:
        ALONE.add(name)


def recipe(make: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """Register a recipe function under its name, `_` as `-`."""
    register(make.__name__.replace("_", "-"), make)
    return make


def names() -> list[str]:
    """Every recipe, each followed by its twin where it has one."""
    return [n for name in RECIPES for n in ((name,) if name in ALONE else (name, f"none-{name}"))]


def load(name: str) -> Recipe:
    """The recipe `name`. UsageError with the nearest name where there is none."""
    base = name.removeprefix("none-")
    if base not in RECIPES or name not in names():
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
    """The recipe with another method at that method's own defaults, its peers as that method arranges them."""
    kind = methods.load(name)
    if made.method.name == name and len(made.nets.names) >= kind.min_peers:
        return made
    arranged = methods.ask(kind, "arranged", made.nets.names)
    if not (isinstance(arranged, tuple) and len(arranged) == 2 and isinstance(arranged[1], MethodConfig)):
        raise UsageError(
            f"method {name}: arranged() gives {type(arranged).__name__}; expected (names of nets, settings); mend it"
        )
    names, config = arranged
    if made.method.name == name:
        config = made.method
    nets = made.nets.model_copy(update={"names": names, "share_stem": None, "private": None})
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


from . import cifar, family, folder, imagenet, tiny  # noqa: E402, F401  their functions register themselves
