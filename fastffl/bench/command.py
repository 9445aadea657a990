"""`fastffl bench kernels`, `train` and `data` below their flags: choose, run, keep rows, print, judge."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import FastFFLError, ThresholdError, UsageError, nearest, printable
from ..recipe import Recipe
from . import kernels, problems, roofline, timing
from .goals import Comparison, Row, goal_table

GOAL_COLUMNS = ["goal", "case", "must", "aim", "measured", "met"]


class Result(NamedTuple):
    """What a run found. code: 0 all fine, 1 something of ours is wrong."""

    document: dict[str, Any]
    code: int
    comparison: Comparison | None

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


def _on_cuda(device: str, instead: str) -> bool:
    """Whether a CUDA device is to be used. UsageError where it is asked for and not there."""
    cuda = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UsageError(f"--device cuda: torch finds no CUDA device; --device cpu {instead}")
    return cuda


def _share(tolerance: float) -> None:
    if not 0 <= tolerance < 1:
        raise UsageError(f"--tolerance {tolerance:g}: expected a share, at least 0 and below 1")


def _earlier(path: Path, here: str, devices: Callable[[Iterable[Row]], set[str]], expected: str) -> list[Row]:
    """The rows to compare with, refused before anything is run if they can't be compared."""
    try:
        rows = timing.read(path)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        said = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise UsageError(f"--compare {path}: {said}; expected the JSONL of an earlier run") from None
    theirs = devices(rows)
    if not theirs:
        raise UsageError(f"--compare {path}: holds no timed rows; expected the JSONL of {expected}")
    if theirs != {here}:
        raise UsageError(f"--compare {path}: timed on {', '.join(sorted(theirs))}, here is {here}; such times can't be compared")
    return rows


def _keeper(
    rows: list[Row], out: Path | None, facts: Row, say: Callable[[str], None], line: Callable[[Row], str]
) -> kernels.Emit:
    """What takes a row: it is kept, appended to `out` and printed."""

    def emit(row: Row) -> None:
        rows.append(row)
        if out:
            try:
                timing.write(out, [row], facts)
            except OSError as error:
                raise FastFFLError(f"--out {out}: {error.strerror or error}") from None
        say(printable(line(row)))

    return emit


def _end(rows: list[Row], wrong: list[Row], facts: Row, comparison: Comparison | None, say: Callable[[str], None]) -> Result:
    """The last lines, and what they come to."""
    say(f"{len(rows)} rows, " + (f"{len(wrong)} of them wrong" if wrong else "all fine"))
    for row in wrong:
        say(printable(f"wrong: {row['case']} {row.get('dtype', '')} {row['variant']}: {row['state']}"))
    for what in comparison.missing if comparison else []:
        say(f"not measured this time: {what}")
    document = {k: facts[k] for k in ("device", "commit", "torch", "triton")} | {"rows": rows}
    return Result(document, 1 if wrong else 0, comparison)


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
    _share(tolerance)
    cuda = _on_cuda(device, "checks answers and compiles the kernels")
    if svg and not cuda:
        raise UsageError("--svg needs timed rows, and those a CUDA device; leave it out to check answers and compiled kernels")
    here = torch.cuda.get_device_name() if cuda else "no CUDA device"
    earlier = _earlier(compare, here, kernels.devices, "a run on a CUDA device") if compare else None
    facts = timing.circumstances()
    rows: list[Row] = []
    emit = _keeper(rows, out, facts, say, _line)
    if cuda:
        with timing.clock_of(torch.device("cuda")) as clock:
            passes = kernels.PASSES[:2] if quick else kernels.PASSES
            todo = problems.full(chosen, quick)
            kernels.timed(todo, clock, emit, rounds=10 if quick else 25, seconds=60 * minutes, passes=passes)
        measured = [m for m in kernels.goals(rows) if m.goal.op in chosen]
        if table and measured:
            table(GOAL_COLUMNS, goal_table(measured), right=2)
        if svg:
            made = ", ".join(f"{k} {facts[k]}" for k in ("commit", "torch", "triton"))
            try:
                roofline.draw(rows, svg, f"{facts['device']}, {made}")
            except (ValueError, OSError) as error:
                raise FastFFLError(f"--svg {svg}: {error}") from None
    else:
        say("no CUDA device: nothing is timed; answers are checked against float64, kernels compiled for GPUs that are not here")
        kernels.checked(chosen, emit, quick=quick)
    comparison = kernels.compare(earlier, [r | facts for r in rows], tolerance) if earlier else None
    return _end(rows, [r for r in rows if kernels.bad(r)], facts, comparison, say)


def _step_line(row: Row) -> str:
    """A row of the step for people."""
    head = f"{row['case']:22} {row['variant']:20}"
    if row["kind"] == "cold" and row["state"] == "ok":
        return f"{head} {row['setup_s']:9.1f} s to the first optimised step of a fresh process"
    if row["ms"] is None:
        return f"{head} {row['state']}"
    units = {"img_s": "img/s", "launches": "launches", "ops": "operations", "peak_mib": "MiB"}
    facts = [f"{row[k]:,.0f} {unit}" for k, unit in units.items() if row.get(k)]
    facts += [f"peers {row['style']}"] if "style" in row else []
    facts += [f"not captured: {row['not_captured']}"] if row["cuda"] and "not_captured" in row else []
    return f"{head} {row['ms']:9.3f} ms {row['ratio']:6.2f} x {row['against']}  {', '.join(facts)}"


