"""SIGINT and SIGTERM save and exit at any moment; a run that met them, or kill -9, ends as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fastffl.errors import Interrupted
from fastffl.train import signals
from fastffl.train.rundir import rows_of
from tests.train import tiny
from tests.train.tiny import EPOCHS, STEPS


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("whole")
    return tiny.train(run).digest, tiny.plain_rows(run)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [0, STEPS - 1, STEPS + 2, EPOCHS * STEPS - 1])
def test_a_signal_in_training_saves_after_the_step(
    tmp_path: Path, whole: tuple[str, list[dict[str, Any]]], at: int, signum: signal.Signals
) -> None:
    with pytest.raises(Interrupted, match=rf"{signum.name}: saved at epoch .*, step {at + 1}; the same command") as raised:
        tiny.train(tmp_path, data=tiny.SignalAt(at, signum))
    assert raised.value.exit_code == 128 + signum
    assert tiny.stored(tmp_path)["position"] == {"epoch": at // STEPS, "batch": at % STEPS + 1, "step": at + 1}
    assert tiny.train(tmp_path).digest == whole[0]
    assert tiny.plain_rows(tmp_path) == whole[1]


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("limit", [None, STEPS, STEPS + 2])
def test_a_signal_in_evaluation_saves_before_it(
    tmp_path: Path, whole: tuple[str, list[dict[str, Any]]], at: int, limit: int | None
) -> None:
    made = tiny.recipe(run__max_steps=limit)
    with pytest.raises(Interrupted):
        tiny.train(tmp_path, made, data=tiny.EvaluationSignal(tiny.data(), at))
    assert tiny.stored(tmp_path)["position"] == {"epoch": 0, "batch": STEPS, "step": STEPS}
    if limit == STEPS:  # the steps are done, the evaluation of the epoch is not
        tiny.train(tmp_path, made)
        assert tiny.stored(tmp_path)["position"] == {"epoch": 1, "batch": 0, "step": STEPS}
    assert tiny.train(tmp_path).digest == whole[0]
    assert tiny.plain_rows(tmp_path) == whole[1]


def test_fifteen_signals_at_random_moments(tmp_path: Path, whole: tuple[str, list[dict[str, Any]]]) -> None:
    """From a timer, so they fall anywhere: in a step, an evaluation, a save, before the first step or after the last."""
    rng, sent, saved = random.Random(4), 0, 0
    while sent < 15:
        run = tmp_path / str(sent)
        for _ in range(50):
            signum = rng.choice([signal.SIGINT, signal.SIGTERM])
            keep = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}  # outside of fit
            timer = threading.Timer(rng.uniform(0, 0.3), os.kill, (os.getpid(), signum))
            timer.start()
            sent += 1
            try:
                result = tiny.train(run)
                break
            except Interrupted as stop:
                saved += 1
                assert stop.exit_code == 128 + signum
            finally:
                timer.join()
                for s, handler in keep.items():
                    signal.signal(s, handler)
        assert result.digest == whole[0] and tiny.plain_rows(run) == whole[1]
    assert saved > 3


def test_handlers_threads_and_files_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(s) for s in signals.SIGNALS]
    with pytest.raises(Interrupted):
        tiny.train(tmp_path, data=tiny.SignalAt(1))
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        tiny.train(tmp_path)
    assert [signal.getsignal(s) for s in signals.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert not [t for t in threading.enumerate() if t.name == "fastffl-signals"]


def test_the_flag_is_set_while_the_main_thread_is_stuck() -> None:
    """A handler of signal.signal alone runs only when the main thread runs Python again; the flag does not wait for it."""
    seen: list[float] = []
    with signals.Stopper() as stop:

        def watch() -> None:
            while not stop.signum:
                time.sleep(0.001)
            seen.append(stop.signum)

        thread = threading.Thread(target=watch)
        thread.start()
        os.kill(os.getpid(), signal.SIGTERM)
        thread.join(10)  # a blocking call in C, as a collective is
        assert seen == [signal.SIGTERM]


@pytest.mark.parametrize(("pause", "code"), [(0.6, 130), (0.0, 7)])
def test_a_second_sigint_stops_at_once(pause: float, code: int) -> None:
    """Half a second later, that is: worker processes echo the first one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with signals.Stopper() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            while not stop.signum:
                time.sleep(0.001)
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


def test_a_fit_off_the_main_thread_leaves_signals_alone(tmp_path: Path, whole: tuple[str, list[dict[str, Any]]]) -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: (torch.set_num_threads(1), found.append(tiny.train(tmp_path).digest)))
    thread.start()
    thread.join()
    assert found == [whole[0]]


# ---- the command line

COMMAND = ["train", "digits", "--model", "resnet8,resnet8", "--epochs", "3", "--device", "cpu", "--json"]
SETS = ["data.train_fraction=0.2", "run.threads=1", "data.batch_size=32", "run.memory_format=contiguous"]


def command(run: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "fastffl", *COMMAND, "--out", str(run), *[w for s in SETS for w in ("--set", s)], *more]


def start(run: Path, *more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(command(run, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(run: Path, pattern: str, process: "subprocess.Popen[str]") -> None:
    """Until the run has written something that matches."""
    for _ in range(6000):
        if list(run.glob(pattern)) or process.poll() is not None:
            return
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole_digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    process = start(tmp_path_factory.mktemp("digits") / "run")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_saves_exits_and_goes_on(
    tmp_path: Path, whole_digits: dict[str, Any], signum: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    process = start(run)
    wait_for(run, "last/*.json", process)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and out == ""
    assert f"error: {signum.name}: saved at epoch" in err and "Traceback" not in err
    result = json.loads(subprocess.run(command(run), capture_output=True, text=True, check=True, timeout=120).stdout)
    assert result["digest"] == whole_digits["digest"] and result["results"] == whole_digits["results"]


def test_kill_9_at_random_moments_then_the_same_command(tmp_path: Path, whole_digits: dict[str, Any]) -> None:
    run, rng = tmp_path / "run", random.Random(int.from_bytes(os.urandom(2), "big"))
    killed = 0
    for pattern in ("rows.jsonl", "last/*.json", "best/*.pt"):
        process = start(run)
        wait_for(run, pattern, process)
        time.sleep(rng.uniform(0, 0.5))
        killed += process.poll() is None
        process.kill()
        process.communicate()
    out = subprocess.run(command(run), capture_output=True, text=True, check=True, timeout=120).stdout
    result = json.loads(out)
    assert result["digest"] == whole_digits["digest"] and result["results"] == whole_digits["results"]
    assert [r["epoch"] for r in rows_of(run)] == [1, 2, 3]
    assert not list(run.rglob("*.tmp")) and killed >= 1
