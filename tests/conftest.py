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

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """Every test starts from the same random numbers and leaves the thread count as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
