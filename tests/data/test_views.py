"""Views: windows inside the image, spread as torchvision spreads them, evaluation's geometry torchvision's pixel for pixel."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from fastffl.data.portable import show
from fastffl.data.views import Change, Draws, Evaluation, Training, View, train_size
from fastffl.recipe import Data
from tests.pictures import picture

SIZES = [(375, 500), (500, 333), (1, 1), (1, 900), (900, 1), (17, 2400), (64, 64), (3, 2)]
CFG = Data(name="folder")


def gap(a: list[float], b: list[float]) -> float:
    """Kolmogorov and Smirnov's distance between two samples, in units in which 1.63 is beyond 99 of 100 equal ones."""
    x, y = torch.tensor(a).double().sort().values, torch.tensor(b).double().sort().values
    both = torch.cat([x, y])
    far = (torch.searchsorted(x, both, right=True) / len(x) - torch.searchsorted(y, both, right=True) / len(y)).abs().max()
    return float(far) * math.sqrt(len(x) * len(y) / (len(x) + len(y)))


def inside(view: View, h: int, w: int, size: int) -> bool:
    return (
        view.height >= 1
        and view.width >= 1
        and 0 <= view.top <= h - view.height
        and 0 <= view.left <= w - view.width
        and 0 <= view.down <= view.rows - view.size
        and 0 <= view.right <= view.columns - view.size
        and view.size == size
    )


@pytest.mark.parametrize("size", [4, 32, 224])
@pytest.mark.parametrize(("h", "w"), SIZES)
def test_every_window_is_inside_the_image(h: int, w: int, size: int) -> None:
    cfg = Data(name="folder", scale=(0.01, 1.0), ratio=(0.1, 5.0))
    for settings in (CFG, cfg):
        for id in range(300):
            assert inside(Training(settings, size, 0, 0)(id, h, w), h, w, size)
        assert inside(Evaluation(settings, size)(0, h, w), h, w, size)


@pytest.mark.parametrize(("h", "w"), [(375, 500), (500, 333), (64, 64), (40, 400), (400, 40)])
def test_windows_are_spread_as_torchvision_spreads_them(h: int, w: int) -> None:
    n = 3000
    image = torch.empty(3, h, w)
    theirs = [v2.RandomResizedCrop(8).make_params([image]) for _ in range(n)]
    ours = [Training(CFG, 8, 5, 1)(id, h, w) for id in range(n)]
    for name, mine, other in (
        ("area", [v.height * v.width / (h * w) for v in ours], [p["height"] * p["width"] / (h * w) for p in theirs]),
        ("ratio", [v.width / v.height for v in ours], [p["width"] / p["height"] for p in theirs]),
        ("top", [v.top / h for v in ours], [p["top"] / h for p in theirs]),
        ("left", [v.left / w for v in ours], [p["left"] / w for p in theirs]),
    ):
        assert gap(mine, other) < 2.2, f"{name}: one in 8,000 is beyond"  # exp(-2 x 2.2^2) x 2


def test_the_test_of_spread_can_fail() -> None:
    n = 3000
    theirs = [v2.RandomResizedCrop(8).make_params([torch.empty(3, 375, 500)]) for _ in range(n)]
    ours = [Training(Data(name="folder", scale=(0.15, 1.0)), 8, 5, 1)(id, 375, 500) for id in range(n)]
    assert gap([v.height * v.width for v in ours], [p["height"] * p["width"] for p in theirs]) > 2.2
    square = [Training(Data(name="folder", ratio=(0.9, 1.1)), 8, 5, 1)(id, 375, 500) for id in range(n)]
    assert gap([v.width / v.height for v in square], [p["width"] / p["height"] for p in theirs]) > 2.2


def test_scale_and_ratio_are_those_asked_for() -> None:
    cfg = Data(name="folder", scale=(0.25, 0.5), ratio=(1.0, 2.0))
    for id in range(500):
        v = Training(cfg, 8, 0, 0)(id, 400, 500)
        assert 0.245 < v.height * v.width / 200_000 < 0.505 and 0.99 < v.width / v.height < 2.02
    whole = Training(Data(name="folder", scale=(1.0, 1.0), ratio=(1.0, 1.0)), 8, 0, 0)(0, 30, 30)
    assert (whole.top, whole.left, whole.height, whole.width) == (0, 0, 30, 30)


