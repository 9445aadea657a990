"""Runs as a report sees them: found below folders, read from their text files, told apart. Nothing of them is executed."""

import contextlib
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import UsageError, nearest, printable
from ..recipe import FREE, SECTIONS, fields
from ..train.checkpoint import note

PEER = re.compile(r"p\d+")
EARLIER = re.compile(r"before-\d+")  # what a method in stages trained before, inside its run folder
HABITS = ("nets.share_stem", "nets.private", "nets.names")  # follow from the method; of the names the first must be the same
# settings that say which images there are: told apart by one of them, runs may have seen others
CHOICE = {f"data.{k}" for k in ("name", "root", "loader", "train_fraction", "val_fraction", "classes", "samples", "checked")}
DATA = "the data"  # in `mixed`, what no setting tells: the images themselves, wherever they lie


class Score(NamedTuple):
    """Top-1 (%) of a vote in one run."""

    last: float
    best: float
    best_epoch: int


class Images(NamedTuple):
    """What a run was trained and scored on: the names of the classes, numbers of images. None where it has no record of it."""

    classes: tuple[str, ...] | None = None
    train: int | None = None
    val: int | None = None


UNKNOWN = Images()


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
    images: Images = UNKNOWN

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
        values = [float(r[key]) for r in self.rows if _number(r.get(key))]
        if not values:
            return None
        return max(values) + self.earlier if key == "seconds" else statistics.median(values)

    def settings(self) -> dict[str, Any]:
        return fields(self.recipe)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """An OSError of the block becomes a UsageError that names the file."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise UsageError(f"{where} can't be read: {error.strerror}; make it readable, or move its folder away") from None


def _json(path: Path, text: str | None = None) -> Any:
    """The JSON in a file. UsageError names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8") if text is None else text)
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


def images_of(path: Path) -> Images:
    """The classes and training images that the checkpoints of a run note. Of a checkpoint only its names and scalars are read."""
    for file in sorted(path.glob("*/step-*.pt")):  # all of a run say the same
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            classes, samples = state["classes"], state["samples"]
        except Exception:  # torch raises many kinds on foreign files; training names them where it goes on
            continue
        if isinstance(classes, list) and all(isinstance(c, str) for c in classes) and _count(samples, 1):
            return Images(tuple(classes), samples)
    return UNKNOWN


def newest(run: Path) -> dict[str, Any]:
    """What was noted beside the last checkpoint of a run. UsageError where its folder can't be read."""
    with readable(run / "last"):
        return note(run / "last")


def read(path: Path) -> Run:
    """The run in a folder. UsageError names the file that is damaged, foreign or can't be read."""
    with readable(path):
        return _read(path)


def _read(path: Path) -> Run:
    environment = _json(path / "environment.json") if (path / "environment.json").exists() else {}
    if not isinstance(environment, dict):
        raise _foreign(path / "environment.json", "expected an object")
    digest = newest(path).get("digest")
    rows = tuple(_rows(path / "rows.jsonl"))
    before = [list(_rows(p / "rows.jsonl")) for p in path.iterdir() if EARLIER.fullmatch(p.name) and is_run(p)]
    earlier = sum(max((float(r["seconds"]) for r in b if _number(r.get("seconds"))), default=0.0) for b in before)
    digest = digest if isinstance(digest, str) else None
    scored = [s.get("samples") for r in rows for s in r.get("val", {}).values()]
    images = images_of(path)._replace(val=scored[-1] if scored and _count(scored[-1], 1) else None)
    return Run(path, _recipe(path / "recipe.json"), rows, environment, digest, earlier, images)


def is_run(folder: Path) -> bool:
    with readable(folder):
        return (folder / "recipe.json").is_file() and (folder / "rows.jsonl").is_file()


