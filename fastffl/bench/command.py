"""`fastffl bench kernels` below its flags: choose, run, keep rows, print, judge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import FastFFLError, ThresholdError, UsageError, nearest, printable
from . import kernels, problems, roofline, timing
from .kernels import Row


class Result(NamedTuple):
    """What a run found. code: 0 all fine, 1 something of ours is wrong."""

    document: dict[str, Any]
    code: int
    comparison: kernels.Comparison | None

    def judge(self) -> None:
        """ThresholdError if ours lost ground against a rival."""
        if self.comparison and self.comparison.worse:
            worse = self.comparison.worse
            more = f" and {len(worse) - 3} more" if len(worse) > 3 else ""
            raise ThresholdError(
                f"ours lost ground in {len(worse)} of {self.comparison.pairs} pairs: {'; '.join(worse[:3])}{more}"
            )


def _line(row: Row) -> str:
    """A row for people."""
    what = f"{row['case']} {row.get('dtype', '')}".strip()
    if row["kind"] == "ceiling":
        return f"{what:46} " + (f"{row['gb_s']:,.0f} GB/s" if "gb_s" in row else f"{row['tflop_s']:,.1f} TFLOP/s")
    if row["kind"] == "compile":
        facts = [
            f"{row[k]} {name}" for k, name in (("registers", "registers"), ("spill", "spilled"), ("shared", "shared")) if k in row
        ]
        facts += [f"{row['loads']}-byte loads", f"{row['wgmma']} wgmma"] if "loads" in row else []
        return f"{what:46} {row['variant']:22} {', '.join([*facts, row['state']])}"
    error = f"  error {row['max_err']:.2g} eps" if "max_err" in row else ""
    if row["ms"] is None:
        return f"{what:46} {row['variant']:22} {row['state']}{error}"
    rate = f"{row['ms'] * 1e3:10.2f} us  {row['gb_s']:7,.0f} GB/s  {100 * row['of_copy']:5.1f} % of copy"
    return f"{what:46} {row['variant']:22} {row['l2']:4} {rate}  {row['ratio']:6.2f} x {row['against']}{error}"


def _chosen(ops: list[str] | None) -> list[str]:
    for op in ops or []:
        if op not in problems.FULL:
            raise UsageError(f"--op {op}: no op is called {op!r}{nearest(op, problems.FULL)}")
    return list(dict.fromkeys(ops or problems.FULL))


def _earlier(path: Path, cuda: bool) -> list[Row]:
    """The rows to compare with, refused before anything is run if they can't be compared."""
    try:
        rows = timing.read(path)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        said = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise UsageError(f"--compare {path}: {said}; expected the JSONL of an earlier run") from None
    theirs = kernels.devices(rows)
    if not theirs:
        raise UsageError(f"--compare {path}: holds no timed rows; expected the JSONL of a run on a CUDA device")
    here = torch.cuda.get_device_name() if cuda else "no CUDA device"
    if theirs != {here}:
        raise UsageError(f"--compare {path}: timed on {', '.join(sorted(theirs))}, here is {here}; such times can't be compared")
    return rows


def bench_kernels(
    ops: list[str] | None,
    out: Path | None,
    svg: Path | None,
    compare: Path | None,
    *,
    tolerance: float = 0.1,
    quick: bool = False,
    minutes: float = 9.5,
    device: str = "auto",
    say: Callable[[str], None] = print,
    table: Callable[..., None] | None = None,
) -> Result:
    """Run the ops, append rows to `out` as they come, print them and what follows from them."""
    chosen = _chosen(ops)
    if not 0 <= tolerance < 1:
        raise UsageError(f"--tolerance {tolerance:g}: expected a share, at least 0 and below 1")
    cuda = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UsageError("--device cuda: torch finds no CUDA device; --device cpu checks answers and compiles the kernels")
    if svg and not cuda:
        raise UsageError("--svg needs timed rows, and those a CUDA device; leave it out to check answers and compiled kernels")
    earlier = _earlier(compare, cuda) if compare else None
    facts = timing.circumstances()
    rows: list[Row] = []

    def emit(row: Row) -> None:
        rows.append(row)
        if out:
            try:
                timing.write(out, [row], facts)
            except OSError as error:
                raise FastFFLError(f"--out {out}: {error.strerror or error}") from None
        say(printable(_line(row)))

    if cuda:
        with timing.clock_of(torch.device("cuda")) as clock:
            passes = kernels.PASSES[:2] if quick else kernels.PASSES
            todo = problems.full(chosen, quick)
            kernels.timed(todo, clock, emit, rounds=10 if quick else 25, seconds=60 * minutes, passes=passes)
        measured = [m for m in kernels.goals(rows) if m.goal.op in chosen]
        if table and measured:
            table(["goal", "case", "must", "aim", "measured", "met"], kernels.goal_table(measured), right=2)
        if svg:
            made = ", ".join(f"{k} {facts[k]}" for k in ("commit", "torch", "triton"))
            try:
                roofline.draw(rows, svg, f"{facts['device']}, {made}")
            except (ValueError, OSError) as error:
                raise FastFFLError(f"--svg {svg}: {error}") from None
    else:
        say("no CUDA device: nothing is timed; answers are checked against float64, kernels compiled for GPUs that are not here")
        kernels.checked(chosen, emit, quick=quick)
    wrong = [r for r in rows if kernels.bad(r)]
    say(f"{len(rows)} rows, " + (f"{len(wrong)} of them wrong" if wrong else "all fine"))
    for row in wrong:
        say(printable(f"wrong: {row['case']} {row.get('dtype', '')} {row['variant']}: {row['state']}"))
    comparison = kernels.compare(earlier, [r | facts for r in rows], tolerance) if earlier else None
    for what in comparison.missing if comparison else []:
        say(f"not measured this time: {what}")
    document = {k: facts[k] for k in ("device", "commit", "torch", "triton")} | {"rows": rows}
    return Result(document, 1 if wrong else 0, comparison)
