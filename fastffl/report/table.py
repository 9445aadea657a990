"""Table: runs grouped by method and setting, every vote's mean and spread over seeds, and Welch's test against the baseline."""

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import __version__
from ..errors import UsageError, nearest
from .runs import DATA, Run, Values, find, known_settings, mixed, read, text_of
from .stats import Spread, Welch, spread, welch

Select = Literal["last", "best"]
LACKS = "-"  # in place of a setting that a method does not have
FEW = 5  # seeds below which a p value is called weak evidence


class Cell(NamedTuple):
    """A vote over the seeds: top-1 (%) of the last epoch, and of the best one of each run."""

    last: Spread
    best: Spread

    def of(self, select: Select) -> Spread:
        return self.best if select == "best" else self.last


@dataclass(frozen=True)
class Line:
    """One row of the table: the finished runs of a method under the same settings.

    label   the method, and what tells this line from its others: `dml T=1`
    by      the values of the settings asked for with --by, LACKS where its method has no such setting
    """

    method: str
    label: str
    by: tuple[str, ...]
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """The label and what --by tells it apart by."""
        return " ".join([self.label, *(value for value in self.by if value != LACKS)])

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def ships(self) -> str | None:
        return self.runs[0].ships

    def values(self, vote: str, select: Select) -> list[float]:
        """Top-1 (%) of a vote, or of the mean over `peers`, a value per run that has it."""
        if vote == "peers":
            return [sum(getattr(r.scores[p], select) for p in r.peers) / len(r.peers) for r in self.runs if r.peers]
        return [float(getattr(r.scores[vote], select)) for r in self.runs if vote in r.scores]

    def cell(self, vote: str | None) -> Cell | None:
        """None where no run has this vote."""
        if vote is None or not self.values(vote, "last"):
            return None
        return Cell(spread(self.values(vote, "last")), spread(self.values(vote, "best")))

    @cached_property
    def votes(self) -> dict[str, Cell]:
        names = dict.fromkeys(v for run in self.runs for v in run.scores)
        return {v: c for v in names if (c := self.cell(v))}

    def median(self, key: str) -> float | None:
        """`seconds` of a run or its `img_s`, the median over the runs."""
        values = [v for run in self.runs if (v := run.figure(key)) is not None]
        return statistics.median(values) if values else None