@pytest.mark.parametrize("size", [20, 31, 224])
@pytest.mark.parametrize(("h", "w"), [(375, 500), (501, 333), (97, 97), (23, 61), (64, 301), (20, 150)])
def test_evaluation_is_torchvisions_resize_and_centre_crop(h: int, w: int, size: int) -> None:
    image = picture(w, h)
    x = v2.functional.pil_to_tensor(image)
    for crop in (224 / 256, 1.0, 0.95):
        short = int(size / crop + 1e-6)
        want = v2.CenterCrop(size)(v2.Resize(short, antialias=True)(x))
        view = Evaluation(Data(name="folder", crop=crop), size)(7, h, w)
        assert torch.equal(show(image, view, 9), want)
    assert Evaluation(CFG, 224)(0, 375, 500)[4:8] == (256, 341, 16, 58)


def test_the_ends_of_a_very_long_image_are_not_enlarged() -> None:
    """A line of 20,000 pixels would be 5 million wide at 256 high; the centre crop shows 1 pixel of it."""
    view = Evaluation(CFG, 224)(0, 1, 20001)
    assert (view.left, view.width, view.rows, view.columns) == (9996, 8, 256, 2048)
    assert (Evaluation(CFG, 224)(0, 900, 3).height, Evaluation(CFG, 224)(0, 24, 3).height) == (24, 24)
    long = picture(20001, 3)
    kept = show(long, Evaluation(CFG, 16)(0, 3, 20001), 9)
    assert kept[0].float().mean() == pytest.approx(127, abs=1)


def test_a_view_is_a_function_of_seed_epoch_and_id() -> None:
    cfg = Data(name="folder", rand_augment=2)
    views = [Training(cfg, 32, 3, 1, 14)(id, 300, 400) for id in range(200)]
    assert views == [Training(cfg, 32, 3, 1, 14)(id, 300, 400) for id in range(200)]
    for seed, epoch in ((4, 1), (3, 2)):
        assert not set(views) & {Training(cfg, 32, seed, epoch, 14)(id, 300, 400) for id in range(200)}
    assert len(set(views)) == 200
    other = [Training(cfg, 32, 3, 1, 14)(id, 200, 600) for id in range(200)]
    assert [(v.flip, v.changes) for v in views] == [(v.flip, v.changes) for v in other], "whatever the image's size"
    small = [Training(cfg, 16, 3, 1, 14)(id, 300, 400)[:4] for id in range(200)]
    assert small == [v[:4] for v in views], "the same window at every size of progressive resizing"


def chi2(counts: Tensor) -> float:
    expected = counts.sum() / counts.numel()
    return float((((counts - expected) ** 2 / expected).sum() - counts.numel() + 1) / math.sqrt(2 * (counts.numel() - 1)))


def test_changes_and_flips_are_uniform_and_unrelated() -> None:
    cfg = Data(name="folder", rand_augment=2)
    views = [Training(cfg, 32, 0, 0, 14)(id, 30, 40) for id in range(12000)]
    ops = torch.tensor([[c.op for c in v.changes] for v in views])
    signs = torch.tensor([[c.negative for c in v.changes] for v in views])
    flips = torch.tensor([v.flip for v in views])
    assert ops.shape == (12000, 2) and chi2((ops[:, 0] * 14 + ops[:, 1]).bincount(minlength=196).double()) < 5
    assert chi2((flips * 4 + signs[:, 0] * 2 + signs[:, 1]).bincount(minlength=8).double()) < 5
    assert not any(Training(cfg.model_copy(update={"flip": False}), 32, 0, 0, 14)(id, 30, 40).flip for id in range(100))
    assert Training(CFG, 32, 0, 0)(0, 30, 40).changes == ()
    assert isinstance(views[0].changes[0], Change)


def test_draws_are_uniform() -> None:
    words = torch.tensor([[d.bits() for _ in range(4)] for d in (Draws(1, 2, id) for id in range(20000))])
    assert words.min() >= 0 and words.max() < 2**32
    for column in words.T:
        assert chi2((column >> 26).bincount(minlength=64).double()) < 5
    assert chi2(((words[:, 0] >> 29) * 8 + (words[:, 1] >> 29)).bincount(minlength=64).double()) < 5
    d = Draws(0, 0, 0)
    assert all(2.0 <= d.uniform(2, 3) < 3.0 and 0 <= d.below(7) < 7 for _ in range(1000))


def test_sizes_rise_to_the_full_one() -> None:
    cfg = Data(name="folder", start_size=128, grow_epochs=10)
    sizes = [train_size(cfg, 224, epoch) for epoch in range(12)]
    assert sizes == sorted(sizes) and sizes[0] == 128 and sizes[-2:] == [224, 224] and {s % 32 for s in sizes} == {0}
    assert set(sizes) == {128, 160, 192, 224}
    assert train_size(CFG, 224, 0) == 224
    odd = [train_size(Data(name="folder", start_size=100, grow_epochs=5), 150, e) for e in range(6)]
    assert odd[0] == 100 and odd[-1] == 150 and odd == sorted(odd) and max(odd) == 150
