"""fit as a whole: full disks, bad numbers, short data, what is evaluated and kept, and memory that stays flat."""

import contextlib
import errno
import gc
import io
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastffl.errors import DataError, DiskError, NumericsError, UsageError
from fastffl.evaluation import evaluate
from fastffl.train import checkpoint, graph, loop
from fastffl.train.progress import Progress
from fastffl.train.rundir import rows_of
from fastffl.train.step import LIMIT, Step
from tests.train import tiny
from tests.train.tiny import EPOCHS, STEPS


class Said:
    """A stream to print to, and its lines."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.progress = Progress(self.stream)

    def lines(self, pattern: str) -> list[str]:
        return [line for line in self.stream.getvalue().splitlines() if re.search(pattern, line)]


# ---- a disk that is full


@contextlib.contextmanager
def full_disk(run: Path, when: Callable[[], bool], call: str = "write", part: str = "") -> Iterator[None]:
    """os.CALL fails with ENOSPC on files of `run` whose path holds `part`, while `when()` is true."""
    real, real_open = getattr(os, call), os.open
    names: dict[int, str] = {}

    def opened(path: Any, *args: Any, **kwargs: Any) -> int:
        fd = real_open(path, *args, **kwargs)
        names[fd] = str(path)
        return fd

    def fails(first: Any, *args: Any, **kwargs: Any) -> Any:
        path = names.get(first, "") if isinstance(first, int) else str(first)
        if path.startswith(f"{run}/") and part in path and when():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(first, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", opened)
        patch.setattr(os, call, fails)
        yield


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_training_goes_on_while_the_disk_is_full(tmp_path: Path, call: str) -> None:
    whole = tiny.train(tmp_path / "whole")
    run, said = tmp_path / "run", Said()
    with full_disk(run, lambda: len(rows_of(run)) == 2, call, "/last/"):
        result = tiny.train(run, progress=said.progress)
    assert result.digest == whole.digest and result.results == whole.results
    (line,) = said.lines("warning")
    assert "step-000000012.pt: No space left on device (need " in line
    assert line.endswith("what was saved before is intact; training goes on (failure 1 of 3)")
    assert [p.name for p in sorted((run / "last").glob("*.pt"))] == ["step-000000006.pt", "step-000000018.pt"]
    assert tiny.plain_rows(run) == tiny.plain_rows(tmp_path / "whole")
    assert not list(run.rglob("*.tmp"))


def test_training_stops_after_three_failures_in_a_row(tmp_path: Path) -> None:
    run, said, made = tmp_path / "run", Said(), tiny.recipe(sched__epochs=8)
    with full_disk(run, lambda: len(rows_of(run)) >= 2), pytest.raises(DiskError, match="No space left on device"):
        tiny.train(run, made, progress=said.progress)
    assert [r["epoch"] for r in rows_of(run)] == [1, 2, 3, 4]
    assert len(said.lines(r"failure [12] of 3\)")) >= 2
    assert tiny.stored(run)["position"] == {"epoch": 1, "batch": 0, "step": STEPS}
    assert not list(run.rglob("*.tmp"))
    result = tiny.train(run, made)  # room was made: the same command goes on
    assert result.digest == tiny.train(tmp_path / "whole", made).digest
    assert tiny.plain_rows(run) == tiny.plain_rows(tmp_path / "whole")


def test_failures_that_are_not_in_a_row_do_not_stop(tmp_path: Path) -> None:
    run, said = tmp_path / "run", Said()
    with full_disk(run, lambda: len(rows_of(run)) in (1, 2, 4, 5), part="/last/"):
        assert tiny.train(run, tiny.recipe(sched__epochs=7), progress=said.progress).epochs == 7
    assert [line[-len("1 of 3)") :] for line in said.lines("warning")] == ["1 of 3)", "2 of 3)"] * 2


def test_a_last_save_that_fails_is_an_error(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with full_disk(run, lambda: len(rows_of(run)) == EPOCHS), pytest.raises(DiskError):
        tiny.train(run)
    assert tiny.stored(run)["position"]["epoch"] == EPOCHS - 1


def test_rows_wait_for_room(tmp_path: Path) -> None:
    """A limit on the size of files, in this process: the rows' file may not grow, then it may."""
    run = tmp_path / "run"
    made, limits = tiny.recipe(), resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limited(tiny.StopAt):
        def train(self, batch_size: int, seed: int, epoch: int, start: int = 0) -> Any:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]) if epoch == 1 else limits)
            yield from self._source.train(batch_size, seed, epoch, start)

    said = Said()
    try:
        tiny.train(run, made, data=Limited(tiny.data(), 0), progress=said.progress)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(said.lines(r"warning: cannot write .*rows.jsonl: File too large; .*failure 1 of 3")) == 1
    assert [r["epoch"] for r in rows_of(run)] == [1, 2, 3]
    assert len((run / "rows.jsonl").read_text().splitlines()) == 3


