"""The captured step on the GPU against the eager one, and its hand-overs between streams.

    python bench/graphchecks.py --out FILE [--only same,delays,...] [--smoke]

same      captured = eager to the last bit under deterministic kernels: weights, momentum, averages, meters, loss scale; peers
          one after the other and in parallel; bf16, fp16 with clipping, moving average and accumulation, other methods, unequal
          nets, short last batches. Where bits differ: within the spread of two eager runs, else it fails
delays    the source of every hand-over is held up for a random time, 200 steps eager and 200 replays: nothing changes
waits     every hand-over of a step is left out in turn, with what it should wait for late: all but the one that only protects
          memory must be missed, or `delays` proves nothing
evaluate  captured = eager, twice, short last batch
memory    10,000 steps: the host grows by 8 MB at most, the device by 0 bytes
replays   `same` over 1,000 steps

A row per check, appended to FILE; exit code 1 if one of them failed. --smoke walks through all of it on the CPU, where nothing
is captured and no stream is another.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from checkrows import Row, run
from fastffl import recipes
from fastffl.data import Place, source
from fastffl.recipe import Recipe, change
from fastffl.streams import Branches, Streams, ahead, tampered
from fastffl.train import Learner, checkpoint, optim
from fastffl.train.device import plan
from fastffl.train.graph import Evaluator, Stepper, computing
from fastffl.train.step import Step
from fastffl.values import Batch

CLASSES, SIZE, ROWS = 100, 32, 64
LONG = 20_000_000  # cycles, about 10 ms: longer than a whole step
HOST_GROWTH = 8 << 20


def recipe(device: str, nets: str = "resnet8,resnet8", method: str = "ffl", **changes: str) -> Recipe:
    made = change(recipes.with_method(recipes.load("cifar100"), method), "nets.names", nets)
    for key, value in {"run__device": device, "amp__enabled": "true", **changes}.items():
        made = change(made, key.replace("__", "."), value)
    return made


VARIANTS: dict[str, dict[str, str]] = {
    "bf16, shared stem": {},
    "bf16, separate": {"nets__share_stem": "false"},
    "fp16, clipped, averaged, 2 parts": {"amp__dtype": "fp16", "optim__clip": "1.0", "ema__decay": "0.9", "optim__accum": "2"},
    "fp32, AdamW": {"amp__enabled": "false", "optim__name": "adamw", "optim__lr": "0.001"},
    "unequal nets": {"nets": "resnet8,wrn16_2"},
    "dml": {"method": "dml"},
    "one": {"method": "one", "nets": "resnet8,resnet8,resnet8", "nets__share_stem": "true"},
}


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Trained:
    """A run of some steps: its loss after each, and the digest of everything trained. The host waits for nothing before the end.

    branch   eager, with branches as inside a graph      late   what is held up before every step: "main", "peer" or "batch"
    """

    def __init__(self, made: Recipe, steps: int, *, graph: bool, streams: Any = "auto", branch: bool = False, late: str = ""):
        where = plan(made)
        device, cuda = where.device, where.device.type == "cuda"
        learner = Learner.build(made, CLASSES, 3, SIZE).place(where)
        step = Step(learner, optim.build(learner, made.optim), made, device)
        learner.train()
        sums: list[torch.Tensor] = []
        moved = [put(made)(batch) for batch in batches(steps)]

        def copied(batch: Batch) -> Batch:
            if late == "batch" and cuda:
                torch.cuda._sleep(LONG)
            return Batch(batch.x.clone(), batch.y.clone(), batch.y)

        with computing(device):
            lanes = Streams(device) if cuda else None
            stepper = Stepper(step, where, graph=graph, streams=streams)
            if branch and lanes:
                learner.cohort.branches = Branches(lanes)
            for k, batch in enumerate(ahead(iter(moved), lanes, copied)):
                step.rate(made.optim.lr * (0.5 if k < steps // 2 else 0.1))
                step.ramp(min(1.0, k / 10))
                if lanes and late in ("main", "peer"):
                    held(lanes.current() if late == "main" else lanes.side(1), LONG)
                if branch:
                    in_parallel(step, batch)
                else:
                    stepper(batch)
                sums.append(step.meters.loss_sum.clone())
            self.reason, self.style = stepper.reason, stepper.style
            stepper.close()
        total = [0.0, *torch.stack(sums).tolist()]
        self.losses = [b - a for a, b in pairwise(total)]
        self.digest, self.skipped = checkpoint.digest(step.state()), int(step.skipped)


def in_parallel(step: Step, batch: Batch) -> None:
    """An eager step whose peers branch."""
    branches = step.learner.cohort.branches
    if branches:
        branches.on = True
    step.update(batch.x, batch.y)
    if branches:
        branches.on = False


def held(stream: Any, cycles: int) -> None:
    """Keep a stream busy."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(cycles)


