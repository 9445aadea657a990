"""What it is worth on a CPU that a step's memory stays with the process (fastffl.train.device.kept_memory).

    python bench/kept_memory.py [--turns 5] [--out bench/results/cpu/memory.jsonl]

Two kinds of processes take turns, with and without, since the setting is a process's own and can't be undone in it. Each
takes 4 steps of the authors' model (two ResNet-32 on a shared stem, batch 128) that are not counted and 10 that are: rows hold
the median step of each process, page faults a step and the peak of memory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

VARIANTS = ("kept", "given back")


def measure(variant: str) -> dict[str, Any]:
    """In a process of its own."""
    import torch

    from fastffl import recipes
    from fastffl.recipe import change
    from fastffl.train import Learner, optim
    from fastffl.train.device import kept_memory, plan
    from fastffl.train.step import Step
    from fastffl.values import Batch

    recipe = change(recipes.load("ffl-cifar100-resnet32"), "run.device", "cpu")
    where = plan(recipe)
    with kept_memory() if variant == "kept" else nullcontext():
        learner = Learner.build(recipe, 100, 3, 32).place(where)
        learner.train()
        step = Step(learner, optim.build(learner, recipe.optim), recipe, where.device)
        x = torch.randn(128, 3, 32, 32).contiguous(memory_format=where.memory_format)
        batch = Batch(x, torch.arange(128) % 100, torch.arange(128))
        times = []
        for k in range(14):
            if k == 4:
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            begin = time.perf_counter()
            step(batch)
            times.append(time.perf_counter() - begin)
        used = resource.getrusage(resource.RUSAGE_SELF)
    return {"ms": 1e3 * statistics.median(times[4:]), "faults": (used.ru_minflt - faults) / 10, "peak_mib": used.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    from fastffl.bench.timing import ROOT, circumstances, write

    found: dict[str, list[dict[str, Any]]] = {v: [] for v in VARIANTS}
    for turn in range(args.turns):
        for variant in VARIANTS[:: 1 if turn % 2 else -1]:
            command = [sys.executable, __file__, "--measure", variant]
            found[variant].append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    rows = []
    for variant, runs in found.items():
        row: dict[str, Any] = {"case": "shared-resnet32-128 on a CPU", "variant": variant, "n": args.turns}
        row |= {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        row["ratio"] = statistics.median(run["ms"] / kept["ms"] for run, kept in zip(runs, found["kept"], strict=True))
        rows.append(row | {"against": "kept"})
        print(rows[-1])
    write(args.out or ROOT / "bench" / "results" / "cpu" / "memory.jsonl", rows, circumstances())


if __name__ == "__main__":
    main()
