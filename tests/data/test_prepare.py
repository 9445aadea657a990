"""fastffl data prepare: the same classes and splits, the same bytes whatever was stopped and however many processes worked."""

import hashlib
import json
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from data.badimages import encoded, photograph
from PIL import Image

from fastffl.data import prepare as module
from fastffl.data.check import check
from fastffl.data.manifest import Splits, splits
from fastffl.data.portable import decode
from fastffl.data.prepare import prepare, shrink
from fastffl.data.shards import Shards, members_of, split_name
from fastffl.errors import DataError, UsageError

from .test_manifest import ODD
from .test_shards import pack


def source(root: Path, held: bool = True) -> Path:
    """Large and small JPEGs and PNGs of three classes, one of them in a folder in a folder."""
    for part, n in (("train", 9), ("val", 3)) if held else (("", 14),):
        for c, cls in enumerate(("ant", "bee", "the cat")):
            for k in range(n):
                wide, high = [(90, 60), (60, 90), (30, 20), (64, 64)][k % 4]
                image = photograph(wide, high, 1000 * len(part) + 100 * c + k)
                folder = root / part / cls / ("deep.er" if k % 5 == 4 else "")
                folder.mkdir(parents=True, exist_ok=True)
                png = k % 3 == 0
                (folder / (f"{k}.x.png" if png else f"{k}.JPEG")).write_bytes(encoded("PNG" if png else "JPEG", image))
    return root


def pixels(found: Splits) -> dict[str, list[tuple[str, str]]]:
    """(class, hash of the pixels) of every image of every split."""
    return {
        part: sorted(
            (m.classes[y], hashlib.sha256(np.asarray(decode(m.read(k))).tobytes()).hexdigest()) for k, y in enumerate(m.labels)
        )
        for part, m in (("train", found.train), ("test", found.test), ("val", found.val))
        if m
    }


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and ".fastffl" not in p.parts}


def test_an_image_is_made_smaller_and_never_larger() -> None:
    big = encoded("PNG", photograph(301, 200))
    made = shrink(big, 100, 90)
    small = Image.open(BytesIO(made.data))
    assert made.resized and small.format == "JPEG" and small.size == (150, 100) and not made.why
    wanted = photograph(301, 200).resize((150, 100), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(wanted)).mean() < 4
    assert shrink(encoded("PNG", photograph(200, 301)), 100, 90).data != big
    for size in (200, 201, None):
        assert shrink(big, size, 90) == module.Made(big, False)
    assert len(shrink(big, 100, 30).data) < len(made.data)
    assert "truncated" in shrink(encoded()[:-100], None, 90).why and shrink(b"", 8, 9).why == "it is empty"


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("packed", [1, None])
def test_copies_have_the_same_classes_and_splits(packed: int | None, held: bool, tmp_path: Path) -> None:
    before = splits(str(source(tmp_path / "a", held)))
    report = prepare(str(tmp_path / "a"), str(tmp_path / "b"), size=1000, shards=packed, workers=2)
    after = splits(str(tmp_path / "b"))
    assert pixels(after) == pixels(before) and after.train.classes == before.train.classes == ("ant", "bee", "the cat")
    assert report.resized == 0 and report.code == 0 and report.images == sum(map(len, pixels(before).values()))
    assert report.splits == {"train": len(before.train.files), "val": len(before.test.files)}
    assert isinstance(after.train, Shards) == bool(packed) and after.val is None
    originals = {m.read(k) for m in (before.train, before.test) for k in range(len(m.files))}
    assert {m.read(k) for m in (after.train, after.test) for k in range(len(m.files))} == originals, "byte for byte"
    assert report.bytes == sum(map(len, originals))


def test_val_and_test_are_both_kept(tmp_path: Path) -> None:
    root = source(tmp_path / "a")
    (root / "val").rename(root / "test")
    source(root / "more")
    (root / "more" / "val").rename(root / "val")
    before = splits(str(root))
    prepare(str(root), str(tmp_path / "b"), shards=1, workers=1)
    after = splits(str(tmp_path / "b"))
    assert after.val and before.val and pixels(after) == pixels(before)


