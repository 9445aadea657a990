"""The variants of a training step that are measured side by side, all from the same weights and on the same batches.

A variant is called with a batch and takes a whole step; set(rate, ramp); mean_loss() of the steps since it was last asked;
`first`: the step from which on it is as fast as it gets.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..recipe import Recipe
from ..train import Learner, optim
from ..train.device import Plan, plan
from ..train.graph import WARM, Stepper
from ..train.step import Step
from ..values import Batch
from . import official
from .cases import Case
from .goals import Row
from .rivals import MODES, PlainLoop

BATCHES = 4  # different ones that lie on the device
SETTLE = 80  # steps within which ours has decided how its peers run


class Setting(NamedTuple):
    """A case on a device: what all its variants share."""

    case: Case
    recipe: Recipe
    where: Plan
    batches: tuple[Batch, ...]
    folder: Path | None  # the authors' checkout

    @property
    def device(self) -> torch.device:
        return self.where.device

    def learner(self, recipe: Recipe | None = None) -> Learner:
        """A fresh learner on the CPU; the seed gives every one the same weights."""
        return Learner.build(recipe or self.recipe, self.case.classes, 3, self.case.size)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


def setting(case: Case, device: str, folder: Path | None = None) -> Setting:
    """Random images in the layout and type a source would give them on this device."""
    amp = device != "cpu" and torch.cuda.is_available()
    recipe = case.recipe(device, amp)
    where = plan(recipe)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(BATCHES):
        x = torch.randn(case.batch, 3, case.size, case.size, generator=generator)
        y = torch.randint(0, case.classes, (case.batch,), generator=generator).to(where.device)
        batches.append(Batch(x.to(where.device, where.images, memory_format=where.memory_format), y, y))
    return Setting(case, recipe, where, tuple(batches), folder)


class Ours:
    """This package's step as the trainer runs it. `streams` as in run.streams; None: not captured."""

    group, mode = "ours", ""

    def __init__(self, at: Setting, streams: Any = "auto", recipe: Recipe | None = None):
        recipe = recipe or at.recipe
        learner = at.learner(recipe).place(at.where)
        self.step = Step(learner, optim.build(learner, recipe.optim), recipe, at.device)
        self.run = Stepper(self.step, at.where, streams=streams or "off", graph=streams is not None)
        self.first = WARM + 1 if not self.run.reason else 1  # the step with which it is as fast as it gets
        self.batches = at.batches
        learner.train()

    def __call__(self, batch: Batch) -> None:
        self.run(batch)

    def set(self, rate: float, ramp: float) -> None:
        self.step.rate(rate)
        self.step.ramp(ramp)

    def mean_loss(self) -> float:
        value = float(self.step.meters.read()["loss"])
        self.step.meters.clear()
        return value

    def settle(self) -> None:
        """Steps until it is decided how the peers run."""
        for k in range(SETTLE):
            if self.run.style or self.run.reason:
                return
            self.run(self.batches[k % BATCHES])

    def about(self) -> Row:
        captured = {"style": self.run.style, "speedup": self.run.speedup}
        return {"not_captured": self.run.reason} if self.run.reason else {k: v for k, v in captured.items() if v is not None}

    def state(self) -> list[Tensor]:
        """Tensors that live from step to step."""
        flat = self.step.flat
        shadow = [flat.shadow] if flat and flat.shadow is not None else []
        return [*self.step.params, *self.step.learner.buffers(), *shadow]

    def loss(self, batch: Batch) -> Tensor:
        with self.step.lowered():
            return self.step.learner(batch.x, batch.y, self.step.w).loss

    def parts(self, batch: Batch) -> dict[str, Callable[[], Any]]:
        """Each call does what the one before it does, and one part of a step more. Peers run one after the other."""
        step, learner = self.step, self.step.learner

        def forward() -> None:
            with step.lowered(), learner._autocast(batch.x):
                learner.method.nodes(learner.cohort(batch.x))

        def backward() -> None:
            step._gradients(batch.x, batch.labels, [])
            step.optimizer.zero_grad(set_to_none=True)

        calls = {"forward": forward, "loss": lambda: self.loss(batch), "backward": backward}
        return {**calls, "optimizer": lambda: step.update(batch.x, batch.y)}

    def close(self) -> None:
        self.run.close()


class Eager(PlainLoop):
    """The plain loop, or a style of torch.compile."""

    def __init__(self, at: Setting, group: str = "eager", mode: str | None = None):
        super().__init__(at.learner(), at.recipe, at.where, mode)
        self.group, self.mode = group, mode or ""
        self.first = 3 if self.graphs else 1  # graphs are recorded in the second step and replayed from the third on
        self.batches = at.batches

    def settle(self) -> None:
        pass

    def about(self) -> Row:
        return {"mode": self.mode} if self.mode else {}

    def state(self) -> list[Tensor]:
        """Tensors that live from step to step."""
        return [*self.net.parameters(), *self.net.buffers()]

    def loss(self, batch: Batch) -> Tensor:
        return self.forward(batch.x, batch.y, self.w)

    def parts(self, batch: Batch) -> dict[str, Callable[[], Any]]:
        """As of ours."""

        def forward() -> None:
            with torch.autocast(batch.x.device.type, self.dtype, enabled=self.dtype is not None):
                self.net.method["fuse"](self.net.cohort(batch.x).maps)

        def whole() -> None:
            self.backward(batch.x, batch.y)
            self.optimizer.step()

        calls = {"forward": forward, "loss": lambda: self.loss(batch), "backward": lambda: self.backward(batch.x, batch.y)}
        return {**calls, "optimizer": whole}

    def close(self) -> None:
        if self.mode:
            torch._dynamo.reset()


class Theirs:
    """The authors' step, fp32 and contiguous as their script has it."""

    group, mode, first = "official", "", 1

    def __init__(self, at: Setting):
        assert at.folder is not None
        depth = int(at.case.nets[0].removeprefix("resnet"))
        self.exact = official.parity(at.folder, depth)
        self.code = official.Official(at.folder, depth, at.device)
        self.code.take(at.learner().state_dict())
        self.batches = tuple(Batch(b.x.float().contiguous(), b.y, b.id) for b in at.batches)
        self.total, self.steps = 0.0, 0

    def __call__(self, batch: Batch) -> None:
        self.total += self.code.step(batch.x, batch.y)
        self.steps += 1

    def set(self, rate: float, ramp: float) -> None:
        self.code.set(rate, ramp)

    def mean_loss(self) -> float:
        value = self.total / max(self.steps, 1)
        self.total, self.steps = 0.0, 0
        return value

    def settle(self) -> None:
        pass

    def about(self) -> Row:
        return {"parity_f64": self.exact}

    def close(self) -> None:
        pass


Variant = Ours | Eager | Theirs


def make(at: Setting, name: str) -> Variant:
    """A variant by its name in the rows."""
    ours = {"ours": "auto", "ours serial": "off", "ours parallel": "on", "ours eager": None}
    if name in ours:
        return Ours(at, ours[name])
    if name == "eager":
        return Eager(at)
    if name == "official":
        return Theirs(at)
    if name.startswith("alone "):
        kinds = at.case.alone(at.device.type, at.where.dtype is not None)
        return Ours(at, recipe=next(r for r in kinds if r.nets.names == (name.removeprefix("alone "),)))
    style, _, mode = name.partition(" ")
    if mode not in MODES.get(style, ()):
        raise ValueError(f"no variant is called {name!r}")
    return Eager(at, "compile", mode)
