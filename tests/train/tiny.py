"""Tiny learners, data and recipes for the trainer's tests: a run of 3 epochs takes a third of a second."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastffl.data import Place
from fastffl.data.resident import Arrays, Resident
from fastffl.errors import FastFFLError
from fastffl.methods.ffl import FFL
from fastffl.recipe import Data, Nets, Optim, Recipe, Run, Sched, change
from fastffl.train import Learner, Result, checkpoint, fit
from fastffl.train.progress import Progress
from fastffl.train.rundir import rows_of

SAMPLES, BATCH, STEPS, EPOCHS = 44, 8, 6, 3  # six batches, the last one of four samples
TIMING = {"img_s", "data_wait", "seconds"}  # fields of a row that differ between two runs


class Small(nn.Module):
    """A net with everything that has state: BatchNorm (unless told not to), dropout, two convolutions."""

    def __init__(self, classes: int = 3, width: int = 6, norm: bool = True, drop: float = 0.2, idle: bool = False):
        super().__init__()
        if idle:
            self.idle = nn.Linear(2, 2)  # a part that no image reaches
        self.low = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.drop = nn.Dropout(drop)
        self.high = nn.Conv2d(width, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.norm(self.low(x))))
        return self.fc(torch.relu(self.high(x)).mean((2, 3)))


def arrays(samples: int = SAMPLES, classes: int = 3, names: tuple[str, ...] | None = None) -> Arrays:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (samples + 20, 1, 8, 8), generator=g).to(torch.uint8)
    y = torch.arange(samples + 20) % classes
    x[torch.arange(len(y)), 0, y % 8] = 255  # a white row per class: something to learn
    names = names or tuple("abcdefgh"[:classes])
    return Arrays("tiny", names, (x[:samples], y[:samples]), (x[samples:], y[samples:]), (0.5,), (0.25,))


def data(samples: int = SAMPLES, **more: Any) -> Resident:
    return Resident(arrays(samples, **more), Data(name="custom", pad=1), Place())


def recipe(**changes: Any) -> Recipe:
    """SGD with a milestone and a ramp inside three epochs; `optim__clip=1.0` changes optim.clip."""
    made = Recipe(
        name="tiny",
        data=Data(name="custom", pad=1, batch_size=BATCH, eval_batch_size=7),
        nets=Nets(names=("Small", "Small"), share_stem=False),
        method=FFL.Config(),
        optim=Optim(lr=0.05),
        sched=Sched(name="step", epochs=EPOCHS, milestones=(2,), ramp_epochs=2),
        run=Run(device="cpu", memory_format="contiguous"),
    )
    for key, value in changes.items():
        made = change(made, key.replace("__", "."), value)
    return made


def learner(seed: int = 0, **more: Any) -> Learner:
    """Two Small under FFL; without batch norm in them the fusion has none either."""
    torch.manual_seed(seed)
    method = FFL.Config() if more.get("norm", True) else FFL.Config(fusion="mean")
    return Learner([Small(**more), Small(**more)], method, classes=3, size=8, channels=1)


def train(out: Path, made: Recipe | None = None, **more: Any) -> Result:
    """A run of a fresh tiny learner, whatever `out` already holds going on."""
    options = {"data": data(), "learner": learner(seed=more.pop("seed", 0)), "progress": Progress(quiet=True), **more}
    return fit(options.pop("learner"), options.pop("data"), made or recipe(), out=out, **options)


def stored(run: Path) -> dict[str, Any]:
    state = checkpoint.newest(run / "last")
    assert state is not None
    return state


class Stop(FastFFLError):
    """Raised by a test in place of a crash: nothing is saved on its way out."""


class StopAt:
    """A source that raises `error` when batch `at` of the whole run (0-based) is asked for: a crash at a chosen step."""

    def __init__(self, source: Resident, at: int, error: type[Exception] = Stop):
        self._source, self._at, self._error = source, at, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def train(self, batch_size: int, seed: int, epoch: int, start: int = 0, **more: Any) -> Any:
        for k, batch in enumerate(self._source.train(batch_size, seed, epoch, start, **more), start):
            if epoch * STEPS + k == self._at:
                raise self._error("stopped by the test")
            yield batch


class NaNAt(StopAt):
    """A source whose batches `at`, `at` + 1, ... `at` + count - 1 of the whole run hold a NaN."""

    def __init__(self, source: Resident, at: int, count: int = 1):
        super().__init__(source, at)
        self._count = count

    def train(self, batch_size: int, seed: int, epoch: int, start: int = 0, **more: Any) -> Any:
        for k, batch in enumerate(self._source.train(batch_size, seed, epoch, start, **more), start):
            if self._at <= epoch * STEPS + k < self._at + self._count:
                batch.x[1, 0, 2, 2] = float("nan")
            yield batch


def signal_self(signum: int) -> None:
    """Send this process a signal, and wait until the thread that listens has had its turn."""
    os.kill(os.getpid(), signum)
    time.sleep(0.05)


class SignalAt(StopAt):
    """A source that sends this process a signal when batch `at` is asked for."""

    def __init__(self, at: int, signum: signal.Signals = signal.SIGTERM):
        super().__init__(data(), at)
        self.signum = signum

    def train(self, batch_size: int, seed: int, epoch: int, start: int = 0, **more: Any) -> Any:
        for k, batch in enumerate(self._source.train(batch_size, seed, epoch, start, **more), start):
            if epoch * STEPS + k == self._at:
                signal_self(self.signum)
            yield batch


class EvaluationSignal:
    """A source that sends this process SIGTERM when batch `at` of an evaluation is asked for."""

    def __init__(self, source: Any, at: int, signum: signal.Signals = signal.SIGTERM):
        self._source, self._at, self._signum = source, at, signum

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def evaluate(self, split: str, batch_size: int) -> Any:
        for k, batch in enumerate(self._source.evaluate(split, batch_size)):
            if k == self._at:
                signal_self(self._signum)
            yield batch


def plain_rows(run: Path) -> list[dict[str, Any]]:
    """Rows without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows_of(run)]
