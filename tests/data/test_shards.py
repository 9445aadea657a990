"""Tar shards: the same bytes as the files', whoever wrote the tar; DALI reads them by our index; damage is named."""

import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastffl.data import shards
from fastffl.data.manifest import splits
from fastffl.data.shards import Shards, index_text, members_of, read_index
from fastffl.errors import DataError


def pack(path: Path, members: Iterable[tuple[str, bytes]], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", errors="surrogateescape", **options) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def some(classes: str = "ab", n: int = 3, start: int = 0) -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(start)
    return [(f"{c}/{start + k}.jpg", rng.bytes(100 + 300 * k)) for k in range(n) for c in classes]


@pytest.mark.parametrize("layout", ["{}-{:06}.tar", "{}/{:06}.tar", "{}_of_mine_{}.tar"])
def test_the_bytes_of_shards_are_the_files(layout: str, tmp_path: Path) -> None:
    whole = {}
    for part in ("train", "val", "test"):
        for s in range(3 if part == "train" else 1):
            members = some(start=10 * s + len(part))
            whole |= {f"{layout.format(part, s)}/{name}": data for name, data in members}
            pack(tmp_path / layout.format(part, s), [("a", b""), *members, ("a/notes.txt", b"x"), ("a/._9.jpg", b"x")])
    found = splits(str(tmp_path))
    assert found.val is not None
    got = {m.files[k]: m.read(k) for m in (found.train, found.val, found.test) for k in range(len(m.files))}
    assert got == whole
    assert [len(m.files) for m in (found.train, found.val, found.test)] == [18, 6, 6] and found.train.classes == ("a", "b")
    assert found.train.path(0) == f"{tmp_path}/{found.train.files[0]}" and found.train.key(0) == "a/5.jpg"
    for m in (found.train, found.val):
        assert all(m.classes[y] == key[0] for y, key in zip(m.labels, map(m.key, range(len(m.files))), strict=True))
    assert splits(str(tmp_path)) == found, "the same from the indices that were kept"


def test_a_tenth_of_one_set_is_held_out(tmp_path: Path) -> None:
    members = [(f"{c}/{k}.jpg", b"x") for c in "ab" for k in range(20)]
    pack(tmp_path / "all-0.tar", members[::2])
    pack(tmp_path / "all-1.tar", members[1::2])
    found = splits(str(tmp_path))
    assert found.val is None and [found.test.labels.count(y) for y in (0, 1)] == [2, 2]
    assert not {*found.train.files} & {*found.test.files} and len(found.train.files) == 36
    for name, _ in members:  # a folder with the same names holds out the same
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(b"x")
    assert {*splits(str(tmp_path / "f")).test.files} == {found.test.key(k) for k in range(4)}


def test_which_tars_are_shards(tmp_path: Path) -> None:
    for name in ("train", "val"):
        pack(tmp_path / "x" / f"{name}.tar", some())
        (tmp_path / "x" / name / "a").mkdir(parents=True)
        (tmp_path / "x" / name / "a" / "1.jpg").write_bytes(b"x")
    assert type(splits(str(tmp_path / "x")).train) is not Shards, "archives beside what was unpacked from them"
    pack(tmp_path / "y" / "train-0.tar", some())
    (tmp_path / "y" / "logs").mkdir()
    assert type(splits(str(tmp_path / "y")).train) is Shards
    pack(tmp_path / "y" / "more.tar", some())
    with pytest.raises(DataError, match=r"shard more.tar belongs to no split; expected train-\*\.tar"):
        splits(str(tmp_path / "y"))
    pack(tmp_path / "z" / "val-0.tar", some())
    with pytest.raises(DataError, match="shards of val but not of train"):
        splits(str(tmp_path / "z"))


# ---- indices


def test_dali_reads_our_shards_by_our_index(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    members = [(f"{stem}.{ext}", data) for k, (name, jpg) in enumerate(some(n=9))
               for stem in [name[:-4]] for ext, data in (("cls", str(k % 2).encode()), ("jpg", jpg))]  # fmt: skip
    tar = pack(tmp_path / "train-0.tar", members)
    tar.with_suffix(".idx").write_text(index_text(members_of(tar)))

    @pipeline_def(batch_size=6, num_threads=1, device_id=None)
    def read():  # type: ignore[no-untyped-def]
        return tuple(
            fn.readers.webdataset(
                paths=[str(tar)],
                index_paths=[str(tar.with_suffix(".idx"))],
                ext=["jpg", "cls"],
                missing_component_behavior="error",
            )
        )

    pipe = read()
    pipe.build()
    theirs = []
    for _ in range(3):
        images, labels = pipe.run()
        theirs += [(bytes(images.at(k)), int(bytes(labels.at(k)))) for k in range(6)]
    ours = splits(str(tmp_path), None)
    mine = {m.files[k]: (m.read(k), y) for m in (ours.train, ours.test) for k, y in enumerate(m.labels)}
    assert sorted(mine.values()) == sorted(theirs) and len(mine) == 18


def test_our_index_is_wds2idx_s(tmp_path: Path) -> None:
    pytest.importorskip("wds2idx")
    long = "c/" + "n" * 150 + ".x.jpg"
    tar = pack(tmp_path / "s.tar", [*some(), ("a/7.cls", b"1"), ("a/7.jpg", b"2" * 700), (long, b"3" * 1024), ("b/e.jpg", b"")])
    subprocess.run([sys.executable, "-m", "wds2idx", str(tar)], check=True, capture_output=True)
    assert tar.with_suffix(".idx").read_text() == index_text(members_of(tar, None))
    tar.with_suffix(".idx").rename(tmp_path / "away.idx")
    assert members_of(tar) == read_index(tmp_path / "away.idx")


def headers_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    seen = []
    scan = shards._headers

    def count(shard: Path, file: object):  # type: ignore[no-untyped-def]
        seen.append(shard)
        return scan(shard, file)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "_headers", count)
    return seen


def test_an_index_that_fits_spares_the_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = headers_read(monkeypatch)
    tar = pack(tmp_path / "train-0.tar", some(n=20))
    splits(str(tmp_path))
    assert seen == [tar] and (tmp_path / ".fastffl" / "train-0.idx").is_file()
    splits(str(tmp_path))
    assert seen == [tar], "kept from the first time"
    (tmp_path / ".fastffl" / "train-0.idx").rename(tar.with_suffix(".idx"))
    splits(str(tmp_path))
    assert seen == [tar], "beside the shard"


def test_a_folder_that_may_not_be_written_is_read_all_the_same(tmp_path: Path) -> None:
    pack(tmp_path / "train-0.tar", some(n=20))
    (tmp_path / ".fastffl").write_bytes(b"in the way")
    with pytest.raises(DataError, match=r"exclude\.txt can't be read"):
        splits(str(tmp_path))
    (tmp_path / ".fastffl").unlink()
    (tmp_path / ".fastffl").mkdir()
    (tmp_path / ".fastffl" / "train-0.idx").mkdir()
    assert len(splits(str(tmp_path)).train.files) == 36


STALE = {
    "a name changed": lambda members: [(n.replace("a/0", "c/0"), d) for n, d in members],
    "a size changed": lambda members: [(n, d + b"x" if n == "a/0.jpg" else d) for n, d in members],
    "one more": lambda members: [*members, ("a/99.jpg", b"x")],
    "one fewer": lambda members: members[:-1],
    "all gone": lambda members: [],
}


@pytest.mark.parametrize("case", STALE)
def test_an_index_of_another_tar_is_not_believed(case: str, tmp_path: Path) -> None:
    tar = pack(tmp_path / "t.tar", some())
    tar.with_suffix(".idx").write_text(index_text(members_of(tar)))
    changed = [*STALE[case](some())]
    pack(tar, changed)
    assert [m.name for m in members_of(tar)] == [n for n, _ in changed]


@pytest.mark.parametrize("text", ["", "v1.1 1\njpg 512 100\n", "v1.2 2\njpg 512 100 a/0.jpg\n", "v1.2 1\njpg 512 100 a/0.jpg",
    "v1.2 1\njpg 512 x a/0.jpg\n", "v1.2 1\njpg 512 100\n", "v1.2 1\njpg -512 100 a/0.jpg\n", "v1.2 1\njpg 512 9999999 a/0.jpg\n",
    "v1.2 1\njpg 1024 100 a/0.jpg\n", "v1.2 x\n", "\x00\udcff"])  # fmt: skip
def test_a_damaged_index_is_not_believed(text: str, tmp_path: Path) -> None:
    tar = pack(tmp_path / "t.tar", some(n=1))
    tar.with_suffix(".idx").write_bytes(os.fsencode(text))
    assert [m.name for m in members_of(tar)] == ["a/0.jpg", "b/0.jpg"]


NAMES = [
    "a/with space.jpg",
    "a/" + "n" * 300 + ".jpg",
    "a/é名.jpg",
    "a/line\nbreak.jpg",
    "a/two.dots.jpg",
    "a/\udcff\udc80.jpg",
    "a/UP.JPEG",
]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_any_name_a_tar_can_hold(form: int, tmp_path: Path) -> None:
    pack(tmp_path / "train-0.tar", [(n, n.encode(errors="surrogateescape")) for n in NAMES], format=form)
    pack(tmp_path / "val-0.tar", [("a/1.jpg", b"x")], format=form)
    for _ in range(2):
        train = splits(str(tmp_path)).train
        assert [train.key(k) for k in range(len(NAMES))] == NAMES
        assert [train.read(k) for k in range(len(NAMES))] == [n.encode(errors="surrogateescape") for n in NAMES]


def test_damaged_tars_are_named(tmp_path: Path) -> None:
    tar = pack(tmp_path / "train-0.tar", some(n=5))
    good = tar.read_bytes()
    at = members_of(tar)[4].offset

    def refuse(data: bytes, text: str) -> None:
        tar.write_bytes(data)
        with pytest.raises(DataError, match=rf"train-0\.tar can't be read as a tar: .*{text}"):
            splits(str(tmp_path))

    refuse(good[: at + 10], "unexpected end")
    refuse(good[: at - 500], "")
    refuse(good[: at - 512] + b"\xff" * 512 + good[at:], f"header at byte {at - 512} is damaged")
    refuse(b"", "")
    refuse(b"no tar" * 1000, "")
    tar.unlink()
    with tarfile.open(tar, "w:gz") as packed:
        packed.addfile(tarfile.TarInfo("a/x.jpg"))
    with pytest.raises(DataError, match="not compressed"):
        splits(str(tmp_path))
    tar.unlink()
    tar.mkdir()
    with pytest.raises(DataError, match="Is a directory"):
        splits(str(tmp_path))


def test_a_shard_cut_short_later_is_an_oserror(tmp_path: Path) -> None:
    tar = pack(tmp_path / "train-0.tar", some(n=5))
    pack(tmp_path / "val-0.tar", some())
    train = splits(str(tmp_path)).train
    last = len(train.files) - 1
    os.truncate(tar, train.offset[last] + 5)  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="the shard ends at byte"):
        train.read(last)
    assert train.read(0) == some(n=5)[0][1]
    tar.unlink()
    with pytest.raises(OSError, match="No such file"):
        pickle.loads(pickle.dumps(train)).read(0)


