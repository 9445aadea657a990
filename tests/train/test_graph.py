"""Capture and replay with a stand-in for CUDA: what runs when, on which tensors, and what happens where it can't."""

import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastffl.streams import Branches
from fastffl.train import Plan, optim
from fastffl.train.graph import IDLE, SHAPES, TRIALS, WARM, Evaluator, Graphed, Stepper, computing, prime
from fastffl.train.step import Step
from fastffl.values import Batch
from tests.train import tiny
from tests.train.recorder import Recorder
from tests.train.test_step import CPU, batch, whole

WHERE = Plan(CPU, None, torch.contiguous_format, "cpu")


class Replay:
    """What a capture gives: `body` again, on whatever its static tensors then hold."""

    def __init__(self, backend: "FakeCuda", body: Callable[[], None], ms: float):
        self.backend, self.body, self.ms = backend, body, ms

    def replay(self) -> None:
        self.backend.replays += 1
        self.backend.now += self.ms
        self.body()


class FakeCuda:
    """Replays are calls; a clock that `ms(style)` moves. As on CUDA, a capture itself computes nothing."""

    def __init__(self, ms: dict[str, float] | None = None, error: str = "", fails: tuple[int, ...] = ()):
        self.ms, self.error, self.fails = (
            ms or {},
            error,
            fails,
        )  # fails: captures (1-based) that end in the error after their body
        self.captures, self.replays, self.now = 0, 0, 0.0
        self.reads: list[str] = []

    def capture(self, body: Callable[[], None]) -> Replay:
        self.captures += 1
        if self.captures in self.fails:
            body()
        if self.error and (not self.fails or self.captures in self.fails):
            raise RuntimeError(self.error)
        style = ("serial", "parallel")[(self.captures - 1) % 2]
        return Replay(self, body, self.ms.get(style, 1.0))

    def mark(self) -> float:
        return self.now

    def between(self, begin: float, end: float) -> float:
        return end - begin

    @contextmanager
    def host_reads(self) -> Iterator[list[str]]:
        yield self.reads


def adder(total: Tensor) -> Callable[[Tensor], None]:
    def work(x: Tensor) -> None:
        total.add_(x.sum())

    return work


def branches() -> Branches:
    return Branches(Recorder())


# ---- when


def test_a_shape_runs_eagerly_first_and_is_captured_once() -> None:
    total, fake, said = torch.zeros(()), FakeCuda(), []
    run = Graphed(adder(total), fake, say=said.append)
    for k in range(10):
        run(torch.full((4,), float(k)))
        assert float(total) == 4 * sum(range(k + 1)), "every call counts once, eager or replayed"
        assert fake.captures == (k >= WARM) and fake.replays == max(0, k + 1 - WARM)
    assert run.reason == "" and len(said) == 1 and "one CUDA graph" in said[0]


def test_each_shape_layout_and_type_has_a_graph_of_its_own() -> None:
    total, fake = torch.zeros(()), FakeCuda()
    run = Graphed(adder(total), fake)
    x = torch.ones(2, 3, 4, 4)
    kinds = [x, x.half(), x.contiguous(memory_format=torch.channels_last), torch.ones(1, 3, 4, 4)]
    for _ in range(WARM + 2):
        for kind in kinds:
            run(kind)
    assert fake.captures == len(kinds)
    assert float(total) == (WARM + 2) * (3 * 96 + 48)


def test_more_shapes_than_fit_run_eagerly_and_are_right() -> None:
    total, fake = torch.zeros(()), FakeCuda()
    run = Graphed(adder(total), fake)
    for n in range(1, SHAPES + 4):
        for _ in range(WARM + 1):
            run(torch.ones(n))
    assert fake.captures == SHAPES and run.reason == ""
    assert float(total) == (WARM + 1) * sum(range(1, SHAPES + 4))


