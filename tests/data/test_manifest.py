"""Which files a run sees: one class map for all splits, exclusions, and a scan that stays cheap."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastffl.data import manifest
from fastffl.data.manifest import Names, exclusions, quoted, scan, splits, unquoted
from fastffl.errors import DataError

ODD = ["plain", "with space", " edges ", "#hash", '"quote"', "line\nbreak", "tab\t", "\x1b[31mred", "\u202eright", "\udcff\udc80"]


def tree(root: Path, counts: dict[str, int]) -> Path:
    """Files NAME/k.jpg, each of which holds its own path."""
    for name, n in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(n):
            (root / name / f"{k}.jpg").write_bytes(f"{name}/{k}".encode())
    return root


def exclude(root: Path, *names: str) -> None:
    (root / ".fastffl").mkdir(exist_ok=True)
    (root / ".fastffl" / "exclude.txt").write_bytes(os.fsencode("# why\n" + "".join(quoted(n) + "\n" for n in names)))


def test_files_are_read_by_number(tmp_path: Path) -> None:
    train = splits(str(tree(tmp_path, {"train/a": 3, "train/b": 2, "val/a": 1, "val/b": 1}))).train
    for k, name in enumerate(train.files):
        assert train.read(k) == f"train/{name.removesuffix('.jpg')}".encode()
        assert train.path(k) == str(tmp_path / "train" / name) and train.key(k) == name
    (tmp_path / "train" / "a" / "1.jpg").unlink()
    with pytest.raises(OSError, match="No such file"):
        train.read(1)


def test_names_are_a_sequence_of_any_file_names() -> None:
    names = Names(ODD)
    assert [*names] == ODD and names[-1] == ODD[-1] and names[2:4] == tuple(ODD[2:4]) and len(names) == len(ODD)
    assert names == Names(ODD) and names != Names(ODD[:-1]) and pickle.loads(pickle.dumps(names)) == names
    for k in (len(ODD), -len(ODD) - 1):
        with pytest.raises(IndexError):
            names[k]


def test_a_scan_asks_no_file_for_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path, {"a": 40, "b": 40, "b/deeper": 40})
    seen = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **more: (seen.append(path), stat(path, **more))[1])
    assert len(scan(root).files) == 120
    assert len(seen) == 3, "one for each folder"


# ---- one class map

MISMATCHES = {
    "missing from val": ({"train/a": 2, "train/b": 2, "val/a": 2}, "only in train: b"),
    "missing from train": ({"train/a": 2, "val/a": 2, "val/b": 2}, "only in val: b"),
    "renamed": ({"train/a": 2, "train/b": 2, "val/a": 2, "val/c": 2}, "only in train: b; only in val: c"),
    "other case": ({"train/Cat": 2, "train/dog": 2, "val/cat": 2, "val/dog": 2}, "only in train: Cat; only in val: cat"),
    "spaces": ({"train/a": 2, "train/b": 2, "val/a": 2, "val/b ": 2}, "only in train: b; only in val: b "),
    "one fewer of many": (
        {f"{s}/n{k:03}": 2 for s in ("train", "val") for k in range(1000) if (s, k) != ("val", 512)},
        "only in train: n512",
    ),
    "test, not val": ({"train/a": 2, "val/a": 2, "test/b": 2}, "train and test have different classes"),
    "an empty class": ({"train/a": 2, "train/b": 2, "val/a": 2, "val/b": 0}, "no images in class b"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_splits_with_other_classes_are_refused(case: str, tmp_path: Path) -> None:
    counts, text = MISMATCHES[case]
    with pytest.raises(DataError, match=text):
        splits(str(tree(tmp_path, counts)))


# ---- exclusions


def test_excluded_files_are_left_out_of_every_split(tmp_path: Path) -> None:
    root = tree(tmp_path, {"train/a": 5, "train/b": 4, "val/a": 2, "val/b": 2, "test/a": 2, "test/b": 3})
    before = splits(str(root))
    assert before.excluded == 0
    exclude(root, "train/a/3.jpg", "val/b/0.jpg", "test/b/2.jpg", "train/a/gone.jpg", "3.jpg")
    found = splits(str(root))
    assert found.excluded == 3 and (found.train.excluded, found.test.excluded) == (1, 1)
    assert [len(m.files) for m in (found.train, found.val, found.test) if m] == [8, 3, 4]
    assert {*before.train.files} - {*found.train.files} == {"a/3.jpg"}
    exclude(root, *[f"val/b/{k}.jpg" for k in range(2)])
    with pytest.raises(DataError, match=r"no images that are not excluded in class b"):
        splits(str(root))


def test_excluding_moves_no_other_image_between_the_splits(tmp_path: Path) -> None:
    root = tree(tmp_path, {"a": 40, "b": 30, "c": 12})
    before = splits(str(root))
    gone = [before.train.files[0], before.test.files[0], before.test.files[-1]]
    exclude(root, *gone)
    found = splits(str(root))
    assert {*before.train.files} - {*found.train.files} == {*gone} & {*before.train.files} | {*found.test.files[-1:]}
    assert {*before.test.files} - {*found.test.files} == {*gone} & {*before.test.files}
    assert found.test.labels.count(2) == 1, "c lost the one it held out, and holds out the next by the hash"
    assert found.excluded == 3
    exclude(root, next(f for f in before.train.files if f.startswith("b/")))
    assert splits(str(root)).test.files == before.test.files, "29 of b are left, and three are held out as of 30"
    exclude(root, *[f"c/{k}.jpg" for k in range(11)])
    with pytest.raises(DataError, match="class c has one image"):
        splits(str(root))


def test_a_link_to_nothing_can_be_excluded(tmp_path: Path) -> None:
    root = tree(tmp_path, {"a": 2, "b": 2})
    (root / "a" / "x.jpg").symlink_to("gone")
    with pytest.raises(DataError, match="a link to nothing"):
        splits(str(root))
    exclude(root, "a/x.jpg")
    assert splits(str(root)).excluded == 1


def test_any_name_can_be_excluded(tmp_path: Path) -> None:
    root = tree(tmp_path, {"a": 2, "b": 2})
    for name in ODD:
        (root / "a" / f"{name}.jpg").write_bytes(b"")
    assert len(scan(root).files) == 4 + len(ODD)
    exclude(root, *[f"a/{name}.jpg" for name in ODD])
    assert splits(str(root)).excluded == len(ODD)
    for name in (*ODD, "", "a\r"):
        assert unquoted(quoted(name)) == name and "\n" not in quoted(name)


def test_another_folder_of_a_check(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", {"a": 3, "b": 3})
    with pytest.raises(DataError, match=r"holds no exclude.txt; write it: fastffl data check .* --out"):
        splits(str(root), str(tmp_path / "away"))
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "exclude.txt").write_text("a/0.jpg\n")
    exclude(root, "b/0.jpg")
    found = splits(str(root), str(tmp_path / "away"))
    assert {*found.train.files, *found.test.files} == {"a/1.jpg", "a/2.jpg", "b/0.jpg", "b/1.jpg", "b/2.jpg"}


@pytest.mark.parametrize("text", [b'"half', b'"\\ud800"', b'"a" b'])
def test_a_damaged_exclude_file_is_refused(text: bytes, tmp_path: Path) -> None:
    root = tree(tmp_path, {"a": 2, "b": 2})
    exclude(root)
    (root / ".fastffl" / "exclude.txt").write_bytes(b"a/0.jpg\n" + text + b"\n")
    with pytest.raises(DataError, match=r"exclude.txt, line 2: .* is no name"):
        splits(str(root))
    (root / ".fastffl" / "exclude.txt").unlink()
    (root / ".fastffl" / "exclude.txt").mkdir()
    with pytest.raises(DataError, match=r"exclude.txt can't be read: Is a directory"):
        exclusions(root)


def test_threads_and_forked_processes_read(tmp_path: Path) -> None:
    train = splits(str(tree(tmp_path, {"train/a": 30, "val/a": 1}))).train
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(train.read, range(30))] == [train.read(k) for k in range(30)]
    assert manifest.Manifest(train.root, train.classes, train.files, train.labels) == train