# ---- classes


def labelled(path: Path, labels: list[str], folder: str = "") -> None:
    members = []
    for k, label in enumerate(labels):
        members += [(f"{folder}{k}.jpg", str(k).encode()), *([(f"{folder}{k}.cls", label.encode())] if label else [])]
    pack(path, members)


def test_labels_from_numbers(tmp_path: Path) -> None:
    labelled(tmp_path / "train-0.tar", ["2", "0", "1\n", " 1 ", "10", *"3456789"])
    labelled(tmp_path / "val-0.tar", ["1", "0"])
    found = splits(str(tmp_path))
    assert found.train.classes == ("00", "01", "02", "03", "04", "05", "06", "07", "08", "09", "10")
    assert (
        found.train.labels[:5] == (2, 0, 1, 1, 10) and found.test.labels == (1, 0) and found.test.classes == found.train.classes
    )
    (tmp_path / "classes.txt").write_text("".join(f"class {c}\n" for c in range(11)))
    assert splits(str(tmp_path)).train.classes[10] == "class 10" and splits(str(tmp_path)).train.labels == found.train.labels


def test_labels_from_folders_in_the_order_of_classes_txt(tmp_path: Path) -> None:
    pack(tmp_path / "train-0.tar", some("cab"))
    pack(tmp_path / "val-0.tar", [(f"./val/{n}", d) for n, d in some("ab", 1)])
    with pytest.raises(DataError, match=r"train and val have different classes \(only in train: c"):
        splits(str(tmp_path))
    (tmp_path / "classes.txt").write_text("c\na\nb\n")
    found = splits(str(tmp_path))
    assert found.train.classes == ("c", "a", "b") and found.train.labels[:3] == (0, 1, 2) and found.test.labels == (1, 2)


