"""Goals: what a release must reach on an H200, what rows say of it, and whether a later run lost ground."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Row = dict[str, Any]


class Goal(NamedTuple):
    """A figure a release must reach on an H200 (`must`) and what the model of bytes and launches expects (`aim`).

    op        an op, or "step"
    against   the group whose best row ours is compared with, or "copy": the share of the copy rate
    """

    id: str
    op: str
    case: str
    against: str
    must: float
    aim: float
    dtype: str = "bf16"

    @property
    def text(self) -> str:
        return f"{self.op} {self.case}, {self.against}"


class Measured(NamedTuple):
    """A goal and what the rows say about it; value None: unmeasured."""

    goal: Goal
    value: float | None
    rival: str

    @property
    def met(self) -> str:
        return "unmeasured" if self.value is None else "yes" if self.value >= self.goal.must else "no"


def goal_table(measured: Iterable[Measured]) -> list[list[str]]:
    """id, what, must, aim, measured, met: as printed and as in the README."""

    def figure(goal: Goal, value: float | None) -> str:
        return "unmeasured" if value is None else f"{100 * value:.0f} %" if goal.against == "copy" else f"{value:.2f} x"

    made = []
    for m in measured:
        what = f"{m.goal.text}{f' ({m.rival})' if m.rival and m.rival != m.goal.against else ''}"
        wanted = [figure(m.goal, v) for v in (m.goal.must, m.goal.aim)]
        made.append([m.goal.id, what, *wanted, figure(m.goal, m.value), m.met])
    return made


class Comparison(NamedTuple):
    """worse: sentences, the worst first; missing: cases of the old file that the new rows lack; pairs: how many were compared."""

    worse: list[str]
    missing: list[str]
    pairs: int


def lost_ground(before: Mapping[tuple[str, ...], Row], now: Mapping[tuple[str, ...], Row], tolerance: float) -> Comparison:
    """Timed rows by what they measured, the variant last. Both figures are ratios within one run, so clocks cancel."""
    worse, missing = [], []
    pairs = 0
    for key, row in before.items():
        what = f"{' '.join(key[:-1])} against {key[-1]}"
        if key not in now:
            missing.append(what)
        elif key[-1] != "ours" and row["against"] == now[key]["against"] == "ours":
            pairs += 1
            change = now[key]["ratio"] / row["ratio"]
            if change < 1 - tolerance:
                worse.append((change, f"{what}: {row['ratio']:.2f} x before, {now[key]['ratio']:.2f} x now"))
    return Comparison([text for _, text in sorted(worse)], missing, pairs)
