"""Sources give the same batches through the augment kernel, interpreted, as in plain torch: images in memory and image files."""

from itertools import zip_longest
from pathlib import Path

import pytest
import torch

from fastffl.data import Arrays, Place, Resident
from fastffl.recipe import Data
from fastffl.values import UNLABELLED, Batch
from fastffl_kernels import _launch, use
from tests.pictures import folder, open_folder

LAYOUTS = [torch.contiguous_format, torch.channels_last]
MIXED = [(0.0, 0.0, LAYOUTS[0]), (0.8, 0.0, LAYOUTS[1]), (0.0, 1.0, LAYOUTS[0]), (0.3, 1.0, LAYOUTS[1])]


def check(got: list[Batch], want: list[Batch], layout: torch.memory_format) -> None:
    for a, b in zip_longest(got, want):
        assert (a.x - b.x).abs().max() < 2e-6 and a.x.is_contiguous(memory_format=layout) and a.x.dtype == b.x.dtype
        assert torch.equal(a.y, b.y) and torch.equal(a.id, b.id)
        assert (a.y2 is None) == (b.y2 is None) == (a.mix is None) == (b.mix is None)
        if a.y2 is not None and b.y2 is not None and a.mix is not None and b.mix is not None:
            assert torch.equal(a.y2, b.y2) and torch.equal(a.mix, b.mix)


@pytest.mark.parametrize(("mixup", "cutmix", "layout"), MIXED)
def test_image_files(
    tmp_path: Path, mixup: float, cutmix: float, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(tmp_path, {"train/a": 5, "train/b": 4, "val/a": 2, "val/b": 1})
    (root / "train" / "a" / "001.png").write_bytes(b"")
    data = open_folder(root, Place(memory_format=layout, rank=0, ranks=1), mixup=mixup, cutmix=cutmix)
    data.say = lambda line: None
    want, tests = list(data.train(4, 7, 1)), list(data.evaluate("val", 2))
    launched: list[str] = []
    launch = _launch.launch
    monkeypatch.setattr(_launch, "launch", lambda kernel, *a, **k: (launched.append(kernel.__name__), launch(kernel, *a, **k)))
    with use("triton"):
        check(list(data.train(4, 7, 1)), want, layout)
        check(list(data.evaluate("val", 2)), tests, layout)
    assert len(launched) == len(want) + len(tests) == 5, "one launch a batch"
    assert sum(int((b.y == UNLABELLED).sum()) for b in want) == 1


@pytest.mark.parametrize(("mixup", "cutmix", "layout"), MIXED[1:])
def test_images_in_memory(mixup: float, cutmix: float, layout: torch.memory_format) -> None:
    images, labels = torch.randint(0, 256, (20, 3, 6, 6), dtype=torch.uint8), torch.arange(20) % 3
    arrays = Arrays("made", ("a", "b", "c"), (images, labels), (images[:3], labels[:3]), (0.4, 0.5, 0.3), (0.2, 0.25, 0.3))
    for ranks in (1, 9):
        place = Place(memory_format=layout, rank=ranks - 1, ranks=ranks)
        data = Resident(arrays, Data(name="custom", pad=2, mixup=mixup, cutmix=cutmix), place)
        want = list(data.train(8, 7, 2))
        assert ranks == 1 or [int(b.id[0]) for b in want] == [-1, -1, -1]
        with use("triton"):
            check(list(data.train(8, 7, 2)), want, layout)
