"""Train, evaluate and export through the command line: numbers repeat, runs move, damage is one message and loses nothing."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from fastffl import nets, recipes
from fastffl.data.manifest import scan
from fastffl.data.rng import order
from fastffl.evaluation import evaluate
from fastffl.runs import open_run
from fastffl.train import Learner


def rows(run: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]


def copied(trained, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    return Path(shutil.copytree(trained[0], tmp_path / "moved"))


def content(run: Path) -> dict[str, str]:
    """Every file of a run and the hash of its bytes."""
    return {
        str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(run.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def images(root: Path, layout: dict[str, int], side: int = 40) -> Path:
    rng = np.random.default_rng(0)
    for name, n in layout.items():
        (root / name).mkdir(parents=True)
        for k in range(n):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(root / name / f"{k}.JPEG")
    return root


LAYOUT = (
    "--set",
    "run.memory_format=contiguous",
    "--set",
    "run.threads=1",
)  # `auto` asks a clock; threads cost more than they give
SMALL = (
    *("--model", "resnet8,resnet8", "--batch-size", "8", "--epochs", "1", *LAYOUT),
    *("--set", "data.size=16", "--set", "data.workers=0"),
)


# ---- train


def test_train_answers_one_document(trained) -> None:  # type: ignore[no-untyped-def]
    run, answer = trained
    got = json.loads(answer.out)
    want = ["run", "recipe", "method", "seed", "device", "epochs", "steps", "seconds", "img_s", "data_wait", "results"]
    assert [k for k in got if k in want] == want
    assert (got["recipe"], got["method"], got["seed"], got["device"]) == ("digits", "ffl", 0, "cpu")
    assert (got["epochs"], got["steps"]) == (1, 3) and got["img_s"] > 0 and 0 <= got["data_wait"] <= 1
    assert list(got["results"]) == ["p0", "p1", "mean", "fused"]
    for vote, r in got["results"].items():
        assert list(r) == ["net", "last", "best", "best_epoch"]
        assert r["net"] == ("resnet8" if vote[0] == "p" else vote)
        assert 0 <= r["last"] <= 100 and r["best"] == r["last"] and r["best_epoch"] == 1
    assert got["run"] == str(run)
    assert "epoch 1/1" in answer.err, "what people read goes to stderr"
    assert {p.name for p in run.iterdir()} >= {"recipe.json", "environment.json", "rows.jsonl", "log.txt", "last", "best"}


def test_the_run_folder_holds_no_absolute_path(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run, _ = trained
    secrets = [str(p).encode() for p in (Path.home(), Path.cwd(), tmp_path.parent, run)]
    for path in run.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(s in data for s in secrets if len(s) > 5), path.name
    assert json.loads((run / "recipe.json").read_text())["data"]["root"] is None


def test_train_as_text(call, tiny) -> None:  # type: ignore[no-untyped-def]
    got = call("train", *tiny, "--set", "run.max_steps=1")
    assert got.code == 0
    for part in (
        "recipe digits",
        "method ffl",
        "resnet8 + resnet8",
        "10 classes (0, 1",
        "batch 64 = 1 rank x 64 x accum 1",
        "fused",
    ):
        assert part in got.out
    assert "fastffl evaluate runs/digits-0001" in got.out and Path("runs/digits-0001/recipe.json").is_file()


def test_a_recipe_file_trains_the_same_again(call, trained) -> None:  # type: ignore[no-untyped-def]
    run, answer = trained
    got = call("train", str(run / "recipe.json"), "--json", "--out", "again")
    assert got.code == 0
    a, b = json.loads(answer.out), json.loads(got.out)
    assert a["digest"] == b["digest"] and a["results"] == b["results"]
    assert (Path("again") / "recipe.json").read_bytes() == (run / "recipe.json").read_bytes()


def test_amp_before_the_recipe(call, tiny) -> None:  # type: ignore[no-untyped-def]
    got = call("train", "--amp", *tiny, "--set", "run.max_steps=1", "--out", "run", "--json")
    assert got.code == 0 and json.loads(got.out)["steps"] == 1
    assert json.loads(Path("run/recipe.json").read_text())["amp"]["enabled"] is True
    assert "float16" in got.err


def test_an_unwritable_run_folder(refused, tiny) -> None:  # type: ignore[no-untyped-def]
    Path("file").write_text("kept")
    for out in ("file", "file/run"):
        line = refused("train", *tiny, "--out", out)
        assert "can't write the run folder" in line and "--out DIR" in line
    assert Path("file").read_text() == "kept"


def test_another_recipe_in_a_used_folder_changes_nothing(refused, trained, tiny, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = copied(trained, tmp_path)
    before = content(run)
    for words, part in (
        (("--lr", "0.7"), "optim.lr 0.1 -> 0.7"),
        (("--method", "dml"), "method ffl -> dml"),
        (("--seed", "5"), "run.seed 0 -> 5"),
        (("--set", "data.val_fraction=0.1"), "data.val_fraction 0.0 -> 0.1"),
        (("--resume", "never"), "already holds a run"),
    ):
        line = refused("train", *tiny, "--out", str(run), *words)
        assert part in line and "--out" in line
        assert content(run) == before


# ---- evaluate


@pytest.mark.parametrize("split", [(), ("--split", "val"), ("--split", "test")])
def test_evaluate_repeats_the_last_row_exactly(split, call, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = copied(trained, tmp_path)
    got = call("evaluate", str(run), *split, "--json")
    assert got.code == 0
    assert json.loads(got.out) == {"results": rows(trained[0])[-1]["val"]}
    first = json.loads(got.out)["results"]["fused"]
    assert list(first) == ["top1", "top5", "nll", "samples"] and first["samples"] == 450
    got = call("evaluate", str(run), "--checkpoint", "best", "--json")
    assert json.loads(got.out)["results"]["fused"] == first


def test_evaluate_counts_every_training_sample(call, trained) -> None:  # type: ignore[no-untyped-def]
    got = json.loads(call("evaluate", str(trained[0]), "--split", "train", "--json").out)
    assert got["results"]["p0"]["samples"] == 136


def test_expect(call, trained) -> None:  # type: ignore[no-untyped-def]
    run = str(trained[0])
    score = rows(trained[0])[-1]["val"]["fused"]["top1"]
    assert call("evaluate", run, "--expect", f"fused>={math.floor(score)}").code == 0
    got = call("evaluate", run, "--expect", "p0>=0", "--expect", "fused>=99.9", "--json")
    assert got.code == 3 and f"fused has top-1 {score:.2f}, expected >= 99.9" in got.err
    assert json.loads(got.out)["results"], "the scores are still told"


def test_unknown_votes(refused, trained) -> None:  # type: ignore[no-untyped-def]
    run = str(trained[0])
    for words in (
        ("evaluate", run, "--vote", "p7"),
        ("evaluate", run, "--expect", "gate>=1"),
        ("export", run, "--vote", "p2"),
        ("export", run, "--vote", "p"),
        ("export", run, "--vote", "../x"),
    ):
        assert "this run has p0, p1, mean, fused" in refused(*words)


def test_one_vote(call, trained) -> None:  # type: ignore[no-untyped-def]
    got = call("evaluate", str(trained[0]), "--vote", "p1", "--json")
    assert list(json.loads(got.out)["results"]) == ["p1"]
    text = call("evaluate", str(trained[0])).out
    assert "top-1" in text and "fused" in text and "450" in text


# ---- damage


def pair(run: Path, which: str = "last") -> tuple[Path, Path]:
    state = max((run / which).glob("step-*.pt"))
    return state, state.with_suffix(".json")


def rewrite(run: Path, change, which: str = "last") -> None:  # type: ignore[no-untyped-def]
    """Change a checkpoint and note the hash of what it is now, as someone would who wrote it on purpose."""
    state, note = pair(run, which)
    loaded = torch.load(state, weights_only=True)
    loaded = change(loaded) or loaded
    torch.save(loaded, state)
    facts = json.loads(note.read_text())
    facts.update(sha256=hashlib.sha256(state.read_bytes()).hexdigest(), bytes=state.stat().st_size)
    note.write_text(json.dumps(facts))


def test_damaged_checkpoints(refused, trained, tiny, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for k, damage in enumerate(("flip", "cut", "empty", "text")):
        run = Path(shutil.copytree(trained[0], tmp_path / str(k)))
        for state in (run / "last").glob("step-*.pt"):
            data = bytearray(state.read_bytes())
            if damage == "flip":
                data[len(data) // 2] ^= 1
            state.write_bytes({"flip": data, "cut": data[: len(data) // 2], "empty": b"", "text": b"hello"}[damage])
        before = content(run)
        for words in (("evaluate", str(run)), ("export", str(run), "--vote", "p0"), ("train", *tiny, "--out", str(run))):
            line = refused(*words)
            assert "no whole checkpoint" in line and "damaged" in line
        assert content(run) == before, "nothing is lost"


def test_foreign_checkpoints(refused, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def drop(key: str):  # type: ignore[no-untyped-def]
        return lambda s: s.pop(key) and None

    def first_weight(s: dict) -> None:  # type: ignore[type-arg]
        name = next(iter(s["learner"]))
        s["learner"][name] = s["learner"][name][:1]

    changes = {
        "a list": lambda s: [1, 2],
        "weights only": lambda s: s["learner"],
        "no recipe": drop("recipe"),
        "no classes": drop("classes"),
        "no shape": drop("shape"),
        "recipe is no JSON": lambda s: s.update(recipe="hello"),
        "recipe is a number": lambda s: s.update(recipe=3),
        "other shape": lambda s: s.update(shape=[1, 16]),
        "other classes": lambda s: s.update(classes=[str(k) for k in range(9, -1, -1)]),
        "other weights": first_weight,
        "weight missing": lambda s: s["learner"].popitem() and None,
        "weights are text": lambda s: s.update(learner=dict.fromkeys(s["learner"], "x")),
    }
    for k, (name, change) in enumerate(changes.items()):
        run = Path(shutil.copytree(trained[0], tmp_path / str(k)))
        rewrite(run, change)
        before = content(run)
        assert len(refused("evaluate", str(run))) > 30, name
        assert content(run) == before


def test_a_checkpoint_of_another_recipe_gives_no_number(refused, call, trained, tiny, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """It fits: same nets, same data. Its numbers would be those of another run, and nobody would know."""
    assert call("train", *tiny, "--lr", "0.5", "--out", "other").code == 0
    run = copied(trained, tmp_path)
    shutil.rmtree(run / "last")
    shutil.copytree(Path("other") / "last", run / "last")
    for words in (("evaluate", str(run)), ("export", str(run), "--vote", "fused")):
        assert "optim.lr 0.5 -> 0.1" in refused(*words)


def test_a_run_without_checkpoint(refused, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = copied(trained, tmp_path)
    shutil.rmtree(run / "last")
    assert "holds no last checkpoint yet" in refused("evaluate", str(run))
    (run / "recipe.json").write_text("{")
    assert "recipe.json can't be read" in refused("evaluate", str(run))


def test_a_hostile_checkpoint_does_not_run(refused, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import os

    canary = tmp_path / "canary"

    class Touch:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return os.system, (f"touch {canary}",)

    run = copied(trained, tmp_path)
    rewrite(run, lambda s: {**s, "last": Touch()})
    refused("evaluate", str(run))
    refused("export", str(run), "--vote", "p0")
    assert not canary.exists()
    torch.load(pair(run)[0], weights_only=False)
    assert canary.exists(), "the payload was live"


# ---- export


@pytest.mark.parametrize("vote", ["p0", "p1"])
@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_an_exported_peer_is_the_plain_net(vote: str, form: str, call, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "net"
    got = call("export", str(trained[0]), "--vote", vote, "--format", form, "--out", str(file), "--json")
    assert got.code == 0
    told = json.loads(got.out)
    assert told == {"file": str(file), "net": "resnet8", "vote": vote, "max_diff": told["max_diff"]} and told["max_diff"] < 1e-5
    state = load_file(file) if form == "safetensors" else torch.load(file, weights_only=True)["state"]
    plain = nets.plain("resnet8", 10, 1, 8)
    plain.load_state_dict(state, strict=True)
    run = open_run(str(trained[0]), device="cpu", data=False)
    x = torch.randn(9, 1, 8, 8)
    with torch.no_grad():
        got_z, want = plain.eval()(x), run.learner.votes(x)[vote]
    assert (got_z - want).abs().max() <= 1e-5 * want.abs().max()
    other = "p1" if vote == "p0" else "p0"
    assert not torch.allclose(got_z, run.learner.votes(x)[other], atol=1e-3), "it is this peer, not the other"


def test_the_fused_export_gives_the_fused_logits(call, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "fused.safetensors"
    assert call("export", str(trained[0]), "--vote", "fused", "--out", str(file)).code == 0
    recipe = recipes.read(trained[0] / "recipe.json")
    learner = Learner.build(recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": 99})}), 10, 1, 8).eval()
    x = torch.randn(5, 1, 8, 8)
    run = open_run(str(trained[0]), device="cpu", data=False)
    with torch.no_grad():
        want = run.learner.votes(x)["fused"]
        assert not torch.allclose(learner.votes(x)["fused"], want, atol=1e-2)
        left = learner.load_state_dict(load_file(file), strict=False)
        assert (learner.votes(x)["fused"] - want).abs().max() <= 1e-5 * want.abs().max()
    assert not left.unexpected_keys and all(".fc." in k or k.startswith("loss.") for k in left.missing_keys)
    with safe_open(file, "pt") as stored:
        about = stored.metadata()
    assert about["vote"] == "fused" and about["nets"] == "resnet8,resnet8" and about["shape"] == "1,8,8"
    assert json.loads(about["classes"]) == list("0123456789") and about["recipe"] == "digits" and about["step"] == "3"


def test_export_where_it_can_not_be_written(refused, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path, tmp_path / "file" / "x"):
        assert "can't write" in refused("export", str(trained[0]), "--vote", "p0", "--out", str(out))
    assert (tmp_path / "file").read_text() == "kept"


def test_export_goes_into_the_run_by_default(call, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = copied(trained, tmp_path)
    got = call("export", str(run), "--vote", "p1")
    assert got.code == 0 and (run / "resnet8-p1.safetensors").is_file() and "resnet8-p1.safetensors" in got.out


# ---- image folders


def test_train_on_your_own_folders(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    root = images(tmp_path / "photos", {"train/cat": 9, "train/dog": 9, "val/cat": 3, "val/dog": 4})
    got = call("train", str(root), *SMALL, "--out", "run", "--json")
    assert got.code == 0, got.err
    assert "2 classes (cat, dog)" in got.err and "18 train, 7 val" in got.err
    assert json.loads(Path("run/recipe.json").read_text())["data"]["root"] == str(root)
    shutil.move("run", tmp_path / "elsewhere")
    shutil.move(str(root), str(tmp_path / "albums"))
    gone = call("evaluate", str(tmp_path / "elsewhere"))
    assert gone.code == 2 and str(root) in gone.err
    again = call("evaluate", str(tmp_path / "elsewhere"), "--data", str(tmp_path / "albums"), "--json")
    assert json.loads(again.out)["results"] == rows(tmp_path / "elsewhere")[-1]["val"]
    (tmp_path / "albums" / "train" / "dog").rename(tmp_path / "albums" / "train" / "eel")
    (tmp_path / "albums" / "val" / "dog").rename(tmp_path / "albums" / "val" / "eel")
    other = call("evaluate", str(tmp_path / "elsewhere"), "--data", str(tmp_path / "albums"))
    assert other.code == 2 and "other classes" in other.err
    exported = call("export", str(tmp_path / "elsewhere"), "--vote", "p0", "--json")
    with safe_open(json.loads(exported.out)["file"], "pt") as stored:
        assert json.loads(stored.metadata()["classes"]) == ["cat", "dog"]


def test_class_folders_alone_and_a_timm_peer(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    root = images(tmp_path / "2024", {"cat": 11, "dog": 8})
    got = call(
        *("train", str(root), "--model", "mobilenetv3_small_050,resnet8", "--batch-size", "8", "--out", "run", "--json"),
        *("--set", "data.size=32", "--set", "data.workers=0", "--set", "run.max_steps=2", *LAYOUT),
    )
    assert got.code == 0, got.err
    assert "17 train, 2 val" in got.err, "a tenth of each class, at least one, is held out"
    assert call("export", "run", "--vote", "p0", "--out", "net.safetensors").code == 0
    plain = timm.create_model("mobilenetv3_small_050", num_classes=2).eval()
    plain.load_state_dict(load_file("net.safetensors"), strict=True)
    x = torch.randn(3, 3, 32, 32)
    run = open_run("run", device="cpu", data=False)
    with torch.no_grad():
        want = run.learner.votes(x)["p0"]
        assert (plain(x) - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_truncated_image_names_its_file_and_keeps_the_steps_before(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    root = images(tmp_path / "photos", {"train/cat": 12, "train/dog": 12, "val/cat": 2, "val/dog": 2}, side=100)
    found = scan(root / "train")
    bad = found.root / found.files[int(order(0, 0, 24)[20])]  # the 21st image of the first epoch
    whole = bad.read_bytes()
    bad.write_bytes(whole[:3000])
    words = ("train", str(root), *SMALL, "--set", "data.batch_size=1", "--out", "run")
    line = refused(*words, "--set", "data.max_bad=0")
    assert str(bad) in line and "can't be decoded" in line and "truncated" in line
    saved = [json.loads(p.read_text())["step"] for p in Path("run/last").glob("step-*.json")]
    assert saved == [20]
    bad.write_bytes(whole)
    from fastffl import cli

    with pytest.raises(SystemExit) as ended:
        cli.main([*words])
    assert ended.value.code == 0 and rows(Path("run"))[-1]["step"] == 24


def test_bad_folders_from_the_command_line(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    root = images(tmp_path / "a", {"train/cat": 2, "train/dog": 2, "val/cat": 2})
    assert "only in train: dog" in refused("train", str(root), *SMALL)
    (root / "val" / "dog").mkdir()
    assert "no images in class dog" in refused("train", str(root), *SMALL)
    root = images(tmp_path / "b", {"cat": 2})
    (root / "dog").mkdir()
    assert "no images in class dog" in refused("train", str(root), *SMALL)
    assert not Path("runs").exists()


def test_file_names_can_not_forge_lines(call, refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    trick = "x\nepoch 9 of 9  loss 0.000  fused 100.00\x1b[2J\u202e"
    root = images(tmp_path / "photos", {f"train/{trick}": 3, "train/dog": 3, f"val/{trick}": 1, "val/dog": 1})
    got = call("train", str(root), *SMALL, "--out", "run")
    assert got.code == 0, got.err
    log = Path("run/log.txt").read_text()
    for text in (got.out, got.err, log):
        assert "\x1b" not in text and "\u202e" not in text
        assert not any(line.startswith("epoch 9 of 9") for line in text.splitlines())
    bad = root / "train" / "dog" / f"{trick}.jpg"
    bad.write_bytes(b"")
    none = ("--set", "data.max_bad=0")
    line = refused("train", str(root), *SMALL, *none, "--out", "run2")
    assert "\\nepoch 9 of 9" in line and "\x1b" not in line
    bad.unlink()
    Path(str(root / "train" / "dog") + "/\udcff.jpg").write_bytes(b"")
    assert "\\udcff.jpg can't be decoded" in refused("train", str(root), *SMALL, *none, "--out", "run3")


def test_archives_from_the_command_line(call, refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    for split, n in (("train", 24), ("test", 10)):
        np.save(tmp_path / f"{split}_x.npy", rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8))
        np.save(tmp_path / f"{split}_y.npy", np.arange(n) % 10)
    words = (
        "train",
        "cifar10",
        "--data",
        str(tmp_path),
        "--model",
        "resnet8,resnet8",
        "--batch-size",
        "16",
        "--epochs",
        "1",
        *LAYOUT,
    )
    got = call(*words, "--out", "run", "--json")
    assert got.code == 0 and json.loads(got.out)["steps"] == 2
    assert json.loads(call("evaluate", "run", "--json").out)["results"] == rows(Path("run"))[-1]["val"]
    np.save(tmp_path / "test_y.npy", np.arange(10) + 1)
    assert "labels 1..10; expected 0..9" in refused(*words, "--out", "run2")
    assert "labels 1..10; expected 0..9" in refused("evaluate", "run")


def test_evaluation_equals_plain_counting(trained) -> None:  # type: ignore[no-untyped-def]
    """Top-1, top-5 and NLL against a sum over single samples in double precision."""
    run = open_run(str(trained[0]), device="cpu")
    assert run.data is not None
    found = evaluate(run.learner, run.data, "test", 64)
    hits, five, nll, n = 0, 0, 0.0, 0
    with torch.no_grad():
        for batch in run.data.evaluate("test", 450):
            for z, y in zip(run.learner.votes(batch.x)["fused"].double(), batch.y.tolist(), strict=True):
                better = int((z > z[y]).sum())
                hits, five, n = hits + (better < 1), five + (better < 5), n + 1
                nll -= float(z.log_softmax(0)[y])
    fused = found["fused"]
    assert fused["samples"] == n == 450
    assert fused["top1"] == pytest.approx(100 * hits / n) and fused["top5"] == pytest.approx(100 * five / n)
    assert fused["nll"] == pytest.approx(nll / n, rel=1e-5)
