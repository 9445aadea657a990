"""fastffl bench kernels: every op against its reference, torch, torch.compile and other packages, side by side in one run.

Parity comes first: a style whose answer is further from float64 than its limit is not timed. Then styles take turns in
rounds (timing.py), with inputs that wait in L2 (warm) and inputs that do not (cold). Styles of torch.compile come after all
others and bring ours again, since their compilation takes longer than everything else together.

Without CUDA nothing is timed: each op's answers are checked against float64, the Triton path in the interpreter, and the
kernels are compiled for GPUs that are not here.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

import fastffl_kernels
from fastffl_kernels import _compile

from . import problems, timing
from .goals import Comparison, Goal, Measured, lost_ground
from .goals import goal_table as goal_table
from .problems import MAX, SHORT, Inputs, Outputs, Problem, Style

Row = dict[str, Any]
Emit = Callable[[Row], None]
OPS = ("distill_graph", "fuse_conv", "bn_act", "augment", "guard", "sgd_flat", "nce")
PASSES = ("", "default", MAX)
# Relative distance beyond which an answer is wrong.
FAR = {torch.bfloat16: 0.05, torch.float16: 0.05, torch.float32: 1e-3, torch.float64: 1e-3}
COMPILE_S = 40.0  # no compilation begins with less time left


GOALS = (
    Goal("L1", "distill_graph", "B1024 C1000 K4", "eager", 12, 20),
    Goal("L2", "distill_graph", "B1024 C1000 K4", "compile", 1.8, 2.5),
    Goal("L3", "distill_graph", "B1024 C1000 K4", "liger", 5, 8),
    Goal("L4", "distill_graph", "B4096 C21841 K4", "eager", 18, 25),
    Goal("L4", "distill_graph", "B4096 C21841 K4", "compile", 2.2, 3),
    Goal("L5", "distill_graph", "B4096 C21841 K4", "copy", 0.75, 0.85),
    Goal("L6", "distill_graph", "B128 C100 K2", "eager", 15, 25),
    Goal("L6", "distill_graph", "B128 C100 K2", "compile", 2, 3),
    Goal("F1", "fuse_conv", "B128 C128>64 8x8", "eager", 2.2, 3),
    Goal("F1", "fuse_conv", "B128 C128>64 8x8", "compile", 1.6, 2.2),
    Goal("F2", "fuse_conv", "B1024 C128>64 8x8", "eager", 2.0, 2.7),
    Goal("F2", "fuse_conv", "B1024 C128>64 8x8", "compile", 1.5, 2.1),
    Goal("F3", "fuse_conv", "B256 C1024>512 7x7", "eager", 1.4, 1.9),
    Goal("F3", "fuse_conv", "B256 C1024>512 7x7", "compile", 1.2, 1.5),
    Goal("F4", "fuse_conv", "B256 C4096>2048 7x7", "eager", 1.2, 1.4),
    Goal("F4", "fuse_conv", "B256 C4096>2048 7x7", "compile", 1.0, 1.25),
    Goal("F5", "fuse_conv", "B128 C128>64 8x8 inference", "eager", 3, 5),
    Goal("F5", "fuse_conv", "B128 C128>64 8x8 inference", "compile", 1.3, 1.8),
    Goal("F5", "fuse_conv", "B1024 C128>64 8x8 inference", "eager", 3, 5),
    Goal("F5", "fuse_conv", "B1024 C128>64 8x8 inference", "compile", 1.3, 1.8),
    Goal("F6", "fuse_conv", "B1024 C128 8x8 depthwise forward", "eager", 1.3, 2),
    Goal("F6", "fuse_conv", "B1024 C128 8x8 depthwise backward", "eager", 1.5, 2.5),
)


def goals(rows: Iterable[Row]) -> list[Measured]:
    """Each goal from the newest cold rows; against a group, its best style that gave a right answer."""
    newest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row.get("kind") == "time" and row.get("l2") == "cold" and row.get("state") == "ok":
            newest[row["op"], row["shape"], row["dtype"], row["variant"]] = row
    made = []
    for goal in GOALS:
        of_case = [r for r in newest.values() if (r["op"], r["shape"], r["dtype"]) == (goal.op, goal.case, goal.dtype)]
        if goal.against == "copy":
            found = [(r.get("of_copy"), "copy") for r in of_case if r["variant"] == "ours"]
        else:
            against = [r for r in of_case if r["group"] == goal.against and r.get("against") == "ours"]
            found = [(r["ratio"], r["variant"]) for r in against]
        figures = [(value, rival) for value, rival in found if value is not None]
        made.append(Measured(goal, *min(figures, default=(None, ""))))
    return made


# ---- timing on a device -----------------------------------------------------------------------------------------------------


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


class Run(NamedTuple):
    """What stays the same over a run."""

    clock: timing.Clock
    emit: Emit
    roofs: timing.Ceilings
    rounds: int
    end: float  # time.monotonic() at which nothing new begins


def timed(
    todo: list[Problem],
    clock: timing.Clock,
    emit: Emit,
    *,
    rounds: int = 25,
    seconds: float = 570,
    passes: Iterable[str] = PASSES,
) -> None:
    """Measure problems in passes: plain styles of all of them, then each torch.compile mode, goals first. Rows go to `emit`."""
    end = time.monotonic() + seconds
    cuda = clock.device.type == "cuda"
    roofs = timing.ceilings(clock) if cuda else timing.ceilings(clock, 16, 256, 3)
    same = {"kind": "ceiling", "variant": "torch", "ms": None}
    emit({"op": "copy", "case": "copy of 1 GB", **same, "gb_s": roofs.copy / 1e9})
    emit({"op": "gemm", "case": "GEMM 8192, bf16", **same, "tflop_s": roofs.gemm / 1e12})
    run = Run(clock, emit, roofs, rounds, end)
    wanted = {(g.op, g.case, g.dtype) for g in GOALS}
    goal = [p for p in todo if (p.op, p.case, SHORT[p.dtype]) in wanted]
    plain, modes = [m for m in passes if not m], [m for m in passes if m]
    order = [(m, p) for m in plain for p in todo] + [(m, p) for m in modes for p in goal]
    order += [(m, p) for m in modes for p in todo if p not in goal]
    with _fastest_convs():
        for mode, problem in order:
            styles = [s for s in problem.styles if s.mode == mode]
            if not styles:
                continue
            if time.monotonic() > end:
                emit(_row(problem, styles[0], state="skipped: out of time"))
                continue
            try:
                _measure(run, problem, [s for s in problem.styles if mode and s.group == "ours"] + styles)
                if cuda:
                    torch.cuda.synchronize()
            except Exception as error:  # one problem must not cost the others
                emit(_row(problem, styles[0], state=f"failed: {_reason(error)}"))
            if cuda and not _alive():
                ours = next(s for s in problem.styles if s.group == "ours")
                emit(_row(problem, ours, state="failed: the device answers no more in this process"))
                return


@contextmanager
def _fastest_convs() -> Iterator[None]:
    """The vendor's library tries its algorithms and takes the fastest: a rival at its best."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _alive() -> bool:
    """False after an illegal access: every later CUDA call of the process fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _row(problem: Problem, style: Style, **more: Any) -> Row:
    same = {"op": problem.op, "shape": problem.case, "dtype": SHORT[problem.dtype], "variant": style.name, "group": style.group}
    return {"kind": "time", "case": problem.name, **same, "ms": None, **more}


def caller(problem: Problem, style: Style, device: torch.device) -> Callable[[Inputs], Outputs]:
    """A style as a function of inputs. On CUDA ours is the Triton path or an error, whatever FASTFFL_KERNELS says."""
    forward = style.forward
    if style.mode:
        torch._dynamo.reset()
        forward = torch.compile(forward, mode=style.mode, dynamic=False)
        # without what other styles keep there: a dictionary with other keys would be compiled again
        return lambda inputs: problems.solved(forward, problem.wrt, {k: v for k, v in inputs.items() if k[0] != "_"})

    def call(inputs: Inputs) -> Outputs:
        ours = style.group.startswith("ours") and device.type == "cuda"
        with fastffl_kernels.use("triton") if ours else nullcontext():
            return problems.solved(forward, problem.wrt, inputs)

    return call


def verdict(problem: Problem, style: Style, got: Outputs, want: problems.Truth) -> Row:
    """How far an answer is from the truth, in eps of the problem's type, and whether that is within the limits."""
    found = problems.errors(got, want, problem.dtype)
    worst = max(found, key=lambda name: found[name])
    limits, judged = dict.fromkeys(found, problem.rival), found
    if style.group not in ("eager", "compile", "liger", "apex"):
        judged = problems.errors(got, want, problem.dtype, own=True)
        limits = {n: problems.VALUE if n[:2] != "d " and x.dtype == torch.float32 else problem.limit for n, x in got.items()}
    wrong = [f"{n} is off by {judged[n]:.3g} eps, limit {limits[n]:g}" for n in judged if not judged[n] <= limits[n]]
    far = problems.distances(got, want)
    for name, value in far.items():
        most = problem.far * max(FAR[problem.dtype], FAR[got[name].dtype])
        if not value <= most:  # true for NaN, too
            wrong.append(f"{name} has a relative distance of {value:.2g}, limit {most:g}")
    said = f"wrong: {'; '.join(wrong[:3])}" if wrong else "ok"
    return {
        "max_err": found[worst],
        "err_unit": "eps x max",
        "err_of": worst,
        "distance": max(far.values(), default=0.0),
        "state": said,
    }