def batches(steps: int) -> Iterator[Batch]:
    """Random images on the host; every seventh batch is a short one."""
    generator = torch.Generator().manual_seed(0)
    for k in range(steps):
        rows = ROWS // 2 - 3 if k % 7 == 6 else ROWS
        x = torch.randn(rows, 3, SIZE, SIZE, generator=generator)
        y = torch.randint(0, CLASSES, (rows,), generator=generator)
        yield Batch(x, y, y)


def put(made: Recipe) -> Callable[[Batch], Batch]:
    where = plan(made)

    def to_device(batch: Batch) -> Batch:
        x = batch.x.to(where.device, where.images, memory_format=where.memory_format)
        y = batch.y.to(where.device)
        return Batch(x, y, y)

    return to_device


def compared(made: Recipe, steps: int, streams: str, captured: bool) -> Row:
    """A captured run beside an eager one."""
    with deterministic():
        eager, graphed = Trained(made, steps, graph=False), Trained(made, steps, graph=True, streams=streams)
        found: Row = {"style": graphed.style, "equal": eager.digest == graphed.digest, "skipped": graphed.skipped}
        if graphed.skipped > steps // 4:  # steps that change nothing are equal for nothing
            return {**found, "ok": False, "error": f"{graphed.skipped} of {steps} steps were not finite"}
        if graphed.reason and captured:
            return {**found, "ok": False, "error": f"not captured: {graphed.reason}"}
        if found["equal"]:
            return {**found, "ok": True}
        again = Trained(made, steps, graph=False)
    spread, off = apart(eager.losses, again.losses), apart(eager.losses, graphed.losses)
    return {**found, "spread": spread, "off": off, "ok": off <= spread, "note": "bits differ between captured and eager"}


def apart(a: list[float], b: list[float]) -> float:
    """Largest relative difference of two runs' losses."""
    return max(abs(x - y) / max(abs(x), 1e-9) for x, y in zip(a, b, strict=True))  # a skipped step adds no loss


def check_same(device: str, steps: int, names: list[str]) -> Row:
    """Variants in both styles."""
    found: Row = {}
    for name in names:
        changes = VARIANTS[name]
        for streams in ("off", "on"):
            row = compared(recipe(device, **changes), steps, streams, device == "cuda")
            found[f"{name}, {'parallel' if streams == 'on' else 'serial'}"] = row
    wrong = {name: row for name, row in found.items() if not row["ok"]}
    return {"ok": not wrong, "equal": sum(row["equal"] for row in found.values()), "of": len(found), "wrong": wrong}


