"""The step on the GPU as the trainer makes it, against the CPU and against itself.

    python bench/stepchecks.py --out FILE [--only fp32,bf16,...] [--smoke]

fp32, bf16, fp16   the first losses beside the CPU's in fp32
reads      no host read in a step (torch's own sync detector)
resume     a run stopped inside an epoch and gone on with ends in the digest of one that was not
kernels    the same training with the Triton kernels and with plain torch

A row per check, appended to FILE; exit code 1 if one of them failed. --smoke walks through all of it on the CPU.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import fastffl_kernels
from checkrows import Row, run
from fastffl import recipes
from fastffl.data import Place, source
from fastffl.recipe import Recipe, change
from fastffl.train import Learner, fit, optim
from fastffl.train.device import Plan, plan
from fastffl.train.progress import Progress
from fastffl.train.step import Step
from fastffl.values import Batch

CHECKS = ("fp32", "bf16", "fp16", "reads", "resume", "kernels")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(CHECKS))
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    device = "cpu" if args.smoke else "cuda"
    todo: dict[str, Callable[[], Row]] = {
        "fp32": lambda: check_against_cpu(device, None, 2e-2),
        "bf16": lambda: check_against_cpu(device, "bf16", 1e-1),
        "fp16": lambda: check_against_cpu(device, "fp16", 1e-1),
        "reads": lambda: check_no_host_read(device),
        "resume": lambda: check_resume(device),
        "kernels": lambda: check_kernels_on_off(device, 3 if args.smoke else 100),
    }
    sys.exit(run(todo, args.only, args.out, "checks: step", "smoke" if args.smoke else "ours"))


if __name__ == "__main__":
    main()