def find(folders: Sequence[str | Path], say: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Run folders at and below `folders`, each once; none inside another run. Links are followed, each folder is entered once.

    say   told of each folder that can't be read
    """
    found, seen = list[Path](), set[tuple[int, int]]()

    def lost(error: OSError) -> None:
        say(f"left out {error.filename}: it can't be read ({error.strerror})")

    for top in map(Path, folders):
        with readable(top):
            if not top.is_dir():
                raise UsageError(f"{top}: there is no such folder; expected run folders, or a folder that holds some")
        for here, below, files in os.walk(top, onerror=lost, followlinks=True):
            folder = Path(here)
            try:
                at = folder.stat()
            except OSError as error:
                lost(error)
                continue
            if (at.st_dev, at.st_ino) in seen:
                below.clear()
                continue
            seen.add((at.st_dev, at.st_ino))
            if {"recipe.json", "rows.jsonl"} <= set(files):
                found.append(folder)
                below.clear()
            below[:] = sorted(b for b in below if not EARLIER.fullmatch(b))
    return found


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


Values = list[tuple[str, list[Run]]]  # what runs have, in words, each with those that have it


def _grouped(pairs: Iterable[tuple[Run, Any]], words: Callable[[Any], str] = text_of) -> Values:
    values: dict[str, tuple[str, list[Run]]] = {}
    for run, value in pairs:
        values.setdefault(_same(value), (words(value), []))[1].append(run)
    return list(values.values())


def mixed(runs: Sequence[Run], by: Sequence[str]) -> dict[str, Values]:
    """Settings in which runs differ though they should not, each with its values and their runs; under DATA their images.

    Runs of other methods must agree in all but the method's own settings, the seed, what changes nothing (FREE) and nets
    that a method arranges, as long as p0 is the same net; runs of one method in those nets too. Data may have moved, but must
    be the same.
    """
    per_run = [(run, run.settings()) for run in runs]
    apart = {}

    def compare(path: str, pairs: Iterable[tuple[Run, Any]]) -> None:
        values = _grouped(pairs)
        if len(values) > 1 and path not in by:
            apart[path] = values

    for path in sorted({p for _, s in per_run for p in s}):
        if shared(path):  # a setting that a version does not know is not compared
            compare(path, ((run, s[path]) for run, s in per_run if path in s))
    compare("nets.names", ((run, run.nets[:1]) for run in runs))
    for method in dict.fromkeys(run.method for run in runs):
        for path in HABITS:
            if path not in apart:
                compare(path, ((run, s.get(path)) for run, s in per_run if run.method == method))
    chosen = [p for p in by if p in CHOICE]
    for _, same in _grouped((run, [s.get(p) for p in chosen]) for run, s in per_run):
        if DATA not in apart and (values := _images_apart(same)):
            apart[DATA] = values
    return apart


def _images_apart(runs: Sequence[Run]) -> Values:
    """The classes, else the numbers of images, in which runs differ; empty where all that is known of them is the same."""
    named = [(run, sorted(run.images.classes)) for run in runs if run.images.classes]
    common = set[str].intersection(*(set(names) for _, names in named)) if named else set()

    def classes(names: list[str]) -> str:
        own = [printable(n) for n in names if n not in common]
        return f"{len(names)} classes" + (f" ({', '.join(own[:5])}{', ...' * (len(own) > 5)})" if own else "")

    found = _grouped(named, classes)
    for key, what in (("train", "training images"), ("val", "images that are scored")):
        if len(found) < 2:
            counts = ((run, getattr(run.images, key)) for run in runs)
            found = [(f"{n} {what}", some) for n, some in _grouped((run, n) for run, n in counts if n is not None)]
    return found if len(found) > 1 else []


def known_settings(runs: Sequence[Run], by: Sequence[str]) -> None:
    """UsageError where `--by` names a setting that no run has."""
    known = {p for run in runs for p in run.settings()}
    for path in by:
        if path not in known:
            raise UsageError(f"--by {path}: no run has such a setting{nearest(path, known)}")
