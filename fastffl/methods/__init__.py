"""Methods by name. A method is one file here, named as the method (`-` becomes `_`), holding one Method class."""

import importlib
import inspect
from pathlib import Path

from ..errors import UsageError, nearest
from ._base import Method as Method


def names() -> list[str]:
    """Every method's name, from the files here, without importing them."""
    files = sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py"))
    return [f.removesuffix("_").replace("_", "-") for f in files]


def load(name: str) -> type[Method]:
    """The class of the method `name`. UsageError with the nearest name where there is none."""
    if name not in names():
        raise UsageError(f"no method is called {name!r}{nearest(name, names())}")
    module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    found = [
        c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, Method) and c.__module__ == module.__name__
    ]
    assert len(found) == 1 and found[0].name == name, f"{module.__name__} must hold one method called {name!r}"
    return found[0]
