"""What all tests share: real data where it is at hand, fixed threads, and memory that shows when it was never written."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch loads, as the command line does: see fastffl.cli.main

import pytest
import torch

# Interpreted kernels can't be compiled and compiled ones can't run here, so `make test` runs tests/interp in a process with
# TRITON_INTERPRET=1 and everything else in processes without it.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interp"]

# Files of whole minutes. They go first, with `--no-loadscope-reorder`: what is left at the end is small, and no worker waits.
LONG = [
    "test_bench.py",
    "cli/test_torchrun.py",
    "test_slurm.py",
    "cli/test_sweep.py",
    "train/test_signals.py",
    "train/test_ranks.py",
    "cli/test_folders_end_to_end.py",
    "cli/test_bench_train.py",
    "methods/test_every_method.py",
    "methods/test_on_ranks.py",
    "nets/test_every_net.py",
    "data/test_check.py",
    "data/test_prepare.py",
    "data/test_mutants.py",
    "data/test_dali.py",
    "train/test_graph.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = {Path(__file__).parent / name: k for k, name in enumerate(LONG)}
    items.sort(key=lambda item: names.get(item.path, len(LONG)))


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """Every test starts from the same random numbers and leaves the thread count as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
