"""fastffl: Feature Fusion Learning and its family of online knowledge distillation.

    from fastffl import Learner, export, fit, source

Importing this package does not import torch; its names are loaded when used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .data import source as source
    from .evaluation import evaluate as evaluate
    from .exporting import export as export
    from .train import Learner as Learner
    from .train import fit as fit

_PUBLIC = {
    "Learner": ("train", "Learner"),
    "fit": ("train", "fit"),
    "source": ("data", "source"),
    "evaluate": ("evaluation", "evaluate"),
    "export": ("exporting", "export"),
}
__all__ = ["Learner", "evaluate", "export", "fit", "source"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastffl' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value