def test_the_size_that_is_asked_for(tmp_path: Path) -> None:
    root = source(tmp_path / "a")
    report = prepare(str(root), str(tmp_path / "f"), size=40, workers=2)
    prepare(str(root), str(tmp_path / "s"), size=40, shards=1, workers=2)
    folders, shards = splits(str(tmp_path / "f")), splits(str(tmp_path / "s"))
    assert pixels(folders) == pixels(shards)
    sizes = [decode(folders.train.read(k)).size for k in range(27)]
    assert sum(min(s) == 40 for s in sizes) == 21 and sum(s == (30, 20) for s in sizes) == 6
    assert report.resized == 27 and report.images == 36
    assert (
        "bee/0.x.png.jpg" in folders.train.files and "bee/1.JPEG" in folders.train.files and "bee/6.x.png" in folders.train.files
    )
    assert shards.train.labels != tuple(sorted(shards.train.labels)), "shuffled, for readers that go from front to back"
    assert {m.name.split(".")[-1] for m in members_of(tmp_path / "s" / "train-000000.tar")} == {"jpg", "png", "cls"}


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    root = source(tmp_path / "a")
    for name in ("0.x.png.jpg", "0.x.png_.jpg", "0.x.jpg"):  # the last has the first one's key in a shard
        (root / "train" / "bee" / name).write_bytes(encoded(image=photograph(70, 70, len(name))))
    prepare(str(root), str(tmp_path / "f"), size=40, workers=2)
    prepare(str(root), str(tmp_path / "s"), size=40, shards=1, workers=1)
    assert len(splits(str(tmp_path / "f")).train.files) == 30
    names = [m.name for m in members_of(tmp_path / "s" / "train-000000.tar")]
    assert len(names) == 60 and len({split_name(n)[0] for n in names}) == 30
    assert pixels(splits(str(tmp_path / "f"))) == pixels(splits(str(tmp_path / "s")))


@pytest.mark.parametrize("packed", [1, None])
def test_bytes_do_not_depend_on_processes(packed: int | None, tmp_path: Path) -> None:
    root = source(tmp_path / "a")
    for workers in (1, 3):
        prepare(str(root), str(tmp_path / str(workers)), size=40, shards=packed, workers=workers)
    assert tree(tmp_path / "1") == tree(tmp_path / "3") and len(tree(tmp_path / "1")) == (36 if not packed else 5)


def many(root: Path) -> Path:
    for part, n in (("train", 40), ("val", 4)):
        for cls in "ab":
            (root / part / cls).mkdir(parents=True)
            for k in range(n):
                noise = np.random.default_rng(1000 * len(part) + 2 * k + (cls == "b")).integers(
                    0, 256, (150, 200, 3), dtype=np.uint8
                )
                (root / part / cls / f"{k}.png").write_bytes(encoded("PNG", Image.fromarray(noise), compress_level=1))
    (root / "train" / "a" / "bad.png").write_bytes(b"no")
    return root


@pytest.mark.parametrize("packed", [1, None])
def test_kill_9_in_the_middle_and_go_on(packed: int | None, tmp_path: Path) -> None:
    root = many(tmp_path / "a")
    whole = prepare(str(root), str(tmp_path / "whole"), size=140, shards=packed, workers=2, quality=95)
    out = tmp_path / "killed"
    code = (
        "import time\nfrom fastffl.data import prepare as p\nshrink = p.shrink\n"
        "p.shrink = lambda *a: (time.sleep(0.02), shrink(*a))[1]\n"
        f"p.prepare({str(root)!r}, {str(out)!r}, size=140, shards={packed}, workers=2, quality=95)"
    )
    progress = out / ".fastffl" / "prepare.jsonl"
    for least in (0,) if packed else (10, 30):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
        while not (progress.exists() and progress.read_bytes().count(b"\n") > least):
            assert child.poll() is None
            time.sleep(0.01)
        child.kill()
        child.wait()
        with progress.open("ab") as file:
            file.write(b'["train", 1')
    made = {path for path in out.rglob("*") if path.is_file() and ".fastffl" not in path.parts}
    times = {path: path.stat().st_mtime_ns for path in made if path.name != "classes.txt"}
    lines = [json.loads(line) for line in progress.read_text().splitlines()[:-1]]
    done = 2 * len(lines) if packed else sum(not why for *_, why in lines)  # a shard has a tar and an index
    report = prepare(str(root), str(out), size=140, shards=packed, workers=2, quality=95)
    assert tree(out) == tree(tmp_path / "whole") and len(tree(out)) > 8
    assert report.document | {"out": ""} == whole.document | {"out": ""} and report.code == 1
    assert [Path(path).name for path, _ in report.skipped] == ["bad.png"]
    kept = sum(path.stat().st_mtime_ns == at for path, at in times.items())
    assert kept >= done > 1, "what has its line is not made again"
    assert not [*(out / ".fastffl" / "temp").iterdir()]


