"""Everything that wants a GPU, unattended and in blocks: first what could not be checked before, then figures, then training.

    python bench/gpu.py [--out DIR] [--only checks,kernels,...] [--minutes 8] [--total 9.5] [--pack FILE] [--ops A,B]
                        [--cases A,B] [--methods A,B] [--data DIR] [--images DIR|TAR] [--official DIR] [--smoke]

checks    bench/stepchecks.py: the step against the CPU, no host read, resume, kernels on and off; then bench/opchecks.py of each
          op: random cases against float64 in guard bands, 2^31 elements, graph replays, repeats
graph     bench/graphchecks.py: the captured step equals the eager one, hand-overs between streams, evaluation, memory
methods   bench/methodchecks.py: every method's captured step gives its eager one's bits, in bf16, fp32 and fp16
kernels   `fastffl bench kernels`, an op at a time: DIR/kernels.jsonl, kernels.svg and the table of goals
sanitize  compute-sanitizer over 60 random cases of each op, where it is installed
step      `fastffl bench train`, all cases, the authors' code with --official: DIR/step.jsonl and the table of goals
dali      bench/dalichecks.py: DALI on the GPU against the CPU, and what damaged files leave behind (--images)
data      two ResNet-50 at 224 against the plain loop, torch.compile and fp32; `fastffl bench data` on --images, repeated in
          memory: real JPEGs against resident batches, decoding on the GPU against 16 processes. DIR/data.jsonl and the table
          of goals
train     ffl-cifar100-resnet32 --amp and its twin (--data), each resumed from DIR/runs where an earlier call stopped; when one
          is done its row, wall time and errors beside the published ones, joins DIR/step.jsonl
compare   one seed of every method in the common setting (--data), `none` first: DIR/compare.jsonl. Only where --only names it

Rows are appended to DIR/gpu.jsonl as they come, DIR being runs/gpu. Each block ends --minutes after it began, all of them
--total after the first, killing and saving included. Called again, a block leaves out what the same code has done and found
right, and takes what failed last. Checks run in processes of their own, a fresh one after a fault, since an illegal access ends
all later CUDA calls of its process; a block that fails writes its reason and the next one runs. --pack FILE keeps a tar of all
rows, tables and runs' reports up to date, without checkpoints. --smoke walks through all of it on the CPU with tiny sizes: its
figures mean nothing.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from checkrows import LOST, OVER, Row, code, facts, reason
from fastffl import methods
from fastffl.bench import cases, problems, roofline, timing, variants
from fastffl.bench import data as load
from fastffl.bench import kernels as benched
from fastffl.bench.problems import FULL
from fastffl.bench.timing import ROOT, circumstances, read, write
from fastffl.recipes.family import COMPARE
from fastffl.train.device import Plan
from fastffl.train.graph import computing
from methodchecks import cases as cases_of
from stepchecks import CHECKS as STEP_CHECKS

Emit = Callable[..., None]

LATE = "out of time before it began; call again to go on"
SLACK = 45  # seconds: a compilation that is under way when a command's own time is over
OP_CHECKS = ("random", "large", "replays", "repeats")
GRAPH_CHECKS = ("same", "delays", "waits", "evaluate", "memory", "replays")
DALI_CHECKS = ("decode", "views", "bad")
PACKED = (".jsonl", ".json", ".seconds", ".svg", ".csv", ".md", ".html", ".log")

# What an op gets of a block's time: the loss and the fusion module have most to compile, of ours and of rivals.
SHARES = {"distill_graph": 0.35, "fuse_conv": 0.36, "bn_act": 0.11, "augment": 0.05, "guard": 0.03, "sgd_flat": 0.05, "nce": 0.05}


def part(ops: list[str], k: int) -> float:
    """The share of op number k in what is left for it and those after it."""
    return SHARES[ops[k]] / sum(SHARES[op] for op in ops[k:])


def over(end: float, share: float = 1.0) -> tuple[float, float]:
    """Seconds that a command is told of a block that ends at `end`, and those after which it is stopped."""
    left = end - time.monotonic()
    seconds = max(20.0, share * left)
    return max(10.0, min(seconds, left - SLACK)), min(seconds + SLACK, left)


def earlier(args: argparse.Namespace) -> dict[str, Row]:
    """The last row of each case that the same code has left here."""
    path, here, commit = args.out / "gpu.jsonl", code(), circumstances()["commit"]
    rows = read(path) if path.is_file() else []
    variant = "smoke" if args.smoke else "ours"
    return {r["case"]: r for r in rows if r["commit"] == commit and r.get("code", here) == here and r["variant"] == variant}


def right(args: argparse.Namespace) -> set[str]:
    return {case for case, row in earlier(args).items() if row.get("ok")}


def in_turn(args: argparse.Namespace, emit: Emit, what: str, script: list[str], names: Sequence[str], end: float) -> bool:
    """The checks of a script in one process, and in a fresh one after each that ended it; whether all are right. In its words
    LEFT stands for the seconds that it has."""
    known, out, silent = earlier(args), args.out / "gpu.jsonl", 0
    todo = [n for n in names if not known.get(f"{what} {n}", {}).get("ok")]
    todo.sort(key=lambda n: f"{what} {n}" in known)
    while todo and silent < 2 and (left := end - time.monotonic()) > 5:
        before = len(read(out)) if out.is_file() else 0
        smoke = ["--smoke"] if args.smoke else []
        words = [word.replace("LEFT", f"{max(1.0, left - 10):.0f}") for word in script]
        exit_code = run_for([sys.executable, *words, "--out", str(out), "--only", ",".join(todo), *smoke], left, grace=5)
        said = {r["case"] for r in (read(out)[before:] if out.is_file() else [])}
        silent = 0 if said else silent + 1
        todo = [n for n in todo if f"{what} {n}" not in said]
        if exit_code == OVER:
            break
        if todo and exit_code != LOST:
            block, _, name = f"{what} {todo.pop(0)}".partition(": ")
            late = "the block's time was over" if end - time.monotonic() < 5 else "it ended its process"
            emit(block, name, ok=False, error=f"{late}, exit code {exit_code}")
    found = right(args)
    return all(f"{what} {n}" in found for n in names)


def checks(args: argparse.Namespace, emit: Emit) -> None:
    begin = time.monotonic()
    end = begin + 60 * args.minutes
    good = in_turn(args, emit, "checks: step", ["bench/stepchecks.py"], STEP_CHECKS, begin + 0.4 * (end - begin))
    emit("checks", "step", ok=good)
    for k, op in enumerate(args.ops):
        share = max(20.0, part(args.ops, k) * (end - time.monotonic()))
        script = ["bench/opchecks.py", op, "--seconds", f"{0.6 * share:.0f}"]
        last = min(end, time.monotonic() + share + SLACK)
        emit("checks", op, ok=in_turn(args, emit, f"checks: {op}", script, OP_CHECKS, last))


def run_for(command: list[str], seconds: float, grace: float = 30, stdout: Path | None = None, **environment: str) -> int:
    """Run a command for at most `seconds`; `grace` before their end it is asked to save and stop (SIGTERM). Its exit code. What
    it started and left behind ends with it: a process that holds the device would slow all that is measured later."""
    with stdout.open("w") if stdout else nullcontext() as said:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=said, process_group=0)
        try:
            try:
                return process.wait(max(seconds / 2, seconds - grace))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
            try:
                return process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()
                return process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def kernels(args: argparse.Namespace, emit: Emit) -> None:
    out, end = args.out / "kernels.jsonl", time.monotonic() + 60 * args.minutes
    done = right(args)
    ops = [op for op in args.ops if f"kernels: {op}" not in done]
    for k, op in enumerate(ops):
        told, limit = over(end, part(ops, k))
        if limit < 10:
            emit("kernels", op, ok=False, error=LATE)
            continue
        command = [sys.executable, "-m", "fastffl", "bench", "kernels", "--op", op, "--out", str(out)]
        command += ["--device", "cpu", "--quick"] if args.smoke else ["--device", "cuda", "--minutes", f"{told / 60:.2f}"]
        exit_code = run_for(command, limit, grace=5)
        emit("kernels", op, ok=exit_code == 0, exit_code=exit_code, rows="kernels.jsonl")
    rows = read(out) if out.is_file() else []
    if args.smoke:
        timed: list[Row] = []
        benched.timed([problems.SMALL[op]()[0] for op in args.ops], timing.Wall(), timed.append, rounds=2, passes=("",))
        emit("kernels", "the measuring loop", ok=not any(map(benched.bad, timed)), rows_timed=len(timed))
        rows += timed
    measured = benched.goals(rows)
    for cells in benched.goal_table(measured):
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, (3, 60, 9, 9, 11, 11), strict=True)), flush=True)
    met = [m.met for m in measured]
    emit("kernels", "goals", ok="no" not in met, **{word: met.count(word) for word in ("yes", "no", "unmeasured")})
    roofline.draw(rows, args.out / "kernels.svg", circumstances()["device"])


def sanitize(args: argparse.Namespace, emit: Emit) -> None:
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None and not args.smoke:
        emit("sanitize", "compute-sanitizer", ok=False, error="not installed")
        return
    tools = ("memcheck", "initcheck", "racecheck")
    end = time.monotonic() + 60 * args.minutes
    done = right(args)
    todo = [(op, tool) for tool in tools for op in args.ops if f"sanitize: {op} {tool}" not in done]
    for k, (op, tool) in enumerate(todo):
        told, limit = over(end, 1 / (len(todo) - k))
        if limit < 10:
            emit("sanitize", f"{op} {tool}", ok=False, error=LATE)
            continue
        wrap = [found, "--tool", tool, "--error-exitcode", "9"] if found and not args.smoke else []
        command = [*wrap, sys.executable, "bench/opchecks.py", op, "--only", "random", "--cases", "60", "--what", "sanitized:"]
        command += ["--out", str(args.out / "gpu.jsonl"), "--seconds", f"{told:.0f}"]
        command += ["--smoke"] if args.smoke else []
        exit_code = run_for(command, limit, grace=5, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        emit("sanitize", f"{op} {tool}", ok=exit_code == 0, exit_code=exit_code)


def graph(args: argparse.Namespace, emit: Emit) -> None:
    end = time.monotonic() + 60 * args.minutes
    emit("graph", "all checks", ok=in_turn(args, emit, "graph:", ["bench/graphchecks.py"], GRAPH_CHECKS, end))


def checked_methods(args: argparse.Namespace, emit: Emit) -> None:
    end = time.monotonic() + 60 * args.minutes
    named = cases_of(args.methods.split(",") if args.methods else methods.names())
    script = ["bench/methodchecks.py", "--seconds", "LEFT"]
    emit("methods", "all checks", ok=in_turn(args, emit, "methods:", script, named, end), of=len(named))


def step(args: argparse.Namespace, emit: Emit) -> None:
    out, (told, limit) = args.out / "step.jsonl", over(time.monotonic() + 60 * args.minutes)
    command = [sys.executable, "-m", "fastffl", "bench", "train", "--out", str(out), "--minutes", f"{told / 60:.2f}"]
    command += ["--official", str(args.official)] if args.official else []
    command += [word for name in args.cases.split(",") if name for word in ("--case", name)]
    command += ["--device", "cpu", "--quick", "--case", "resnet8x2-32"] if args.smoke else ["--device", "cuda"]
    exit_code = run_for(command, limit, grace=5)
    met = [m.met for m in cases.goals(read(out) if out.is_file() else [])]
    counts = {word: met.count(word) for word in ("yes", "no", "unmeasured")}
    emit("step", "fastffl bench train", ok=exit_code == 0 and not counts["no"], exit_code=exit_code, rows="step.jsonl", **counts)


def dali(args: argparse.Namespace, emit: Emit) -> None:
    end = time.monotonic() + 60 * args.minutes
    script = ["bench/dalichecks.py", *(["--images", str(args.images)] if args.images else [])]
    emit("dali", "all checks", ok=in_turn(args, emit, "dali:", script, DALI_CHECKS, end))


def fp32_beside_ours(smoke: bool) -> list[Row]:
    """The plain loop in fp32 and the default layout, convolutions in TF32 as torch has them, beside our step: rows as bench
    train's, against ours."""
    case = cases.CASES["resnet8x2-32"] if smoke else cases.CASES[load.STEP]
    at = variants.setting(case, "cpu" if smoke else "cuda")
    where = Plan(at.device, None, torch.contiguous_format, "fp32, contiguous")
    batches = tuple(batch._replace(x=batch.x.float().contiguous()) for batch in at.batches)
    with computing(at.device):
        made = {"ours": variants.make(at, "ours"), "fp32": variants.Eager(at._replace(where=where, batches=batches), "fp32")}
        calls = {}
        for name, variant in made.items():
            variant.set(0.05, 0.5)
            for k in range(variant.first):
                variant(variant.batches[k % len(variant.batches)])
            variant.settle()
            calls[name] = turn_of(variant, at, 1 if smoke else 4)
        times = timing.interleave(calls, 3 if smoke else 12)
        found = timing.rows(case.name, times, "ours")
        losses_ = {name: variant.mean_loss() for name, variant in made.items()}
        made["ours"].close()
    off = abs(losses_["fp32"] - losses_["ours"]) / abs(losses_["ours"])
    state = "ok" if off < 0.1 else f"wrong: the mean loss differs from ours by {off:.2g}"
    facts = {"kind": "step", "cuda": not smoke, "state": state, "steps": 1 if smoke else 4}
    return [row | facts | {"group": row["variant"]} for row in found if row["variant"] == "fp32"]