def test_a_shape_long_out_of_use_makes_room() -> None:
    """Images that grow: nine sizes, one after the other, each for longer than a graph may idle."""
    total, fake, said = torch.zeros(()), FakeCuda(), []
    run = Graphed(adder(total), fake, say=said.append)
    calls = IDLE + WARM + 1
    for n in range(1, SHAPES + 4):
        for _ in range(calls):
            run(torch.ones(n))
    assert fake.captures == SHAPES + 3 and len(said) == 1
    assert fake.replays == (SHAPES + 3) * (calls - WARM), "every size is replayed as soon as it is warm"
    assert float(total) == calls * sum(range(1, SHAPES + 4))
    assert sum(bool(s.graphs) for s in run._shapes.values()) == SHAPES


# ---- which style


@pytest.mark.parametrize(
    ("serial", "parallel", "kept"), [(1.0, 0.8, "parallel"), (1.0, 1.2, "serial"), (1.0, 0.995, "serial"), (1.0, 1.0, "serial")]
)
def test_both_styles_take_turns_and_the_faster_is_kept(serial: float, parallel: float, kept: str) -> None:
    total, b, said = torch.zeros(()), branches(), []
    fake, seen = FakeCuda({"serial": serial, "parallel": parallel}), []

    def work(x: Tensor) -> None:
        seen.append(b.on)
        total.add_(x.sum())

    run = Graphed(work, fake, branches=b, say=said.append)
    for _ in range(WARM):
        run(torch.ones(3))
    assert seen == [False] * (WARM - 1) + [True], "the last eager call takes the side streams the capture will take"
    for _ in range(2 * TRIALS):
        run(torch.ones(3))
    assert seen[WARM:] == [False, True] * TRIALS
    assert run.style == kept and run.speedup == pytest.approx(serial / parallel)
    assert len(said) == 1 and f"{serial / parallel:.2f} x as fast" in said[0]
    for _ in range(3):
        run(torch.ones(3))
    assert seen[-3:] == [kept == "parallel"] * 3 and not b.on
    for _ in range(WARM + 1):
        run(torch.ones(2))
    assert fake.captures == 3, "a later shape is captured in the style that was kept"
    assert float(total) == 3 * (WARM + 2 * TRIALS + 3) + 2 * (WARM + 1)


@pytest.mark.parametrize(("asked", "style"), [("on", "parallel"), ("off", "serial")])
def test_a_style_that_is_asked_for_is_not_measured(asked: Any, style: str) -> None:
    b, fake = branches(), FakeCuda()
    seen = []
    run = Graphed(lambda x: seen.append(b.on), fake, branches=b, asked=asked)
    for _ in range(WARM + 4):
        run(torch.ones(2))
    assert fake.captures == 1 and run.style == style and run.speedup is None
    assert seen[WARM:] == [style == "parallel"] * 4


# ---- where it can't


def test_a_failed_capture_goes_on_eagerly_and_says_why() -> None:
    total, fake, said = torch.zeros(()), FakeCuda(error="operation not permitted when stream is capturing\nmore"), []
    run = Graphed(adder(total), fake, say=said.append)
    for _ in range(WARM + 3):
        run(torch.ones(2))
    assert float(total) == 2 * (WARM + 3) and fake.captures == 1 and fake.replays == 0
    assert said == ["step runs without a CUDA graph: capturing it failed: operation not permitted when stream is capturing"]
    assert run.reason in said[0]


