"""CUDA graphs: work whose every effect is in tensors that outlive it, captured once per shape and replayed.

The first calls with a shape run eagerly: kernels are compiled, library algorithms chosen, states allocated. Then the work is
captured, where there are branches in two styles, serial and parallel; both take turns on real steps, which they compute alike,
and the faster one is kept. What can't be captured runs eagerly for ever, and `reason` says why.
"""

import gc
import os
import random
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastffl_kernels import _launch

from ..data import Source
from ..evaluation import Scorer, evaluate
from ..streams import Branches, Streams, apart
from ..values import Batch
from .device import Plan, kept_memory
from .randomness import rng_state, set_rng_state
from .step import Step

Style = Literal["serial", "parallel"]
Asked = Literal["auto", "on", "off"]
WARM = 3  # eager calls with a shape before its capture
TRIALS = 12  # timed replays of each style
SKIP = 2  # of them not counted: a graph's first replay uploads it
GAIN = 1.01  # parallel branches must win by so much: a draw goes to the simpler graph
SHAPES = 8  # captured at most: each graph keeps the memory of a step
IDLE = 100  # calls with other shapes after which a graph makes room: images that grow do not come back to their old size


class Cuda:
    """What captures, replays and times on a CUDA device. Tests put a stand-in in its place."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, body: Callable[[], None]) -> Any:
        """A graph of `body`; graphs share their memory, as they never run at once and none's outputs outlive it."""
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        gc.disable()  # a collection could free another graph, which breaks a capture
        try:
            # thread_local: loaders' and loggers' threads may allocate meanwhile
            stream = torch.cuda.current_stream()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                body()
        finally:
            gc.enable()
        return graph

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """ms, waiting for `end`."""
        end.synchronize()
        return float(begin.elapsed_time(end))

    @contextmanager
    def host_reads(self) -> Iterator[list[str]]:
        """Collects where the block makes the host wait for the device."""
        found: list[str] = []
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for w in seen:
            if "synchroniz" in str(w.message):
                found.append(f"{w.filename}:{w.lineno}")
            else:
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


def _drawn() -> list[Any]:
    """The host's random states: a graph would repeat one draw for ever."""
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)
    keys, at = state[1:3]
    return [random.getstate(), np.asarray(keys).tobytes(), at, torch.get_rng_state().numpy().tobytes()]


@dataclass
class _Shape:
    """What is known of one set of shapes."""

    calls: int = 0
    used: int = 0  # number of the last call with it
    given: tuple[Tensor, ...] = ()  # where the graphs read
    graphs: dict[Style, Any] = field(default_factory=dict)


