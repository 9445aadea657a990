"""Our step on a CPU beside the plain loop, each in processes of its own: what it is worth that a step's memory stays there.

    python bench/kept_memory.py [--turns 5] [--out bench/results/cpu/memory.jsonl]

kept         ours, within fastffl.train.device.kept_memory, as the trainer runs it
given back   ours without it
plain loop   the plain PyTorch loop of `fastffl bench train`

The setting is a process's own and can't be undone in it, so processes take turns. Each takes 4 steps that are not counted and 10
(of the small case 100) that are. Rows hold the median over processes of the median step, page faults a step and peak of memory.
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

VARIANTS = ("kept", "given back", "plain loop")
CASES = {"shared-resnet32-128": ("resnet32,resnet32", "true", 128, 10), "resnet8x2-32": ("resnet8,resnet8", "false", 32, 100)}


def measure(case: str, variant: str) -> dict[str, Any]:
    """In a process of its own."""
    import torch

    from fastffl import recipes
    from fastffl.bench.rivals import PlainLoop
    from fastffl.recipe import change
    from fastffl.train import Learner, optim
    from fastffl.train.device import kept_memory, plan
    from fastffl.train.step import Step
    from fastffl.values import Batch

    nets, shared, size, steps = CASES[case]
    recipe = change(change(recipes.load("ffl-cifar100-resnet32"), "nets.names", nets), "nets.share_stem", shared)
    where = plan(change(recipe, "run.device", "cpu"))
    learner = Learner.build(recipe, 100, 3, 32)
    with kept_memory() if variant == "kept" else nullcontext():
        if variant == "plain loop":
            step: Any = PlainLoop(learner, recipe, where)
        else:
            learner.place(where).train()
            step = Step(learner, optim.build(learner, recipe.optim), recipe, where.device)
        x = torch.randn(size, 3, 32, 32).contiguous(memory_format=where.memory_format)
        batch = Batch(x, torch.arange(size) % 100, torch.arange(size))
        times = []
        for k in range(4 + steps):
            if k == 4:
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            begin = time.perf_counter()
            step(batch)
            times.append(time.perf_counter() - begin)
        used = resource.getrusage(resource.RUSAGE_SELF)
    faults = used.ru_minflt - faults
    return {"ms": 1e3 * statistics.median(times[4:]), "faults": faults / steps, "peak_mib": used.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    from fastffl.bench.timing import ROOT, circumstances, write

    rows = []
    for case in CASES:
        found: dict[str, list[dict[str, Any]]] = {v: [] for v in VARIANTS}
        for turn in range(args.turns):
            for k in range(len(VARIANTS)):
                variant = VARIANTS[(turn + k) % len(VARIANTS)]
                command = [sys.executable, __file__, "--measure", case, variant]
                found[variant].append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        for variant, runs in found.items():
            row: dict[str, Any] = {"case": case, "variant": variant, "n": args.turns}
            row |= {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            row["ratio"] = statistics.median(run["ms"] / kept["ms"] for run, kept in zip(runs, found["kept"], strict=True))
            rows.append(row | {"against": "kept"})
            print(rows[-1], flush=True)
    write(args.out or ROOT / "bench" / "results" / "cpu" / "memory.jsonl", rows, circumstances())


if __name__ == "__main__":
    main()
