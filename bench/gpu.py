"""Everything that wants a GPU, unattended and in blocks: first what could not be checked before, then figures, then training.

    python bench/gpu.py --out DIR [--official DIR] [--data DIR] [--images DIR|TAR] [--only checks,kernels,...] [--ops A,B]
                        [--cases A,B] [--minutes 9] [--smoke]

checks    the step on the device against the CPU, bf16 and fp16, no host read (torch's own sync detector), resume to the
          same digest, kernels on and off; then each op (bench/opchecks.py): random cases against float64 in guard bands,
          2^31 elements, graph replays, repeats. One row each, `ok` or the reason
kernels   `fastffl bench kernels`, an op at a time: DIR/kernels.jsonl, kernels.svg and the table of goals
sanitize  compute-sanitizer over 60 random cases of each op, where it is installed
graph     bench/graphchecks.py: the captured step equals the eager one, hand-overs between streams, evaluation, memory
step      `fastffl bench train`, all cases, the authors' code with --official: DIR/step.jsonl and the table of goals
dali      bench/dalichecks.py: DALI on the GPU against the CPU, and what damaged files leave behind (--images)
data      two ResNet-50 at 224 against the plain loop, torch.compile and fp32; `fastffl bench data` on --images, repeated in
          memory: real JPEGs against resident batches, decoding on the GPU against 16 processes. DIR/data.jsonl and the table
          of goals. What an earlier call of the same commit finished is not measured again
methods   bench/methodchecks.py: every method's captured step equals its eager one, fp32 and bf16
train     ffl-cifar100-resnet32 --amp and its twin (--data), each resumed from DIR/runs where an earlier call stopped; when one
          is done its row, wall time and errors beside the published ones, joins DIR/step.jsonl

Rows are appended to DIR/gpu.jsonl as they come. Each block ends by itself when --minutes are over; a block that fails
writes its reason and the next one runs. Every op runs in a process of its own, since an illegal access ends all later CUDA
calls of its process. --smoke walks through all of it on the CPU with tiny sizes: its figures mean nothing.
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
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import fastffl_kernels
from fastffl import methods, recipes
from fastffl.bench import cases, problems, roofline, timing, variants
from fastffl.bench import data as load
from fastffl.bench import kernels as benched
from fastffl.bench.problems import FULL
from fastffl.bench.timing import ROOT, circumstances, read, write
from fastffl.data import Place, source
from fastffl.recipe import Recipe, change
from fastffl.recipes.family import COMPARE
from fastffl.train import Learner, fit, optim
from fastffl.train.device import Plan, plan
from fastffl.train.graph import computing
from fastffl.train.progress import Progress
from fastffl.train.step import Step
from fastffl.values import Batch

Row = dict[str, Any]


def made(recipe: Recipe, where: Plan, classes: int, channels: int, size: int) -> Step:
    """A step as the trainer builds it."""
    learner = Learner.build(recipe, classes, channels, size).place(where)
    return Step(learner, optim.build(learner, recipe.optim), recipe, where.device)


def losses(recipe: Recipe, device: str, steps: int = 3) -> list[float]:
    """The first losses of a recipe's nets on random CIFAR-shaped images."""
    where = plan(change(recipe, "run.device", device))
    step = made(recipe, where, 100, 3, 32)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 3, 32, 32, generator=generator), torch.randint(0, 100, (64,), generator=generator)
    values = []
    for _ in range(steps):
        step.rate(0.05)
        images = x.to(where.device, memory_format=where.memory_format)
        step(Batch(images, y.to(where.device), y))
        values.append(float(step.meters.read()["loss"]))
        step.meters.clear()
    return values


def small(recipe: str, **changes: str) -> Recipe:
    made_ = change(recipes.load(recipe), "nets.names", "resnet8,resnet8")
    for key, value in changes.items():
        made_ = change(made_, key.replace("__", "."), value)
    return made_


def check_against_cpu(device: str, amp: str | None, limit: float) -> Row:
    """The device's losses beside the CPU's in fp32."""
    base = small("cifar100")
    mixed = base if amp is None else change(change(base, "amp.enabled", "true"), "amp.dtype", amp)
    want, got = losses(base, "cpu"), losses(mixed, device)
    off = max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))
    return {"value": off, "unit": "largest relative loss difference", "ok": off < limit}