def test_excluded_images_are_left_out(tmp_path: Path) -> None:
    root = many(tmp_path / "a")
    check(str(root), str(tmp_path / "c"), workers=1)
    with pytest.raises(DataError, match=r"holds no exclude\.txt"):
        prepare(str(root), str(tmp_path / "b"), shards=100, checked=str(tmp_path))
    report = prepare(str(root), str(tmp_path / "b"), shards=100, workers=1, checked=str(tmp_path / "c"))
    assert report.code == 0 and report.excluded == 1 and report.images == 88 and not report.skipped


def test_shards_into_folders_write_nowhere_else(tmp_path: Path) -> None:
    """Names in a tar are no paths: none leads out of the folder, and equal ones do not overwrite each other."""
    names = ["a/../../../evil.png", "a//etc/x.png", "a/1.png", "a/1.png", "b/../b/1.png", "b/..png", "b/n\n.png"]
    images = [encoded("PNG", photograph(20, 20, k)) for k in range(2 * len(names))]
    pack(tmp_path / "in" / "train-0.tar", zip(names, images, strict=False))
    pack(tmp_path / "in" / "train-1.tar", zip(names, images[len(names) :], strict=False))
    pack(tmp_path / "in" / "val-0.tar", [("a/1.png", images[0]), ("b/1.png", images[1])])
    before = splits(str(tmp_path / "in"))
    here = {*tmp_path.rglob("*")}
    report = prepare(str(tmp_path / "in"), str(tmp_path / "deep" / "er" / "out"), size=30, workers=2)
    out = tmp_path / "deep" / "er" / "out"
    new = {*tmp_path.rglob("*")} - here
    assert all(p.is_relative_to(out) or p in out.parents for p in new) and not Path("/etc/x.png").exists()
    assert pixels(splits(str(out))) == pixels(before) and report.images == len(before.train.files) + 2 == 14
    pack(tmp_path / "up" / "train-0.tar", [("../1.png", images[0]), ("../2.png", images[1])])
    with pytest.raises(DataError, match=r"class '\.\.' can't be the name of a folder"):
        prepare(str(tmp_path / "up"), str(tmp_path / "up-out"), size=10)


def test_odd_names_go_into_shards_and_come_out(tmp_path: Path) -> None:
    root = source(tmp_path / "a")
    for k, name in enumerate([*ODD, "n" * 240, "a.b", "a b", "~"]):
        (root / "train" / "bee" / f"{name}.jpg").write_bytes(encoded(image=photograph(40, 40, 5000 + k)))
    prepare(str(root), str(tmp_path / "s"), shards=1, workers=1)
    assert pixels(splits(str(tmp_path / "s"))) == pixels(splits(str(root)))
    for tar in (tmp_path / "s").glob("*.tar"):
        assert all(m.name.isascii() and m.name.isprintable() and " " not in m.name for m in members_of(tar))
    prepare(str(tmp_path / "s"), str(tmp_path / "f"), size=1000, workers=1)
    assert pixels(splits(str(tmp_path / "f"))) == pixels(splits(str(root)))


