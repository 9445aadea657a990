"""Methods by name. A method is one file here, named as the method (`-` becomes `_`), holding one Method class; another package
adds its own by an entry point in the group `fastffl.methods`, whose name is the method's and whose value is the class."""

import importlib
import inspect
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from ..errors import FastFFLError, UsageError, first_line, nearest
from ..recipe import MethodConfig
from ._base import Method as Method
from ._base import Published as Published
from ._base import Terms as Terms

GROUP = "fastffl.methods"


@cache
def own() -> tuple[str, ...]:
    """The methods of this package, from the files here, without importing them."""
    found = sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py"))
    return tuple(f.removesuffix("_").replace("_", "-") for f in found)


def _points() -> list[EntryPoint]:
    return sorted({*entry_points(group=GROUP)}, key=lambda e: (e.name, e.value))


def plugins() -> dict[str, EntryPoint]:
    """Methods of other packages by name; one that is called as a method here is not among them."""
    return {e.name: e for e in _points() if e.name not in own()}


def unused() -> list[str]:
    """A sentence about every method of another package that is called as one here."""
    return [
        f"method {e.name} of {_package(e)} is not used: fastffl has one of that name; give it another"
        for e in _points()
        if e.name in own()
    ]


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


def names() -> list[str]:
    """Every method's name, without importing any: those here, then those of other packages."""
    return [*own(), *plugins()]


def foreign(kind: type[Method]) -> bool:
    """Whether a method is another package's."""
    return not kind.__module__.startswith(f"{__name__}.")


def ask(method: Method | type[Method], hook: str, *given: Any) -> Any:
    """What a method's hook (`needs`, `arranged`, ...) gives. UsageError with its name where another package's raises."""
    kind = method if isinstance(method, type) else type(method)
    try:
        return getattr(method, hook)(*given)
    except FastFFLError:
        raise
    except Exception as error:
        if not foreign(kind):
            raise
        raise UsageError(f"method {kind.name} raises in {hook}: {first_line(error)}; mend its package") from error


def load(name: str) -> type[Method]:
    """The class of the method `name`. UsageError with the nearest name where there is none, or with what is wrong with it."""
    if name in own():
        module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
        found = [
            c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, Method) and c.__module__ == module.__name__
        ]
        assert len(found) == 1 and found[0].name == name, f"{module.__name__} must hold one method called {name!r}"
        return found[0]
    if name not in plugins():
        raise UsageError(f"no method is called {name!r}{nearest(name, names())}")
    rivals = [e for e in _points() if e.name == name]
    if len(rivals) > 1:
        bring = " and ".join(f"{_package(e)} ({e.value})" for e in rivals)
        raise UsageError(f"method {name} is brought by {bring}; uninstall all but one")
    return _plugged(name, rivals[0])


def _plugged(name: str, entry: EntryPoint) -> type[Method]:
    """The class an entry point gives. UsageError where it gives none, or one that is not whole."""
    where = f"method {name} of {_package(entry)}"
    try:
        kind = entry.load()
    except (Exception, SystemExit) as error:  # a stranger's module may raise anything when imported
        raise UsageError(f"{where} can't be imported: {first_line(error)}; mend or uninstall it") from error
    if not (inspect.isclass(kind) and issubclass(kind, Method)):
        raise UsageError(f"{where}: {entry.value} is {kind!r}; expected a subclass of fastffl.methods.Method")
    lacking = [k for k in ("name", "paper", "year", "summary", "status", "deviations", "Config") if not hasattr(kind, k)]
    if lacking:
        raise UsageError(f"{where} lacks {', '.join(lacking)}; set them on {kind.__name__}")
    if kind.name != name:
        raise UsageError(f"{where} calls itself {kind.name!r}; the entry point and the class must have one name")
    try:
        config = kind.Config(name=name)
    except Exception as error:  # pydantic's, of a setting without a default; anything, of a class that is something else
        raise UsageError(f"{where}: its Config can't be made bare: {first_line(error)}; give each a default") from error
    if not isinstance(config, MethodConfig):
        raise UsageError(f"{where}: its Config is no subclass of fastffl.recipe.MethodConfig; make it one")
    return kind