def check_no_host_read(device: str) -> Row:
    """Torch raises at any synchronising call inside the block; on the CPU there is nothing to detect."""
    recipe = small("cifar100", amp__enabled="true", optim__clip="1.0", ema__decay="0.9")
    where = plan(change(recipe, "run.device", device))
    step = made(recipe, where, 100, 3, 32)
    x = torch.randn(32, 3, 32, 32, device=where.device).contiguous(memory_format=where.memory_format)
    y = torch.arange(32, device=where.device)
    step(Batch(x, y, y))
    cuda = where.device.type == "cuda"
    if cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        for k in range(5):
            step.rate(0.01 * (k + 1))
            step.ramp(k / 5)
            step(Batch(x, y, y))
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
    return {"value": 0, "unit": "host reads in 5 steps", "ok": True}


def check_resume(device: str) -> Row:
    """A run stopped inside an epoch and gone on with, against the run that was never stopped, deterministic kernels."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        digests = []
        with tempfile.TemporaryDirectory() as folder:
            for name, limits in (("whole", [None]), ("cut", ["17", None])):
                for limit in limits:
                    recipe = small("digits", sched__epochs="2", run__device=device)
                    recipe = recipe if limit is None else change(recipe, "run.max_steps", limit)
                    where = plan(recipe)
                    data = source(recipe.data, Place(where.device, where.memory_format))
                    learner = Learner.build(recipe, 10, 1, 8)
                    result = fit(learner, data, recipe, out=Path(folder) / name, progress=Progress(quiet=True))
                digests.append(result.digest)
        same = digests[0] == digests[1]
        return {"value": int(same), "unit": "digests equal", "ok": same}
    finally:
        torch.use_deterministic_algorithms(False)


def check_kernels_on_off(device: str, steps: int) -> Row:
    """The same training with the Triton kernels and with plain torch: each step's loss, fp32."""
    recipe = small("cifar100")
    found = {}
    for choice in ("auto", "reference"):
        with fastffl_kernels.use(choice):
            found[choice] = losses(recipe, device, steps)
    off = max(abs(a - b) / abs(b) for a, b in zip(found["auto"], found["reference"], strict=True))
    return {"value": off, "unit": f"largest relative loss difference of {steps} steps", "ok": off < 1e-4}


# What an op gets of a block's time: the loss and the fusion module have most to compile, of ours and of rivals.
SHARES = {"distill_graph": 0.35, "fuse_conv": 0.36, "bn_act": 0.11, "augment": 0.05, "guard": 0.03, "sgd_flat": 0.05, "nce": 0.05}


def part(ops: list[str], k: int) -> float:
    """The share of op number k in what is left for it and those after it."""
    return SHARES[ops[k]] / sum(SHARES[op] for op in ops[k:])


def checks(args: argparse.Namespace, emit: Callable[..., None]) -> None:
    device, end = "cpu" if args.smoke else "cuda", time.monotonic() + 60 * args.minutes
    todo: dict[str, Callable[[], Row]] = {
        "step equals CPU, fp32": lambda: check_against_cpu(device, None, 2e-2),
        "step near CPU, bf16": lambda: check_against_cpu(device, "bf16", 1e-1),
        "step near CPU, fp16": lambda: check_against_cpu(device, "fp16", 1e-1),
        "no host read in a step": lambda: check_no_host_read(device),
        "resume to the same digest": lambda: check_resume(device),
        "kernels on and off": lambda: check_kernels_on_off(device, 3 if args.smoke else 100),
    }
    for name, run in todo.items():
        try:
            emit("checks", name, **run())
        except Exception as error:  # a failing check must not cost the blocks after it
            emit("checks", name, ok=False, error=f"{type(error).__name__}: {str(error).splitlines()[0]}")
            traceback.print_exc()
    for k, op in enumerate(args.ops):
        share = max(20.0, part(args.ops, k) * (end - time.monotonic()))
        command = [
            sys.executable,
            "bench/opchecks.py",
            op,
            "--out",
            str(args.out / "gpu.jsonl"),
            "--seconds",
            f"{0.6 * share:.0f}",
        ]
        code = run_for([*command, *(["--smoke"] if args.smoke else [])], share)
        emit("checks", op, ok=code == 0, exit_code=code)


