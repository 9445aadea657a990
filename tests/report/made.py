"""Run folders with planted numbers, written by the code that writes real ones; no training."""

import errno
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastffl import recipes
from fastffl.recipe import Recipe, change
from fastffl.report.runs import Images
from fastffl.train import checkpoint
from fastffl.train.rundir import RunDir

HOSTILE = (
    "<script>window.pwned=1</script></title><img src=http://localhost:9/x onerror=alert(1)>|`_*[x](http://x)\\ & % $ # { } ~ ^ "
    "\"'\n@me \u202e ]]> --> url(http://localhost:9/y)"
)
DIGITS = Images(tuple("0123456789"), 1347, 450)
MACHINE = {"fastffl": "0.1.0", "torch": "2.15.0", "device": "cpu", "cores": 2, "threads": 1}


def recipe(method: str, seed: int, epochs: int = 3, **settings: Any) -> Recipe:
    """digits under a method; settings by path with `__` for the dot."""
    made = change(recipes.with_method(recipes.load("digits"), method), "sched.epochs", epochs)
    made = change(made, "run.seed", seed)
    for path, value in settings.items():
        made = change(made, path.replace("__", "."), value)
    return made


def run(
    path: Path,
    method: str,
    seed: int,
    votes: dict[str, Sequence[float]],
    *,
    ships: str | None = None,
    loss: Sequence[float] | None = None,
    machine: dict[str, Any] | None = None,
    epochs: int | None = None,
    images: Images = DIGITS,
    **settings: Any,
) -> Path:
    """A run whose votes have these top-1 by epoch; unfinished where `epochs` is more than they have."""
    length = len(next(iter(votes.values())))
    made = recipe(method, seed, epochs or length, **settings)
    folder = RunDir(path)
    folder.begin(made, MACHINE if machine is None else machine)
    for k in range(length):
        val = {v: {"top1": t[k], "top5": 100.0, "nll": 0.1, "samples": images.val} for v, t in votes.items()}
        row = {"epoch": k + 1, "step": 22 * (k + 1), "loss": (loss or [2 * math.exp(-k)] * length)[k], "img_s": 1000.0 + k}
        folder.row({**row, "seconds": 2.0 * (k + 1), "skipped": 0, "val": val, "ships": ships or next(iter(votes))})
    state = {"learner": {}, "position": {"epoch": length, "batch": 0, "step": 22 * length}, "recipe": made.json_text()}
    state |= {"classes": list(images.classes or ()), "samples": images.train}
    facts = {"epoch": length, "digest": checkpoint.digest({"of": str(path)})}
    checkpoint.save(folder.last, state, 22 * length, facts)
    folder.close()
    return path


def two_methods(top: Path) -> Path:
    """none and ffl, three seeds each. Last p0: 97, 98, 99 and 98, 98.5, 99; fused 99, 99.2, 99.4."""
    for seed in range(3):
        alone = {"p0": [50.0, 99.5, 97.0 + seed], "p1": [60.0, 90.0, 95.0 + seed], "mean": [70.0, 80.0, 99.0]}
        run(top / "none" / f"seed-{seed}", "none", seed, alone)
        ours = {"p0": [40.0, 90.0, 98.0 + 0.5 * seed], "p1": [60.0, 99.0, 96.0], "mean": [70.0, 80.0, 98.0]}
        fused = [10.0, 99.9, 99.0 + 0.2 * seed]
        run(top / "ffl" / f"seed-{seed}", "ffl", seed, {**ours, "fused": fused}, ships="fused")
    return top


def hostile(top: Path) -> Path:
    """Two runs, in folders and with recipe, method and vote names that try to be code."""
    for seed, name in enumerate(("<img src=x onerror=alert(1)>", "a|b")):
        made = run(top / name, "dml", seed, {"p0": [50.0], HOSTILE: [60.0 + seed]}, ships=HOSTILE)
        stored = json.loads((made / "recipe.json").read_text())
        stored |= {"name": HOSTILE, "method": {"name": HOSTILE, "x": HOSTILE}}
        stored["nets"]["names"] = [HOSTILE]
        (made / "recipe.json").write_text(json.dumps(stored))
        (made / "environment.json").write_text(json.dumps({"torch": HOSTILE, HOSTILE: HOSTILE}))
    return top


def locked(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A folder that can't be entered, also for root, who may do anything."""

    def refusing(was: Callable[..., Any], below: bool) -> Callable[..., Any]:
        def call(path: Any = ".", *args: Any, **named: Any) -> Any:
            if isinstance(path, (str, Path)) and (folder in Path(path).parents if below else Path(path) == folder):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return was(path, *args, **named)

        return call

    for name, below in (("scandir", False), ("listdir", False), ("stat", True)):
        monkeypatch.setattr(os, name, refusing(getattr(os, name), below))
    monkeypatch.setattr(io, "open", refusing(io.open, True))