def bench_train(
    names: list[str] | None,
    rivals: list[str] | None,
    folder: Path | None,
    out: Path | None,
    compare: Path | None,
    *,
    tolerance: float = 0.1,
    quick: bool = False,
    minutes: float = 9.5,
    device: str = "auto",
    say: Callable[[str], None] = print,
    table: Callable[..., None] | None = None,
) -> Result:
    """Run the cases, append rows to `out` as they come, print them and what follows from them.

    names    cases; None: all of them on CUDA, those a CPU can do on a CPU
    rivals   None: all on CUDA, the plain loop (and the authors' code where `folder` is given) on a CPU
    folder   a checkout of the authors' code
    """
    from . import cases, official, train

    for name in names or []:
        if name not in cases.CASES:
            raise UsageError(f"--case {name}: no case is called {name!r}{nearest(name, cases.CASES)}")
    for name in rivals or []:
        if name not in train.RIVALS:
            raise UsageError(f"--rivals {name}: no rival is called {name!r}{nearest(name, train.RIVALS)}")
    _share(tolerance)
    cuda = _on_cuda(device, "measures on the CPU")
    if "official" in (rivals or []) and not folder:
        raise UsageError("--rivals official needs --official DIR, a checkout of Jangho-Kim/FFL-pytorch")
    if folder:
        official.module(folder, "our_network")
    todo = [cases.CASES[n] for n in dict.fromkeys(names or cases.CASES)]
    if not names:
        todo = [c for c in todo if (cuda or c.usual) and (c.quick or not quick)]
    if not cuda and any(c.heavy for c in todo):
        raise UsageError(f"--case {next(c.name for c in todo if c.heavy)}: this case needs a CUDA device")
    chosen = rivals or [r for r in train.RIVALS if (cuda or r == "eager") and r != "official"]
    chosen = list(dict.fromkeys([*chosen, *(["official"] if folder and not rivals else [])]))
    facts = timing.circumstances(cuda)
    earlier = None
    if compare:
        earlier = _earlier(compare, facts["device"], train.devices, "a run of bench train")
    rows: list[Row] = []
    emit = _keeper(rows, out, facts, say, _step_line)
    if not cuda:
        say("no CUDA device: nothing is captured, the goals stay unmeasured; ours beside the plain loop on this CPU")
    train.timed(todo, chosen, device, folder, emit, rounds=(5 if quick else 15) + 10 * cuda, seconds=60 * minutes)
    if table and cuda:
        table(GOAL_COLUMNS, goal_table(cases.goals(rows)), right=2)
    comparison = train.compare(earlier, rows, tolerance) if earlier else None
    return _end(rows, [r for r in rows if train.bad(r)], facts, comparison, say)


def _data_line(row: Row) -> str:
    """A row of the loaders for people."""
    head = f"{row['case']:22} {row['variant']:24}"
    if row["kind"] == "images":
        if "bytes" not in row:
            return f"{head} {row.get('images', 'shards')}"
        spread = [f"{key} {row[key]['p5']:,} {row[key]['p50']:,} {row[key]['p95']:,}" for key in ("bytes", "side")]
        return f"{head} {row['images']:,}, each {row['copies']} times; 5, 50 and 95 % of {', of '.join(spread)}"
    if row["ms"] is None:
        return f"{head} {row['state']}"
    gpu = f", GPU {row['gpu_pct']:.0f} %" if "gpu_pct" in row else ""
    rate = f"{row['img_s']:10,.1f} img/s  {row['ms']:9.1f} ms a batch"
    return f"{head} {rate}  {row['ratio']:6.2f} x {row['against']}  {row['cpu_cores']:.1f} of {row['cores']} cores{gpu}"


def bench_data(
    recipe: Recipe,
    loaders: list[str] | None,
    workers: list[str] | None,
    parts: list[str] | None,
    out: Path | None,
    *,
    quick: bool = False,
    minutes: float = 9.5,
    say: Callable[[str], None] = print,
) -> Result:
    """Measure loaders, step and both on a recipe's images, append rows to `out` as they come, print them and what binds.

    loaders   None: those that are installed
    workers   numbers; None: as training has it, one per core but one
    parts     of loader, compute, together; None: all
    """
    from ..data.folder import has_dali
    from . import data

    for flag, given, known in (("loaders", loaders, data.LOADERS), ("parts", parts, data.PARTS)):
        for name in given or []:
            if name not in known:
                raise UsageError(f"--{flag} {name}: expected some of {', '.join(known)}{nearest(name, known)}")
    if wrong := [word for word in workers or [] if not word.isdecimal() or int(word) > 1024]:
        raise UsageError(f"--workers {wrong[0]}: expected numbers up to 1024, for example 1,2,4")
    if recipe.data.name not in ("folder", "imagenet", "imagenette"):
        raise UsageError(f"bench data measures loaders of image files; {recipe.name} learns {recipe.data.name}; try imagenette")
    if recipe.data.root is None:
        raise UsageError(
            "bench data needs images: --data DIR, with DIR/train/CLASS/IMAGE.JPEG or DIR/CLASS/IMAGE.JPEG; few will do"
        )
    cuda = _on_cuda(recipe.run.device, "measures on the CPU")
    facts = timing.circumstances(cuda)
    rows: list[Row] = []
    emit = _keeper(rows, out, facts, say, _data_line)
    chosen = loaders or [name for name in data.LOADERS if name != "dali" or has_dali()]
    data.measure(
        recipe,
        list(dict.fromkeys(chosen)),
        [int(word) for word in workers] if workers else [None],
        parts or data.PARTS,
        emit,
        rounds=3 if quick else 7,
        turns=data.Turns(1.0 if quick else 2.0, 8 if cuda else 2, 200 if cuda else 24),
        seconds=60 * minutes,
    )
    for line in data.binds(rows):
        say(line)
    return _end(rows, [r for r in rows if data.bad(r)], facts, None, say)
