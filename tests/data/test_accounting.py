"""Exact accounting of image files: every id once an epoch over all ranks, the same pixels whoever decodes them, no trace of a
break or a resume."""

import importlib.util
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastffl.data import Place
from fastffl.data.folder import Folder
from fastffl.recipe import Data
from fastffl.values import UNLABELLED, Batch
from tests.pictures import folder, open_folder, photographs

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
TRAIN, VAL = 23, 11


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("images"), {"train/a": 12, "train/b": 11, "val/a": 6, "val/b": 5})


def ids_of(batches: list[Batch]) -> list[int]:
    return [int(i) for b in batches for i in b.id]


def pixels(batches: list[Batch]) -> dict[int, Tensor]:
    return {int(i): b.x[k] for b in batches for k, i in enumerate(b.id) if i >= 0}


def same(a: list[Batch], b: list[Batch]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(all(torch.equal(s, t) for s, t in zip(x[:3], y[:3], strict=True)) for x, y in pairs)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 11, 23, 64])
def test_every_id_once_over_all_ranks(root: Path, batch: int, ranks: int) -> None:
    one = list(open_folder(root).train(batch, 3, 1))
    assert sorted(ids_of(one)) == list(range(TRAIN)) and len(one) == -(-TRAIN // batch), "steps are known in advance"
    assert [len(b.y) for b in one] == [batch] * (TRAIN // batch) + [TRAIN % batch] * (TRAIN % batch > 0)
    data = [open_folder(root, Place(rank=r, ranks=ranks)) for r in range(ranks)]
    parts = [list(d.train(batch, 3, 1)) for d in data]
    assert [len(p) for p in parts] == [len(one)] * ranks, "all ranks take the same steps"
    labels = data[0]._manifests["train"].labels
    for k, whole in enumerate(one):
        shares = [p[k] for p in parts]
        sizes = [len(s.id) for s in shares]
        assert max(sizes) - min(sizes) <= 1
        real = [s for s in shares if s.id[0] >= 0]
        assert same([Batch(*(torch.cat(t) for t in zip(*(s[:3] for s in real), strict=True)))], [whole]), "no pixel differs"
        for s in shares:
            assert s.y.tolist() == [labels[i] if i >= 0 else UNLABELLED for i in s.id.tolist()]
            if s.id[0] < 0:
                assert s.id.tolist() == [-1] and torch.equal(s.x, whole.x[:1]), "a share of nothing is a picture without a label"
    tests = [list(d.evaluate("val", 2)) for d in data]
    assert Counter(i for t in tests for i in ids_of(t)) == Counter(range(VAL)), "evaluation scores every image on one rank"
    assert all((b.y >= 0).all() for t in tests for b in t)


@pytest.mark.parametrize("ranks", [1, 3])
def test_another_epoch_is_another_order(root: Path, ranks: int) -> None:
    data = open_folder(root, Place(rank=0, ranks=ranks))
    orders = {tuple(ids_of(list(data.train(4, seed, epoch)))) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4 and len(list(data.train(4, 0, 0))) == len(list(data.train(4, 0, 1))) == 6


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_breaking_off_and_going_on_leaves_no_trace(root: Path, workers: int, rank: int) -> None:
    place = Place(rank=rank, ranks=2)
    want = list(open_folder(root, place).train(4, 3, 1))
    data = open_folder(root, place, workers=workers)
    for start in (0, 1, 3, 5):
        stream = data.train(4, 3, 1, start)
        assert same(list(islice(stream, 2)), want[start : start + 2])
        stream.close()  # type: ignore[attr-defined]
        assert same(list(data.train(4, 3, 1, start)), want[start:]), "what was read ahead is not missing"
        held = data.evaluate("val", 2)
        next(held)
        assert same(list(data.train(4, 3, 1, start)), want[start:]), "an evaluation that is not over is another iterator"
        assert len(ids_of(list(held))) == len(data.place.share(torch.arange(VAL))) - 2
    assert not list(data.train(4, 3, 1, 6)), "nothing is left after the last batch"
    data.close()
    assert same(list(data.train(4, 3, 1)), want)


def test_workers_and_layouts_give_the_same_batches(root: Path) -> None:
    alone = open_folder(root)
    state = torch.get_rng_state()
    for workers in (1, 2):
        helped = open_folder(root, workers=workers)
        assert same(list(alone.train(5, 3, 1)), list(helped.train(5, 3, 1)))
        assert same(list(alone.evaluate("val", 2)), list(helped.evaluate("val", 2)))
    assert torch.equal(state, torch.get_rng_state()), "loading draws nothing from the run's generator"
    last = Folder(alone.cfg, Place(memory_format=torch.channels_last, rank=0, ranks=1))
    batches = list(last.train(5, 3, 1))
    assert same(batches, list(alone.train(5, 3, 1))) and all(
        b.x.is_contiguous(memory_format=torch.channels_last) for b in batches
    )


def test_pixels_depend_on_seed_epoch_and_id_alone(root: Path) -> None:
    data = open_folder(root)
    seen = pixels(list(data.train(4, 3, 1)))
    for size in (1, 23):
        again = pixels(list(data.train(size, 3, 1)))
        assert again.keys() == seen.keys() and all(torch.equal(x, seen[id]) for id, x in again.items())
    for seed, epoch in ((3, 2), (4, 1)):
        other = pixels(list(data.train(4, seed, epoch)))
        assert not any(torch.equal(x, seen[id]) for id, x in other.items())


@pytest.mark.parametrize("ranks", [1, 2])
def test_fractions(root: Path, ranks: int) -> None:
    data = [open_folder(root / "train", Place(rank=r, ranks=ranks), train_fraction=0.5, val_fraction=0.3) for r in range(ranks)]
    train, val, test = ([i for d in data for i in ids_of(list(d.evaluate(s, 4)))] for s in ("train", "val", "test"))
    assert not {*train} & {*val} and len(train) == data[0].samples("train") and len(val) == data[0].samples("val")
    assert sorted(i for d in data for i in ids_of(list(d.train(2 * ranks, 0, 0)))) == sorted(train)
    assert len(test) == data[0].samples("test") == 2, "a tenth of every class was held out before"
    assert data[0].samples("train") + data[0].samples("val") < 21


@pytest.mark.parametrize("loader", ["torchvision", "dali"])
def test_real_photographs_over_ranks(tmp_path: Path, loader: str) -> None:
    """The same pixels of a photograph in one process and over three ranks, whatever batch it is decoded in."""
    if loader == "dali" and importlib.util.find_spec("nvidia.dali") is None:
        pytest.skip("DALI is not installed")
    for part in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / part).mkdir(parents=True)
    for k, path in enumerate(photographs(tmp_path, 6)):
        path.rename(tmp_path / ("val" if k % 4 == 0 else "train") / "ab"[k // 4 % 2] / path.name)
    options = Data(name="folder", root=str(tmp_path), loader=loader, size=64, workers=1, rand_augment=2)
    whole = Folder(options, Place(rank=0, ranks=1))
    want = pixels(list(whole.train(8, 0, 0)))
    parts = [Folder(options, Place(rank=r, ranks=3)) for r in range(3)]
    got = [pixels(list(d.train(8, 0, 0))) for d in parts]
    assert sorted(i for g in got for i in g) == sorted(want) == list(range(15))
    assert all(torch.equal(x, want[i]) for g in got for i, x in g.items())
    tests = [pixels(list(d.evaluate("val", 2))) for d in parts]
    plain = pixels(list(whole.evaluate("val", 5)))
    assert sorted(i for t in tests for i in t) == sorted(plain) == list(range(5))
    assert all(torch.equal(x, plain[i]) for t in tests for i, x in t.items())
    for d in (whole, *parts):
        d.close()