def turn_of(variant: Any, at: variants.Setting, steps: int) -> Callable[[], None]:
    def turn() -> None:
        for k in range(steps):
            variant(variant.batches[k % len(variant.batches)])
        at.wait()

    return turn


def unpacked(images: Path | None, folder: Path) -> Path | None:
    """The folder of training images in a folder or tar of them."""
    if images is None or images.is_dir():
        return images
    with tarfile.open(images) as tar:
        tar.extractall(folder, filter="data")
    return folder


def data(args: argparse.Namespace, emit: Emit) -> None:
    out, end = args.out / "data.jsonl", time.monotonic() + 60 * args.minutes
    done = right(args)
    fastffl = [sys.executable, "-m", "fastffl", "bench"]
    train_ = [*fastffl, "train", "--out", str(out), "--rivals", "eager" if args.smoke else "eager,compile"]
    train_ += (
        ["--device", "cpu", "--quick", "--case", "resnet8x2-32"] if args.smoke else ["--device", "cuda", "--case", load.STEP]
    )
    with tempfile.TemporaryDirectory() as folder:
        images = unpacked(args.images, Path(folder))
        load_ = [*fastffl, "data", "imagenet", "--data", str(images), "--out", str(out), "--set", "nets.share_stem=false"]
        small = ["--batch-size", "4", "--set", "data.size=16", "--quick", "--device", "cpu", "--workers", "1"]
        load_ += small if args.smoke else ["--amp", "--device", "cuda", "--workers", "16"]
        nets = ("resnet8", "resnet8") if args.smoke else ("resnet50", "resnet34")
        # name -> (command, share of the block's time)
        todo: dict[str, tuple[list[str] | None, float]] = {
            "step": (train_, 0.45),
            "fp32": (None, 0.1),
            "JPEGs, first pair": ([*load_, "--model", ",".join(nets[:1] * 2)], 0.3),
            "JPEGs, second pair": (
                [*load_, "--model", ",".join(nets[1:] * 2), "--loaders", "dali", "--parts", "together,compute"],
                0.15,
            ),
        }
        left = sum(share for _, share in todo.values())
        for name, (command, share) in todo.items():
            told, limit = over(end, share / left)
            left -= share
            if f"data: {name}" in done:
                continue
            if limit < 10:
                emit("data", name, ok=False, error=LATE)
                continue
            if "JPEGs" in name and images is None:
                emit("data", name, ok=False, error="no --images DIR given")
            elif command is None:
                rows = fp32_beside_ours(args.smoke)
                write(out, rows, circumstances())
                emit("data", name, ok=all(row["state"] == "ok" for row in rows))
            else:
                exit_code = run_for([*command, "--minutes", f"{told / 60:.2f}"], limit, grace=10)
                emit("data", name, ok=exit_code == 0, exit_code=exit_code, rows="data.jsonl")
    met = [m.met for m in load.goals(read(out) if out.is_file() else [])]
    emit("data", "goals", ok="no" not in met, **{word: met.count(word) for word in ("yes", "no", "unmeasured")})