class Graphed:
    """work(*tensors), captured per shape and replayed.

    branches  what `work` forks by where they are on; None: there is nothing to fork
    asked     auto: serial and parallel are measured, the faster is kept; on: parallel; off: serial
    say       gets a line for people about every decision
    undo      called after a failed capture: what the host then holds was never computed
    reason    why the work is not captured, "" while it is or may be
    style     the style kept, None while it is being measured
    speedup   serial time / parallel time, None where that was not measured
    """

    def __init__(
        self,
        work: Callable[..., None],
        backend: Cuda,
        *,
        what: str = "step",
        branches: Branches | None = None,
        asked: Asked = "auto",
        say: Callable[[str], None] | None = None,
        undo: Callable[[], None] = lambda: None,
    ):
        self.work, self.backend, self.what, self.branches, self.undo = work, backend, what, branches, undo
        self.say = say or (lambda text: None)
        self.reason = ""
        self.speedup: float | None = None
        self.style: Style | None = {"off": "serial", "on": "parallel"}.get(asked) if branches else "serial"  # type: ignore[assignment]
        self._shapes: dict[Any, _Shape] = {}
        self._calls = 0
        self._told = False
        self._timed: _Shape | None = None  # the shape whose replays are measured
        self._times: dict[Style, list[tuple[Any, Any]]] = {"serial": [], "parallel": []}

    def __call__(self, *tensors: Tensor) -> None:
        key = tuple((t.shape, t.dtype, t.stride()) for t in tensors)
        at = self._shapes.setdefault(key, _Shape())
        at.calls += 1
        self._calls += 1
        at.used = self._calls
        if not self.reason and not at.graphs and at.calls > WARM and self._room():
            self._capture(at, tensors)
        if not at.graphs:
            self._eager(at, tensors)
            return
        for mine, theirs in zip(at.given, tensors, strict=True):
            mine.copy_(theirs)
        if len(at.graphs) > 1:
            self._trial(at)
        else:
            next(iter(at.graphs.values())).replay()

    def _room(self) -> bool:
        """Whether one more shape may be captured; a shape that is long out of use is forgotten for it."""
        held = {key: s for key, s in self._shapes.items() if s.graphs}
        if len(held) < SHAPES:
            return True
        key, oldest = min(held.items(), key=lambda item: item[1].used)
        if self._calls - oldest.used < IDLE:
            return False
        del self._shapes[key]
        if oldest is self._timed:
            self._timed, self._times = None, {"serial": [], "parallel": []}
        return True

    @property
    def _styles(self) -> tuple[Style, ...]:
        return (self.style,) if self.style else ("serial", "parallel")

    def _run(self, style: Style, tensors: tuple[Tensor, ...]) -> None:
        if self.branches:
            self.branches.on = style == "parallel"
        try:
            self.work(*tensors)
        finally:
            if self.branches:
                self.branches.on = False

    def _eager(self, at: _Shape, tensors: tuple[Tensor, ...]) -> None:
        """A plain call. The last one before a capture is watched, and branches as the capture will."""
        if self.reason or at.calls != WARM:
            self._run("serial", tensors)
            return
        before = _drawn()
        with self.backend.host_reads() as found:
            self._run(self._styles[-1], tensors)
        if found:
            self._give_up(f"it makes the host wait for the device ({found[0]})")
        elif _drawn() != before:
            self._give_up("it draws random numbers on the host, which a graph would repeat")

    def _capture(self, at: _Shape, tensors: tuple[Tensor, ...]) -> None:
        at.given = tuple(torch.empty_like(t) for t in tensors)
        for style in self._styles:
            try:
                at.graphs[style] = self.backend.capture(lambda style=style: self._run(style, at.given))  # type: ignore[misc]
            except Exception as error:  # torch, libraries and users' nets raise many kinds here
                self.undo()
                lines = str(error).strip().splitlines() or [type(error).__name__]
                self._refused(at, f"capturing it failed: {lines[0][:200]}")
        if not at.graphs:
            return
        if self.style and not self._told:
            self._told = True
            self.say(f"{self.what} captured as one CUDA graph, {self._words()}")
        self._timed = self._timed or at

    def _refused(self, at: _Shape, why: str) -> None:
        """A style that can't be captured; the serial one, captured first, is then enough."""
        if at.graphs:
            self.say(f"{self.what} in parallel: {why}")
            self.style = "serial"
        elif self.style or self._styles[0] == "serial":
            at.given = ()
            self._give_up(why)

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self.say(f"{self.what} runs without a CUDA graph: {reason}")

    def _trial(self, at: _Shape) -> None:
        """Replay the style whose turn it is, timed; after the last turn keep the faster one, everywhere."""
        turn: Style = min(self._times, key=lambda s: len(self._times[s]))
        if at is not self._timed:
            at.graphs[turn].replay()
            return
        begin = self.backend.mark()
        at.graphs[turn].replay()
        self._times[turn].append((begin, self.backend.mark()))
        if len(self._times["parallel"]) < TRIALS:
            return
        serial, parallel = (
            statistics.median(self.backend.between(*pair) for pair in self._times[s][SKIP:]) for s in ("serial", "parallel")
        )
        self.speedup = serial / parallel
        self.style = "parallel" if serial >= GAIN * parallel else "serial"
        for shape in self._shapes.values():
            shape.graphs = {s: g for s, g in shape.graphs.items() if s == self.style}
        self._times = {"serial": [], "parallel": []}
        self.say(f"{self.what} captured as one CUDA graph, {self._words()}")

    def _words(self) -> str:
        if not self.branches:
            return "one stream"
        kept = "peers in parallel" if self.style == "parallel" else "peers one after the other"
        return kept if self.speedup is None else f"{kept} (in parallel {self.speedup:.2f} x as fast)"


