"""The FFL training step and the augmentation against the authors' code, interleaved in one run.

    python bench/train.py --official DIR [--rounds 15] [--out bench/results/cpu/train.jsonl] [--json]

DIR is a checkout of the public repository Jangho-Kim/FFL-pytorch; its modules are imported from there. Both sides start
from the same weights and see the same images. Before timing, both take `PARITY_STEPS` steps and their losses are
compared: the largest relative difference stands in the rows as max_err (at the timed dtype, where rounding grows from step
to step at rate 0.1) and as parity_f64 (the same in float64: that the two compute the same thing).
"""

import argparse
import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from fastffl import recipes
from fastffl.bench.timing import ROOT, circumstances, interleave, rows, write
from fastffl.data import Arrays, Place, Resident
from fastffl.data.rng import order
from fastffl.recipe import Recipe, change
from fastffl.train import Learner, optim
from fastffl.train.device import plan
from fastffl.train.step import Step
from fastffl.values import Batch

PARITY_STEPS = 3
BATCH = 128
MEAN = [x / 255.0 for x in (129.3, 124.1, 112.4)]  # the constants of the official loader
STD = [x / 255.0 for x in (68.2, 65.4, 70.4)]


def module(folder: Path, name: str) -> ModuleType:
    """Import one file of the authors' checkout."""
    spec = importlib.util.spec_from_file_location(f"official_{name}", folder / f"{name}.py")
    if spec is None or spec.loader is None or not (folder / f"{name}.py").is_file():
        sys.exit(f"error: --official {folder} has no {name}.py; expected a checkout of Jangho-Kim/FFL-pytorch")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@contextlib.contextmanager
def cuda_is_here() -> Iterator[None]:
    """The authors' loss calls .cuda() without asking; without a GPU that is made a no-op while it runs."""
    if torch.cuda.is_available():
        yield
        return
    real = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = real  # type: ignore[method-assign]


class Official:
    """The authors' nets, loss and optimizers in the step their script takes, host reads included."""

    def __init__(self, folder: Path, depth: int, device: torch.device):
        nets, self.utils = module(folder, "our_network"), module(folder, "utils")
        self.net = nets.ffl_resnet(num_classes=100, depth=depth).to(device)
        self.fusion = nets.Fusion_module(64, 100, 8).to(device)
        sgd: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
        self.optims = [
            torch.optim.SGD(self.net.parameters(), weight_decay=1e-4, **sgd),
            torch.optim.SGD(self.fusion.parameters(), weight_decay=1e-5, **sgd),
        ]
        self.ce, self.kl, self.w = torch.nn.CrossEntropyLoss(), self.utils.KLLoss(), 0.5
        self.correct = [0.0, 0.0, 0.0]

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        for o in self.optims:
            o.zero_grad()
        with cuda_is_here():
            z1, z2, maps = self.net(x)
            u = self.fusion(maps[0], maps[1])
            labels = self.ce(z1, y) + self.ce(z2, y) + self.ce(u, y)
            loss = labels + self.w * (self.kl(z1, u) + self.kl(z2, u) + self.kl(u, (z1 + z2) / 2))
        loss.backward()
        for o in self.optims:
            o.step()
        for k, z in enumerate((z1, z2, u)):
            self.correct[k] += z.data.max(1)[1].eq(y.data).cpu().sum().float().item()
        return loss.item()


def renamed(net: dict[str, Any], fusion: dict[str, Any]) -> dict[str, Any]:
    """The authors' weights under this package's names (methods-core section 5)."""
    made: dict[str, Any] = {}
    for key, value in net.items():
        for k in (1, 2):
            if key.startswith((f"layer3_{k}", f"classfier3_{k}")):
                tail = key.replace(f"layer3_{k}", "layer3").replace(f"classfier3_{k}", "fc")
                made[f"cohort.p{k - 1}.plain.{tail}"] = value
        if not key.startswith(("layer3_", "classfier3_")):
            for k in (0, 1):
                made[f"cohort.p{k}.plain.{key}"] = value
    names = {"conv1": "dw", "bn1": "bn1", "conv1_1": "pw", "bn1_1": "bn2", "fc2": "fc"}
    for key, value in fusion.items():
        head, _, rest = key.partition(".")
        made[f"method.fuse.{names[head]}.{rest}"] = value
    return made


class Ours:
    """This package's step, exactly as the trainer runs it."""

    def __init__(self, recipe: Recipe, weights: dict[str, Any] | None = None):
        self.where = plan(recipe)
        self.learner = Learner.build(recipe, 100, 3, 32)
        if weights:
            self.learner.load_state_dict(weights)
        self.learner.place(self.where)
        self.step = Step(self.learner, optim.build(self.learner, recipe.optim), recipe, self.where.device)
        self.step.rate(0.1)
        self.step.ramp(0.5)

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x = x.to(self.where.device, memory_format=self.where.memory_format)
        self.step(Batch(x, y, y))

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


def parity(folder: Path, depth: int) -> float:
    """Largest relative difference of the two sides' losses over PARITY_STEPS updates in float64: rounding only, if equal."""
    recipe = change(recipes.load("ffl-cifar100-resnet32"), "nets.names", f"resnet{depth},resnet{depth}")
    recipe = change(change(recipe, "run.memory_format", "contiguous"), "run.device", "cpu")
    torch.manual_seed(1)
    x, y = torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.randint(0, 100, (16,))
    official = Official(folder, depth, torch.device("cpu"))
    official.net.double()
    official.fusion.double()
    learner = Learner.build(recipe, 100, 3, 32).double()
    learner.load_state_dict(renamed(official.net.state_dict(), official.fusion.state_dict()))
    step = Step(learner, optim.build(learner, recipe.optim), recipe, torch.device("cpu"))
    step.rate(0.1)
    step.ramp(0.5)
    worst = 0.0
    for _ in range(PARITY_STEPS):
        want = official.step(x, y)
        step(Batch(x, y, y))
        worst = max(worst, abs(float(step.meters.read()["loss"]) - want) / abs(want))
        step.meters.clear()
    return worst


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
    from PIL import Image
    from torchvision import transforms

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
    official = transforms.Compose(
        [
            transforms.Pad(4, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(),
            transforms.RandomCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(mean=MEAN, std=STD),
        ]
    )
    pictures = [Image.fromarray(np.ascontiguousarray(x.permute(1, 2, 0).numpy())) for x in images[:BATCH]]
    ids = order(0, 0, 5000)[:BATCH]

    def ours(source: Resident) -> None:
        source.augment(source._x["train"], ids, source._y["train"][ids], 0, 0)

    variants: dict[str, Callable[[], Any]] = {"official": lambda: torch.stack([official(p) for p in pictures])}
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
    module(args.official, "our_network")  # a wrong folder is told before minutes are spent
    made = bench_augment(args.rounds * 4) + bench_step(args.official, args.rounds)
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
