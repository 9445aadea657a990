"""Every method's captured step on the GPU against its eager one: under deterministic kernels both end in the same bits.

    python bench/methodchecks.py --out FILE [--methods A,B | --only "afd bf16,kd fp32"] [--seconds N] [--smoke]

bf16   channels_last, peers in parallel; then as a GPU run with --amp has it, without deterministic kernels and with both styles
       captured and timed: that it is captured, every step finite, and which style is kept
fp32   contiguous, peers one after the other, a moving average, two parts a batch
fp16   channels_last, peers in parallel, a moving average, two parts a batch: of methods with objectives, memory or a teacher

Images, labels, ids, rate and ramp are others in every step, so that a graph that froze one of them ends otherwise. Each step of
the captured run is taken again by an eager step from the state it began with: what differs is then that step's, and has not
grown over those before it (in ten steps of these small nets 1e-7 becomes as much as they move). Everything trained and kept is
compared: weights, momentum, objectives' optimizers, averages, memories, loss scale, meters. Only where two eager steps give
other bits, too, each tensor may be FACTOR times as far off as they, or NEAR, as a part of the way that it goes in the step, in
all steps but MOST.

A row per method and setting, appended to FILE; exit code 1 if one failed. --smoke walks through all of it on the CPU, where
nothing is captured.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from checkrows import Row, run
from fastffl import checks, methods
from fastffl.recipe import Amp, Data, Ema, Nets, Optim, Recipe
from fastffl.train import Learner, checkpoint, optim
from fastffl.train.device import Plan
from fastffl.train.graph import TRIALS, WARM, Stepper, computing
from fastffl.train.step import Step
from fastffl.values import Batch
from graphchecks import deterministic

STEPS = 10  # three eager ones, the capture, six more replays
LR = 0.06  # the largest
FACTOR, NEAR, MOST = 4, 0.05, 2
LIMIT = 120  # seconds of one case: the first ones compile
SCALE = 256.0  # of fp16's losses: its own start overflows in the first steps, which then change nothing


class Setting(NamedTuple):
    dtype: torch.dtype | None
    layout: torch.memory_format
    streams: Literal["auto", "on", "off"]
    average: float
    accum: int


SETTINGS = {
    "bf16": Setting(torch.bfloat16, torch.channels_last, "on", 0.0, 1),
    "fp32": Setting(None, torch.contiguous_format, "off", 0.9, 2),
    "fp16": Setting(torch.float16, torch.channels_last, "on", 0.9, 2),
}


def cases(named: list[str]) -> list[str]:
    """The default setting of all methods comes first, then the rest of each."""
    rich = [n for n in named if stateful(n)]
    return [*(f"{n} bf16" for n in named), *(f"{n} fp16" for n in rich), *(f"{n} fp32" for n in named)]


def stateful(name: str) -> bool:
    """Whether a step leaves more behind than weights and momentum. What can't be built fails when it is checked."""
    try:
        made = checks.learner(methods.load(name))
    except Exception:
        return True
    return bool(made.objectives) or made.teacher is not None or made.needs.ids


def batches(made: Learner, device: torch.device, setting: Setting, images: torch.dtype) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(checks.ROWS * made.needs.views, 1, checks.SIZE, checks.SIZE, generator=generator)
        ids = torch.randperm(checks.ROWS, generator=generator)
        yield Batch(x.to(device, images, memory_format=setting.layout), (ids % checks.CLASSES).to(device), ids.to(device))


class Side:
    """A method's learner and its step, as the trainer makes them; equal for equal arguments."""

    def __init__(self, name: str, setting: Setting, device: torch.device, graph: bool):
        self.made = made = checks.learner(methods.load(name))
        self.where = Plan(device, setting.dtype, setting.layout, str(device))
        config: Any = made.config
        recipe = Recipe(
            name="check",
            data=Data(name="custom", batch_size=checks.ROWS),
            nets=Nets(names=made.cohort.names),
            method=config,
            optim=Optim(lr=LR, clip=5.0, accum=setting.accum),
            amp=Amp(enabled=setting.dtype is not None),
            ema=Ema(decay=setting.average),
        )
        made.place(self.where)
        made.method.prepare((torch.arange(checks.ROWS) % checks.CLASSES).to(device))
        self.step = Step(made, optim.build(made, recipe.optim), recipe, device)
        if self.step.scaler:
            self.step.scaler.scale.fill_(SCALE)
        made.train()
        self.stepper = Stepper(self.step, self.where, streams=setting.streams, graph=graph)

    def take(self, k: int, batch: Batch) -> None:
        self.step.ramp(0.1 + 0.9 * (0.37 * k % 1))
        self.step.rate(LR / 3 + LR / 1.5 * ((0.37 * k + 0.5) % 1))
        self.stepper(batch)

    def again(self, before: Any, k: int, batch: Batch) -> Any:
        """The state after step k from another's state before it."""
        self.step.load(copied(before))  # an optimizer keeps the tensors that it loads
        self.take(k, batch)
        return self.state()

    def state(self) -> Any:
        return copied(self.step.state())