WRONG_CLASSES = {
    "not a number": (["1", "0", "x"], None, "holds b'x'; expected the number of the class"),
    "negative": (["1", "0", "-1"], None, "holds b'-1'"),
    "huge": (["1", "0", "9" * 12], None, "expected the number of the class"),
    "none": (["", "", ""], None, "has no known class; expected CLASS/NAME.jpg, or NAME.cls"),
    "one without": (["1", "0", ""], None, "2.jpg has no known class"),
    "one without, named": (["1", "0", ""], "a\nb\n", "2.jpg has no known class"),
    "a gap": (["0", "2"], None, "hold no images of class 1"),
    "too high": (["0", "1", "2"], "a\nb\n", "2.jpg has class 2, but there are 2 classes"),
    "twice": (["0", "1"], "a\na\n", "'a'; expected each class once"),
    "a blank": (["0", "1"], "a\n\nb\n", "''; expected each class once"),
    "nothing": (["0", "1"], "", "no name; expected"),
}


@pytest.mark.parametrize("case", WRONG_CLASSES)
def test_classes_that_can_not_be_known(case: str, tmp_path: Path) -> None:
    labels, classes, text = WRONG_CLASSES[case]
    labelled(tmp_path / "train-0.tar", labels)
    labelled(tmp_path / "val-0.tar", labels)
    if classes is not None:
        (tmp_path / "classes.txt").write_text(classes)
    with pytest.raises(DataError, match=text):
        splits(str(tmp_path))