def test_a_failed_capture_leaves_no_gradient_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture computes nothing, but autograd hangs onto the leaves what it would have made."""
    plain, step, _, _ = steps_of({})
    seen = []

    class Broken(FakeCuda):
        def capture(self, body: Callable[[], None]) -> Replay:
            def judge(*args: Any) -> None:
                seen.extend(p.grad for p in step.params if p.grad is not None)
                raise RuntimeError("no")

            statistics = step.buffers.save()
            with monkeypatch.context() as patch:
                patch.setattr(step, "_judge", judge)
                try:
                    body()
                finally:
                    step.buffers.restore(statistics, torch.tensor(False))
            raise AssertionError("the body did not fail")

    run = Stepper(step, WHERE, backend=Broken(), streams="off")
    for k in range(WARM + 3):
        plain(batch(at=8 * k))
        run(batch(at=8 * k))
    assert seen and run.reason == "capturing it failed: no" and whole(plain) == whole(step)


def test_where_branches_cannot_be_captured_the_serial_graph_is_kept() -> None:
    total, said, undone = torch.zeros(()), [], []
    fake = FakeCuda(error="unjoined work", fails=(2,))

    def work(x: Tensor) -> None:
        if not b.on:
            total.add_(x.sum())

    b = branches()
    run = Graphed(work, fake, branches=b, say=said.append, undo=lambda: undone.append(1))
    for _ in range(WARM + 5):
        run(torch.ones(2))
    assert run.style == "serial" and run.reason == "" and fake.replays == 5 and undone == [1]
    assert any("in parallel: capturing it failed: unjoined work" in line for line in said)
    assert float(total) == 2 * (WARM - 1 + 5)


def test_only_one_shape_is_measured() -> None:
    """A short batch takes less time: it must not decide."""
    total, b = torch.zeros(()), branches()
    fake = FakeCuda({"serial": 1.0, "parallel": 0.9})
    run = Graphed(adder(total), fake, branches=b)
    for k in range(WARM + 4 * TRIALS):
        run(torch.ones(4))
        run(torch.ones(2))
        assert (run.style is None) == (k < WARM + 2 * TRIALS - 1)
    assert run.style == "parallel" and float(total) == 6 * (WARM + 4 * TRIALS)


def test_host_reads_are_found_before_a_capture_is_tried() -> None:
    fake, said = FakeCuda(), []
    fake.reads.append("net.py:12")
    run = Graphed(lambda x: None, fake, say=said.append)
    for _ in range(WARM + 3):
        run(torch.ones(2))
    assert fake.captures == 0 and "net.py:12" in run.reason and len(said) == 1


@pytest.mark.parametrize(
    "draw", [random.random, lambda: np.random.rand(3), lambda: torch.rand(2)], ids=["python", "numpy", "torch"]
)
def test_random_numbers_of_the_host_are_found_too(draw: Callable[[], Any]) -> None:
    fake = FakeCuda()
    run = Graphed(lambda x: draw(), fake)
    for _ in range(WARM + 3):
        run(torch.ones(2))
    assert fake.captures == 0 and "random numbers on the host" in run.reason


# ---- the step


def steps_of(changes: dict[str, Any], **more: Any) -> tuple[Step, Step, Stepper, FakeCuda]:
    """A step called plainly and one through a Stepper with the stand-in."""
    made, both = tiny.recipe(**changes), []
    for _ in range(2):
        learner = tiny.learner(drop=0.0)
        learner.train()
        both.append(Step(learner, optim.build(learner, made.optim, True), made, CPU))
    fake = FakeCuda()
    return both[0], both[1], Stepper(both[1], WHERE, backend=fake, **more), fake


@pytest.mark.parametrize(
    "changes",
    [{}, {"optim__accum": 2}, {"ema__decay": 0.9, "optim__clip": 0.5}, {"optim__name": "adamw", "optim__lr": 1e-3}],
    ids=["plain", "accum", "ema+clip", "adamw"],
)
@pytest.mark.parametrize("streams", ["off", "on", "auto"])
def test_a_replayed_step_equals_a_called_one(changes: dict[str, Any], streams: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedules reach the replay as device values, partial batches get a graph of their own: the same bits at the end."""
    monkeypatch.setattr("fastffl.train.graph.Streams", lambda device: Recorder())
    plain, captured, run, fake = steps_of(changes, streams=streams)
    for k in range(20):
        for step, call in ((plain, plain), (captured, run)):
            step.rate(0.05 / (k + 1))
            step.ramp(min(1.0, k / 10))
            call(batch(8, 8 * k))
            if k % 3 == 2:
                call(batch(4, k))
    assert fake.replays > 15 and fake.captures >= 2
    assert whole(plain) == whole(captured)


