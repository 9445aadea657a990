"""fastffl doctor: every state of apex, DALI of another CUDA than torch's, and a machine without torch."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastffl import doctor

FAKE = Path(__file__).parent / "train" / "fakeapex"


def line() -> doctor.Part:
    return next(p for p in doctor.report() if p.part == "apex")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield tmp_path / "site"
    for name in ("apex", "amp_C"):
        sys.modules.pop(name, None)


def test_the_states_of_apex(package: Path) -> None:
    assert line().state == "absent" and "never `pip install apex`" in line().fix
    (package / "apex").mkdir()
    (package / "apex" / "__init__.py").write_text("raise SystemExit('it was run')")
    assert line().state == "wrong" and "pip uninstall apex" in line().fix
    shutil.rmtree(package / "apex")
    shutil.copytree(FAKE / "apex", package / "apex")
    assert line().state == "wrong" and "without its CUDA part" in line().fix and "--no-build-isolation" in line().fix
    (package / "amp_C.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    assert line().state == "wrong" and "compiled for another torch" in line().fix
    shutil.copy(FAKE / "amp_C.py", package)
    assert line()[2:] == ("ok", "")


@pytest.mark.parametrize(
    ("installed", "cuda", "state", "fix"),
    [
        ("nvidia-dali-cuda130", "13.2", "ok", ""),
        ("nvidia-dali-cuda130", "", "ok", ""),
        ("nvidia-dali-cuda120", "12.9", "ok", ""),
        (
            "nvidia-dali-cuda120",
            "13.2",
            "wrong",
            'torch has CUDA 13.2: pip uninstall nvidia-dali-cuda120, then pip install "fastffl[gpu]"',
        ),
        ("nvidia-dali-cuda130", "12.9", "wrong", 'then pip install "fastffl[gpu-cu12]"'),
        ("", "13.2", "absent", 'pip install "fastffl[gpu]"'),
    ],
)
def test_dali_and_torch_have_one_cuda(installed: str, cuda: str, state: str, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "2.4.0" if name == installed else "")
    found = doctor._dali(cuda)
    assert found.state == state and found.fix.endswith(fix) and bool(found.fix) == (state != "ok")


def test_without_torch_it_still_answers(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    code = "from fastffl.doctor import report; print({p.part: p.state for p in report() if p.part in ('cuda', 'apex')})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.stdout == "{'cuda': 'absent', 'apex': 'absent'}\n", done.stderr
