"""The FFL training step and the augmentation against the authors' code, interleaved in one run.

    python bench/train.py --official DIR [--rounds 15] [--out bench/results/cpu/train.jsonl] [--json]

DIR is a checkout of the public repository Jangho-Kim/FFL-pytorch; its modules are imported from there. Both sides start
from the same weights and see the same images. Before timing, both take `PARITY_STEPS` steps and their losses are
compared: the largest relative difference stands in the rows as max_err (at the timed dtype, where rounding grows from step
to step at rate 0.1) and as parity_f64 (the same in float64: that the two compute the same thing).
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastffl import recipes
from fastffl.bench.official import PARITY_STEPS, Official, Pictures, module, parity, renamed
from fastffl.bench.timing import ROOT, circumstances, interleave, rows, write
from fastffl.data import Arrays, Place, Resident
from fastffl.data.rng import order
from fastffl.errors import FastFFLError
from fastffl.recipe import Recipe, change
from fastffl.train import Learner, optim
from fastffl.train.device import plan
from fastffl.train.graph import Stepper, computing
from fastffl.train.step import Step
from fastffl.values import Batch

BATCH = 128


class Ours:
    """This package's step, exactly as the trainer runs it."""

    def __init__(self, recipe: Recipe, weights: dict[str, Any] | None = None):
        self.where = plan(recipe)
        self.learner = Learner.build(recipe, 100, 3, 32)
        if weights:
            self.learner.load_state_dict(weights)
        self.learner.place(self.where)
        self.step = Step(self.learner, optim.build(self.learner, recipe.optim), recipe, self.where.device)
        self.run = Stepper(self.step, self.where)
        self.step.rate(0.1)
        self.step.ramp(0.5)

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x = x.to(self.where.device, memory_format=self.where.memory_format)
        self.run(Batch(x, y, y))

    def mean_loss(self) -> float:
        """Of the steps since the last call."""
        value = float(self.step.meters.read()["loss"])
        self.step.meters.clear()
        return value


def synchronized(call: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def bench_step(folder: Path, rounds: int, depth: int = 32) -> list[dict[str, Any]]:
    """One optimizer step at the official shapes: two ResNets on a shared stem, 128 CIFAR-100 images."""
    base = recipes.load("ffl-cifar100-resnet32")
    base = change(base, "nets.names", f"resnet{depth},resnet{depth}")
    device = plan(base).device
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, 3, 32, 32, device=device), torch.randint(0, 100, (BATCH,), device=device)
    official = Official(folder, depth, device)
    weights = renamed(official.net.state_dict(), official.fusion.state_dict())
    ours = {"ours": Ours(base, weights), "ours --amp": Ours(change(base, "amp.enabled", True), weights)}
    want = [official.step(x, y) for _ in range(PARITY_STEPS)]
    errors = {}
    for name, mine in ours.items():
        got = []
        for _ in range(PARITY_STEPS):
            mine(x, y)
            got.append(mine.mean_loss())
        errors[name] = max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))
    variants = {"official": synchronized(lambda: official.step(x, y))}
    variants |= {name: synchronized(lambda mine=mine: mine(x, y)) for name, mine in ours.items()}  # type: ignore[misc]
    exact = parity(folder, depth)
    made = rows(f"ffl step resnet{depth} x2 shared, batch {BATCH}", interleave(variants, rounds), "official")
    for row in made:
        row["img_s"] = 1e3 * BATCH / row["ms"]
        row["max_err"] = errors.get(row["variant"], 0.0)
        if row["variant"] in ours:
            if row["variant"] == "ours":
                row["parity_f64"] = exact
            row["plan"] = ours[row["variant"]].where.text
    return made


def bench_augment(rounds: int) -> list[dict[str, Any]]:
    """Images per second of pad, flip, crop, normalise on one core: the authors' PIL transforms and ours."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5000, 3, 32, 32), generator=generator).to(torch.uint8)
    labels = torch.arange(5000) % 100
    recipe = recipes.load("ffl-cifar100-resnet32")
    arrays = Arrays(
        "cifar100", tuple(map(str, range(100))), (images, labels), (images[:100], labels[:100]), (0.5,) * 3, (0.25,) * 3
    )
    sources = {
        "ours": Resident(arrays, recipe.data, Place()),
        "ours, channels_last": Resident(arrays, recipe.data, Place(memory_format=torch.channels_last)),
    }
    pictures = Pictures(images, labels)
    ids = order(0, 0, 5000)[:BATCH]

    def ours(source: Resident) -> None:
        source.augment(source._x["train"], ids, source._y["train"][ids], 0, 0)

    variants: dict[str, Callable[[], Any]] = {"official": lambda: torch.stack([pictures[k][0] for k in range(BATCH)])}
    variants |= {name: lambda s=s: ours(s) for name, s in sources.items()}  # type: ignore[misc]
    made = rows(f"augment {BATCH} CIFAR images, 1 core", interleave(variants, rounds), "official")
    for row in made:
        row["img_s"], row["speedup"] = 1e3 * BATCH / row["ms"], 1 / row["ratio"]
    torch.set_num_threads(threads)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, metavar="DIR", help="checkout of Jangho-Kim/FFL-pytorch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None, help="JSONL to append to; default bench/results/DEVICE/train.jsonl")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        module(args.official, "our_network")  # a wrong folder is told before minutes are spent
    except FastFFLError as error:
        sys.exit(f"error: {error}")
    made = bench_augment(args.rounds * 4)
    with computing(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        made += bench_step(args.official, args.rounds)
    facts = circumstances()
    out = args.out or ROOT / "bench" / "results" / ("h200" if "H200" in facts["device"] else "cpu") / "train.jsonl"
    write(out, made, facts)
    if args.json:
        shared = {k: facts[k] for k in ("device", "commit", "torch", "triton")}
        print(json.dumps({**shared, "rows": made}))
        return
    for row in made:
        print(f"{row['case']:44} {row['variant']:20} {row['ms']:9.2f} ms  {row['img_s']:10,.0f} img/s  {row['ratio']:.3f} x")


if __name__ == "__main__":
    main()
