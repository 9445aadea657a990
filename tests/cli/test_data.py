"""fastffl data check and data prepare as commands: exit codes, tables, JSON, and names that can't forge a line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from data.badimages import FILES, UNUSABLE, encoded, photograph

from .conftest import Answer

Call = Callable[..., Answer]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six good images of two classes."""
    for k, name in enumerate(("train/a/0", "train/a/1", "train/b/0", "train/b/1", "val/a/0", "val/b/0")):
        path = tmp_path / "d" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded("PNG", photograph(40, 30, k)))
    return tmp_path / "d"


def test_check_says_what_there_is(root: Path, call: Call) -> None:
    got = call("data", "check", str(root), "--workers", "1")
    assert got.code == 0 and "6 images of 2 classes (4 train, 2 val); 0 can't be used" in got.out
    assert str(root / ".fastffl" / "manifest.jsonl") in got.out and not got.err


def test_check_names_every_bad_file(root: Path, call: Call) -> None:
    for name in FILES:
        (root / "train" / "a" / name).write_bytes(FILES[name][0]())
    got = call("data", "check", str(root), "--workers", "2")
    assert got.code == 1 and f"{len(UNUSABLE)} can't be used" in got.out
    lines = got.out.splitlines()
    for name, (_, kind) in FILES.items():
        assert not kind or any(kind in line and f"train/a/{name}: " in line for line in lines)
    got = call("data", "check", str(root), "--workers", "2", "--json")
    document = json.loads(got.out)
    assert got.code == 1 and [*document] == ["images", "classes", "splits", "problems", "manifest", "exclude"]
    assert document["images"] == 26 and document["splits"] == {"train": 14, "val": 2}
    named = {(p["path"], p["kind"]) for p in document["problems"]}
    assert {(f"train/a/{name}", kind) for name, (_, kind) in FILES.items() if kind} <= named


def test_names_of_files_forge_no_line(root: Path, call: Call) -> None:
    (root / "train" / "a" / "x\n0 can't be used\x1b[2K\udcff.png").write_bytes(b"")
    got = call("data", "check", str(root), "--workers", "1")
    assert got.code == 1 and not any(line.startswith("0 can't") for line in got.out.splitlines())
    assert "\x1b" not in got.out and r"x\n0 can't be used\x1b[2K\udcff.png" in got.out
    document = json.loads(call("data", "check", str(root), "--workers", "1", "--json").out)
    assert document["problems"][0]["path"] == "train/a/x\n0 can't be used\x1b[2K\udcff.png"


def test_another_folder_for_what_is_found(root: Path, call: Call, tmp_path: Path) -> None:
    got = call("data", "check", str(root), "--out", str(tmp_path / "found"), "--workers", "1")
    assert got.code == 0 and f"--set data.checked={tmp_path / 'found'}" in got.out and not (root / ".fastffl").exists()
    first = (tmp_path / "found" / "manifest.jsonl").read_bytes()
    (root / "train" / "a" / "0.png").write_bytes(encoded("PNG", photograph(40, 30, 99)))
    got = call("data", "check", str(root), "--out", str(tmp_path / "found"), "--workers", "1")
    assert got.code == 1 and "its bytes changed since the last check" in got.out
    got = call("data", "check", str(root), "--out", str(tmp_path / "found"), "--workers", "1", "--again")
    assert got.code == 0 and (tmp_path / "found" / "manifest.jsonl").read_bytes() != first


def test_prepare_makes_what_trains(root: Path, call: Call, tmp_path: Path) -> None:
    got = call("data", "prepare", str(root), "--out", str(tmp_path / "p"), "--size", "16", "--shards", "1", "--workers", "1")
    assert got.code == 0 and "6 images of 2 classes (4 train, 2 val), 6 of them resized" in got.out
    assert f"next: fastffl train {tmp_path / 'p'}" in got.out and " in 2 shards" in got.out
    assert sorted(p.name for p in (tmp_path / "p").glob("*.*")) == [
        *(".fastffl", "classes.txt", "train-000000.idx", "train-000000.tar", "val-000000.idx", "val-000000.tar")
    ]
    (root / "val" / "a" / "bad\n.png").write_bytes(b"")
    got = call("data", "prepare", str(root), "--out", str(tmp_path / "q"), "--size", "16", "--workers", "1", "--json")
    document = json.loads(got.out)
    assert got.code == 1 and document["images"] == 6 and document["resized"] == 6 and document["classes"] == 2
    assert document["skipped"] == [{"path": str(root / "val" / "a" / "bad\n.png"), "why": "it is empty"}]
    got = call("data", "prepare", str(root), "--out", str(tmp_path / "r"), "--size", "16", "--workers", "1")
    assert r"left out " in got.out and r"bad\n.png: it is empty" in got.out


WRONG = {
    "data chekc .": ("no data is called 'chekc'", "did you mean check?"),
    "data check": ("DIR", "fastffl data check --help"),
    "data check nowhere": ("nowhere", "no such folder"),
    "data check .": ("holds no images in class folders", "CLASS/IMAGE.jpg"),
    "data check . --agian": ("unknown option --agian for data check", "did you mean --again?"),
    "data check . --workers many": ("--workers", "many"),
    "data prepare .": ("--out", "fastffl data prepare --help"),
    "data prepare nowhere --out x --size 9": ("nowhere", "no such folder"),
    "data prepare . --out x": ("--size 256", "--shards 256"),
    "data prepare . --out x --size 9 --quality 0": ("--quality 0", "1 to 95"),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_words(words: str, refused: Callable[..., str]) -> None:
    line = refused(*words.split())
    for part in WRONG[words]:
        assert part in line
    assert not list(Path().rglob("*"))