def test_a_run_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"can't write the run folder .*; choose another with --out DIR"):
        tiny.train(tmp_path / "file" / "run")


# ---- bad numbers


def test_nine_bad_steps_then_a_good_one_is_no_stop(tmp_path: Path) -> None:
    said = Said()
    result = tiny.train(tmp_path, data=tiny.NaNAt(tiny.data(), 4, LIMIT - 1), progress=said.progress)
    assert result.skipped == LIMIT - 1
    assert [r["skipped"] for r in rows_of(tmp_path)] == [2, 8, 9]
    assert [r["rows"] for r in rows_of(tmp_path)] == [32, 0, 36]  # samples of finite steps
    assert said.lines("skipped 9") and all(torch.isfinite(v).all() for v in tiny.stored(tmp_path)["learner"].values())


@pytest.mark.parametrize("log_every", [1, 3, 100])
@pytest.mark.parametrize("mode", [{}, {"amp__enabled": True, "amp__dtype": "fp16", "ema__decay": 0.9}])
def test_the_state_after_the_stop_is_that_of_the_last_finite_step(tmp_path: Path, log_every: int, mode: dict[str, Any]) -> None:
    """However late the host looks: with log_every=100 it is the epoch's end, 14 bad steps on."""
    made = tiny.recipe(run__log_every=log_every, data__batch_size=2, **mode)
    tiny.train(tmp_path / "cut", tiny.recipe(run__max_steps=5, data__batch_size=2, **mode))
    finite = tiny.stored(tmp_path / "cut")
    broken = tiny.learner()

    class Broken(tiny.StopAt):
        def train(self, batch_size: int, seed: int, epoch: int, start: int = 0) -> Any:
            for k, batch in enumerate(self._source.train(batch_size, seed, epoch, start), start):
                if 5 <= k < 19:
                    batch.x.fill_(float("inf"))
                yield batch

    with pytest.raises(NumericsError, match=r"loss not finite for 10 steps in a row, first bad term: ce/p0, ce/p1"):
        tiny.train(tmp_path / "run", made, learner=broken, data=Broken(tiny.data(), 0))
    assert finite["position"]["step"] == 5 and checkpoint.digest(finite["learner"]) == checkpoint.digest(broken.state_dict())
    assert checkpoint.newest(tmp_path / "run" / "last") is None  # nothing of it was saved


# ---- what is evaluated and kept


def test_the_average_is_what_is_evaluated_when_on(tmp_path: Path) -> None:
    for decay in (0.0, 0.9):
        run, learner = tmp_path / str(decay), tiny.learner()
        tiny.train(run, tiny.recipe(ema__decay=decay), learner=learner)
        state, row = tiny.stored(run), rows_of(run)[-1]["val"]
        scored = evaluate(learner, tiny.data(), batch_size=7)  # what fit leaves is what it scored
        learner.load_state_dict(state["learner"])
        raw = evaluate(learner, tiny.data(), batch_size=7)
        assert (raw["fused"]["nll"] == pytest.approx(row["fused"]["nll"], rel=1e-6)) == (decay == 0)
        if decay:
            learner.load_state_dict(state["average"]["model"])
        for vote, score in evaluate(learner, tiny.data(), batch_size=7).items():
            assert row[vote] == pytest.approx(score, rel=1e-12) == scored[vote]


def test_last_and_best_are_of_every_vote(tmp_path: Path) -> None:
    result = tiny.train(tmp_path, tiny.recipe(sched__epochs=8, optim__lr=0.2))
    rows = rows_of(tmp_path)
    assert list(result.results) == ["p0", "p1", "mean", "fused"]
    for vote, r in result.results.items():
        scores = [row["val"][vote]["top1"] for row in rows]
        assert r["last"] == pytest.approx(scores[-1]) and r["best"] == pytest.approx(max(scores))
        assert r["best_epoch"] == scores.index(max(scores)) + 1  # the first of equals
        assert r["net"] == ("Small" if vote.startswith("p") else vote)
    assert len({(r["last"], r["best"], r["best_epoch"]) for r in result.results.values()}) > 1
    best = checkpoint.newest(tmp_path / "best")
    assert best is not None and best["position"]["epoch"] == result.results["fused"]["best_epoch"]
    assert [p.name for p in (tmp_path / "best").glob("*.pt")] == [f"step-{best['position']['step']:09d}.pt"]
    document = json.loads(result.json_text())
    assert document["epochs"] == 8 and document["steps"] == 8 * STEPS and document["results"] == result.results


