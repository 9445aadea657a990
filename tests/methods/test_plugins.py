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
    "ends the process": ("import sys\nsys.exit(3)\n", "X", "can't be imported: SystemExit: 3; mend or"),
    "has settings of no kind": (
        HEAD + "class X(LeaveOneOut):\n    name = 'bad'\n    class Config:\n        pass\n",
        "X",
        "its Config can't be made bare: TypeError",
    ),
    "has a setting without a default": (
        HEAD
        + "class X(LeaveOneOut):\n    name = 'bad'\n"
        + "    class Config(LeaveOneOut.Config):\n        name: str = ''\n        a: int\n",
        "X",
        "its Config can't be made bare: ValidationError",
    ),
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


GRAPH = "        self.graph = replace(self.graph, {})\n"
INIT = "    def __init__(self, config, spec):\n        super().__init__(config, spec)\n"
BODIES = {  # what a package's class may get wrong, and what is said of it
    "nodes of another width": (
        INIT + GRAPH.format("made=('odd',)") + "    def nodes(self, peers, y=None):\n        return {'odd': peers.z[0][:, :2]}\n",
        "nodes() gives odd of shape (2, 2); expected (2, 10), a row of 10 logits for each of 2 images",
    ),
    "nodes of fixed length": (
        INIT + GRAPH.format("made=('odd',)") + "    def nodes(self, peers, y=None):\n        return {'odd': peers.z[0][:2]}\n",
        "nodes() gives odd of shape (2, 10); expected (3, 10)",
    ),
    "no nodes": (
        INIT + GRAPH.format("made=('odd',)") + "    def nodes(self, peers, y=None):\n        pass\n",
        "nodes() gives NoneType; its graph names ('odd',)",
    ),
    "a list": ("    def nodes(self, peers, y=None):\n        return [*peers.z]\n", "nodes() gives list; its graph names"),
    "a vote with labels only": (
        INIT
        + GRAPH.format("made=('m',), votes=('p0', 'p1', 'm')")
        + "    def nodes(self, peers, y=None):\n        return {} if y is None else {'m': peers.z[0]}\n",
        "nodes() gives () without labels, as evaluation asks for them; its votes are ('p0', 'p1', 'm')",
    ),
    "a term of many numbers": (
        INIT
        + GRAPH.format("extra={'t': 1.0}")
        + "    def extra(self, peers, y, ids):\n        return Terms({'t': peers.z[0]})\n",
        "extra() gives t of shape (2, 10); expected (), one number",
    ),
    "terms that are none": ("    def extra(self, peers, y, ids):\n        return {}\n", "extra() gives dict; expected Terms"),
    "no graph": ("    def __init__(self, config, spec):\n        Method.__init__(self, config, spec)\n", "sets no self.graph"),
    "no needs": ("    @classmethod\n    def needs(cls, config, nets):\n        pass\n", "needs() gives NoneType; expected"),
    "raises when built": (
        "    def __init__(self, config, spec):\n        1 / 0\n",
        "can't be built: ZeroDivisionError: division by zero",
    ),
    "raises in nodes": ("    def nodes(self, peers, y=None):\n        1 / 0\n", "raises in nodes: ZeroDivisionError: division"),
    "raises in objectives": (
        "    def objectives(self, below):\n        raise KeyError('a\\nb')\n",
        "raises in objectives: KeyError: ",
    ),
    "raises in needs": (
        "    @classmethod\n    def needs(cls, config, nets):\n        assert False\n",
        "raises in needs: AssertionError;",
    ),
    "raises in arranged": (
        "    @classmethod\n    def arranged(cls, nets):\n        1 / 0\n",
        "raises in arranged: ZeroDivisionError",
    ),
    "raises in shares": (
        "    @classmethod\n    def shares(cls, nets, asked):\n        1 / 0\n",
        "raises in shares: ZeroDivisionError",
    ),
}
CLASS = (
    "from dataclasses import replace\n"
    "from fastffl.methods import Method, Terms\n"
    "class X(LeaveOneOut):\n"
    "    name = 'bad'\n"
    "    class Config(LeaveOneOut.Config):\n"
    "        name: str = 'bad'\n"
)


@pytest.mark.parametrize("what", BODIES)
def test_what_a_class_gets_wrong_is_told_in_one_sentence(
    what: str, example: None, install: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In training, before anything is written, exit 2; by the checks with all that does not hold, exit 1."""
    body, text = BODIES[what]
    install("fastffl_bad", {"bad": "fastffl_bad:X"}, HEAD + CLASS + body)
    run = ("--method", "bad", "--model", "resnet8,resnet8", "--out", str(tmp_path / "never"), "--device", "cpu")
    if "arranged" in what:
        run = ("--method", "bad", "--out", str(tmp_path / "never"))
    code, _, err = command(capsys, "train", "digits", *run)
    assert code == 2 and "Traceback" not in err, err
    said = err.splitlines()[-1]
    assert said.startswith("error: method bad") and text in said, said
    assert not (tmp_path / "never").exists()


def test_the_checks_tell_wrong_shapes(example: None, install: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    install("fastffl_bad", {"bad": "fastffl_bad:X"}, HEAD + CLASS + BODIES["nodes of another width"][0])
    code, out, _ = command(capsys, "methods", "check", "bad")
    assert code == 1 and "WRONG  graph" in out and "odd" in out
    assert all(line.startswith(("ok    ", "WRONG ", "bad: ")) for line in out.splitlines()), "a line each"


@pytest.mark.parametrize("hook", ["decay", "prepare", "earlier"])
def test_what_raises_around_a_run_is_told(
    hook: str, example: None, install: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    body = f"    def {hook}(self, *given):\n        raise OSError('no such thing')\n"
    install("fastffl_bad", {"bad": "fastffl_bad:X"}, HEAD + CLASS + body)
    code, _, err = command(
        capsys, "train", "digits", "--method", "bad", "--model", "resnet8,resnet8", "--out", str(tmp_path / "r")
    )
    assert code == 2 and f"error: method bad raises in {hook}: OSError: no such thing; mend its package" in err, err


def test_two_packages_of_one_name_are_told(
    example: None, install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install("fastffl_bad", {"bad": "fastffl_bad:X"}, HEAD + CLASS)
    install("fastffl_worse", {"bad": "fastffl_worse:X"}, HEAD + CLASS)
    code, _, err = command(capsys, "train", "digits", "--method", "bad")
    assert code == 2 and "fastffl_bad (fastffl_bad:X) and fastffl_worse (fastffl_worse:X); uninstall all but one" in err, err


def test_a_name_of_ours_is_not_taken_over(install: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    install("fastffl_loo", {"ffl": "fastffl_loo:LeaveOneOut"})
    assert methods.load("ffl").__module__ == "fastffl.methods.ffl"
    assert methods.names().count("ffl") == 1
    code, _, err = command(capsys, "methods", "check", "none")
    assert code == 0 and "note: method ffl of fastffl_loo is not used: fastffl has one of that name" in err