def _measure(run: Run, problem: Problem, styles: list[Style]) -> None:
    """Parity, memory and time of some styles of a problem, and their rows."""
    clock = run.clock
    first = problem.draw(clock.device, 0)
    footprint = sum(x.numel() * x.element_size() for x in problems.leaves(first))
    truth = problems.truth(problem, first)
    sets = [problem.draw(clock.device, k) for k in range(clock.inputs(footprint, cold=True))]
    about: dict[str, Row] = {}
    ready: dict[str, tuple[timing.Prepared, timing.Prepared]] = {}  # cold, warm

    def prepare(style: Style) -> str:
        """Why the style is not timed, or "" when it is ready."""
        if style.missing:
            return style.missing
        if style.mode and time.monotonic() > run.end - COMPILE_S:
            return "skipped: out of time"
        begin = time.monotonic()
        call = caller(problem, style, clock.device)
        about[style.name] = verdict(problem, style, call(problem.draw(clock.device, 0)), truth)
        if about[style.name]["state"] == "ok":
            about[style.name]["peak_mib"] = clock.peak(lambda: call(sets[0])) / 2**20
            ready[style.name] = clock.prepare(call, sets), clock.prepare(call, sets[:1])
            about[style.name]["setup_s"] = time.monotonic() - begin
        return str(about[style.name]["state"]).removeprefix("ok")

    by_name = {style.name: style for style in styles}
    for style in styles:
        try:
            said = prepare(style)
        except Exception as error:
            said = f"failed: {_reason(error)}"
        if said:
            run.emit(_row(problem, style, **{**about.get(style.name, {}), "state": said}))
    for k, l2 in enumerate(("cold", "warm") if ready else ()):
        variants = {name: pair[k] for name, pair in ready.items()}
        times = clock.interleave(variants, run.rounds, cold=l2 == "cold")
        state = timing.gpu_state() if clock.device.type == "cuda" else {}
        for row in timing.rows(problem.name, times, "ours" if "ours" in variants else next(iter(variants))):
            byte_s, flop_s = 1e3 * problem.bytes / row["ms"], 1e3 * problem.flop / row["ms"]
            rate = {"bytes": problem.bytes, "gb_s": byte_s / 1e9, "of_copy": byte_s / run.roofs.copy}
            rate |= {"flop": problem.flop, "tflop_s": flop_s / 1e12}
            rate |= {"of_gemm": flop_s / run.roofs.gemm} if problem.gemm else {}
            name = row["variant"]
            more = {"l2": l2, "graph": variants[name].graph, **about[name], **state}
            run.emit(_row(problem, by_name[name]) | row | rate | more)
    ready.clear()
    gc.collect()
    if clock.device.type == "cuda":
        torch.cuda.empty_cache()