PUBLISHED = {"fused": "25.56 +- 0.32", "p0": "27.06 +- 0.34", "p1": "27.06 +- 0.34"}  # errors, FFL slides


def train(args: argparse.Namespace, emit: Emit) -> None:
    runs(args, emit, "train", ["ffl-cifar100-resnet32", "none-ffl-cifar100-resnet32"], args.out / "step.jsonl")


def compare(args: argparse.Namespace, emit: Emit) -> None:
    """One seed of every method in the common setting: the baseline, then the family's first ones."""
    first = ("none", "ffl", "dml", "one")
    named = [m for m in first if m in methods.own()] + [m for m in methods.own() if m not in first]
    if args.smoke:  # the baseline, one that needs other runs finished first, one with a memory
        named = ["none", "kd", "mcl-okd"]
    runs(args, emit, "compare", [COMPARE + m for m in named], args.out / "compare.jsonl")


def runs(args: argparse.Namespace, emit: Emit, block: str, names: list[str], rows: Path) -> None:
    """Train recipes one after the other until the time is over, each resumed where an earlier call stopped it."""
    if not args.data and not args.smoke:
        emit(block, names[0], ok=False, error="no --data DIR given")
        return
    end = time.monotonic() + 60 * args.minutes
    for name in names:
        run, spent = args.out / "runs" / name, args.out / "runs" / f"{name}.seconds"
        command = [sys.executable, "-m", "fastffl", "train", "--amp", name, "--out", str(run), "--json"]
        if args.smoke:
            command += ["--set", "data.loader=synthetic", "--epochs", "1", "--model", "resnet8,resnet8"]
            command += ["--set", "run.max_steps=2", "--set", "data.samples=256"]
        else:
            command += ["--data", str(args.data), "--set", "run.save_every=10"]
        left = end - time.monotonic()
        if left < 40:
            emit(block, name, ok=False, error=LATE)
            continue
        spent.parent.mkdir(parents=True, exist_ok=True)
        begin, said = time.monotonic(), args.out / "runs" / f"{name}.json"
        done = said.is_file() and said.read_text().strip() != ""  # nothing is printed before a run is finished
        exit_code = 0 if done else run_for(command, left, stdout=said)
        finished = said.read_text().strip() if exit_code == 0 else ""
        seconds = float(spent.read_text()) if spent.is_file() else 0.0
        seconds += 0 if done else time.monotonic() - begin
        spent.write_text(f"{seconds:.2f}")  # of all calls so far: start, data, capture, epochs and evaluations
        if finished and not done:
            write(rows, [outcome(name, json.loads(finished), seconds, not args.smoke)], circumstances())
        emit(block, name, ok=bool(finished), exit_code=exit_code, run=f"runs/{name}", seconds=seconds)


