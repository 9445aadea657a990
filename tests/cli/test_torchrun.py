"""The command line under torchrun: one table, one JSON document, a killed rank named, a signal saved and gone on from."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "fastffl",
    "train",
    "digits",
]
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")} | {
    "OMP_NUM_THREADS": "1"
}
FEW = ["--set", "data.train_fraction=0.5", "--set", "data.eval_batch_size=90"]


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    """torchrun in a process group of its own, with the run in folder/run."""
    words = [*TORCHRUN, "--out", "run", *FEW, *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=folder, env=ENV, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def epochs(folder: Path) -> int:
    rows = folder / "run" / "rows.jsonl"
    return len(rows.read_text().splitlines()) if rows.exists() else 0


def until(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait for so many epochs."""
    begin = time.monotonic()
    while epochs(folder) < count:
        assert process.poll() is None and time.monotonic() - begin < 120, process.communicate()
        time.sleep(0.05)


def ranks_of(process: subprocess.Popen[str]) -> dict[str, int]:
    """Process ids of the ranks."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
            except OSError:
                continue
            rank = [e[5:] for e in environment if e.startswith(b"RANK=")]
            if rank and parent == str(process.pid):
                found[rank[0].decode()] = int(entry.name)
    return found


def test_two_ranks_print_one_document_and_write_one_run(tmp_path: Path) -> None:
    process = start(tmp_path, "--epochs", "1", "--json")
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    made = json.loads(out)
    assert made["steps"] == 11 and set(made["results"]) == {"p0", "p1", "mean", "fused"}
    assert "batch 64 = 2 ranks x 32 x accum 1" in err and err.count("method ffl") == 1
    assert epochs(tmp_path) == 1
    one = subprocess.run(
        [sys.executable, "-m", "fastffl", "evaluate", "run", "--json"], cwd=tmp_path, capture_output=True, text=True, env=ENV
    )
    score = json.loads(one.stdout)["results"]["fused"]
    assert score["samples"] == 450 and score["top1"] == pytest.approx(made["results"]["fused"]["last"], abs=0.01)


def test_a_killed_rank_is_named_and_the_run_ends(tmp_path: Path) -> None:
    process = start(tmp_path, "--epochs", "500", "--set", "run.watch=3")
    until(tmp_path, 2, process)
    os.kill(ranks_of(process)["1"], signal.SIGKILL)
    begin = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - begin < 60
    assert "error: rank 1 on" in err and "was killed or stopped" in err


def test_a_signal_is_saved_and_the_same_command_goes_on(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    process = start(whole, "--epochs", "3", "--json")
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    cut = tmp_path / "cut"
    cut.mkdir()
    process = start(cut, "--epochs", "3", "--json")
    until(cut, 1, process)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "SIGTERM: saved at epoch" in err, err
    again = start(cut, "--epochs", "3", "--json")
    resumed, err = again.communicate(timeout=180)
    assert again.returncode == 0 and "resumed at epoch" in err, err
    assert json.loads(resumed)["digest"] == json.loads(out)["digest"]
