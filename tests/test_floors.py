"""Imports go down only, kernels/ is no package, importing fastffl loads no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    {"fastffl_kernels"},
    {"errors", "values", "recipe", "streams", "__init__"},
    {"nets", "fusion", "data", "losses"},
    {"methods"},
    {"train", "evaluation", "exporting"},
    {"recipes", "runs", "checks", "cards"},
    {"bench", "cli", "doctor", "report", "slurm", "sweep", "__main__"},
]


def floor(part: str) -> int:
    return next(k for k, parts in enumerate(FLOORS) if part in parts)


def imported(path: Path) -> set[str]:
    """The first-level parts of fastffl (or fastffl_kernels) that a file imports at run time."""
    package = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            base = list(package[: -node.level]) if node.level else []
            whole = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*whole, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "fastffl_kernels":
                found.add("fastffl_kernels")
            elif parts[0] == "fastffl" and len(parts) > 1:
                known = set().union(*FLOORS)
                found.add(parts[1] if parts[1] in known else "__init__")
    return found


FILES = sorted((ROOT / "fastffl").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    me = path.relative_to(ROOT / "fastffl").parts[0].removesuffix(".py")
    for other in imported(path) - {me}:
        assert floor(other) <= floor(me), f"{me} (floor {floor(me)}) imports {other} above it"


def test_the_floor_test_sees_an_upward_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "fastffl" / "nets" / "x.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("from ..train import fit\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert imported(bad) == {"train"} and floor("train") > floor("nets")


def test_kernels_know_nothing_of_fastffl_and_are_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in (ROOT / "kernels").rglob("*.py"):
        text = path.read_text()
        assert "import fastffl\n" not in text and "from fastffl." not in text and "from fastffl " not in text, path


def test_no_method_is_named_in_the_trainer_the_data_or_the_kernels() -> None:
    from fastffl import methods

    for folder in ("fastffl/train", "fastffl/data", "fastffl/nets", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
            named = strings & (set(methods.names()) - {"none"})
            # the default of the Python interface is the one place where a method is named
            assert named <= ({"ffl"} if path.name == "learner.py" else set()), f"{path} names {named}"


def test_importing_fastffl_and_its_command_line_loads_no_torch() -> None:
    code = "import sys, fastffl, fastffl.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_in_the_package_opens_pickles_or_runs_text() -> None:
    """No unsafe load anywhere: torch.load is explicit, pickle stays in the restricted unpickler's file."""
    for path in [*FILES, *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system"), path
                if called == "torch.load":
                    assert {k.arg: ast.unparse(k.value) for k in node.keywords}["weights_only"] == "True", path
            if isinstance(node, ast.Import) and any(a.name == "pickle" for a in node.names):
                assert path.name == "archives.py", path