def run_for(command: list[str], seconds: float, grace: float = 60, stdout: Path | None = None, **environment: str) -> int:
    """Run a command; after `seconds` it is asked to save and stop (SIGTERM), after `grace` more it is killed. Its exit code."""
    with stdout.open("w") if stdout else nullcontext() as said:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=said)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def kernels(args: argparse.Namespace, emit: Callable[..., None]) -> None:
    out, end = args.out / "kernels.jsonl", time.monotonic() + 60 * args.minutes
    for k, op in enumerate(args.ops):
        seconds = max(20.0, part(args.ops, k) * (end - time.monotonic()))
        command = [sys.executable, "-m", "fastffl", "bench", "kernels", "--op", op, "--out", str(out)]
        command += ["--device", "cpu", "--quick"] if args.smoke else ["--device", "cuda", "--minutes", f"{seconds / 60:.2f}"]
        code = run_for(command, seconds + 45, grace=5)  # the last compilation may still be under way
        emit("kernels", op, ok=code == 0, exit_code=code, rows="kernels.jsonl")
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


def sanitize(args: argparse.Namespace, emit: Callable[..., None]) -> None:
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None and not args.smoke:
        emit("sanitize", "compute-sanitizer", ok=False, error="not installed")
        return
    tools = ("memcheck", "initcheck", "racecheck")
    end = time.monotonic() + 60 * args.minutes
    left = len(args.ops) * len(tools)
    for op in args.ops:
        for tool in tools:
            share = max(20.0, (end - time.monotonic()) / left)
            left -= 1
            wrap = [found, "--tool", tool, "--error-exitcode", "9"] if found and not args.smoke else []
            command = [*wrap, sys.executable, "bench/opchecks.py", op, "--only", "random", "--cases", "60"]
            command += ["--out", str(args.out / "gpu.jsonl"), "--seconds", f"{share:.0f}"]
            command += ["--smoke"] if args.smoke else []
            code = run_for(command, share + 30, grace=5, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            emit("sanitize", f"{op} {tool}", ok=code == 0, exit_code=code)


def graph(args: argparse.Namespace, emit: Callable[..., None]) -> None:
    command = [sys.executable, "bench/graphchecks.py", "--out", str(args.out / "gpu.jsonl"), *(["--smoke"] if args.smoke else [])]
    code = run_for(command, 60 * args.minutes, grace=5)
    emit("graph", "all checks", ok=code == 0, exit_code=code)


def step(args: argparse.Namespace, emit: Callable[..., None]) -> None:
    out = args.out / "step.jsonl"
    command = [sys.executable, "-m", "fastffl", "bench", "train", "--out", str(out), "--minutes", f"{args.minutes:.2f}"]
    command += ["--official", str(args.official)] if args.official else []
    command += [word for name in args.cases.split(",") if name for word in ("--case", name)]
    command += ["--device", "cpu", "--quick", "--case", "resnet8x2-32"] if args.smoke else ["--device", "cuda"]
    code = run_for(command, 60 * args.minutes + 45, grace=5)  # the last compilation may still be under way
    met = [m.met for m in cases.goals(read(out) if out.is_file() else [])]
    counts = {word: met.count(word) for word in ("yes", "no", "unmeasured")}
    emit("step", "fastffl bench train", ok=code == 0 and not counts["no"], exit_code=code, rows="step.jsonl", **counts)


def dali(args: argparse.Namespace, emit: Callable[..., None]) -> None:
    command = [sys.executable, "bench/dalichecks.py", "--out", str(args.out / "gpu.jsonl")]
    command += (["--images", str(args.images)] if args.images else []) + (["--smoke"] if args.smoke else [])
    code = run_for(command, 60 * args.minutes, grace=5)
    emit("dali", "all checks", ok=code == 0, exit_code=code)


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


def data(args: argparse.Namespace, emit: Callable[..., None]) -> None:
    out, end = args.out / "data.jsonl", time.monotonic() + 60 * args.minutes
    known = read(args.out / "gpu.jsonl") if (args.out / "gpu.jsonl").is_file() else []
    commit = circumstances()["commit"]
    done = {
        r["case"] for r in known if r.get("ok") and r["commit"] == commit and r["variant"] == ("smoke" if args.smoke else "ours")
    }
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
            seconds = max(20.0, (end - time.monotonic()) * share / left)
            left -= share
            if f"data: {name}" in done:
                continue
            if "JPEGs" in name and images is None:
                emit("data", name, ok=False, error="no --images DIR given")
            elif command is None:
                rows = fp32_beside_ours(args.smoke)
                write(out, rows, circumstances())
                emit("data", name, ok=all(row["state"] == "ok" for row in rows))
            else:
                limit = ["--minutes", f"{seconds / 60:.2f}"]
                code = run_for([*command, *limit], seconds + 60, grace=10)
                emit("data", name, ok=code == 0, exit_code=code, rows="data.jsonl")
    met = [m.met for m in load.goals(read(out) if out.is_file() else [])]
    emit("data", "goals", ok="no" not in met, **{word: met.count(word) for word in ("yes", "no", "unmeasured")})


PUBLISHED = {"fused": "25.56 +- 0.32", "p0": "27.06 +- 0.34", "p1": "27.06 +- 0.34"}  # errors, FFL slides


def checked_methods(args: argparse.Namespace, emit: Callable[..., None]) -> None:
    from methodchecks import every

    every(emit, args.smoke)


def train(args: argparse.Namespace, emit: Callable[..., None]) -> None:
    runs(args, emit, "train", ["ffl-cifar100-resnet32", "none-ffl-cifar100-resnet32"], args.out / "step.jsonl")


def compare(args: argparse.Namespace, emit: Callable[..., None]) -> None:
    """One seed of every method in the common setting; those that an earlier call finished are not trained again."""
    named = [COMPARE + m for m in sorted(methods.names(), key=lambda m: m not in ("none", "ffl", "dml", "one"))]
    runs(args, emit, "compare", named[:2] if args.smoke else named, args.out / "compare.jsonl")


def runs(args: argparse.Namespace, emit: Callable[..., None], block: str, names: list[str], rows: Path) -> None:
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
        if left < 30:
            emit(block, name, ok=False, error="out of time before it began; call again to go on")
            continue
        spent.parent.mkdir(parents=True, exist_ok=True)
        begin, said = time.monotonic(), args.out / "runs" / f"{name}.json"
        done = said.is_file() and said.read_text().strip() != ""  # nothing is printed before a run is finished
        code = 0 if done else run_for(command, left, stdout=said)
        seconds = float(spent.read_text()) if spent.is_file() else 0.0
        seconds += 0 if done else time.monotonic() - begin
        spent.write_text(f"{seconds:.2f}")  # of all calls so far: start, data, capture, epochs and evaluations
        emit(block, name, ok=code == 0, exit_code=code, run=f"runs/{name}", seconds=seconds)
        if code == 0 and not done:
            write(rows, [outcome(name, json.loads(said.read_text()), seconds, not args.smoke)], circumstances())


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--official", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--images", type=Path, help="JPEGs in class folders, or a tar of them; few will do")
    parser.add_argument("--only", default="checks,graph,methods,kernels,sanitize,step,dali,data,train")
    parser.add_argument("--ops", default=",".join(FULL), help="of the blocks checks, kernels and sanitize")
    parser.add_argument("--cases", default="", help="of the block step; all that is compiled takes longer than a block")
    parser.add_argument("--minutes", type=float, default=9.0, help="for each block")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("error: no CUDA device; --smoke walks through every block on the CPU")
    args.out, args.ops = args.out.resolve(), args.ops.split(",")
    if unknown := set(args.ops) - set(FULL):
        sys.exit(f"error: --ops {','.join(unknown)}: expected some of {', '.join(FULL)}")
    facts = circumstances()
    before = time.perf_counter()

    def emit(block: str, case: str, **values: Any) -> None:
        """A row; its ms are the wall time since the row before it."""
        nonlocal before
        now = time.perf_counter()
        row = {"case": f"{block}: {case}", "variant": "smoke" if args.smoke else "ours", "ms": 1e3 * (now - before), **values}
        before = now
        write(args.out / "gpu.jsonl", [row], facts)
        print(row, flush=True)

    blocks = {"checks": checks, "graph": graph, "kernels": kernels, "sanitize": sanitize, "step": step}
    blocks |= {"dali": dali, "data": data, "train": train, "compare": compare}
    blocks["methods"] = checked_methods
    for name in args.only.split(","):
        if name not in blocks:
            sys.exit(f"error: --only {name}: expected some of {', '.join(blocks)}")
        try:
            blocks[name](args, emit)
        except Exception as error:  # a failing block must not cost those after it
            emit(name, "the block", ok=False, error=f"{type(error).__name__}: {error}")
            traceback.print_exc()


if __name__ == "__main__":
    main()