def test_of_equal_scores_the_first_is_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([50.0, 60.0, 60.0, 40.0])

    def scored(learner: Any, *args: Any, **kwargs: Any) -> dict[str, dict[str, Any]]:
        top1 = next(scores)
        return {v: {"top1": top1, "top5": 100.0, "nll": 1.0, "samples": 20} for v in learner.graph.scored}

    monkeypatch.setattr(graph, "evaluate", scored)
    result = tiny.train(tmp_path, tiny.recipe(sched__epochs=4))
    for r in result.results.values():
        assert (r["last"], r["best"], r["best_epoch"]) == (40.0, 60.0, 2)
    best = checkpoint.newest(tmp_path / "best")
    assert best is not None and best["position"]["epoch"] == 2


def test_evaluations_and_checkpoints_come_when_asked_and_at_the_end(tmp_path: Path) -> None:
    made = tiny.recipe(sched__epochs=5, run__eval_every=2, run__save_every=3)
    steps: list[int] = []
    real = checkpoint.save

    def save(folder: Path, state: Any, step: int, *args: Any, **kwargs: Any) -> None:
        if folder.name == "last":
            steps.append(step)
        real(folder, state, step, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        tiny.train(tmp_path, made)
    assert ["val" in r for r in rows_of(tmp_path)] == [False, True, False, True, True]
    assert steps == [3 * STEPS, 5 * STEPS]


def test_training_learns(tmp_path: Path) -> None:
    learner = tiny.learner(drop=0.0, width=12)
    result = tiny.train(tmp_path, tiny.recipe(sched__epochs=25, data__pad=0), learner=learner, data=tiny.data(samples=150))
    assert result.results["fused"]["best"] > 60  # of 33 by chance
    losses = [r["terms"]["ce/fused"] for r in rows_of(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_ramp_and_the_rate_reach_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []
    call = Step.__call__

    def spy(self: Step, batch: Any) -> None:
        seen.append((float(self.w), self.optimizer.param_groups[0]["lr"]))
        assert len({g["lr"] for g in self.optimizer.param_groups}) == 1
        call(self, batch)

    monkeypatch.setattr(Step, "__call__", spy)
    tiny.train(tmp_path)
    assert [w for w, _ in seen] == pytest.approx([w for w in (0.006738, 0.286505, 1.0) for _ in range(STEPS)], rel=1e-4)
    assert [lr for _, lr in seen] == pytest.approx([0.05] * 2 * STEPS + [0.005] * STEPS)


# ---- data that fails


@pytest.mark.parametrize("at", [3, STEPS + 2])
def test_a_failing_source_costs_no_step(tmp_path: Path, at: int) -> None:
    with pytest.raises(DataError, match="stopped by the test"):
        tiny.train(tmp_path, data=tiny.StopAt(tiny.data(), at, DataError))
    assert tiny.stored(tmp_path)["position"]["step"] == at
    assert tiny.train(tmp_path).digest == tiny.train(tmp_path / "whole").digest


def test_an_epoch_that_ends_early_is_an_error(tmp_path: Path) -> None:
    class Short(tiny.StopAt):
        def train(self, batch_size: int, seed: int, epoch: int, start: int = 0) -> Any:
            yield from list(self._source.train(batch_size, seed, epoch, start))[:-1]

    with pytest.raises(DataError, match="tiny gave 5 of 6 batches in epoch 1"):
        tiny.train(tmp_path, data=Short(tiny.data(), 0))


# ---- memory


MANY_STEPS = """
import gc, os, sys
sys.path.insert(0, sys.argv[1])
import tiny, torch
from fastffl.train import optim
from fastffl.train.step import Step

torch.set_num_threads(1)
made = tiny.recipe(ema__decay=0.9, optim__clip=1.0)
learner = tiny.learner()
step = Step(learner, optim.build(learner, made.optim), made, torch.device("cpu"))
source = tiny.data(samples=8)
leak = []

def facts():
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), tensors

def run(steps):
    for epoch in range(steps):
        for batch in source.train(8, 0, epoch):
            step(batch)
            if sys.argv[2] == "leak":
                leak.append(torch.ones(32768))

run(100)
before = facts()
run(300)
print(*(b - a for a, b in zip(before, facts())))
"""


def growth(kind: str) -> list[int]:
    """Bytes, open files and tensors gained by 300 steps in a process of their own, where no other test moves the heap."""
    command = [sys.executable, "-W", "ignore", "-c", MANY_STEPS, str(Path(__file__).parent), kind]
    return [int(n) for n in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


def test_three_hundred_steps_leave_memory_and_files_flat() -> None:
    memory, files, tensors = growth("none")
    assert files == 0 and tensors == 0 and memory < 8 * 2**20


def test_control_a_leak_of_memory_is_seen() -> None:
    memory, _, tensors = growth("leak")
    assert tensors == 300 and memory > 30 * 2**20


def held() -> int:
    """Tensors that Python holds."""
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_control_a_leak_is_seen() -> None:
    before = held()
    kept = [torch.zeros(1) for _ in range(300)]
    assert held() == before + len(kept)


def test_the_trainer_is_lean() -> None:
    assert len(Path(loop.__file__).read_text().splitlines()) <= 350