def check_delays(device: str, steps: int) -> Row:
    made = recipe(device)
    rng = random.Random(0)
    with deterministic():
        plain = Trained(made, steps, graph=False)
        found: Row = {}
        for name, graph in (("eager", False), ("captured", True)):
            with tampered(delay=lambda stream: held(stream, rng.randrange(LONG // 20))) as seen:
                run = Trained(made, steps, graph=graph, streams="on", branch=not graph)
            found[name] = run.digest == plain.digest and run.losses == plain.losses
            found[f"{name} hand-overs"] = seen.count
    return {**found, "ok": found["eager"] and found["captured"]}


def check_waits(device: str, steps: int) -> Row:
    """Of the third step: the batch, the fork of the peers, their join are missed; the guard of a batch's memory may not be."""
    made = recipe(device)
    with deterministic():
        with tampered() as counted:
            whole = Trained(made, steps, graph=False, branch=True)
        per = counted.count // steps
        missed: dict[int, list[str]] = {}
        for k in range(2 * per, 3 * per):
            for late in ("main", "peer", "batch"):
                with tampered(without=k):
                    run = Trained(made, steps, graph=False, branch=True, late=late)
                if run.digest != whole.digest:
                    missed.setdefault(k, []).append(late)
        calm = all(
            Trained(made, steps, graph=False, branch=True, late=x).digest == whole.digest for x in ("main", "peer", "batch")
        )
    seen = len(missed)
    return {"hand_overs_in_a_step": per, "missed": {str(k): v for k, v in missed.items()}, "ok": calm and seen >= per - 1}


def check_evaluate(device: str, samples: int) -> Row:
    made = recipe(device, data__loader="synthetic", data__samples=str(samples), data__eval_batch_size="48", ema__decay="0.9")
    where = plan(made)
    data = source(made.data, Place(where.device, where.memory_format, where.images))
    learner = Learner.build(made, len(data.classes), 3, SIZE).place(where)
    step = Step(learner, optim.build(learner, made.optim), made, where.device)
    with computing(where.device), deterministic():
        found = []
        for graph in (False, True):
            score = Evaluator(step, where, graph=graph)
            found += [score(data, 48) for _ in range(2)]
            score.close()
    return {"ok": all(f == found[0] for f in found), "votes": len(found[0]), "samples": data.samples("val")}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_memory(device: str, steps: int, first: int) -> Row:
    """Growth from step `first` on."""
    made = recipe(device)
    where = plan(made)
    learner = Learner.build(made, CLASSES, 3, SIZE).place(where)
    step = Step(learner, optim.build(learner, made.optim), made, where.device)
    cuda = where.device.type == "cuda"
    moved = [put(made)(batch) for batch in batches(8)]
    with computing(where.device):
        stepper = Stepper(step, where)
        begin, start = (0, 0, 0), 0.0

        def now() -> tuple[int, int, int]:
            if not cuda:
                return resident(), 0, 0
            torch.cuda.synchronize()
            return resident(), torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

        for k in range(first + steps):
            if k == first:
                begin, start = now(), time.perf_counter()
            stepper(moved[k % len(moved)])
            if k % 200 == 0:
                step.check()
        host, allocated, reserved = (b - a for a, b in zip(begin, now(), strict=True))
        ms = 1e3 * (time.perf_counter() - start) / steps
        stepper.close()
    found = {"host_bytes": host, "device_bytes": allocated, "reserved_bytes": reserved, "ms_per_step": ms, "steps": steps}
    return {**found, "ok": (host <= HOST_GROWTH and allocated == reserved == 0) or not cuda}


def main() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; its deterministic mode asks for it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="same,delays,waits,evaluate,memory,replays")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    few = args.smoke
    device = "cpu" if few else "cuda"
    todo: dict[str, Callable[[], Row]] = {
        "same": lambda: check_same(device, 2 if few else 40, list(VARIANTS)[:2] if few else list(VARIANTS)),
        "delays": lambda: check_delays(device, 2 if few else 200),
        "waits": lambda: check_waits(device, 3 if few else 6),
        "evaluate": lambda: check_evaluate(device, 400 if few else 4000),
        "memory": lambda: check_memory(device, 4 if few else 10_000, 2 if few else 500),
        "replays": lambda: compared(recipe(device), 3 if few else 1000, "auto", not few),
    }
    sys.exit(run(todo, args.only, args.out, "graph:", "smoke" if few else "ours"))


if __name__ == "__main__":
    main()