def test_a_step_on_the_cpu_is_called_and_says_so() -> None:
    _, step, _, _ = steps_of({})
    run = Stepper(step, WHERE)
    run(batch())
    assert "cpu" in run.reason and run.style == "serial" and int(step.meters.rows) == 8
    assert "run.graph" in Stepper(step, WHERE, graph=False, backend=FakeCuda()).reason


def test_closing_gives_the_learner_back() -> None:
    _, step, run, _ = steps_of({})
    assert step.learner.cohort.branches is not None
    run.close()
    assert step.learner.cohort.branches is None


def test_a_captured_evaluation_equals_a_called_one() -> None:
    _, step, run, _ = steps_of({})
    run(batch())
    data, fake = tiny.data(), FakeCuda()
    plain, captured = Evaluator(step, WHERE), Evaluator(step, WHERE, backend=fake)
    want = plain(data, 7)
    for _ in range(3):
        assert captured(data, 7) == want
    assert fake.captures == 1 and fake.replays > 0  # the short last batch is seen three times: not yet captured
    assert step.learner.training


def test_computing_leaves_the_librarys_choice_alone_on_a_cpu() -> None:
    before = torch.backends.cudnn.benchmark
    with computing(CPU):
        assert torch.backends.cudnn.benchmark == before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_a_step_on_a_cpu_asks_the_kernel_for_no_memory() -> None:
    """Page faults of allocations as a step makes them, counted in processes of their own."""
    code = """
import resource, sys, torch
from contextlib import nullcontext
from fastffl.train.graph import computing
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        kept = [torch.ones(2**24) for _ in range(2)]  # 64 MB each: glibc asks the kernel for each, whatever it has free
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with computing(torch.device("cpu")) if sys.argv[1] == "kept" else nullcontext():
    faults()
    print(faults())
"""
    found = {}
    for how in ("kept", "given back"):
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True)
        found[how] = int(done.stdout)
    assert found["kept"] < 50 and found["given back"] > 200  # 320 with pages of 2 MB, 163,840 with pages of 4 KB


def test_a_batch_is_what_a_stepper_takes() -> None:
    _, step, run, _ = steps_of({})
    x, y, at = batch()[:3]
    run(Batch(x, y, at))
    assert int(step.meters.rows) == 8


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema__decay": 0.9, "optim__clip": 0.5}, {"optim__name": "adamw", "optim__lr": 1e-3}],
    ids=["plain", "ema+clip", "adamw"],
)
@pytest.mark.parametrize("before", [0, 2])
def test_priming_leaves_no_trace(changes: dict[str, Any], before: int) -> None:
    """Here without kernels to leave out: a whole step is taken, dropout's draws included, and put back."""
    made, ends = tiny.recipe(**changes), []
    for primed in (False, True):
        learner = tiny.learner(drop=0.3)
        learner.train()
        step = Step(learner, optim.build(learner, made.optim, True), made, CPU)
        torch.manual_seed(7)
        for k in range(before):
            step(batch(at=8 * k))
        if primed:
            assert prime(step, *batch(at=3)[:2]) == 0, "no launch without Triton"
            assert step.flat is not None and not step.flat.g.any()
        for k in range(3):
            step(batch(at=8 * k))
        ends.append(whole(step))
    assert ends[0] == ends[1]


def test_priming_survives_a_net_that_does_not() -> None:
    _, step, _, _ = steps_of({})
    before = whole(step)
    x, y, _ = batch()[:3]
    assert prime(step, x[:, :, :, :0], y) == 0 and whole(step) == before


def resident() -> int:
    """Bytes of memory this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_thousand_steps_grow_host_memory_by_less_than_8_mb() -> None:
    _, step, run, fake = steps_of({"ema__decay": 0.9}, streams="off")
    batches = [batch(8, 0), batch(4, 3)]

    def steps(n: int) -> None:
        for k in range(n):
            step.rate(0.01 / (k + 1))
            run(batches[k % 7 == 6])

    steps(300)
    before = resident()
    steps(1000)
    assert resident() - before < 8 << 20
    assert fake.captures == 2 and fake.replays > 1000