# ---- without a GPU: answers and machine code --------------------------------------------------------------------------------


def numerics(ops: Iterable[str]) -> Iterable[Row]:
    """Small cases of each op against float64 on the CPU: the reference, or the Triton path where this process interprets it."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
    wanted, path = ("ours", "triton") if interpreted else ("reference", "reference")
    cpu = torch.device("cpu")
    for problem in problems.small(ops):
        for style in (s for s in problem.styles if s.group == wanted):
            row = _row(problem, style, kind="numerics")
            missing = style.missing or ("" if not interpreted or problems.has_triton(problem.op) else "no Triton path yet")
            if missing:
                yield row | {"state": missing}
                continue
            begin = time.perf_counter()
            try:
                truth = problems.truth(problem, problem.draw(cpu, 0))
                with fastffl_kernels.use(path):  # type: ignore[arg-type]
                    got = problems.solved(style.forward, problem.wrt, problem.draw(cpu, 0))
                yield row | verdict(problem, style, got, truth) | {"check_ms": 1e3 * (time.perf_counter() - begin)}
            except Exception as error:
                yield row | {"state": f"failed: {_reason(error)}"}


def machine_code(ops: Iterable[str], capabilities: Iterable[int] = _compile.CAPABILITIES) -> Iterable[Row]:
    """Registers, spill, shared memory, load width and matrix instructions of every configuration the dispatch picks."""
    for op in ops:
        same: Row = {"kind": "compile", "op": op, "ms": None}
        if not problems.has_triton(op):
            yield same | {"case": op, "variant": "ours", "state": "no Triton path yet"}
            continue
        for case in _compile.cases(op):
            for capability in capabilities:
                row = same | {"case": f"{op} {case.name}", "variant": f"sm_{capability}"}
                try:
                    report = _compile.report(case, capability)
                except Exception as error:
                    yield row | {"state": f"failed: {_reason(error)}"}
                    continue
                said = "; ".join(_compile.wrong(case, capability, report))
                yield row | report._asdict() | {"state": f"wrong: {said}" if said else "ok"}


def checked(ops: list[str], emit: Emit, *, quick: bool) -> None:
    """What can be said on a machine without CUDA. The interpreter is chosen when Triton is imported, hence its own process."""
    whole: Row = {"op": "all", "case": "all ops", "variant": "ours", "ms": None}
    command = [sys.executable, "-m", "fastffl.bench.kernels", *ops]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    beside = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) if find_spec("triton") else None
    try:
        for row in numerics(ops):
            emit(row)
        if beside is None:
            emit(whole | {"kind": "compile", "state": "triton is not installed"})
            return
        for row in machine_code(ops, (90,) if quick else _compile.CAPABILITIES):
            emit(row)
        out, _ = beside.communicate()
        for line in out.splitlines():
            emit(json.loads(line))
        if beside.returncode:
            emit(whole | {"kind": "numerics", "state": f"failed: the interpreter's process ended with {beside.returncode}"})
    finally:
        if beside is not None and beside.poll() is None:
            beside.kill()
            beside.wait()


def bad(row: Row) -> bool:
    """Wrong or broken, and ours: what others answer is their business."""
    group = str(row.get("group", "ours"))
    return str(row.get("state", "ok")).startswith(("wrong", "failed")) and group.startswith(("ours", "reference"))


# ---- two files of rows ------------------------------------------------------------------------------------------------------


def _timed(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    wanted = (r for r in rows if r.get("kind") == "time" and r.get("ms") is not None)
    return {(r["op"], r["shape"], r["dtype"], r["l2"], r["variant"]): r for r in wanted}


def devices(rows: Iterable[Row]) -> set[str]:
    """The devices whose times stand in rows."""
    return {str(r.get("device")) for r in _timed(rows).values()}


def compare(old: Iterable[Row], new: Iterable[Row], tolerance: float) -> Comparison:
    """How much faster ours is than each rival, now and before."""
    return lost_ground(_timed(old), _timed(new), tolerance)


def main() -> None:
    """python -m fastffl.bench.kernels OP ...: the rows of `numerics`, one JSON object per line."""
    for row in numerics(sys.argv[1:] or OPS):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
