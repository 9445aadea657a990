"""RandAugment's operations: torchvision's, bit for bit; where a moved image's pixels come from."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from fastffl.data import rand_augment
from fastffl.data.rand_augment import FILL, FULL, OPS, apply, source_of, strength
from fastffl.data.views import Change, Training
from fastffl.recipe import Data

NAMES = {name: "".join(part.capitalize() for part in name.split("_")) for name in OPS}  # as torchvision calls them
MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def picture(size: int, seed: int = 0) -> Tensor:
    """Waves and noise, (3, size, size) uint8: most levels occur."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 5, size), torch.linspace(0, 4, size), indexing="ij")
    waves = torch.stack([torch.sin(x + y), torch.cos(2 * x), torch.sin(y * x)]) * 70 + 128
    return (waves + 10 * torch.randn(3, size, size, generator=generator)).clamp(5, 250).to(torch.uint8)


def theirs(image: Tensor, name: str, magnitude: int, negative: bool) -> Tensor:
    augment = v2.RandAugment(fill=FILL)
    levels, signed = augment._AUGMENTATION_SPACE[NAMES[name]]
    values = levels(FULL + 1, *image.shape[-2:])
    by = 0.0 if values is None else float(values[magnitude])
    kind, fill = v2.InterpolationMode.NEAREST, augment._fill
    return augment._apply_image_or_video_transform(image, NAMES[name], -by if signed and negative else by, kind, fill)


def test_the_operations_are_those_of_the_paper() -> None:
    assert len(OPS) == 14 and {*NAMES.values()} == {*v2.RandAugment._AUGMENTATION_SPACE}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("negative", [False, True])
def test_equal_to_torchvision_at_every_magnitude(name: str, negative: bool) -> None:
    for size in (32, 51):
        image = picture(size)
        for magnitude in range(FULL + 1):
            got = apply(image, [Change(OPS.index(name), negative)], magnitude)
            assert torch.equal(got, theirs(image, name, magnitude, negative)), (size, magnitude)


def test_an_operation_does_something_and_its_sign_matters() -> None:
    image = picture(48)
    for k, name in enumerate(OPS):
        up, down = (apply(image, [Change(k, negative)], 15) for negative in (False, True))
        assert torch.equal(up, image) == (name == "identity")
        assert torch.equal(up, down) == (name not in rand_augment.REACH)


def test_changes_follow_one_another() -> None:
    image, first, then = picture(32), Change(OPS.index("rotate"), False), Change(OPS.index("contrast"), True)
    assert torch.equal(apply(image, [first, then], 12), apply(apply(image, [first], 12), [then], 12))
    assert not torch.equal(apply(image, [first, then], 12), apply(image, [then, first], 12))
    assert torch.equal(apply(image, [], 12), image)


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("negative", [False, True])
def test_where_moved_pixels_come_from(name: str, negative: bool) -> None:
    size, change = 64, Change(OPS.index(name), negative)
    image = picture(size)
    for magnitude in (5, 9, 23, 30):
        a, b, c, d, e, f = source_of(change, magnitude, size)
        y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
        column, row = (a * x + b * y + c).floor().long(), (d * x + e * y + f).floor().long()
        inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
        got = image[:, row.clamp(0, size - 1), column.clamp(0, size - 1)].where(
            inside, torch.tensor(int(FILL), dtype=torch.uint8)
        )
        wrong = (got != apply(image, [change], magnitude)).any(0).float().mean()
        assert wrong < 0.001, (magnitude, wrong)  # between two pixels fp32 may choose the other one
        assert not inside.all()


def test_an_operation_that_moves_nothing_reads_every_pixel_where_it_is() -> None:
    for k, name in enumerate(OPS):
        if name not in MOVES:
            assert source_of(Change(k, True), 30, 100) == (1, 0, 0, 0, 1, 0)


def test_strengths_at_both_ends() -> None:
    for k, name in enumerate(OPS):
        none, full = (strength(Change(k, True), m, 331) for m in (0, FULL))
        expected = {"posterize": (8, 4), "solarize": (255, 0), "rotate": (0, -30), "translate_x": (0, -150)}
        if name in expected:
            assert (none, full) == expected[name]
    assert strength(Change(OPS.index("color"), True), FULL, 9) == pytest.approx(0.1)


def test_draws_reach_every_operation_and_both_signs() -> None:
    view = Training(Data(name="folder", rand_augment=2), 224, 0, 0, len(OPS))
    drawn = {change for id in range(500) for change in view(id, 300, 400).changes}
    assert drawn == {Change(k, negative) for k in range(14) for negative in (False, True)}
