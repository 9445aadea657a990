"""Methods of other packages: found by their entry point, used like any other, told in one sentence where they are wrong."""

import json
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from fastffl import methods
from fastffl.cli import main

EXAMPLE = Path(__file__).resolve().parents[1] / "plugin"


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a package where Python finds it, as an installer does: its files, and a dist-info with its entry points."""

    def put(package: str, points: dict[str, str], source: str | None = None) -> None:
        site = tmp_path / package
        if source is None:
            shutil.copytree(EXAMPLE / package, site / package)
        else:
            (site / package).mkdir(parents=True)
            (site / package / "__init__.py").write_text(source)
        info = site / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[fastffl.methods]\n{lines}")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, package, raising=False)

    return put


@pytest.fixture
def example(install: Callable[..., None]) -> None:
    stated = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"]["fastffl.methods"]
    install("fastffl_loo", stated)


def test_the_example_is_a_method_like_any_other(
    example: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert methods.names()[-1] == "loo"
    code, out, _ = command(capsys, "methods", "--json")
    assert code == 0 and {c["name"]: c["status"] for c in json.loads(out)}["loo"] == "reconstructed"
    code, out, _ = command(capsys, "methods", "check", "loo")
    assert code == 0 and "loo: 11 of 11 checks hold" in out, out
    code, out, _ = command(capsys, "methods", "loo")
    assert code == 0 and "rest0 > p0   T=3, weight 1, ramp" in out
    few = ("--set", "data.train_fraction=0.1", "--epochs", "1", "--device", "cpu", "--set", "run.threads=1")
    code, out, err = command(capsys, "train", "digits", "--method", "loo", "--model", "resnet8", *few, "--out", "r", "--json")
    assert code == 0, err
    assert json.loads(out)["method"] == "loo" and list(json.loads(out)["results"]) == ["p0", "p1", "mean"]
    code, out, _ = command(capsys, "evaluate", "r", "--json")
    assert code == 0


HEAD = "from fastffl_loo import LeaveOneOut\n"
WRONG = {
    "raises when imported": (
        "1 / 0\n",
        "X",
        "method bad of fastffl_bad can't be imported: ZeroDivisionError: division by zero; mend or",
    ),
    "is no method": ("X = 3\n", "X", "fastffl_bad:X is 3; expected a subclass of fastffl.methods.Method"),
    "is not there": ("", "X", "can't be imported: AttributeError"),
    "has another name": (HEAD + "class X(LeaveOneOut):\n    name = 'worse'\n", "X", "calls itself 'worse'"),
    "is not whole": ("from fastffl.methods import Method\nclass X(Method):\n    name = 'bad'\n", "X", "lacks paper, year"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_one_is_told_in_one_sentence(
    what: str, example: None, install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    source, name, text = WRONG[what]
    install("fastffl_bad", {"bad": f"fastffl_bad:{name}"}, source)
    for words in (("methods", "bad"), ("methods", "check", "bad"), ("train", "digits", "--method", "bad")):
        code, out, err = command(capsys, *words)
        assert code == 2 and not out and err.startswith("error: method bad of fastffl_bad") and text in err, err
        assert err.count("\n") == 1
    code, out, _ = command(capsys, "methods", "--json")
    assert code == 0, "the list still shows the others"
    assert {c["name"]: c["status"] for c in json.loads(out)}["bad"] == "broken"


def test_wrong_shapes_are_told(example: None, install: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    """In training in one sentence with the method's name, exit 2; by the checks with all that does not hold, exit 1."""
    source = HEAD + (
        "from dataclasses import replace\n"
        "class X(LeaveOneOut):\n"
        "    name = 'bad'\n"
        "    def __init__(self, config, spec):\n"
        "        super().__init__(config, spec)\n"
        "        self.graph = replace(self.graph, made=('odd',))\n"
        "    def nodes(self, peers, y=None):\n"
        "        return {'odd': peers.z[0][:, :2]}\n"
        "    class Config(LeaveOneOut.Config):\n"
        "        name: str = 'bad'\n"
    )
    install("fastffl_bad", {"bad": "fastffl_bad:X"}, source)
    code, _, err = command(capsys, "train", "digits", "--method", "bad", "--out", "never", "--device", "cpu")
    assert code == 2 and "method bad" in err and "odd" in err and err.splitlines()[-1].startswith("error: "), err
    assert not Path("never").exists()
    code, out, _ = command(capsys, "methods", "check", "bad")
    assert code == 1 and "WRONG  graph" in out and "odd" in out


def test_a_name_of_ours_is_not_taken_over(install: Callable[..., None]) -> None:
    install("fastffl_loo", {"ffl": "fastffl_loo:LeaveOneOut"})
    assert methods.load("ffl").__module__ == "fastffl.methods.ffl"
    assert methods.names().count("ffl") == 1
