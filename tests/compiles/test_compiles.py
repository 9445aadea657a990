"""Every configuration the dispatch picks, compiled for GPUs that are not here: nothing spills, loads are wide, limits hold.

The installed Triton in this process; the oldest supported one, for sm_90 alone, in the environment FASTFFL_TRITON_OLD (made by
`make test`): all four took a minute more.
"""

import json
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

from fastffl_kernels import _compile

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton")
ALL = [(op, case) for op in _compile.OPS for case in _compile.cases(op)]


@pytest.mark.parametrize("capability", _compile.CAPABILITIES)
@pytest.mark.parametrize(("op", "case"), ALL, ids=lambda v: v if isinstance(v, str) else v.name)
def test_compiles_within_limits(op: str, case: _compile.Case, capability: int) -> None:
    assert not _compile.wrong(case, capability, _compile.report(case, capability))


@cache
def old(op: str) -> dict[tuple[str, int], list[str]]:
    script = ROOT / "kernels" / "fastffl_kernels" / "_compile.py"
    run = subprocess.run([os.environ["FASTFFL_TRITON_OLD"], script, "--sm=90", op], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert rows and all(r["triton"].startswith("3.6.") for r in rows)
    return {(r["case"], r["sm"]): r["wrong"] for r in rows}


@pytest.mark.skipif("FASTFFL_TRITON_OLD" not in os.environ, reason="FASTFFL_TRITON_OLD names no Python that has Triton 3.6")
@pytest.mark.parametrize("op", _compile.OPS)
def test_the_oldest_triton_compiles_them_too(op: str) -> None:
    found = old(op)
    assert set(found) == {(case.name, 90) for case in _compile.cases(op)}
    assert not [text for said in found.values() for text in said]