@dataclass(frozen=True)
class Table:
    """What a report shows. `against[label, vote]` is that vote's selected top-1 against p0 of the baseline's line."""

    lines: tuple[Line, ...]
    runs: tuple[Run, ...]  # the finished ones, in the order of the lines
    select: Select
    baseline: Line
    by: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def name(self) -> str:
        return ", ".join(dict.fromkeys(str(run.recipe["name"]) for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        return sorted({s for line in self.lines for s in line.seeds})

    def base(self, line: Line) -> Line | None:
        """The baseline's line under the same settings, as far as the baseline has them."""

        def fits(base: Line) -> bool:
            has = base.runs[0].settings()
            return all(a == b or path not in has for path, a, b in zip(self.by, line.by, base.by, strict=True))

        return next((b for b in self.lines if b.label == self.baseline.label and fits(b)), None)

    def against(self, line: Line, vote: str | None) -> Welch | None:
        """A vote of a line against p0 of the baseline; None where there is nothing to compare, or it is that p0 itself."""
        base = self.base(line)
        if vote is None or base is None or (base is line and vote == "p0"):
            return None
        mine, theirs = line.values(vote, self.select), base.values("p0", self.select)
        return welch(mine, theirs) if mine and theirs else None

    @property
    def tests(self) -> list[tuple[Line, str, Welch]]:
        """Every comparison with the baseline, once where p0 is what is shipped."""
        asked = [(line, vote) for line in self.lines for vote in dict.fromkeys(("p0", line.ships)) if vote]
        return [(line, vote, found) for line, vote in asked if (found := self.against(line, vote))]

    @property
    def few(self) -> bool:
        return min((len(line.runs) for line in self.lines), default=0) < FEW

    def settings(self) -> dict[str, str]:
        """What all runs share, in words."""
        parts = [run.settings() for run in self.runs]
        same = [p for p in parts[0] if not p.startswith("method.") and len({text_of(s.get(p)) for s in parts}) == 1]
        return {p: text_of(parts[0][p]) for p in same if p != "data.root"}  # where it lay is nobody else's business

    def environments(self) -> list[tuple[str, int]]:
        """Versions and device in words, each with its number of runs."""
        made = [", ".join(f"{k} {text_of(v)}"[:120] for k, v in run.environment.items()) for run in self.runs]
        return [(text, made.count(text)) for text in dict.fromkeys(made) if text]

    def document(self) -> dict[str, Any]:
        """All of it for a script."""

        def cell(found: Cell | None) -> dict[str, Any] | None:
            return found and {"last": found.last._asdict(), "best": found.best._asdict()}

        def test(line: Line, vote: str | None) -> dict[str, Any] | None:
            found = self.against(line, vote)
            return found and found._asdict()

        return {
            "recipe": self.name,
            "fastffl": __version__,
            "select": self.select,
            "baseline": self.baseline.label,
            "seeds": self.seeds,
            "rows": [
                {
                    "method": line.method,
                    "label": line.label,
                    "by": dict(zip(self.by, line.by, strict=True)),
                    "seeds": line.seeds,
                    "ships": line.ships,
                    "votes": {v: cell(c) for v, c in line.votes.items()},
                    "peers": cell(line.cell("peers")),
                    "welch": {"p0": test(line, "p0"), "ships": test(line, line.ships)},
                    "seconds": line.median("seconds"),
                    "img_s": line.median("img_s"),
                }
                for line in self.lines
            ],
            "warnings": list(self.warnings),
            "runs": [
                {"run": str(r.path), "method": r.method, "seed": r.seed, "digest": r.digest, "votes": _scores(r)}
                for r in self.runs
            ],
        }


def _scores(run: Run) -> dict[str, Any]:
    return {v: s._asdict() for v, s in run.scores.items()}


def _asked(folders: Sequence[str | Path]) -> tuple[list[str], list[int]]:
    """The methods that sweeps in these folders were asked for, in order, and the seeds."""
    methods: list[str] = []
    seeds: list[int] = []
    for folder in map(Path, folders):
        try:
            plan = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
            methods += [str(m) for m in plan["methods"]]
            seeds += [s for s in plan["seeds"] if isinstance(s, int)]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # there was no sweep; what it wrote is checked where it goes on
    return list(dict.fromkeys(methods)), sorted(set(seeds))


def _lines(runs: Sequence[Run], by: Sequence[str], order: Sequence[str], forced: bool) -> list[Line]:
    """Runs grouped by method, by `by`, and by whatever settings of a method differ within it."""
    groups: dict[tuple[str, tuple[str, ...]], list[Run]] = {}
    for run in runs:
        s = run.settings()
        groups.setdefault((run.method, tuple(text_of(s[p]) if p in s else LACKS for p in by)), []).append(run)
    made = []
    for (method, values), some in groups.items():
        own = sorted({p for run in some for p in run.settings() if p.startswith("method.") and p not in by})
        apart = [p for p in own if len({text_of(run.settings().get(p)) for run in some}) > 1]
        split: dict[str, list[Run]] = {}
        for run in some:
            what = " ".join(f"{p.removeprefix('method.')}={text_of(run.settings().get(p))}" for p in apart)
            split.setdefault(f"{method} {what}".strip(), []).append(run)
        for label, mine in split.items():
            mine.sort(key=lambda run: run.seed)
            if not forced:
                _twice(label, mine)
            made.append(Line(method, label, values, tuple(mine)))
    rank = {m: k for k, m in enumerate(order)}
    return sorted(made, key=lambda line: (line.by, rank.get(line.method, len(rank)), line.method, line.label))


def _twice(label: str, runs: Sequence[Run]) -> None:
    for a, b in itertools.pairwise(runs):
        if a.seed == b.seed:
            raise UsageError(
                f"{a.path} and {b.path} are both seed {a.seed} of {label}; a seed counts once: leave one of them out"
            )


def _base(lines: Sequence[Line], baseline: str | None) -> Line:
    wanted = baseline or ("none" if any(line.method == "none" for line in lines) else lines[0].label)
    found = [line for line in lines if wanted in (line.label, line.method)]
    if not found:
        raise UsageError(f"--baseline {wanted}: no finished run has it{nearest(wanted, [line.label for line in lines])}")
    if len(labels := dict.fromkeys(line.label for line in found)) > 1:
        raise UsageError(f"--baseline {wanted} is several lines; name one of them: {', '.join(map(repr, labels))}")
    return found[0]


def _refuse(apart: dict[str, Values]) -> None:
    for path, values in apart.items():
        (a, [one, *_]), (b, [two, *_]), *_ = values
        tell = "data.root" if path == DATA else path
        elsewhere = path != DATA or one.settings().get(tell) != two.settings().get(tell)
        how = f"tell them apart with --by {tell}, or mix" if elsewhere else "leave some out, or mix"
        raise UsageError(f"runs differ in {path}: {a} in {one.path} and {b} in {two.path}; {how} them with --force")


def table(
    folders: Sequence[str | Path],
    *,
    select: Select = "last",
    baseline: str | None = None,
    by: Sequence[str] = (),
    force: bool = False,
) -> Table:
    """The table of the runs at and below `folders`.

    select     which top-1 is compared: of the last epoch, or of each run's best (chosen on the data it is reported on)
    baseline   a method or a line's label; None: `none`, else the first
    by         settings that tell lines apart       force   mix runs whose settings differ, with a warning
    UsageError names the setting in which runs differ, or the file that is damaged.
    """
    warnings: list[str] = []
    runs = [read(path) for path in find(folders, warnings.append)]
    if not runs:
        below = f"no run folder below {', '.join(map(str, folders))}"
        raise UsageError(f"{below}: {warnings[0]}" if warnings else f"{below}; `fastffl train` and `fastffl sweep` make them")
    for run in runs:
        if not run.finished:
            warnings.append(f"left out {run.path}: it ended at epoch {run.done} of {run.epochs}")
    known_settings(runs, by)
    runs = [run for run in runs if run.finished]
    if not runs:
        raise UsageError(f"no finished run below {', '.join(map(str, folders))}: {warnings[0]}; train it to its last epoch")
    apart = mixed(runs, by)
    if not force:
        _refuse(apart)
    for path, values in apart.items():
        shown = ", ".join(f"{value} in {len(some)}" for value, some in values)
        warnings.append(f"mixed by --force: {path} is {shown} runs")
    order, asked = _asked(folders)
    lines = _lines(runs, by, order, bool(apart))
    first = _base(lines, baseline)
    lines.sort(key=lambda line: (line.by, line.label != first.label))
    made = tuple(run for line in lines for run in line.runs)
    return Table(tuple(lines), made, select, first, tuple(by), (*warnings, *_gaps(lines, order, asked), *_mix(made)))


def _gaps(lines: Sequence[Line], order: Sequence[str], asked: Sequence[int]) -> list[str]:
    """Cells with fewer seeds than their neighbours, methods with none, and seeds that were asked for and no method has."""
    seeds = sorted({s for line in lines for s in line.seeds})
    said = []
    for line in lines:
        if missing := [s for s in seeds if s not in line.seeds]:
            lost = ", ".join(map(str, missing))
            said.append(f"{line.name} has {len(line.runs)} of {len(seeds)} seeds (missing {lost}); shown as n={len(line.runs)}")
    have = {line.method for line in lines}
    many = len({*seeds, *asked})
    said += [f"{m} has none of {many} seeds; it has no row" for m in order if m not in have]
    nowhere = [s for s in asked if s not in seeds]
    return said + [f"no method has a finished run of seed {s}, which the sweep was asked for" for s in nowhere]


def _mix(runs: Sequence[Run]) -> list[str]:
    """What differs between the machines of the runs, though not in their settings."""
    said = []
    for key, cost in (
        ("fastffl", "they may not compute the same"),
        ("torch", "rounding differs"),
        ("device", "rounding differs and times can't be compared"),
        ("threads", "rounding differs and times can't be compared"),
    ):
        values = dict.fromkeys(text_of(run.environment[key])[:80] for run in runs if key in run.environment)
        if len(values) > 1:
            said.append(f"runs were made with different {key} ({', '.join(values)}): {cost}")
    old = sum(run.ships is None for run in runs)
    return said + ([f"{old} runs do not say which vote they ship; train them with this version"] if old else [])