def prime(step: Step, x: Tensor, *labels: Tensor) -> int:
    """Compile all kernels of a step side by side before its first one needs them one by one; how many launches it has.

    The step is taken without its kernels, which also lets the library choose its convolutions, and then everything it changed
    is put back.
    """
    # kept on the host: on the device it would stand on top of the step's own peak
    saved = tree_map(lambda t: t.to("cpu", copy=True) if isinstance(t, Tensor) else t, step.state())
    random_state = rng_state()
    with _launch.noted() as seen:
        try:
            step.update(x, *labels)
        except Exception:  # of a net that can't bear what a missing kernel left; a real fault comes again in the first step
            seen.clear()
    step.forget()
    step.load(saved)
    if step.flat:
        step.flat.g.zero_()  # what no parameter owns of it was multiplied by whatever memory held
    set_rng_state(random_state)
    _launch.compile_all(seen, _threads())
    return len(seen)


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores)


class Stepper:
    """A Step as the trainer runs it: called with a Batch, captured where that can be.

    streams   how the peers run inside the graph; see `Graphed`
    graph     False: eager
    """

    def __init__(
        self,
        step: Step,
        where: Plan,
        *,
        streams: Asked = "auto",
        graph: bool = True,
        say: Callable[[str], None] | None = None,
        backend: Any = None,
    ):
        self.step, self.backend, self._primed = step, backend, False
        self._why = ""
        self._graphed: Graphed | None = None
        if not graph:
            self._why = "run.graph is off"
            return
        if not step.ranks.alone:
            # NCCL inside a graph needs eleven eager steps on the capturing stream and its watchdog off: not tried yet
            self._why = "several ranks reduce gradients between its kernels"
            return
        if where.device.type != "cuda" and backend is None:
            self._why = f"CUDA graphs need CUDA, this is {where.device.type}"
            return
        cohort = step.learner.cohort
        if len(cohort.names) > 1:
            cohort.branches = Branches(Streams(where.device))
        self.backend = backend or Cuda()
        self._graphed = Graphed(step.update, self.backend, branches=cohort.branches, asked=streams, say=say, undo=step.forget)

    def __call__(self, batch: Batch) -> None:
        if batch.x.is_cuda and not self._primed and self.step.ranks.alone:
            prime(self.step, *self.step.given(batch))
        self._primed = True
        if self._graphed is None:
            self.step(batch)
        else:
            self._graphed(*self.step.given(batch))

    def close(self) -> None:
        """Drop the graphs and their memory; the learner is a plain module again."""
        self._graphed = None
        self.step.learner.cohort.branches = None
        self.step.close()

    @property
    def reason(self) -> str:
        return self._graphed.reason if self._graphed else self._why

    @property
    def style(self) -> Style | None:
        return self._graphed.style if self._graphed else "serial"

    @property
    def speedup(self) -> float | None:
        return self._graphed.speedup if self._graphed else None


class Evaluator:
    """Scores the learner of a step, or its moving average, after an epoch; captured where that can be.

    backend   the Stepper's, whose graphs' memory it then shares
    """

    def __init__(self, step: Step, where: Plan, *, graph: bool = True, backend: Any = None):
        self.model = step.average.model if step.average else step.learner
        self.model.amp_dtype = where.dtype
        self._scorer = Scorer(self.model)
        self._lowered = nullcontext if step.average else step.lowered
        self._sum = step.ranks.sum
        self._primed = False
        self.add: Callable[[Tensor, Tensor], None] = self._add
        if graph and (where.device.type == "cuda" or backend):
            self.add = Graphed(self._add, backend or Cuda(), what="evaluation")

    def _add(self, x: Tensor, y: Tensor) -> None:
        if x.is_cuda and not self._primed:
            self._primed = True
            with _launch.noted() as seen, self._lowered():
                self._scorer.add(x, y)
            self._scorer.clear()  # it was the first batch
            _launch.compile_all(seen, _threads())
        with self._lowered():
            self._scorer.add(x, y)

    def __call__(self, data: Source, batch_size: int, check: Callable[[], None] | None = None) -> dict[str, dict[str, Any]]:
        return evaluate(self.model, data, "val", batch_size, check, scorer=self._scorer, add=self.add, reduce=self._sum)

    def close(self) -> None:
        """Drop the graphs and their memory."""
        self.add = self._add


@contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """All that is computed on a device belongs in here: on CUDA one stream apart, and the library's fastest convolutions,
    unless deterministic ones were asked for; on a CPU memory that is kept."""
    if device.type == "cpu":
        with kept_memory():
            yield
        return
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        with apart(device):
            yield
    finally:
        torch.backends.cudnn.benchmark = before