def outcome(name: str, result: Row, seconds: float, cuda: bool) -> Row:
    """The row of a finished run: wall seconds, last-epoch error (%) of every vote, the published ones beside it."""
    errors = {vote: round(100 - r["last"], 2) for vote, r in result["results"].items()}
    published = PUBLISHED if name == "ffl-cifar100-resnet32" else {}
    facts = {k: result[k] for k in ("epochs", "steps", "seed", "img_s", "digest")}
    row = {"kind": "run", "case": name, "variant": result["method"], "group": "ours", "cuda": cuda, "state": "ok"}
    return {
        **row,
        "ms": 1e3 * seconds,
        "seconds": seconds,
        "train_s": result["seconds"],
        "error": errors,
        "published": published,
        **facts,
    }


def pack(folder: Path, file: Path) -> None:
    """A tar of what is small in a folder: rows, tables, figures, recipes. The old one stays until it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part_ = file.with_name(f"{file.name}.part")
    with tarfile.open(part_, "w:gz", compresslevel=1) as tar:
        for path in sorted(folder.rglob("*")):
            if path.suffix in PACKED and path.is_file() and path.stat().st_size < 4 << 20:
                tar.add(path, path.relative_to(folder))
    part_.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--official", type=Path)
    parser.add_argument("--data", type=Path, help="the folder that holds cifar-100-python/, of the blocks train and compare")
    parser.add_argument("--images", type=Path, help="JPEGs in class folders, or a tar of them; few will do")
    parser.add_argument("--only", default="")
    parser.add_argument("--ops", default=",".join(FULL), help="of the blocks checks, kernels and sanitize")
    parser.add_argument("--cases", default="", help="of the block step; all that is compiled takes longer than a block")
    parser.add_argument("--methods", default="", help="of the block methods")
    parser.add_argument("--minutes", type=float, default=8.0, help="for each block")
    parser.add_argument("--total", type=float, default=float("inf"), help="minutes for all blocks of this call")
    parser.add_argument("--pack", type=Path, help="a .tar.gz of all rows and reports, written anew after each row")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("error: no CUDA device; --smoke walks through every block on the CPU")
    args.out, args.ops = args.out.resolve(), args.ops.split(",")
    if unknown := set(args.ops) - set(FULL):
        sys.exit(f"error: --ops {','.join(unknown)}: expected some of {', '.join(FULL)}")
    blocks = {"checks": checks, "graph": graph, "methods": checked_methods, "kernels": kernels, "sanitize": sanitize}
    blocks |= {"step": step, "dali": dali, "data": data, "train": train, "compare": compare}
    asked = args.only.split(",") if args.only else [name for name in blocks if name != "compare"]
    for name in asked:
        if name not in blocks:
            sys.exit(f"error: --only {name}: expected some of {', '.join(blocks)}")
        if args.only and name in ("train", "compare") and not (args.data or args.smoke):
            sys.exit(
                f"error: {name} trains on CIFAR-100; type: python bench/gpu.py --only {name} --data DIR (cifar-100-python/ in it)"
            )
    same = facts()
    before, end = time.perf_counter(), time.monotonic() + 60 * args.total

    def emit(block: str, case: str, **values: Any) -> None:
        """A row; its ms are the wall time since the row before it."""
        nonlocal before
        now = time.perf_counter()
        row = {"case": f"{block}: {case}", "variant": "smoke" if args.smoke else "ours", "ms": 1e3 * (now - before), **values}
        before = now
        write(args.out / "gpu.jsonl", [row], same)
        print(row, flush=True)
        if args.pack:
            pack(args.out, args.pack)

    minutes = args.minutes
    for name in asked:
        args.minutes = min(minutes, (end - time.monotonic()) / 60)
        if args.minutes < 0.5:
            emit(name, "the block", ok=False, error=LATE)
            continue
        try:
            blocks[name](args, emit)
        except Exception as error:  # a failing block must not cost those after it
            emit(name, "the block", ok=False, error=reason(error))
            traceback.print_exc()


if __name__ == "__main__":
    main()