def copied(state: Any) -> Any:
    """On the host."""
    return tree_map(lambda t: t.detach().to("cpu", copy=True) if isinstance(t, Tensor) else t, state)


def tensors(state: Any, at: str = "") -> dict[str, Tensor]:
    """A state's tensors and numbers by their places in it, in fp64."""
    if isinstance(state, Tensor | float | int):
        return {at: torch.as_tensor(state).double()}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {place: t for key, value in items for place, t in tensors(value, f"{at}/{key}").items()}


def apart(before: Any, a: Any, b: Any) -> dict[str, float]:
    """Of each tensor the largest difference of two ends, as a part of the farthest that a number of it went to the first."""
    start, other, found = tensors(before), tensors(b), {}
    for name, t in tensors(a).items():
        if t.numel():
            way = (t - start.get(name, torch.zeros(()))).abs().max()
            found[name] = float((t - other[name]).abs().max() / way.clamp(min=1e-12))
    return found


def _same(a: Any, b: Any) -> bool:
    return checkpoint.digest(a) == checkpoint.digest(b)


def judged(spread: dict[str, float], off: dict[str, float]) -> Row:
    """The tensor of a captured step that is farthest off, beside two eager steps."""
    usual = statistics.quantiles(spread.values(), n=10)[-1]  # one more step says little of one tensor
    near = NEAR if usual else 0.0
    wrong = {n: v for n, v in off.items() if not v <= max(near, FACTOR * max(spread[n], usual))}
    worst = max(wrong or off, key=off.__getitem__)
    return {"off": off[worst], "spread": spread[worst], "usual": usual, "tensor": worst, "tensors": len(wrong)}


def compared(name: str, setting: Setting, device: torch.device) -> Row:
    """Each step of a captured run beside an eager step from the state that it began with."""
    equal, spreads, rows = 0, 0, []
    with computing(device), deterministic():
        graphed, eager = (Side(name, setting, device, graph) for graph in (True, False))
        state = graphed.state()
        for k, batch in enumerate(batches(graphed.made, device, setting, graphed.where.images)):
            before = state
            graphed.take(k, batch)
            state = graphed.state()
            first = eager.again(before, k, batch)
            if _same(first, state):
                equal += 1
                continue
            second = eager.again(before, k, batch)
            spreads += not _same(first, second)
            rows.append({"step": k, **judged(apart(before, first, second), apart(before, first, state))})
        skipped, reason = graphed.step.check(), graphed.stepper.reason
        found: Row = {"style": graphed.stepper.style, "equal": equal, "of": STEPS, "skipped": skipped, "eager_unequal": spreads}
        for side in (graphed, eager):
            side.stepper.close()
    wrong = [row for row in rows if row["tensors"]]
    # what a graph froze is wrong in every replay; where sums have no order a value falls now and then to the other side of a ReLU
    found |= {"ok": len(wrong) <= (MOST if spreads else 0), "wrong": len(wrong)}
    if rows:
        found |= max(wrong or rows, key=lambda row: row["off"])
    if reason and device.type == "cuda":
        return {**found, "ok": False, "error": f"not captured: {reason}"}
    if skipped > STEPS // 4:  # steps that change nothing are equal for nothing
        return {**found, "ok": False, "error": f"{skipped} of {STEPS} steps were not finite"}
    return found


def as_run(name: str, setting: Setting, device: torch.device) -> Row:
    """A run's own way: the library's fastest convolutions, both styles captured and timed, the faster one kept."""
    with computing(device):
        side = Side(name, setting._replace(streams="auto"), device, True)
        given = list(batches(side.made, device, setting, side.where.images))
        for k in range(WARM + 2 * TRIALS + 3 if device.type == "cuda" else 2):
            side.take(k, given[k % STEPS])
        skipped, reason, stepper = side.step.check(), side.stepper.reason, side.stepper
        kept: Row = {"kept": stepper.style, "speedup": stepper.speedup}
        stepper.close()
    if reason and device.type == "cuda":
        return {**kept, "ok": False, "error": f"a run of it is not captured: {reason}"}
    return {**kept, "ok": True} if not skipped else {**kept, "ok": False, "error": f"a run of it: {skipped} steps not finite"}


def check(name: str, setting: str, device: torch.device) -> Row:
    found = compared(name, SETTINGS[setting], device)
    return found if setting != "bf16" or not found["ok"] else found | as_run(name, SETTINGS[setting], device)


def main() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; its deterministic mode asks for it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(methods.names()))
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    device = torch.device("cpu" if args.smoke else "cuda")
    asked = args.only.split(",") if args.only else cases(args.methods.split(","))
    todo = {case: partial(check, case.split()[0], case.split()[1], device) for case in asked}
    variant = "smoke" if args.smoke else "ours"
    sys.exit(run(todo, ",".join(asked), args.out, "methods:", variant, args.seconds, LIMIT))


if __name__ == "__main__":
    main()
