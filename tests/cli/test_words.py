"""Wrong words: exit code 2 and one line with the nearest right one; help without torch; lists of what there is."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fastffl import recipes
from fastffl.errors import UsageError, printable
from fastffl.recipe import SECTIONS, Recipe, change, fields

# words of a command line -> what its one line of complaint must contain
WRONG: dict[str, tuple[str, ...]] = {
    "trian digits": ("no verb is called 'trian'", "did you mean train?"),
    "--jsn": ("unknown option --jsn",),
    "train digitz": ("digitz", "did you mean digits?"),
    "train cifar101": ("did you mean cifar10",),
    "train ./nowhere": ("./nowhere", "no such folder"),
    "train nowhere.json": ("nowhere.json", "can't be read as a recipe", "recipe.json"),
    "train digits --epoch 3": ("unknown option --epoch", "did you mean --epochs?"),
    "train digits --epochs three": ("three", "--epochs"),
    "train digits --epochs 0": ("sched.epochs=0", "int >= 1"),
    "train digits --lr 0": ("optim.lr=0", "float > 0, now 0.1"),
    "train digits --lr inf": ("optim.lr=inf", "finite"),
    "train digits --batch-size 0": ("data.batch_size=0", "int >= 1"),
    "train digits --seed -1": ("run.seed=-1", "int >= 0"),
    "train digits --device tpu": ("run.device=tpu", "auto or cpu or cuda"),
    "train digits --method fll": ("no method is called 'fll'", "did you mean ffl?"),
    "train digits --model resnet8,resnt20": ("no model is called 'resnt20'", "did you mean resnet"),
    "train digits --set optim.lrr=1": ("unknown option --set optim.lrr", "did you mean optim.lr (float > 0, now 0.1)?"),
    "train digits --set lr=1": ("unknown option --set lr", "did you mean optim.lr"),
    "train digits --set otpim.lr=1": ("unknown option --set otpim.lr", "did you mean optim.lr"),
    "train digits --set method.TT=1": ("unknown option --set method.TT", "did you mean method.T"),
    "train digits --set method.name=dml": ("--method dml",),
    "train digits --set optim.lr": ("expected key=value",),
    "train digits --set optim.lr=": ("optim.lr=", "float > 0"),
    "train digits --set data.std=0,1,1": ("data.std", "greater than 0"),
    "train digits --set data.train_fraction=0": ("data.train_fraction=0", "> 0 and <= 1"),
    "train digits --set data.val_fraction=1": ("data.val_fraction=1", "< 1"),
    "train digits --set sched.name=cosin": ("sched.name=cosin", "step or cosine or constant"),
    "train digits --set optim.accum=1000": ("optim.accum 1000", "data.batch_size 64"),
    "train digits --set data.pad=8 --set data.pad_mode=reflect": ("can't reflect images of 8 pixels", "data.pad_mode=zero"),
    "train digits --set data.size=32": ("data.size 32", "8 pixels"),
    "train digits --resume nowhere": ("--resume nowhere", "expected a run folder, auto or never"),
    "train cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz", "train_x.npy", "--data DIR"),
    "train cifar100 --data .": ("--data .", "cifar-100-python", "tar xf"),
    "train cifar100 --data nowhere": ("--data nowhere", "no such folder"),
    "train folder": ("fastffl train DIR", "DIR/train/CLASS/IMAGE.jpg"),
    "train folder --data nowhere": ("nowhere", "no such folder"),
    "train .": ("holds no class folders", "CLASS/IMAGE.jpg"),
    "evaluate nowhere": ("nowhere is no run folder", "recipe.json"),
    "evaluate nowhere --expect fused=9": ("--expect fused=9", "fused>=74.4"),
    "evaluate nowhere --expect fused>=nan": ("--expect fused>=nan",),
    "evaluate nowhere --split vall": ("vall",),
    "evaluate": ("run", "fastffl evaluate --help"),
    "export nowhere --vote p0": ("nowhere is no run folder",),
    "export nowhere": ("--vote",),
    "export nowhere --vote p0 --format pth": ("pth",),
    "recipes cifra10": ("no recipe is called 'cifra10'", "did you mean"),
    "methods dmll": ("no method is called 'dmll'", "did you mean dml?"),
    "models resnt50": ("no model is called 'resnt50'", "did you mean"),
    "models nothing*": ("no model matches 'nothing*'",),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_words_exit_2_with_the_nearest(words: str, refused) -> None:  # type: ignore[no-untyped-def]
    line = refused(*words.split())
    for part in WRONG[words]:
        assert part in line
    assert not list(Path().rglob("*")), "nothing was written"


def test_wrong_words_with_json_leave_stdout_empty(call) -> None:  # type: ignore[no-untyped-def]
    for words in ("train digitz --json", "evaluate nowhere --json", "recipes x --json"):
        got = call(*words.split())
        assert got.code == 2 and got.out == "" and got.err.startswith("error: ")


def test_amp_is_a_plain_switch() -> None:
    from fastffl import cli

    for words in ("train --amp digits", "train digits --amp"):
        _, bound, _ = cli.app.parse_args(words.split(), exit_on_error=False, print_error=False)
        assert bound.arguments["recipe"] == "digits" and bound.arguments["amp"] is True


def test_flags_come_before_set_and_all_are_typed() -> None:
    from fastffl import cli

    made = cli._recipe(
        "digits", "dml", "resnet8,wrn16_2", {"optim.lr": 0.3, "sched.epochs": None}, ["optim.lr=0.2", " data.pad = 2"]
    )
    assert (made.optim.lr, made.data.pad, made.method.name, made.nets.names) == (0.2, 2, "dml", ("resnet8", "wrn16_2"))
    assert made.sched.epochs == recipes.load("digits").sched.epochs


def test_help_and_recipes_names_import_no_torch() -> None:
    code = (
        "import sys; from fastffl import cli\n"
        "for words in (['--help'], ['train', '--help'], ['--version'], ['trian']):\n"
        "    try: cli.main(words)\n"
        "    except SystemExit as e: print('code', e.code)\n"
        "print('loaded', sorted(m for m in ('torch', 'numpy', 'timm', 'pydantic', 'PIL') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("code")] == ["code 0", "code 0", "code 0", "code 2"]
    loaded = done.stdout.splitlines()[-1]
    assert "torch" not in loaded and "timm" not in loaded and "numpy" not in loaded
    assert "did you mean train?" in done.stderr


def test_a_closed_pipe_is_no_traceback() -> None:
    ends = os.pipe()
    os.close(ends[0])
    with os.fdopen(ends[1], "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "fastffl", "recipes"], stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.returncode == 1 and done.stderr == ""


def test_lists_as_json(call) -> None:  # type: ignore[no-untyped-def]
    for verb, keys in (
        ("recipes", {"name", "paper", "summary", "data", "nets", "method"}),
        ("methods", {"name", "paper", "summary"}),
    ):
        got = call(verb, "--json")
        found = json.loads(got.out)
        assert got.code == 0 and found and all(keys <= set(f) for f in found)
        one = json.loads(call(verb, found[0]["name"], "--json").out)
        assert one == found[:1]
    assert {f["name"] for f in json.loads(call("recipes", "--json").out)} == set(recipes.names())
    facts = json.loads(call("models", "resnet20", "--classes", "7", "--size", "32", "--json").out)
    assert list(facts) == ["name", "source", "parameters", "macs", "feature"] and facts["feature"] == [64, 8, 8]
    assert facts["source"] == "fastffl" and facts["macs"] > 10**6
    names = {m["name"] for m in json.loads(call("models", "resnet1*", "--json").out)}
    assert {"resnet110", "resnet18"} <= names
    got = call("doctor", "--json")
    parts = json.loads(got.out)
    assert got.code == 0 and all({"state", "fix"} <= set(p) for p in parts.values())
    assert parts["torch"]["state"] == "ok" and parts["python"]["state"] == "ok"
    assert all(p["fix"] for p in parts.values() if p["state"] != "ok")


@pytest.mark.parametrize("words", ["recipes", "recipes digits", "methods", "methods ffl", "models", "models resnet8", "doctor"])
def test_lists_as_text(words: str, call) -> None:  # type: ignore[no-untyped-def]
    got = call(*words.split())
    assert got.code == 0 and len(got.out.splitlines()) > 1 and "Traceback" not in got.err


def test_doctor_knows_a_foreign_apex_and_a_wrong_setting(call, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FASTFFL_KERNELS", "fast")
    parts = json.loads(call("doctor", "--json").out)
    assert parts["apex"]["state"] == "wrong" and "not NVIDIA" in parts["apex"]["fix"]
    assert parts["kernels"]["state"] == "wrong" and "reference" in parts["kernels"]["fix"]


# ---- recipes as files


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_survives_json_and_every_value_can_be_set(name: str) -> None:
    made = recipes.load(name)
    again = recipes.from_dict(json.loads(made.json_text()), "here")
    assert again == made and type(again.method) is type(made.method)
    for path, value in fields(made.model_dump(mode="json")).items():
        if path == "method.name":
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if text:
            assert change(made, path, text) == made, path


def test_text_is_read_as_the_fields_type() -> None:
    r = recipes.load("digits")
    for path, text, want in (
        ("optim.clip", "none", None),
        ("optim.clip", "5", 5.0),
        ("optim.nesterov", "false", False),
        ("data.mean", "0.1,0.2", (0.1, 0.2)),
        ("data.mean", "[0.1]", (0.1,)),
        ("data.root", "123", "123"),
        ("sched.milestones", "150,225", (150.0, 225.0)),
        ("nets.names", "resnet8", ("resnet8",)),
    ):
        new = change(r, path, text)
        section, key = path.split(".")
        assert getattr(getattr(new, section), key) == want
    for path, text in (("optim.nesterov", "maybe"), ("sched.epochs", "1.5"), ("sched.epochs", "NaN"), ("optim.lr", "[1]")):
        with pytest.raises(UsageError, match="expected"):
            change(r, path, text)


def test_damaged_recipe_files_are_one_error(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    good = json.loads(recipes.load("digits").json_text())
    wrong: dict[str, bytes] = {
        "empty": b"",
        "text": b"hello",
        "bytes": b"\xff\xfe{}",
        "list": b"[]",
        "number": b"3",
        "deep": b"[" * 100000,
        "no method": json.dumps({k: v for k, v in good.items() if k != "method"}).encode(),
        "unknown method": json.dumps({**good, "method": {"name": "fll"}}).encode(),
        "method as path": json.dumps({**good, "method": {"name": "../ffl"}}).encode(),
        "method as list": json.dumps({**good, "method": ["ffl"]}).encode(),
        "unknown field": json.dumps({**good, "extra": 1}).encode(),
        "name as path": json.dumps({**good, "name": "../../elsewhere"}).encode(),
        "absolute name": json.dumps({**good, "name": "/elsewhere"}).encode(),
        "name of lines": json.dumps({**good, "name": "a\nerror: b"}).encode(),
        "infinite rate": json.dumps({**good, "optim": {**good["optim"], "lr": float("inf")}}).encode(),
        "rate as text": json.dumps({**good, "optim": {**good["optim"], "lr": "fast"}}).encode(),
    }
    path = tmp_path / "r.json"
    for data in wrong.values():
        path.write_bytes(data)
        assert "r.json" in refused("train", str(path))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "r.json"]


def test_mutated_recipe_files(tmp_path: Path) -> None:
    rng = random.Random(3)
    whole = recipes.load("digits").json_text()
    path, valid = tmp_path / "r.json", 0
    for _ in range(500):
        text = list(whole)
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(len(text))
            kind = rng.random()
            if kind < 0.4:
                text[at] = rng.choice('0123456789-.eE"{}[],:\\truefalsn \n\x00é')
            elif kind < 0.7:
                del text[at : at + rng.choice((1, 5, 40))]
            else:
                text[at:at] = rng.choice(("-", "9" * 30, "1e999", "NaN", '"', "null", "[[", "../", "\\u202e", '"x": 1,'))
        path.write_text("".join(text))
        try:
            got = recipes.read(path)
        except UsageError as error:
            assert str(error)
        else:
            assert isinstance(got, Recipe) and "/" not in got.name and got.optim.lr > 0
            valid += 1
    assert 10 < valid < 450


def test_sections_say_what_each_value_means() -> None:
    r = recipes.load("digits")
    for section in SECTIONS:
        for key, info in type(getattr(r, section)).model_fields.items():
            assert info.description or (section, key) == ("method", "name"), f"{section}.{key} has no help"


def test_printable_leaves_text_and_hides_tricks() -> None:
    assert printable("naïve 日本語 é") == "naïve 日本語 é"
    tricks = "\n\r\t\x00\x1b[2J\x9b\u202e\u2066\u200f\u2028\u061c\ufeff\udcff"
    shown = printable(tricks)
    assert shown.isprintable() and shown.encode() and len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("fast", "FASTFFL_KERNELS=fast: expected one of auto, triton, reference"),
        ("triton", "FASTFFL_KERNELS=triton: distill_graph got a tensor on cpu; Triton needs CUDA"),
    ],
)
def test_a_wrong_choice_of_kernels_is_one_sentence(asked: str, said: str, refused, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("FASTFFL_KERNELS", asked)
    assert said in refused("train", "digits", "--device", "cpu")
