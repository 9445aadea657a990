"""Several views of an image: the first is the one there is without the others; each is a pure function of (seed, epoch, id,
view); all are of the same samples."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastffl.data import Place, Resident
from fastffl.data.folder import Folder, has_dali
from fastffl.data.source import view_seed
from fastffl.errors import DataError, UsageError
from fastffl.recipe import Data, Nets
from fastffl.train import Learner, fit
from fastffl.values import UNLABELLED, Batch
from tests.pictures import folder, open_folder
from tests.train import tiny

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
VIEWS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("images"), {"train/a": 6, "train/b": 5, "val/a": 1, "val/b": 1})


Opened = Resident | Folder


def resident(place: Place | None = None, samples: int = 11, **options: Any) -> Resident:
    """Images of noise, so that no two windows of one are alike."""
    made = tiny.arrays(samples)
    x = torch.randint(0, 256, (samples, 1, 8, 8), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    arrays = replace(made, train=(x, made.train[1]))
    return Resident(arrays, Data(name="custom", pad=3, **options), place or Place(rank=0, ranks=1))


def opened(kind: str, root: Path, place: Place | None = None, **options: Any) -> Opened:
    return resident(place, **options) if kind == "resident" else open_folder(root, place, **options)


def seen(batches: Iterator[Batch], views: int) -> dict[tuple[int, int], Tensor]:
    """The pixels of every (id, view)."""
    found = {}
    for b in batches:
        assert len(b.x) == views * len(b.y) and b.id.shape == b.y.shape
        for v, part in enumerate(b.x.chunk(views)):
            found |= {(int(i), v): part[k] for k, i in enumerate(b.id) if i >= 0}
    return found


KINDS = ("resident", "folder")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_view_is_the_one_there_is_alone(kind: str, layout: torch.memory_format, root: Path) -> None:
    place = Place(memory_format=layout, rank=0, ranks=1)
    one, many = (list(opened(kind, root, place).train(4, 5, 2, **more)) for more in ({}, {"views": VIEWS}))
    assert len(one) == len(many) == 3
    for a, b in zip(one, many, strict=True):
        assert torch.equal(b.x[: len(a.x)], a.x) and torch.equal(b.y, a.y) and torch.equal(b.id, a.id)
        assert len(b.x) == VIEWS * len(a.x) and b.x.is_contiguous(memory_format=layout) and b.x.dtype == a.x.dtype
        assert b.y2 is None and b.mix is None
    same = list(opened(kind, root, place).train(4, 5, 2, views=1))
    assert all(torch.equal(a.x, b.x) for a, b in zip(one, same, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_view_is_a_function_of_seed_epoch_id_and_view(kind: str, root: Path) -> None:
    """Whatever batch an image is in, wherever the epoch is begun, however many views there are."""
    want = seen(opened(kind, root).train(4, 5, 2, views=VIEWS), VIEWS)
    assert sorted(want) == [(i, v) for i in range(11) for v in range(VIEWS)]
    for batch, start, views in ((1, 0, VIEWS), (11, 0, VIEWS), (4, 1, VIEWS), (4, 0, 2)):
        again = seen(opened(kind, root).train(batch, 5, 2, start, views=views), views)
        assert len(again) == (11 - batch * start) * views and all(torch.equal(x, want[at]) for at, x in again.items())
    for seed, epoch in ((5, 3), (6, 2)):
        other = seen(opened(kind, root).train(4, seed, epoch, views=VIEWS), VIEWS)
        assert other.keys() == want.keys()
        for v in range(VIEWS):
            equal = [torch.equal(other[i, v], want[i, v]) for i in range(11)]
            assert sum(equal) <= 1, "one of 98 windows may come twice"


@pytest.mark.parametrize("kind", KINDS)
def test_views_of_an_image_differ(kind: str, root: Path) -> None:
    found = seen(opened(kind, root).train(4, 5, 2, views=VIEWS), VIEWS)
    pairs = [(i, v, w) for i in range(11) for v in range(VIEWS) for w in range(v)]
    assert sum(torch.equal(found[i, v], found[i, w]) for i, v, w in pairs) <= 1
    assert len({view_seed(s, v) for s in range(50) for v in range(8)}) == 400 and view_seed(7, 0) == 7


def test_a_view_is_a_window_as_the_first_is() -> None:
    """Drawn by its own seed: the pixels of view v are those of a run with that seed, image by image."""
    found = seen(resident().train(4, 5, 2, views=VIEWS), VIEWS)
    for v in range(VIEWS):
        data = resident()
        whole = torch.arange(11)
        alone = data.augment(data._x["train"], whole, data._y["train"], view_seed(5, v), 2).x
        assert all(torch.equal(found[i, v], alone[i]) for i in range(11))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [2, 4])
def test_ranks_share_the_views(kind: str, batch: int, root: Path) -> None:
    """Over three ranks every (id, view) once; who has no share gets an image without a label, in all views."""
    whole = list(opened(kind, root).train(batch, 5, 2, views=VIEWS))
    want = seen(iter(whole), VIEWS)
    parts = [list(opened(kind, root, Place(rank=r, ranks=3)).train(batch, 5, 2, views=VIEWS)) for r in range(3)]
    got = [seen(iter(p), VIEWS) for p in parts]
    assert sorted(at for g in got for at in g) == sorted(want)
    assert all(torch.equal(x, want[at]) for g in got for at, x in g.items())
    fillers = [(b, k) for p in parts for k, b in enumerate(p) if b.id[0] < 0]
    assert len(fillers) >= (len(whole) if batch == 2 else 0) and all(len(p) == len(whole) for p in parts)
    for b, k in fillers:
        assert b.id.tolist() == [-1] and b.y.tolist() == [UNLABELLED] and len(b.x) == VIEWS
        first = int(whole[k].id[0])
        assert all(torch.equal(b.x[v], want[first, v]) for v in range(VIEWS)), "the first sample of the batch, unlabelled"


@pytest.mark.parametrize(("loader", "workers"), [("torchvision", 1), ("torchvision", 2), ("dali", 1)])
def test_workers_and_loaders_give_the_same_views(loader: str, workers: int, root: Path) -> None:
    if loader == "dali" and not has_dali():
        pytest.skip("DALI is not installed")
    want = list(open_folder(root).train(2, 5, 2, views=VIEWS))
    data = open_folder(root, loader=loader, workers=workers)
    for a, b in zip(data.train(2, 5, 2, views=VIEWS), want, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.id, b.id) and torch.equal(a.y, b.y)
    data.close()


def test_a_bad_image_is_nothing_in_all_views(tmp_path: Path) -> None:
    """And one that fails for a single view is nothing in all of them, too: it is told once."""
    root = folder(tmp_path, {"train/a": 6, "train/b": 5, "val/a": 1, "val/b": 1})
    clean = seen(open_folder(root).train(4, 5, 2, views=VIEWS), VIEWS)
    data = open_folder(root, max_bad=0.5)
    manifest = data._manifests["train"]
    (root / "train" / "b" / "001.png").write_bytes(b"this is no picture")
    said: list[str] = []
    data.say = said.append
    batches = list(data.train(4, 5, 2, views=VIEWS))
    (bad,) = [k for k in range(11) if manifest.path(k).endswith("b/001.png")]
    assert len(said) == 1 and "b/001.png can't be decoded" in said[0] and set(data.bad) == {bad}
    found = seen(iter(batches), VIEWS)
    for (i, v), x in found.items():
        assert bool((x == 0).all()) if i == bad else torch.equal(x, clean[i, v])
    labels = {int(i): int(y) for b in batches for i, y in zip(b.id, b.y, strict=True)}
    assert labels == {i: UNLABELLED if i == bad else manifest.labels[i] for i in range(11)}


def test_an_image_that_fails_in_one_view_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_folder(root, max_bad=0.5)
    data.say = lambda line: None
    decoder = data._decoder("train")
    real = decoder.decode

    def decode(jobs: Any) -> Any:
        for k, made in enumerate(real(jobs)):
            yield made._replace(bad={1: "gone for a moment"}) if k == 4 else made  # view 1 of batch 1

    monkeypatch.setattr(decoder, "decode", decode)
    batches = list(data.train(4, 5, 2, views=VIEWS))
    for number, b in enumerate(batches):
        parts = torch.stack(b.x.chunk(VIEWS))
        lost = [k for k in range(len(b.y)) if int(b.y[k]) == UNLABELLED]
        assert lost == ([1] if number == 1 else [])
        assert all(bool((parts[:, k] == 0).all()) == (k in lost) for k in range(len(b.y)))


def test_growing_images(root: Path) -> None:
    data = open_folder(root, size=64, start_size=32, grow_epochs=2)
    for epoch, side in ((0, 32), (2, 64)):
        one, many = (next(iter(data.train(4, 5, epoch, views=v))) for v in (1, VIEWS))
        assert many.x.shape == (12, 3, side, side) and torch.equal(many.x[:4], one.x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixed", [{"mixup": 0.2}, {"cutmix": 1.0}])
def test_mixed_images_have_one_view(kind: str, mixed: dict[str, float], root: Path) -> None:
    data = opened(kind, root, **mixed)
    assert next(iter(data.train(4, 0, 0))).mix is not None
    with pytest.raises(DataError, match=r"data\.mixup and data\.cutmix mix one view of the images.*leave both at 0"):
        next(iter(data.train(4, 0, 0, views=2)))


class OneView:
    """Somebody's Source, made before there were views."""

    def __init__(self, data: Resident):
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def train(self, batch_size: int, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        return self._data.train(batch_size, seed, epoch, start)


def test_a_run_that_can_t_have_its_views_is_told_before_it_begins(tmp_path: Path) -> None:
    model = Learner(["resnet8"] * 2, "pcl", classes=3, size=8, channels=1)
    recipe = tiny.recipe().model_copy(update={"method": model.config, "nets": Nets(names=model.cohort.names)})
    with pytest.raises(DataError, match=r"leave both at 0, or choose another method"):
        fit(model, tiny.data(), recipe, out=tmp_path / "a", data__mixup=0.2)
    with pytest.raises(
        UsageError, match=r"method pcl needs 2 views of every image, and tiny gives one: its train takes no views="
    ):
        fit(model, OneView(tiny.data()), recipe, out=tmp_path / "b")  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    plain = fit(tiny.learner(), OneView(tiny.data()), tiny.recipe(run__max_steps=1), out=tmp_path / "c")  # type: ignore[arg-type]
    assert plain.steps == 1, "where one view is enough it does"
