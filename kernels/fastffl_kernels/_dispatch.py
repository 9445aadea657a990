"""Triton or reference: the only place that decides, by a rule that can be printed.

FASTFFL_KERNELS=auto       Triton where the tensor is on CUDA and the op has a Triton path, the reference elsewhere
FASTFFL_KERNELS=triton     Triton or an error
FASTFFL_KERNELS=reference  plain torch everywhere

Tensors on "meta" have shapes and no data: the Triton path gives shapes too, so that its launches can be counted without a GPU.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

from torch import Tensor

from ._launch import KernelUnavailable

Choice = Literal["auto", "triton", "reference"]
CHOICES: tuple[Choice, ...] = ("auto", "triton", "reference")
HAS_TRITON = find_spec("triton") is not None
_override: list[Choice] = []  # innermost last; a list, because torch 2.11 does not trace a ContextVar

# op name -> its Triton path. A kernel file registers its own here; the name is taken once.
_TRITON: dict[str, Callable[..., Any]] = {}
_unavailable: set[str] = set()  # ops whose kernels this machine's GPU or Triton can't compile


def register(op: str, path: Callable[..., Any]) -> None:
    """Announce the Triton path of `op`. ValueError if the op already has one."""
    if op in _TRITON:
        raise ValueError(f"two Triton paths for {op!r}")
    _TRITON[op] = path


def choice() -> Choice:
    """What the user asked for: the innermost `use(...)`, else FASTFFL_KERNELS, else auto."""
    asked = _override[-1] if _override else os.environ.get("FASTFFL_KERNELS", "auto")
    if asked not in CHOICES:
        raise ValueError(f"FASTFFL_KERNELS={asked}: expected one of {', '.join(CHOICES)}")
    return asked


@contextmanager
def use(asked: Choice) -> Iterator[None]:
    """Within the block every op, in every thread, takes the path `asked` ("auto", "triton" or "reference")."""
    if asked not in CHOICES:
        raise ValueError(f"use({asked!r}): expected one of {', '.join(CHOICES)}")
    _override.append(asked)
    try:
        yield
    finally:
        _override.pop()


def triton_path(op: str, x: Tensor) -> Callable[..., Any] | None:
    """The Triton path of `op` for a tensor like `x`, or None where the reference is to be used."""
    asked = choice()
    path = _TRITON.get(op)
    if asked == "triton" and path is None:
        raise ValueError(f"FASTFFL_KERNELS=triton: {op} has no Triton path in this version; use auto or reference")
    if asked == "reference" or (asked == "auto" and (not x.is_cuda or op in _unavailable or not HAS_TRITON)):
        return None
    if not HAS_TRITON:
        raise ValueError(f"FASTFFL_KERNELS=triton: {op} needs the package triton, which is not installed: pip install triton")
    if x.device.type not in ("cuda", "meta") and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"FASTFFL_KERNELS=triton: {op} got a tensor on {x.device.type}; Triton needs CUDA (or TRITON_INTERPRET=1, which "
            "interprets kernels on the CPU); use auto or reference"
        )
    return path


def run(op: str, x: Tensor, reference: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """The result of `op` for a tensor like `x`: its Triton path where that is to be used, else `reference`.

    A kernel that can't be compiled for this GPU is replaced by the reference with one warning; FASTFFL_KERNELS=triton: an error.
    Where an earlier kernel of that one call had run already, running statistics are updated twice by it.
    """
    path = triton_path(op, x)
    if path is None:
        return reference(*args, **named)
    try:
        return path(*args, **named)
    except KernelUnavailable as error:
        if choice() == "triton":
            raise
        _unavailable.add(op)
        warnings.warn(f"{error}; {op} runs as plain torch from now on", RuntimeWarning, stacklevel=3)
        return reference(*args, **named)


def explain(op: str, x: Tensor) -> str:
    """The decision for `op` on a tensor like `x`, in words."""
    path = "triton" if triton_path(op, x) else "reference"
    has = "has a Triton path" if op in _TRITON else "has no Triton path yet"
    return f"{op} on {x.device.type}: {path} (FASTFFL_KERNELS={choice()}, the op {has})"