def test_dali_and_tarfile_read_what_was_packed(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    prepare(str(source(tmp_path / "a")), str(tmp_path / "s"), size=40, shards=1, workers=1)
    train = splits(str(tmp_path / "s")).train
    tars = [str(p) for p in sorted((tmp_path / "s").glob("train-*.tar"))]
    jpeg = [k for k, f in enumerate(train.files) if f.endswith(".jpg")]

    @pipeline_def(batch_size=len(jpeg), num_threads=1, device_id=None)
    def read():  # type: ignore[no-untyped-def]
        indices = [t.replace(".tar", ".idx") for t in tars]
        return tuple(
            fn.readers.webdataset(paths=tars, index_paths=indices, ext=["jpg", "cls"], missing_component_behavior="skip")
        )

    pipe = read()
    pipe.build()
    images, labels = pipe.run()
    theirs = sorted((bytes(images.at(k)), int(bytes(labels.at(k)))) for k in range(len(jpeg)))
    assert theirs == sorted((train.read(k), train.labels[k]) for k in jpeg)
    for path in tars:
        subprocess.run(["tar", "--list", "--file", path], check=True, capture_output=True)


def test_another_order_of_classes(tmp_path: Path) -> None:
    for part in ("train", "val"):
        pack(
            tmp_path / "a" / f"{part}-0.tar",
            [(f"{c}/{k}.png", encoded("PNG", photograph(20, 20, ord(c) + k))) for c in "ba" for k in (1, 2)],
        )
    (tmp_path / "a" / "classes.txt").write_text("b\na\n")
    with pytest.raises(DataError, match="in another order than their names"):
        prepare(str(tmp_path / "a"), str(tmp_path / "f"), size=10)
    prepare(str(tmp_path / "a"), str(tmp_path / "s"), shards=1)
    assert splits(str(tmp_path / "s")).train.classes == ("b", "a")
    assert pixels(splits(str(tmp_path / "s"))) == pixels(splits(str(tmp_path / "a")))


def test_what_can_not_be_done(tmp_path: Path) -> None:
    root = str(source(tmp_path / "a"))

    def refuse(text: str, out: str = "b", **options: int) -> None:
        with pytest.raises(UsageError, match=text):
            prepare(root, str(tmp_path / out), **options)  # type: ignore[arg-type]

    refuse("say what to make: --size 256")
    refuse("--size 0: expected 1", size=0)
    refuse("--quality 96: expected 1 to 95", size=9, quality=96)
    refuse("--shards -1: expected", shards=-1)
    refuse("--workers 0: expected", shards=1, workers=0)
    refuse("lies in", out="a", size=9)
    refuse("lies in", out="a/inside", size=9)
    refuse("lies in .* or around it", out=".", size=9)
    assert not (tmp_path / "b").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    refuse("is not empty", out="full", size=9)
    (tmp_path / "file").touch()
    refuse("can't write", out="file/b", size=9)
    prepare(root, str(tmp_path / "b"), size=9, workers=1)
    assert prepare(root, str(tmp_path / "b"), size=9, workers=1).images == 36, "made before"
    refuse("begun with other settings", size=10)
    (tmp_path / "a" / "train" / "bee" / "1.JPEG").unlink()
    refuse("has other files now", size=9)
    with pytest.raises(DataError, match="there is no such folder"):
        prepare(str(tmp_path / "none"), str(tmp_path / "c"), size=9)


def test_a_full_disk_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(source(tmp_path / "a"))
    replace = module.os.replace

    def full(a: object, b: object) -> None:
        if str(b).endswith(("1.JPEG", ".tar")):
            raise OSError(28, "No space left on device")
        replace(a, b)  # type: ignore[arg-type]

    for packed in (None, 1):
        with monkeypatch.context() as patch:
            patch.setattr(module.os, "replace", full)
            with pytest.raises(UsageError, match=r"can't write .*No space left on device; choose another --out"):
                prepare(root, str(tmp_path / f"b{packed}"), size=40, shards=packed, workers=1)
        assert prepare(root, str(tmp_path / f"b{packed}"), size=40, shards=packed, workers=1).images == 36


def test_an_image_that_ends_its_process_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = source(tmp_path / "a")
    deadly = (root / "train" / "bee" / "1.JPEG").read_bytes()
    monkeypatch.setattr(module, "shrink", lambda data, *more: module.os._exit(7) if data == deadly else shrink(data, *more))
    for packed in (None, 1):
        report = prepare(str(root), str(tmp_path / f"b{packed}"), size=40, shards=packed, workers=2)
        assert report.images == 35 and [(Path(p).name, "exit code 7" in why) for p, why in report.skipped] == [("1.JPEG", True)]
        assert report.code == 1 and json.dumps(report.document["skipped"])
