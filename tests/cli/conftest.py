"""The command line called in-process, and one small finished run for all tests that need one."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from fastffl import cli

TINY = ("--model", "resnet8,resnet8", "--batch-size", "64", "--epochs", "1", "--device", "cpu", "--set", "run.threads=1")
# The layout is fixed: `auto` asks a clock, and equal digests need equal layouts.
TINY_DIGITS = ("digits", *TINY, "--set", "data.train_fraction=0.1", "--set", "run.memory_format=contiguous")


class Answer(NamedTuple):
    """What a command gave: its exit code and what it wrote."""

    code: int
    out: str
    err: str


def command(*words: str) -> Answer:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        cli.main([str(w) for w in words])
    assert isinstance(ended.value.code, int)
    return Answer(ended.value.code, out.getvalue(), err.getvalue())


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """`call("train", "digits", ...)` in an empty folder of its own."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return command


@pytest.fixture
def refused(call: Callable[..., Answer]) -> Callable[..., str]:
    """`refused(...)`: the one line a command that can't be used says, after checking that it is one."""

    def check(*words: str, code: int = 2) -> str:
        got = call(*words)
        assert got.code == code, got
        lines = got.err.splitlines()
        assert lines and lines[-1].startswith("error: ") and sum(line.startswith("error") for line in lines) == 1, got.err
        assert "Traceback" not in got.err + got.out
        return lines[-1]

    return check


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Words that train digits for one epoch of three steps."""
    return TINY_DIGITS


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """A finished run, and what `train --json` answered. Tests copy it before they change it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    answer = command("train", *TINY_DIGITS, "--out", str(run), "--json")
    assert answer.code == 0, answer.err
    return run, answer
