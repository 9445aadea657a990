"""Runs as a report sees them: found below folders, read from their text files, told apart. Nothing of them is executed."""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError, nearest
from ..recipe import FREE, SECTIONS, fields
from ..train.checkpoint import note

PEER = re.compile(r"p\d+")
EARLIER = re.compile(r"before-\d+")  # what a method in stages trained before, inside its run folder
HABITS = ("nets.share_stem", "nets.private", "nets.names")  # follow from the method; of the names the first must be the same


class Score(NamedTuple):
    """Top-1 (%) of a vote in one run."""

    last: float
    best: float
    best_epoch: int


@dataclass(frozen=True)
class Run:
    """One run folder: its recipe as JSON, the rows of whole epochs, environment and the digest of its last checkpoint.

    earlier   seconds of the runs that its method had finished first
    """

    path: Path
    recipe: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    environment: dict[str, Any]
    digest: str | None
    earlier: float = 0.0

    @property
    def method(self) -> str:
        return str(self.recipe["method"]["name"])

    @property
    def seed(self) -> int:
        return int(self.recipe["run"]["seed"])

    @property
    def nets(self) -> list[str]:
        return [str(n) for n in self.recipe["nets"]["names"]]

    @property
    def epochs(self) -> int:
        """What the recipe asks for."""
        return int(self.recipe["sched"]["epochs"])

    @cached_property
    def scored(self) -> tuple[dict[str, Any], ...]:
        """The rows with an evaluation, one per epoch, in order."""
        return tuple(v for _, v in sorted({r["epoch"]: r for r in self.rows if "val" in r}.items()))

    @property
    def done(self) -> int:
        """The newest whole epoch."""
        return max((r["epoch"] for r in self.rows), default=0)

    @property
    def finished(self) -> bool:
        return bool(self.scored) and self.scored[-1]["epoch"] == self.epochs

    @property
    def ships(self) -> str | None:
        """The vote its method ships; None in runs of versions that did not note it."""
        name = self.scored[-1].get("ships")
        return name if isinstance(name, str) and name in self.scored[-1]["val"] else None

    @cached_property
    def scores(self) -> dict[str, Score]:
        """Every vote of the last evaluation: peers, means, what the method makes."""
        made = {}
        for vote, last in self.scored[-1]["val"].items():
            curve = [(r["val"][vote]["top1"], -r["epoch"]) for r in self.scored if vote in r["val"]]
            best, at = max(curve)
            made[vote] = Score(last["top1"], best, -at)
        return made

    @property
    def peers(self) -> list[str]:
        return [v for v in self.scores if PEER.fullmatch(v)]

    def net(self, vote: str) -> str:
        """The architecture of a peer's vote, where the recipe's names are those of the cohort."""
        return self.nets[int(vote[1:])] if PEER.fullmatch(vote) and len(self.nets) == len(self.peers) else ""

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(epoch, value) of a number of the rows."""
        found = {r["epoch"]: float(r[key]) for r in self.rows if _number(r.get(key))}
        return sorted(found.items())

    def figure(self, key: str) -> float | None:
        """`seconds` of training, with that of earlier runs, or the median `img_s` over epochs."""
        values = sorted(float(r[key]) for r in self.rows if _number(r.get(key)))
        if not values:
            return None
        return values[-1] + self.earlier if key == "seconds" else values[len(values) // 2]

    def settings(self) -> dict[str, Any]:
        return fields(self.recipe)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _json(path: Path, text: str | None = None) -> Any:
    """The JSON in a file. UsageError names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8") if text is None else text)
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}; leave its folder out") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged or not ours: it is not JSON ({error}); leave its folder out") from None


def _foreign(path: Path, what: str) -> UsageError:
    return UsageError(f"{path} is damaged or not ours: {what}; leave its folder out")


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _recipe(path: Path) -> dict[str, Any]:
    stored = _json(path)
    if not isinstance(stored, dict) or not all(isinstance(stored.get(s, {}), dict) for s in SECTIONS):
        raise _foreign(path, "expected a recipe's sections")
    parts = {s: stored.get(s, {}) for s in SECTIONS}
    names = parts["nets"].get("names")
    for fits, what in (
        (isinstance(stored.get("name"), str), "name must be text"),
        (isinstance(parts["method"].get("name"), str), "method.name must be text"),
        (isinstance(names, list) and names and all(isinstance(n, str) for n in names), "nets.names must be names"),
        (_count(parts["run"].get("seed"), 0), "run.seed must be a whole number"),
        (_count(parts["sched"].get("epochs"), 1), "sched.epochs must be a whole number"),
    ):
        if not fits:
            raise _foreign(path, what)
    return {**stored, **parts}


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}; leave its folder out") from None
    except ValueError:
        raise _foreign(path, "it is not text") from None
    *lines, _cut = text.split("\n")  # what stands after the last line end was cut short by a crash
    for number, line in enumerate(lines, 1):
        row = _json(path, line)
        if not isinstance(row, dict) or not _count(row.get("epoch"), 0):
            raise _foreign(path, f"line {number} is no row of an epoch")
        if row.get("stopped_early"):
            continue  # scored inside an epoch, for that run's own result only
        val = row.get("val", {})
        if not isinstance(val, dict) or not all(
            isinstance(s, dict) and _number(s.get("top1")) and 0 <= s["top1"] <= 100 for s in val.values()
        ):
            raise _foreign(path, f"line {number} has votes without a top1 from 0 to 100")
        yield row


