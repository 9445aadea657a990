"""Image folders: layouts, every kind of file, bad files named, exact accounting, the same pixels from any worker."""

import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastffl.data import Place
from fastffl.data.folder import Folder, decode, middle
from fastffl.data.manifest import scan, splits
from fastffl.errors import DataError
from fastffl.recipe import Data

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def picture(w: int = 40, h: int = 30, k: int = 0) -> Image.Image:
    """A smooth picture, different for every k, whose left and right halves differ."""
    y, x = np.mgrid[0:h, 0:w]
    rgb = np.stack([x * 255 // max(w - 1, 1), y * 255 // max(h - 1, 1), np.full_like(x, (k * 40) % 256)], 2)
    return Image.fromarray(rgb.astype(np.uint8))


def folder(root: Path, counts: dict[str, int], suffix: str = "png") -> Path:
    for c, (name, n) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for k in range(n):
            picture(k=7 * c + k).save(root / name / f"{k:03}.{suffix}")
    return root


def open_folder(root: Path, **options: object) -> Folder:
    return Folder(Data.model_validate({"name": "folder", "root": str(root), "size": 16, "workers": 0, **options}), Place())


def header_bomb(w: int, h: int) -> bytes:
    """A valid PNG of a few bytes that claims w x h pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


def jpeg(image: Image.Image, **options: object) -> bytes:
    out = BytesIO()
    image.save(out, "JPEG", quality=95, **options)
    return out.getvalue()


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    return jpeg(picture(), exif=exif)


def deep_grey() -> bytes:
    return encoded(Image.fromarray((np.arange(1200, dtype=np.uint16) * 50).reshape(30, 40)), "PNG")


def animated() -> bytes:
    return encoded(picture(), "GIF", save_all=True, append_images=[picture(k=3)])


# file name -> bytes, and the largest difference of a channel from the original picture where it is the same picture
GOOD: dict[str, tuple[Callable[[], bytes], int | None]] = {
    "plain.png": (lambda: encoded(picture(), "PNG"), 0),
    "plain.JPEG": (lambda: jpeg(picture()), 12),
    "progressive.jpg": (lambda: jpeg(picture(), progressive=True), 12),
    "cmyk.jpg": (lambda: jpeg(picture().convert("CMYK")), 20),
    "png named.JPEG": (lambda: encoded(picture(), "PNG"), 0),
    "exif says turn.jpg": (rotated, 12),
    "phone.jpg": (lambda: encoded(picture(), "MPO", save_all=True, append_images=[picture(k=3)], quality=95), 12),
    "rgba.png": (lambda: encoded(picture().convert("RGBA"), "PNG"), 0),
    "lossless.webp": (lambda: encoded(picture(), "WEBP", lossless=True), 0),
    "plain.bmp": (lambda: encoded(picture(), "BMP"), 0),
    "plain.ppm": (lambda: encoded(picture(), "PPM"), 0),
    "plain.tif": (lambda: encoded(picture(), "TIFF"), 0),
    "grey.png": (lambda: encoded(picture().convert("L"), "PNG"), None),
    "grey.jpg": (lambda: jpeg(picture().convert("L")), None),
    "black and white.png": (lambda: encoded(picture().convert("1"), "PNG"), None),
    "palette.png": (lambda: encoded(picture().convert("P"), "PNG"), None),
    "palette, clear.png": (lambda: encoded(picture().convert("P"), "PNG", transparency=b"\x00\x80"), None),
    "grey and alpha.png": (lambda: encoded(picture().convert("LA"), "PNG"), None),
    "deep grey.png": (deep_grey, None),
    "animated.gif": (animated, None),
    "one pixel.png": (lambda: encoded(picture(1, 1), "PNG"), None),
    "very long.png": (lambda: encoded(picture(20000, 1), "PNG"), None),
}
BAD: dict[str, Callable[[], bytes]] = {
    "empty.jpg": lambda: b"",
    "text.jpg": lambda: b"this is not a picture\n" * 10,
    "zeros.png": lambda: bytes(1000),
    "half.jpg": lambda: jpeg(picture(200, 200))[:1500],
    "end missing.jpg": lambda: jpeg(picture(200, 200))[:-200],
    "header only.jpg": lambda: jpeg(picture())[:100],
    "half.png": lambda: encoded(picture(200, 200), "PNG")[:300],
    "half.webp": lambda: encoded(picture(200, 200), "WEBP")[:150],
    "half.gif": lambda: animated()[:200],
    "bomb.png": lambda: header_bomb(60000, 60000),
    "smaller bomb.png": lambda: header_bomb(11000, 11000),
    "bomb.jpg": lambda: jpeg(picture()).replace(struct.pack(">HH", 30, 40), struct.pack(">HH", 60000, 60000)),
    "program.jpg": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "float.tif": lambda: encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    "deep.tif": lambda: encoded(Image.fromarray(np.full((4, 4), 2**20, np.int32)), "TIFF"),
}


@pytest.mark.parametrize("name", GOOD)
def test_kinds_of_images(name: str, tmp_path: Path) -> None:
    make, off = GOOD[name]
    (tmp_path / name).write_bytes(make())
    rgb = decode(tmp_path / name)
    assert rgb.mode == "RGB"
    if off is not None:
        assert rgb.size == (40, 30), "EXIF turns nothing, in training or in evaluation"
        assert np.abs(np.asarray(rgb).astype(int) - np.asarray(picture()).astype(int)).max() <= off
    for split in ("train", "test"):  # and every kind goes through both chains
        for c in "ab":
            (tmp_path / "d" / "train" / c).mkdir(parents=True, exist_ok=True)
            (tmp_path / "d" / "test" / c).mkdir(parents=True, exist_ok=True)
            (tmp_path / "d" / split / c / name).write_bytes(make())
    data = open_folder(tmp_path / "d")
    for batch in (next(data.train(2, 0, 0)), next(data.evaluate("test", 2))):
        assert batch.x.shape == (2, 3, 16, 16) and batch.x.isfinite().all()


def test_deep_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(deep_grey())
    got = np.asarray(decode(tmp_path / "x.png"))
    assert np.array_equal(got[..., 0], (np.arange(1200) * 50 // 257).reshape(30, 40)) and (got[..., 0] == got[..., 2]).all()


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_one_error_that_names_the_file(name: str, tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1})
    (root / "train" / "b" / name).write_bytes(BAD[name]())
    data = open_folder(root)
    with pytest.raises(DataError) as caught:
        list(data.train(2, 0, 0))
    text = str(caught.value)
    assert str(root / "train" / "b" / name) in text and "can't be decoded" in text and "replace or remove" in text
    assert "\n" not in text
    if "bomb" in name:
        assert "million" in text and "header claims" in text
    list(data.evaluate("val", 2))


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a": 4, "b": 4})
    data = open_folder(root)
    gone = data._sets["train"][0].files[0]
    (root / gone).unlink()
    with pytest.raises(DataError, match=r"No such file.*replace or remove"):
        list(data.train(3, 0, 0))


def test_evaluation_pixels_are_a_centre_crop_of_the_resized_image(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 1})
    big = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    big.save(root / "val" / "a" / "000.png")
    data = open_folder(root, size=28)
    got = next(data.evaluate("val", 1)).x[0]
    small = big.resize((48, 32), Image.Resampling.BILINEAR)  # 28 * 256 // 224 = 32
    want = torch.from_numpy(np.asarray(small.crop((10, 2, 38, 30))).copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    assert (got * std + mean - want).abs().max() < 1e-5


def test_a_very_long_image_keeps_its_middle() -> None:
    long = picture(20001, 3)
    kept = middle(long)
    assert kept.size == (24, 3)
    assert np.asarray(kept)[0, 11, 0] == pytest.approx(127, abs=1)
    assert middle(picture(24, 3)).size == (24, 3) and middle(picture(3, 100)).size == (3, 24)


# ---- layouts


@pytest.mark.parametrize("held", ["val", "validation", "valid", "test"])
def test_train_and_a_held_out_folder(held: str, tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/b": 5, "train/a": 3, f"{held}/a": 2, f"{held}/b": 1})
    data = open_folder(root)
    assert data.classes == ("a", "b")
    assert (data.samples("train"), data.samples("val"), data.samples("test")) == (8, 3, 3)


def test_val_and_test_are_told_apart(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/a": 5, "train/b": 5, "val/a": 2, "val/b": 2, "test/a": 1, "test/b": 2})
    data = open_folder(root)
    assert (data.samples("train"), data.samples("val"), data.samples("test")) == (10, 4, 3)
    with pytest.raises(DataError, match="val folder of its own"):
        open_folder(root, val_fraction=0.2)


@pytest.mark.parametrize("top", ["", "train/"])
def test_a_tenth_is_held_out_where_nothing_is(top: str, tmp_path: Path) -> None:
    root = folder(tmp_path, {f"{top}a": 31, f"{top}b": 4, f"{top}c": 2})
    found = splits(str(root))
    assert not {*found.train.files} & {*found.test.files}
    assert len(found.train.files) + len(found.test.files) == 37
    assert [found.test.labels.count(c) for c in range(3)] == [3, 1, 1]
    again = splits(str(root))
    assert again == found, "the choice is part of the data"


def test_class_folders_called_train(tmp_path: Path) -> None:
    root = folder(tmp_path, {"bus": 3, "train": 3})
    assert splits(str(root)).train.classes == ("bus", "train")


def test_links_dots_and_nested_folders(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a": 2, "a/deep/er": 2, "b": 2, ".hidden": 2, "a/.thumbs": 1})
    (root / "a" / ".x.png").write_bytes(b"")
    (root / "a" / "notes.txt").write_bytes(b"")
    (root / "a" / "loop").symlink_to(root / "a", target_is_directory=True)
    (root / "b" / "more").symlink_to(folder(root / ".else", {"z": 3}) / "z", target_is_directory=True)
    found = scan(root)
    assert found.classes == ("a", "b")
    assert [found.labels.count(c) for c in range(2)] == [4, 5]
    assert len(set(found.files)) == 9


def test_layouts_that_can_not_be_used(tmp_path: Path) -> None:
    def refuse(counts: dict[str, int], text: str, empty: tuple[str, ...] = ()) -> None:
        root = folder(tmp_path / str(len(list(tmp_path.iterdir()))), counts)
        for name in empty:
            (root / name).mkdir(parents=True)
        with pytest.raises(DataError, match=text):
            open_folder(root)

    refuse({"train/a": 2, "train/b": 2, "val/a": 2}, "only in train: b")
    refuse({"train/a": 2, "val/a": 2, "val/c": 1}, "only in val: c")
    refuse({"train/a": 2, "val/A": 2}, "only in train: a; only in val: A")
    refuse({"train/a": 2, "val/a": 1, "test/b": 1}, "train and test have different")
    refuse({"train/a": 2, "val/a": 2}, "no images in class b", ("train/b", "val/b"))
    refuse({"train/a": 2, "train/b": 2, "val/a": 2}, "no images in class b", ("val/b",))
    refuse({"a": 2}, "no images in class b", ("b",))
    refuse({"a": 1, "b": 2}, "class a has one image")
    refuse({}, "holds no class folders", ("train", "val"))
    refuse({"val/a": 1, "test/a": 1}, "but no train")
    empty = tmp_path / "nothing"
    empty.mkdir()
    with pytest.raises(DataError, match="holds no class folders"):
        open_folder(empty)
    with pytest.raises(DataError, match="there is no such folder"):
        open_folder(tmp_path / "absent")
    root = folder(tmp_path / "dangling", {"a": 2, "b": 2})
    (root / "a" / "x.jpg").symlink_to(root / "gone.jpg")
    with pytest.raises(DataError, match=r"a/x\.jpg is a link to nothing"):
        open_folder(root)
    root = folder(tmp_path / "pipe", {"a": 2, "b": 2})
    os.mkfifo(root / "a" / "x.jpg")
    with pytest.raises(DataError, match=r"a/x\.jpg is not a file"):
        open_folder(root)
    root = folder(tmp_path / "bytes", {"a": 2, "b": 2})
    (root / "a").rename(Path(os.fsdecode(os.fsencode(root) + b"/\xff")))
    with pytest.raises(DataError, match="not UTF-8"):
        open_folder(root)
    with pytest.raises(DataError, match="1 and 1 values for 3 channels"):
        open_folder(folder(tmp_path / "grey", {"a": 2, "b": 2}), mean=[0.5], std=[0.5])


def test_a_file_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a": 3, "b": 3})
    (root / "a" / "000.png").rename(Path(os.fsdecode(os.fsencode(root / "a") + b"/\xff.png")))
    data = open_folder(root)
    assert sum(len(b.y) for s in ("train", "test") for b in data.evaluate(s, 4)) == 6


# ---- accounting and randomness


def ids_of(batches: list) -> list[int]:  # type: ignore[type-arg]
    return [int(i) for b in batches for i in b.id]


def test_every_image_once_and_start_skips(tmp_path: Path) -> None:
    data = open_folder(folder(tmp_path, {"train/a": 7, "train/b": 4, "val/a": 3, "val/b": 2}))
    whole = list(data.train(4, 3, 1))
    assert sorted(ids_of(whole)) == list(range(11)) and [len(b.y) for b in whole] == [4, 4, 3]
    assert all(int(b.y[k]) == data._sets["train"][0].labels[int(i)] for b in whole for k, i in enumerate(b.id))
    for start in (1, 2, 3):
        rest = list(data.train(4, 3, 1, start))
        assert len(rest) == 3 - start
        for a, b in zip(whole[start:], rest, strict=True):
            assert torch.equal(a.x, b.x) and torch.equal(a.id, b.id)
    assert ids_of(list(data.evaluate("val", 2))) == list(range(5))
    part = open_folder(tmp_path, train_fraction=0.5, val_fraction=0.3)
    train, val = ids_of(list(part.evaluate("train", 4))), ids_of(list(part.evaluate("val", 4)))
    assert not {*train} & {*val} and len(train) == part.samples("train") and len(val) == part.samples("val") == 3
    assert sorted(ids_of(list(part.train(2, 0, 0)))) == train
    assert part.samples("test") == 5


def test_pixels_depend_on_seed_epoch_and_id_alone(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/a": 5, "train/b": 4, "val/a": 1, "val/b": 1})
    data = open_folder(root)
    state = torch.get_rng_state()
    seen = {int(i): b.x[k] for b in data.train(4, 3, 1) for k, i in enumerate(b.id)}
    assert torch.equal(state, torch.get_rng_state()), "loading draws nothing from the run's generator"
    for size in (1, 9):
        for b in data.train(size, 3, 1):
            assert all(torch.equal(b.x[k], seen[int(i)]) for k, i in enumerate(b.id))
    for seed, epoch in ((3, 2), (4, 1)):
        same = [torch.equal(b.x[k], seen[int(i)]) for b in data.train(4, seed, epoch) for k, i in enumerate(b.id)]
        assert len(same) == 9 and not any(same)
    last = Folder(data.cfg, Place(memory_format=torch.channels_last))
    for b in last.train(4, 3, 1):
        assert b.x.is_contiguous(memory_format=torch.channels_last)
        assert all(torch.equal(b.x[k], seen[int(i)]) for k, i in enumerate(b.id))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_workers_give_the_same_batches(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/a": 5, "train/b": 4, "val/a": 2, "val/b": 1})
    alone, helped = open_folder(root), open_folder(root, workers=2)
    for a, b in zip(alone.train(2, 3, 1), helped.train(2, 3, 1), strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.id, b.id)
    for a, b in zip(alone.evaluate("val", 2), helped.evaluate("val", 2), strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)


def test_a_worker_that_dies_is_one_error(tmp_path: Path) -> None:
    data = open_folder(folder(tmp_path, {"a": 4, "b": 4}), workers=1)
    data._augment = lambda image: os._exit(9)
    with pytest.raises(DataError, match=r"process that decodes images died.*data\.workers=0"):
        list(data.train(2, 0, 0))


def test_half_of_the_training_images_are_mirrored(tmp_path: Path) -> None:
    data = open_folder(folder(tmp_path, {"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 1}))
    turned = 0
    for epoch in range(100):
        for b in data.train(2, 0, epoch):
            red = b.x[:, 0]  # rises from left to right in the original
            turned += int((red[:, :, 0].mean(1) > red[:, :, -1].mean(1)).sum())
    assert 65 < turned < 135
    still = open_folder(tmp_path, flip=False)
    for epoch in range(5):
        for b in still.train(2, 0, epoch):
            assert (b.x[:, 0, :, 0].mean(1) < b.x[:, 0, :, -1].mean(1)).all()


def test_real_photographs(tmp_path: Path) -> None:
    """ImageNet's own JPEGs, the smallest, largest and grey ones among them."""
    if not (SHARED / "imagenet120.tar").is_file():
        pytest.skip("the real photographs are not here")
    with tarfile.open(SHARED / "imagenet120.tar") as tar:
        chosen = [m for m in tar.getmembers() if m.isreg() and m.name.lower().endswith((".jpg", ".jpeg"))]
        chosen = sorted(chosen, key=lambda m: m.size)
        chosen = chosen[:8] + chosen[-8:]
        for k, m in enumerate(chosen):
            to = tmp_path / ("train" if k % 4 else "val") / f"c{k % 2}" / f"{k}.JPEG"
            to.parent.mkdir(parents=True, exist_ok=True)
            stream = tar.extractfile(m)
            assert stream is not None
            to.write_bytes(stream.read())
    (tmp_path / "val" / "c1").mkdir(exist_ok=True)
    (tmp_path / "train" / "c1" / "1.JPEG").rename(tmp_path / "val" / "c1" / "1.JPEG")
    data = open_folder(tmp_path, size=64)
    got = list(data.train(5, 0, 0)) + list(data.evaluate("val", 5))
    x = torch.cat([b.x for b in got])
    assert len(x) == 16 and x.isfinite().all() and x.abs().max() < 3
    assert x.flatten(1).std(1).min() > 0.05, "no picture is blank"
