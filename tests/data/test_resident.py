"""Data sets in memory: every sample counted once, pixels equal to those of Pillow-style padding, any layout, any batch."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as TF

from fastffl.data import Arrays, Place, Resident, digits, source, synthetic
from fastffl.data.resident import crop_flip
from fastffl.data.rng import below, uniform_bits
from fastffl.data.source import portions
from fastffl.errors import DataError
from fastffl.recipe import Data
from fastffl.values import UNLABELLED, Batch
from fastffl_kernels.augment import augment_reference

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def made(n: int = 50, side: int = 6, channels: int = 3, classes: int = 3, tests: int = 17) -> Arrays:
    g = torch.Generator().manual_seed(1)

    def part(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(0, 256, (count, channels, side, side), generator=g, dtype=torch.uint8)
        return x, torch.arange(count) % classes

    names = tuple(f"c{k}" for k in range(classes))
    return Arrays("made", names, part(n), part(tests), (0.4,) * channels, (0.2,) * channels)


def pixels(data: Resident, x: Tensor) -> Tensor:
    """Normalised images back as uint8."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    raw = (x.double() * std + mean) * 255
    assert (raw - raw.round()).abs().max() < 1e-2
    return raw.round().to(torch.uint8)


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    theirs = load_digits()
    want = Counter((x.astype(np.uint8).tobytes(), int(y)) for x, y in zip(theirs.images, theirs.target, strict=True))
    ours = digits.arrays()
    got: Counter[tuple[bytes, int]] = Counter()
    for x, y in (ours.train, ours.test):
        assert (x % 15 == 0).all()
        got.update((i.tobytes(), int(k)) for i, k in zip((x[:, 0] // 15).numpy(), y, strict=True))
    assert got == want and sum(got.values()) == 1797
    assert len(ours.test[1]) == 450
    for y in (ours.train[1], ours.test[1]):
        share = y.bincount(minlength=10) / len(y)
        assert (share - 0.1).abs().max() < 0.01, "both parts hold every class alike"
    x = ours.train[0].double() / 255
    assert abs(x.mean() - ours.mean[0]) < 1e-3 and abs(x.std() - ours.std[0]) < 1e-3


@pytest.mark.parametrize("batch", [1, 7, 50, 64])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_every_training_sample_once(batch: int, start: int) -> None:
    data = Resident(made(), Data(name="custom", pad=2), Place())
    whole = list(data.train(batch, 5, 2))
    ids = torch.cat([b.id for b in whole])
    assert sorted(ids.tolist()) == list(range(50))
    assert [len(b.y) for b in whole] == [batch] * (50 // batch) + [50 % batch] * (50 % batch > 0)
    assert all(torch.equal(b.y, b.id % 3) for b in whole)
    rest = list(data.train(batch, 5, 2, start))
    assert len(rest) == max(0, len(whole) - start)
    for a, b in zip(whole[start:], rest, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.id, b.id)
    other = torch.cat([b.id for b in data.train(batch, 5, 3)])
    assert not torch.equal(ids, other) and sorted(other.tolist()) == list(range(50))


@pytest.mark.parametrize("train_fraction", [1.0, 0.5, 0.01])
@pytest.mark.parametrize("val_fraction", [0.0, 0.1, 0.34, 0.99])
def test_accounting_with_fractions(train_fraction: float, val_fraction: float) -> None:
    arrays = made()
    cfg = Data(name="custom", pad=1, train_fraction=train_fraction, val_fraction=val_fraction)
    data = Resident(arrays, cfg, Place())
    seen: dict[str, Counter[bytes]] = {}
    for split in ("train", "val", "test"):
        got = list(data.evaluate(split, 4))
        assert sum(len(b.y) for b in got) == data.samples(split) == len({int(i) for b in got for i in b.id})
        images = pixels(data, torch.cat([b.x for b in got]))
        labels = torch.cat([b.y for b in got])
        seen[split] = Counter(x.numpy().tobytes() + bytes([int(y)]) for x, y in zip(images, labels, strict=True))
    kinds = {
        k: Counter(x.numpy().tobytes() + bytes([int(y)]) for x, y in zip(*part, strict=True))
        for k, part in (("train", arrays.train), ("test", arrays.test))
    }
    assert seen["test"] == kinds["test"]
    assert not seen["train"] - kinds["train"] and seen["train"].total() > 0
    epoch = list(data.train(8, 0, 0))
    assert sorted(int(i) for b in epoch for i in b.id) == list(range(data.samples("train")))
    assert {int(v) for b in epoch for v in b.y} == {0, 1, 2}, "every class is learned"
    if val_fraction:
        assert not seen["val"] - kinds["train"] and not seen["val"] & seen["train"]
        if train_fraction == 1:
            assert seen["val"] + seen["train"] == kinds["train"]
        assert abs(seen["val"].total() - 50 * val_fraction) <= 3
    else:
        assert seen["val"] == kinds["test"]


def test_portions_do_not_depend_on_anything_but_labels() -> None:
    labels = torch.arange(100) % 4
    a = portions(labels, 0.5, 0.2)
    torch.manual_seed(9)
    b = portions(labels, 0.5, 0.2)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert [int((labels[a[0]] == c).sum()) for c in range(4)] == [10] * 4
    assert [int((labels[a[1]] == c).sum()) for c in range(4)] == [5] * 4


def test_portions_are_drawn_class_by_class() -> None:
    """Which images are held out is part of published runs: it must stay what it was."""
    labels = torch.tensor([5, 0, 5, 2, 0, 5, 5, 2, 0, 5])
    used, held = portions(labels, 1.0, 0.4)
    want = []
    for c in (0, 2, 5):
        ids = (labels == c).nonzero()[:, 0]
        want += ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(c))][: round(0.4 * len(ids))].tolist()
    assert held.tolist() == sorted(want) and sorted([*used.tolist(), *want]) == list(range(10))


def slow(image: Tensor, pad: int, mode: str, top: int, left: int, flip: bool) -> Tensor:
    """One image through Pillow (zero pad) or torchvision (reflect), cropped and mirrored a pixel at a time."""
    side = image.shape[1]
    if mode == "zero" and len(image) == 3:
        framed = ImageOps.expand(Image.fromarray(image.permute(1, 2, 0).numpy()), border=pad)
        big = torch.from_numpy(np.array(framed)).permute(2, 0, 1)
    else:
        big = TF.pad(image, [pad] * 4, padding_mode="reflect" if mode == "reflect" else "constant")
    out = torch.empty_like(image)
    for d in range(len(image)):
        for i in range(side):
            for j in range(side):
                out[d, i, j] = big[d, top + i, left + (side - 1 - j if flip else j)]
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("mode", "pad", "channels"), [("reflect", 4, 3), ("zero", 2, 3), ("zero", 9, 1), ("reflect", 5, 1), ("zero", 0, 4)]
)
def test_augmented_pixels_equal_the_slow_way(mode: str, pad: int, channels: int, layout: torch.memory_format) -> None:
    arrays = made(n=12, channels=channels)
    cfg = Data(name="custom", pad=pad, pad_mode=mode)
    data = Resident(arrays, cfg, Place(memory_format=layout))
    tried = 0
    for epoch in range(3):
        for b in data.train(5, 7, epoch):
            got = pixels(data, b.x)
            top = below(uniform_bits(7, epoch, b.id, 0), 2 * pad + 1)
            left = below(uniform_bits(7, epoch, b.id, 1), 2 * pad + 1)
            flip = uniform_bits(7, epoch, b.id, 2) < 2**31
            for k, at in enumerate(b.id):
                want = slow(arrays.train[0][at], pad, mode, int(top[k]), int(left[k]), bool(flip[k]))
                assert torch.equal(got[k], want)
                tried += 1
    assert tried == 36


def test_crops_are_uniform_and_half_are_mirrored() -> None:
    """One marked pixel tells where each crop was taken and whether it was mirrored."""
    side, pad, n = 9, 2, 5000
    x = torch.zeros(n, 1, side, side, dtype=torch.uint8)
    x[:, 0, 4, 3] = 255
    arrays = Arrays(
        "marked", ("a",), (x, torch.zeros(n, dtype=torch.int64)), (x[:1], torch.zeros(1, dtype=torch.int64)), (0.0,), (1.0,)
    )
    data = Resident(arrays, Data(name="custom", pad=pad, pad_mode="zero"), Place())
    rows, columns = [], []
    for epoch in range(5):
        for b in data.train(1000, 0, epoch):
            _, _, row, column = b.x.nonzero(as_tuple=True)
            assert len(row) == len(b.y)
            rows.append(row)
            columns.append(column)
    row, column = torch.cat(rows), torch.cat(columns)
    assert row.min() == 2 and row.max() == 6 and column.min() == 1 and column.max() == 7
    counts = row.bincount(minlength=7)[2:].double()
    assert ((counts - 5000) ** 2 / 5000).sum() < 25, "four degrees of freedom: 25 is beyond one in 10^4"
    edges = column.bincount(minlength=8).double()
    mirrored, straight = edges[6:].sum(), edges[1:3].sum()  # 2 of 5 shifts of each kind can't be mistaken
    assert abs(mirrored - 5000) < 320 and abs(straight - 5000) < 320
    assert abs(edges[3:6].sum() - 15000) < 400


def test_no_flip_when_told() -> None:
    data = Resident(made(), Data(name="custom", pad=0, flip=False), Place())
    for b in data.train(50, 0, 0):
        assert torch.equal(pixels(data, b.x), made().train[0][b.id])
    turned = Resident(made(), Data(name="custom", pad=0, flip=True), Place())
    b = next(turned.train(50, 0, 0))
    same = [torch.equal(a, w) for a, w in zip(pixels(turned, b.x), made().train[0][b.id], strict=True)]
    assert 10 < sum(same) < 40


def test_a_sample_is_the_same_in_any_batch_and_layout() -> None:
    by_id: dict[int, Tensor] = {}
    for layout in LAYOUTS:
        data = Resident(made(), Data(name="custom", pad=3), Place(memory_format=layout))
        for size in (1, 7, 50):
            for b in data.train(size, 1, 4):
                assert b.x.is_contiguous(memory_format=layout)
                for k, at in enumerate(b.id.tolist()):
                    assert torch.equal(by_id.setdefault(at, b.x[k]), b.x[k])
    assert len(by_id) == 50
    data = Resident(made(), Data(name="custom", pad=3), Place())
    at = torch.tensor([31, 2])
    alone = data.augment(data._x["train"], at, at, 1, 4)
    assert isinstance(alone, Batch) and torch.equal(alone.x[0], by_id[31]) and torch.equal(alone.x[1], by_id[2])
    moved = [torch.equal(b.x[k], by_id[int(i)]) for b in data.train(50, 1, 5) for k, i in enumerate(b.id)]
    assert sum(moved) < 10, "another epoch shows other crops"


def test_evaluation_pixels_are_the_images_in_both_layouts() -> None:
    arrays = made()
    for layout in LAYOUTS:
        data = Resident(arrays, Data(name="custom", pad=3), Place(memory_format=layout))
        for split, (x, y) in (("train", arrays.train), ("test", arrays.test)):
            got = list(data.evaluate(split, 7))
            assert torch.equal(pixels(data, torch.cat([b.x for b in got])), x)
            assert torch.equal(torch.cat([b.y for b in got]), y)
            assert torch.cat([b.id for b in got]).tolist() == list(range(len(y)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_mixed_batches_equal_the_kernels_reference(mixup: float, cutmix: float, layout: torch.memory_format) -> None:
    arrays = made(side=12)
    data = Resident(arrays, Data(name="custom", pad=2, mixup=mixup, cutmix=cutmix), Place(memory_format=layout))
    seen = set()
    for epoch in range(4):
        for b in data.train(16, 7, epoch):
            want = augment_reference(
                *(arrays.train[0], b.id, torch.tensor(7), torch.tensor(epoch)),
                size=12,
                pad=2,
                mean=data.mean,
                std=data.std,
                mixup=mixup,
                cutmix=cutmix,
                labels=arrays.train[1],
            )
            assert b.y2 is not None and b.mix is not None and want.labels is not None and want.mix is not None
            assert torch.equal(b.x, want.x[0]) and b.x.is_contiguous(memory_format=layout)
            assert torch.equal(b.y, want.labels) and torch.equal(b.y2, want.labels2) and torch.equal(b.mix, want.mix)
            assert torch.equal(b.y2, b.y.flip(0)) and b.mix.dtype == torch.float32
            seen.add(float(b.mix[0]))
    assert len(seen) > 6, "other draws for other batches"
    for b in data.evaluate("test", 5):
        assert b.y2 is None and b.mix is None


# ---- ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 4, 7, 16, 50, 64])
def test_ranks_share_every_batch(ranks: int, batch: int) -> None:
    arrays = made()
    cfg = Data(name="custom", pad=2)
    whole = list(Resident(arrays, cfg, Place()).train(batch, 5, 2))
    parts = [list(Resident(arrays, cfg, Place(rank=r, ranks=ranks)).train(batch, 5, 2)) for r in range(ranks)]
    assert {len(p) for p in parts} == {len(whole)}, "every rank takes the same steps"
    for k, one in enumerate(whole):
        shares = [p[k] for p in parts]
        real = [s for s in shares if int(s.id[0]) >= 0]
        assert torch.equal(torch.cat([s.id for s in real]), one.id) and torch.equal(torch.cat([s.x for s in real]), one.x)
        assert torch.equal(torch.cat([s.y for s in real]), one.y)
        for s in shares:
            if int(s.id[0]) < 0:
                assert s.id.tolist() == [-1] and s.y.tolist() == [UNLABELLED] and torch.equal(s.x, one.x[:1])
        assert sum(len(s.id) for s in shares) == max(len(one.id), ranks)
    for start in (1, len(whole) - 1):
        rest = list(Resident(arrays, cfg, Place(rank=ranks - 1, ranks=ranks)).train(batch, 5, 2, start))
        assert all(torch.equal(a.x, b.x) and torch.equal(a.id, b.id) for a, b in zip(rest, parts[-1][start:], strict=True))
    tests = [b for r in range(ranks) for b in Resident(arrays, cfg, Place(rank=r, ranks=ranks)).evaluate("test", 4)]
    assert torch.cat([b.id for b in tests]).tolist() == list(range(17)), "evaluation scores every image on one rank"


def test_crop_flip_leaves_its_input_alone() -> None:
    x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    kept = x.clone()
    zero = torch.zeros(4, dtype=torch.int64)
    out = crop_flip(x, torch.arange(4), zero, zero, zero.bool(), 8)
    out.zero_()
    assert torch.equal(x, kept)


def test_synthetic_is_the_same_on_every_call_and_has_every_class() -> None:
    for name, classes in (("synthetic", 7), ("cifar100", None)):
        cfg = Data(name=name, classes=classes, samples=400, loader="synthetic")
        a, b = synthetic.arrays(cfg), synthetic.arrays(cfg)
        assert torch.equal(a.train[0], b.train[0]) and torch.equal(a.test[0], b.test[0])
        assert not torch.equal(a.train[0][:1], a.test[0][:1])
        assert set(a.train[1].tolist()) == set(a.test[1].tolist()) == set(range(len(a.classes))) == set(range(classes or 100))
        assert source(cfg).samples("train") == 400 and source(cfg).samples("test") == 100


def test_synthetic_images_show_their_class_and_are_as_large_as_asked() -> None:
    for name, size, side in (("imagenet", None, 224), ("imagenette", None, 160), ("imagenette", 96, 96), ("digits", None, 8)):
        cfg = Data(name=name, classes=3, samples=12, loader="synthetic", size=size)
        data = source(cfg, Place(rank=1, ranks=2))
        assert (data.size, data.samples("train"), data.samples("test")) == (side, 12, 3)
        arrays = synthetic.arrays(cfg)
        x, y = arrays.train[0].double(), arrays.train[1]
        means = torch.stack([x[y == c].mean(0) for c in range(3)])
        tests = arrays.test[0].double()
        nearest = ((tests[:, None] - means) ** 2).flatten(2).sum(2).argmin(1)
        assert torch.equal(nearest, arrays.test[1]), "the test images show the patterns of the training images"
        assert x.min() < 20 and x.max() > 230 and len(x[0].unique()) > 30


def test_synthetic_imagenet_is_small_enough_to_try() -> None:
    arrays = synthetic.arrays(Data(name="imagenet", loader="synthetic"))
    assert len(arrays.classes) == 1000 and arrays.train[0].shape == (1024, 3, 224, 224)
    assert arrays.train[0].nbytes + arrays.test[0].nbytes == 1280 * 3 * 224 * 224, "193 MB"
    data = Resident(arrays, Data(name="imagenet"), Place())
    assert data._x["train"].data_ptr() == arrays.train[0].data_ptr(), "not copied"


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (lambda a: {"train": (a.train[0], a.train[1] + 1)}, "label 3, outside the 3 classes"),
        (lambda a: {"test": (a.test[0], a.test[1] - 1)}, "label -1"),
        (lambda a: {"train": (a.train[0][:-1], a.train[1])}, "49 images and 50 labels"),
        (lambda a: {"train": (a.train[0].float(), a.train[1])}, "expected uint8"),
        (lambda a: {"train": (a.train[0][..., :5], a.train[1])}, "squares"),
        (lambda a: {"test": (a.test[0][:0], a.test[1][:0])}, "is empty"),
        (lambda a: {"test": (a.test[0][..., :5, :5], a.test[1])}, "differ in shape"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(break_it, text: str) -> None:  # type: ignore[no-untyped-def]
    good = made()
    bad = Arrays(**{**good.__dict__, **break_it(good)})
    with pytest.raises(DataError, match=text):
        Resident(bad, Data(name="custom"), Place())


def test_settings_that_do_not_fit_are_refused() -> None:
    for cfg, text in (
        (Data(name="custom", pad=6), "can't reflect images of 6 pixels"),
        (Data(name="custom", size=32), "images are 6 pixels"),
        (Data(name="custom", mean=(0.5,), std=(0.5,)), "1 values for 3|1 and 1 values for 3"),
    ):
        with pytest.raises(DataError, match=text):
            Resident(made(), cfg, Place())
    data = Resident(made(), Data(name="custom"), Place())
    with pytest.raises(DataError, match="expected train, val, test"):
        data.samples("valid")


@pytest.mark.parametrize("key", ["rand_augment", "start_size"])
def test_what_is_for_image_files_is_refused(key: str) -> None:
    """It would be ignored without a word; synthetic images stand for files and may ignore it."""
    with pytest.raises(DataError, match=f"data.{key} 6 is for image files, and digits lies in memory"):
        source("digits", **{key: 6})
    assert source("imagenette", loader="synthetic", size=16, samples=16, **{key: 6}).size == 16
