"""Image folders as a Source: layouts, bad images named, mixed batches, sizes that grow, errors that say what to type."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastffl.data import Place, portable, source
from fastffl.data import folder as folders
from fastffl.data.manifest import scan, splits
from fastffl.data.portable import Portable
from fastffl.data.rng import mix
from fastffl.errors import DataError
from fastffl.recipe import Data
from fastffl.values import UNLABELLED, Batch
from fastffl_kernels.augment import augment_reference
from tests.pictures import BAD, folder, open_folder, photographs


def by_id(batches: list[Batch]) -> dict[int, torch.Tensor]:
    return {int(i): b.x[k] for b in batches for k, i in enumerate(b.id)}


# ---- bad images


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "PAUSES", (0.0, 0.0))


@pytest.mark.parametrize(("loader", "workers"), [("torchvision", 0), ("torchvision", 1), ("dali", 1)])
def test_every_bad_image_is_named_once_and_costs_nobody_else(tmp_path: Path, loader: str, workers: int) -> None:
    """All kinds of bad files among good ones: label UNLABELLED, pixels 0, every other image bit for bit what it was."""
    root = folder(tmp_path, {"train/a": 20, "train/b": 20, "val/a": 2, "val/b": 2})
    if loader == "dali" and not folders.has_dali():
        pytest.skip("DALI is not installed")
    clean = by_id(list(open_folder(root, loader=loader).train(7, 3, 1)))
    names = [f"{3 * k:03}.png" for k in range(len(BAD))]  # a and b in turn, so that every batch has both
    hurt = {}
    for k, (name, make) in enumerate(zip(names, BAD.values(), strict=True)):
        path = root / "train" / "ab"[k % 2] / f"{int(name[:3]) % 20:03}.png"
        path.write_bytes(make())
        hurt[str(path)] = list(BAD)[k]
    said: list[str] = []
    data = open_folder(root, max_bad=0.5, loader=loader, workers=workers)
    data.say = said.append
    for _ in range(2):
        batches = list(data.train(7, 3, 1))
        assert sorted(int(i) for b in batches for i in b.id) == list(range(40)), "none is lost or repeated"
    train = data._manifests["train"]
    bad = {k for k in range(40) if train.path(k) in hurt}
    assert len(bad) == len(BAD) == 15 and set(data.bad) == bad
    assert len(said) == 15, "each is named once, not in every epoch"
    for id in bad:
        (line,) = (line for line in said if line.startswith(train.path(id) + " "))
        assert "can't be decoded" in line and "counts for nothing" in line and f"fastffl data check {root}" in line
        assert "\n" not in line
        if "bomb" in hurt[train.path(id)]:
            assert "million" in line and "header claims" in line
    for b in batches:
        for k, id in enumerate(b.id.tolist()):
            if id in bad:
                assert int(b.y[k]) == UNLABELLED and (b.x[k] == 0).all()
            else:
                assert int(b.y[k]) == train.labels[id] and torch.equal(b.x[k], clean[id])
    assert len(list(data.evaluate("val", 3))) == 2


@pytest.mark.parametrize("name", BAD)
def test_evaluation_refuses_a_bad_image_by_name(name: str, tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1})
    (root / "val" / "b" / name).write_bytes(BAD[name]())
    with pytest.raises(DataError) as caught:
        list(open_folder(root).evaluate("val", 2))
    text = str(caught.value)
    assert str(root / "val" / "b" / name) in text and "can't be decoded" in text and "replace or remove" in text
    assert "\n" not in text


def test_too_many_bad_images_end_training(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/a": 30, "train/b": 20, "val/a": 1, "val/b": 1})
    for k in range(6):
        (root / "train" / "a" / f"{k:03}.png").write_bytes(b"x")
    said: list[str] = []
    for share, allowed in ((0.12, 6), (0.11, 6), (0.1, 5), (0.02, 1), (0.0, 0)):
        said.clear()
        data = open_folder(root, max_bad=share)
        data.say = said.append
        if allowed == 6:
            list(data.train(8, 0, 0))
        else:
            with pytest.raises(
                DataError, match=rf"a/00\d\.png can't be decoded.*{allowed + 1} of 50 training images.*data\.max_bad"
            ):
                list(data.train(8, 0, 0))
        assert len(said) == allowed


def test_a_file_that_vanishes_is_named(tmp_path: Path, quick: None) -> None:
    root = folder(tmp_path, {"train/a": 4, "train/b": 4, "val/a": 1, "val/b": 1})
    data = open_folder(root, max_bad=0.5)
    said: list[str] = []
    data.say = said.append
    (root / "train" / "a" / "001.png").unlink()
    (root / "val" / "a" / "000.png").unlink()
    got = list(data.train(3, 0, 0))
    assert sum(int((b.y == UNLABELLED).sum()) for b in got) == 1
    assert len(said) == 1 and "a/001.png" in said[0] and "No such file" in said[0]
    with pytest.raises(DataError, match=r"val/a/000\.png can't be decoded: No such file.*replace or remove"):
        list(data.evaluate("val", 3))


def test_a_share_that_is_gone_ends_training(tmp_path: Path, quick: None) -> None:
    """Not one bad image after the other, up to max_bad of them: nothing can be read, so nothing is learned."""
    root = folder(tmp_path / "share", {"train/a": 40, "train/b": 40, "val/a": 1, "val/b": 1})
    data = open_folder(root, max_bad=1.0)
    data.say = lambda line: pytest.fail(line)
    epoch = data.train(8, 0, 0)
    next(epoch)
    root.rename(tmp_path / "unmounted")
    with pytest.raises(DataError, match=r"none of 8 images of .* can be read any more \(No such file.*mounted"):
        list(epoch)
    (tmp_path / "unmounted").rename(root)
    assert len(list(data.train(8, 0, 0, 1))) == 9, "and it can go on where it was"


def test_a_read_that_fails_for_a_moment_is_tried_again(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_folder(folder(tmp_path, {"train/a": 4, "train/b": 4, "val/a": 1, "val/b": 1}))
    data.say = lambda line: pytest.fail(line)
    manifest = type(data._manifests["train"])
    real, failed = manifest.read, dict.fromkeys(range(8), 0)

    def read(self: object, k: int) -> bytes:
        failed[k] += 1
        if failed[k] <= 2:
            raise OSError(5, "Input/output error")
        return real(self, k)  # type: ignore[arg-type]

    monkeypatch.setattr(manifest, "read", read)
    assert all((b.y >= 0).all() for b in data.train(3, 0, 0)) and set(failed.values()) == {3}


# ---- pixels of a batch


def test_evaluation_pixels_are_a_centre_crop_of_the_resized_image(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 1})
    big = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    big.save(root / "val" / "a" / "000.png")
    data = open_folder(root, size=28)
    got = next(data.evaluate("val", 1)).x[0]
    small = big.resize((48, 32), Image.Resampling.BILINEAR)  # 28 / 0.875 = 32
    want = torch.from_numpy(np.asarray(small.crop((10, 2, 38, 30))).copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    assert (got * std + mean - want).abs().max() < 1.01 / 255, "Pillow's resizing and torchvision's differ by one of 255"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.0, 0.0), (0.8, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_batches_equal_the_kernels_reference(tmp_path: Path, mixup: float, cutmix: float, layout: torch.memory_format) -> None:
    root = folder(tmp_path, {"train/a": 7, "train/b": 6, "val/a": 1, "val/b": 1})
    data = open_folder(root, Place(memory_format=layout, rank=0, ranks=1), mixup=mixup, cutmix=cutmix)
    labels, manifest = torch.tensor(data._manifests["train"].labels), data._manifests["train"]
    views = folders.Training(data.cfg, 16, 5, 2)
    shares = set()
    for number, b in enumerate(data.train(4, 5, 2, 1), 1):
        pixels, bad = portable.whole(manifest, folders.Job(tuple(b.id.tolist()), views))
        assert not bad
        want = augment_reference(
            *(pixels.permute(0, 3, 1, 2), torch.arange(len(b.id)), torch.tensor(mix(5, 2, number)), torch.tensor(0)),
            size=16,
            mean=data.mean,
            std=data.std,
            flip=False,
            mixup=mixup,
            cutmix=cutmix,
            labels=labels[b.id],
        )
        assert torch.equal(b.x, want.x[0]) and torch.equal(b.y, labels[b.id]) and b.x.is_contiguous(memory_format=layout)
        if not (mixup or cutmix):
            assert b.y2 is None and b.mix is None
            continue
        assert b.y2 is not None and b.mix is not None
        assert torch.equal(b.y2, want.labels2) and torch.equal(b.mix, want.mix)
        shares.add(float(b.mix[0]))
    assert len(shares) >= 2 or not (mixup or cutmix), "another draw for another batch"


def test_mixing_is_the_same_draw_on_every_rank(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/a": 9, "train/b": 8, "val/a": 1, "val/b": 1})
    ranks = [open_folder(root, Place(rank=r, ranks=2), mixup=0.4, cutmix=1.0) for r in range(2)]
    for a, b in zip(*(d.train(6, 1, 0) for d in ranks), strict=True):
        assert a.mix is not None and b.mix is not None and a.mix[0] == b.mix[0]


def test_a_mixed_bad_image_takes_its_partner_with_it(tmp_path: Path) -> None:
    """The label of neither is what the pixels show, so the loss counts neither."""
    root = folder(tmp_path, {"train/a": 3, "train/b": 3, "val/a": 1, "val/b": 1})
    (root / "train" / "a" / "000.png").write_bytes(b"")
    data = open_folder(root, mixup=1.0)
    data.say = lambda line: None
    (b,) = data.train(6, 0, 0)
    assert b.y2 is not None
    lost = (b.y == UNLABELLED) | (b.y2 == UNLABELLED)
    k = int((b.id == 0).nonzero())
    assert lost.nonzero()[:, 0].tolist() == sorted({k, 5 - k}) and (b.x[k] == 0).all()


def test_images_grow(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1})
    data = open_folder(root, size=96, start_size=32, grow_epochs=2)
    assert [tuple(next(data.train(4, 0, epoch)).x.shape[2:]) for epoch in range(4)] == [(32, 32), (64, 64), (96, 96), (96, 96)]
    assert next(data.evaluate("val", 2)).x.shape == (2, 3, 96, 96), "evaluation is at full size throughout"
    with pytest.raises(DataError, match="start_size 128 is above the size 96"):
        open_folder(root, size=96, start_size=128, grow_epochs=4)
    with pytest.raises(DataError, match="start_size 32 needs the epochs in which images grow"):
        open_folder(root, size=96, start_size=32)


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
    """ImageNet's own JPEGs, from the smallest to the largest."""
    for part in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / part).mkdir(parents=True)
    for k, path in enumerate(photographs(tmp_path, 8)):
        path.rename(tmp_path / ("val" if k % 4 == 0 else "train") / "ab"[k // 4 % 2] / path.name)
    data = open_folder(tmp_path, size=64)
    got = list(data.train(5, 0, 0)) + list(data.evaluate("val", 5))
    x = torch.cat([b.x for b in got])
    assert len(x) == 15 and x.isfinite().all() and x.abs().max() < 3
    assert x.flatten(1).std(1).min() > 0.05, "no picture is blank"


# ---- who decodes, and what is there


def test_the_loader_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = scan(folder(tmp_path, {"a": 2, "b": 2}))
    cpu, cuda = Place(), Place(device=torch.device("cuda"))
    auto, torchvision, dali = (Data(name="folder", loader=k, workers=3) for k in ("auto", "torchvision", "dali"))
    monkeypatch.setattr(folders, "has_dali", lambda: False)
    for cfg, place in ((auto, cpu), (auto, cuda), (torchvision, cuda)):
        assert isinstance(folders.decoder(cfg, manifest, place), Portable)
    with pytest.raises(DataError, match=r"DALI is not installed; pip install 'fastffl\[gpu\]'"):
        folders.decoder(dali, manifest, cpu)
    monkeypatch.setattr(folders, "has_dali", lambda: True)
    assert isinstance(folders.decoder(auto, manifest, cpu), Portable), "DALI is for GPUs unless it is asked for"
    assert isinstance(folders.decoder(torchvision, manifest, cuda), Portable)


def test_ranks_of_a_machine_share_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = scan(folder(tmp_path, {"a": 2, "b": 2}))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16))
    for ranks, workers in (("1", 15), ("4", 3), ("16", 0), ("32", 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        made = folders.decoder(Data(name="folder"), manifest, Place())
        assert isinstance(made, Portable) and made._workers == workers


def test_data_sets_that_are_folders_say_what_to_type(tmp_path: Path) -> None:
    for name in ("imagenet", "imagenette"):
        with pytest.raises(DataError) as caught:
            source(name)
        text = str(caught.value)
        assert text.startswith(f"{name} needs images and none were named: expected DIR/train/CLASS/IMAGE.JPEG")
        assert f"fastffl train {name} --data DIR" in text and "--set data.loader=synthetic --set run.max_steps=3" in text
        for root, why in ((tmp_path / "absent", "no such folder"), (tmp_path, "no class folders|holds no")):
            with pytest.raises(DataError, match=rf"^{name}: .*({why}).*--data DIR.*data\.loader=synthetic"):
                source(name, root=str(root))
        tried = source(name, loader="synthetic", samples=8)
        assert tried.size == {"imagenet": 224, "imagenette": 160}[name]
    found = source("imagenette", root=str(folder(tmp_path, {"a": 3, "b": 3})))
    assert (found.name, found.size, len(found.classes)) == ("imagenette", 160, 2)
    with pytest.raises(DataError, match="name the folder of images"):
        source("folder")


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


def test_what_a_check_found_unusable_is_left_out(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/a": 4, "train/b": 4, "val/a": 1, "val/b": 1})
    (root / "train" / "b" / "bad.png").write_bytes(b"")
    (root / ".fastffl").mkdir()
    (root / ".fastffl" / "exclude.txt").write_text("# empty\ntrain/b/bad.png\n")
    data = open_folder(root, max_bad=0.0)
    assert data.samples("train") == 8 and len(list(data.train(8, 0, 0))) == 1
    shutil.move(root / ".fastffl", tmp_path.parent / "elsewhere")
    with pytest.raises(DataError, match=r"bad\.png can't be decoded: it is empty"):
        list(open_folder(root, max_bad=0.0).train(9, 0, 0))
    assert open_folder(root, checked=str(tmp_path.parent / "elsewhere")).samples("train") == 8


def test_a_file_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a": 3, "b": 3})
    (root / "a" / "000.png").rename(Path(os.fsdecode(os.fsencode(root / "a") + b"/\xff.png")))
    data = open_folder(root)
    assert sum(len(b.y) for s in ("train", "test") for b in data.evaluate(s, 4)) == 6