def read(path: Path) -> Run:
    """The run in a folder. UsageError names the file that is damaged or foreign."""
    environment = _json(path / "environment.json") if (path / "environment.json").exists() else {}
    if not isinstance(environment, dict):
        raise _foreign(path / "environment.json", "expected an object")
    digest = note(path / "last").get("digest")
    rows = tuple(_rows(path / "rows.jsonl"))
    before = [list(_rows(p / "rows.jsonl")) for p in path.iterdir() if EARLIER.fullmatch(p.name) and is_run(p)]
    earlier = sum(max((float(r["seconds"]) for r in b if _number(r.get("seconds"))), default=0.0) for b in before)
    digest = digest if isinstance(digest, str) else None
    return Run(path, _recipe(path / "recipe.json"), rows, environment, digest, earlier)


def is_run(folder: Path) -> bool:
    return (folder / "recipe.json").is_file() and (folder / "rows.jsonl").is_file()


def find(folders: Sequence[str | Path]) -> list[Path]:
    """Run folders at and below `folders`, each once; none inside another run."""
    found: dict[Path, Path] = {}
    for top in map(Path, folders):
        if not top.is_dir():
            raise UsageError(f"{top}: there is no such folder; expected run folders, or a folder that holds some")
        for here, below, _ in os.walk(top):
            folder = Path(here)
            if is_run(folder):
                found.setdefault(folder.resolve(), folder)
                below.clear()
            below[:] = sorted(b for b in below if not EARLIER.fullmatch(b))
    return list(found.values())


# ---- told apart


def text_of(value: Any) -> str:
    """A setting's value in words."""
    if isinstance(value, list):
        return ",".join(map(text_of, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _same(value: Any) -> str:
    """Equal for equal settings: 1 and 1.0 are."""
    return json.dumps(value, sort_keys=True) if not _number(value) else repr(float(value))


def shared(path: str) -> bool:
    """Whether runs of one table must agree in this setting, whatever their methods and seeds."""
    return not path.startswith("method.") and path not in FREE and path != "run.seed" and path not in HABITS


def mixed(runs: Sequence[Run], by: Sequence[str]) -> dict[str, dict[str, list[Run]]]:
    """Settings in which runs differ though they should not, each with its values and their runs.

    Runs of other methods must agree in all but the method's own settings, the seed, what changes nothing (FREE) and nets
    that a method arranges, as long as p0 is the same net; runs of one method in those nets too.
    """
    per_run = [(run, run.settings()) for run in runs]
    apart = {}

    def compare(path: str, pairs: Iterable[tuple[Run, Any]]) -> None:
        values: dict[str, list[Run]] = {}
        shown = {}
        for run, value in pairs:
            values.setdefault(_same(value), []).append(run)
            shown[_same(value)] = text_of(value)
        if len(values) > 1 and path not in by:
            apart[path] = {shown[k]: v for k, v in values.items()}

    for path in sorted({p for _, s in per_run for p in s}):
        if shared(path):  # a setting that a version does not know is not compared
            compare(path, ((run, s[path]) for run, s in per_run if path in s))
    compare("nets.names", ((run, run.nets[:1]) for run in runs))
    for method in dict.fromkeys(run.method for run in runs):
        for path in HABITS:
            if path not in apart:
                compare(path, ((run, s.get(path)) for run, s in per_run if run.method == method))
    return apart


def known_settings(runs: Sequence[Run], by: Sequence[str]) -> None:
    """UsageError where `--by` names a setting that no run has."""
    known = {p for run in runs for p in run.settings()}
    for path in by:
        if path not in known:
            raise UsageError(f"--by {path}: no run has such a setting{nearest(path, known)}")