def test_numbers_and_names_must_agree(tmp_path: Path) -> None:
    labelled(tmp_path / "train-0.tar", ["1", "1"], "cat/")
    labelled(tmp_path / "train-1.tar", ["0", "0"], "dog/")
    labelled(tmp_path / "val-0.tar", ["0"], "dog/")
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    assert splits(str(tmp_path)).train.labels == (1, 1, 0, 0)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"cat/0.jpg has class 1 in its .cls, but cat is number 0"):
        splits(str(tmp_path))


def test_a_number_goes_before_a_name_that_only_looks_like_one_of_the_classes(tmp_path: Path) -> None:
    """As `data prepare` packs the classes `a b` and `a%20b`."""
    for part in ("train", "val"):
        labelled(tmp_path / f"{part}-0.tar", ["0"], "a%20b/")
        labelled(tmp_path / f"{part}-1.tar", ["1"], "a%2520b/")
    (tmp_path / "classes.txt").write_text("a b\na%20b\n")
    assert splits(str(tmp_path)).train.labels == (0, 1)


def test_a_validation_set_with_a_class_too_many(tmp_path: Path) -> None:
    labelled(tmp_path / "train-0.tar", ["0", "1"])
    labelled(tmp_path / "val-0.tar", ["0", "1", "2"])
    with pytest.raises(DataError, match=r"2\.jpg has class 2, but there are 2 classes"):
        splits(str(tmp_path))


def test_excluded_members_are_left_out(tmp_path: Path) -> None:
    pack(tmp_path / "train-0.tar", some(n=4))
    pack(tmp_path / "val-0.tar", some(n=2))
    (tmp_path / ".fastffl").mkdir()
    (tmp_path / ".fastffl" / "exclude.txt").write_text('# x\ntrain-0.tar/a/2.jpg\n"val-0.tar/b/1.jpg"\ntrain-0.tar/none.jpg\n')
    found = splits(str(tmp_path))
    assert found.excluded == 2 and len(found.train.files) == 7 and len(found.test.files) == 3
    wanted = {n: d for n, d in some(n=4) if n != "a/2.jpg"}
    assert {found.train.key(k): found.train.read(k) for k in range(7)} == wanted
    with (tmp_path / ".fastffl" / "exclude.txt").open("a") as file:
        file.writelines(json.dumps(f"train-0.tar/b/{k}.jpg") + "\n" for k in range(4))
    with pytest.raises(DataError, match="no images that are not excluded of class b"):
        splits(str(tmp_path))


# ---- reading at the same time


def reads(train: Shards, wanted: list[bytes], seed: int) -> bool:
    order = np.random.default_rng(seed).permutation(len(wanted))
    return all(train.read(int(k)) == wanted[k] for _ in range(20) for k in order)


def test_threads_and_forked_processes_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN", 2)  # fewer than there are, so some are opened for every read
    for s in range(4):
        pack(tmp_path / f"train-{s}.tar", some(n=6, start=10 * s))
    pack(tmp_path / "val-0.tar", some())
    train = splits(str(tmp_path)).train
    assert isinstance(train, Shards)
    wanted = [data for s in range(4) for _, data in some(n=6, start=10 * s)]
    assert train.read(0) == wanted[0] and len(train._open) == 1, "a shard is open when processes fork"
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda seed: reads(train, wanted, seed), range(8)))
    fork = multiprocessing.get_context("fork")
    codes = [fork.Process(target=lambda s=s: os._exit(0 if reads(train, wanted, s) else 1)) for s in range(3)]
    for process in codes:
        process.start()
    assert reads(train, wanted, 9) and len(train._open) == 2
    for process in codes:
        process.join()
    assert [p.exitcode for p in codes] == [0, 0, 0]
    assert reads(pickle.loads(pickle.dumps(train)), wanted, 1)
