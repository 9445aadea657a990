"""augment's reference: the slow way in float64, today's Resident bit for bit, the distributions it draws from, its errors."""

import math
from typing import Any

import pytest
import torch
from kernelkit import draws, layouts
from slow_augment import batch, options
from torch import Tensor

from fastffl.data import Arrays, Place, Resident
from fastffl.data.rng import mix, uniform_bits
from fastffl.recipe import Data
from fastffl_kernels import _compile, explain, use
from fastffl_kernels._draws import _mix_tensors, signed
from fastffl_kernels.augment import affine, augment, augment_reference, beta_quantiles, bytes_moved, draw_mix

PLAIN: dict[str, Any] = {"size": 6, "pad": 2, "mean": [0.5] * 3, "std": [0.25] * 3}
TOL = {torch.float32: (5e-6, 1e-6), torch.float16: (2.0**-11, 1e-6), torch.bfloat16: (2.0**-8, 1e-6)}


def scalars(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(v) for v in values)


@pytest.mark.parametrize("part", range(10))
def test_equals_the_slow_way(part: int) -> None:
    for r in draws(part, 30):
        S, D, N = r.randint(1, 9), r.randint(1, 4), r.randint(1, 5)
        pad = r.randint(0, min(S - 1, 4))
        o = options(r, S, D, pad, r.randint(1, S + 2 * pad))
        images = r.choice(list(layouts(torch.randint(0, 256, (N, D, S, S), dtype=torch.uint8)).values()))
        ids = [r.randrange(-1 if r.random() < 0.1 else 0, N) for _ in range(r.randint(0, 4))]
        labels = torch.randint(0, 9, (N,))
        seed, epoch = r.randrange(-(2**63), 2**63), r.randrange(400)
        kept = images.clone()
        got = augment(images, torch.tensor(ids, dtype=torch.int64), *scalars(seed, epoch), labels=labels, **o)
        assert torch.equal(images, kept) and got.x.dtype == o["dtype"]
        want, share = batch(images, ids, seed, epoch, o)
        rtol, atol = TOL[o["dtype"]]
        torch.testing.assert_close(got.x.double(), want, rtol=rtol, atol=atol, equal_nan=True)
        assert got.labels is not None and got.labels.tolist() == [int(labels[k]) if k >= 0 else -1 for k in ids]
        assert (got.mix is None) == (share is None) == (got.labels2 is None)
        if share is not None:
            assert got.mix is not None and got.mix.sub(share).abs().sum() < 1e-6 and got.mix.shape == (len(ids),)
            assert got.labels2 is not None and torch.equal(got.labels2, got.labels.flip(0))


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("pad", "mode", "flip"), [(2, "reflect", True), (0, "reflect", True), (3, "zero", False)])
def test_a_residents_batches_bit_for_bit(last: bool, pad: int, mode: str, flip: bool) -> None:
    """From padded images and, by index, from the images themselves."""
    images, labels = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8), torch.arange(40) % 3
    arrays = Arrays("made", ("a", "b", "c"), (images, labels), (images[:3], labels[:3]), (0.4, 0.5, 0.3), (0.2, 0.25, 0.3))
    layout = torch.channels_last if last else torch.contiguous_format
    data = Resident(arrays, Data(name="custom", pad=pad, pad_mode=mode, flip=flip), Place(memory_format=layout))
    for seed, epoch in ((0, 0), (2**63 - 1, 3)):
        for want in data.train(16, seed, epoch):
            for held, by in ((data._x["train"], 0), (images, pad)):
                got = augment(
                    *(held, want.id, *scalars(seed, epoch)),
                    **{"size": 6, "pad": by, "pad_mode": mode, "flip": flip, "mean": arrays.mean, "std": arrays.std},
                    **{"channels_last": last, "labels": labels},
                )
                assert torch.equal(got.x[0], want.x) and got.x[0].is_contiguous(memory_format=layout)
                assert got.labels is not None and torch.equal(got.labels, want.y)


def test_keys_of_tensors_are_those_of_integers() -> None:
    ids = torch.randint(0, 2**40, (20,))
    for r in draws(5, 300):
        words = [r.choice([r.randrange(-(2**63), 2**63), r.randrange(400)]) for _ in range(3)]
        assert int(_mix_tensors(*scalars(*words[:2]), words[2])) == mix(*words)
        stream = r.randrange(80)
        got = uniform_bits(*scalars(*words[:2]), ids, stream)
        assert torch.equal(got, uniform_bits(words[0], words[1], ids, stream))
    assert [signed(w) for w in (0, 2**63 - 1, 2**63, 2**64 - 1, -1, 2**64 + 5)] == [0, 2**63 - 1, -(2**63), -1, -1, 5]


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 0.5, 1.0, 2.0, 8.0])
def test_quantiles_are_those_of_beta(alpha: float) -> None:
    q = beta_quantiles(alpha).double()
    assert (q.diff() >= 0).all() and q.min() >= 0 and q.max() <= 1
    torch.testing.assert_close(q + q.flip(0), torch.ones_like(q), rtol=0, atol=1e-7)
    # moments of Beta(a, a): variance 1 / (4 (2a + 1)), fourth central moment 3 / (16 (2a + 1) (2a + 3))
    assert abs(q.var(unbiased=False) * 4 * (2 * alpha + 1) - 1) < 2e-3
    assert abs((q - 0.5).pow(4).mean() * 16 * (2 * alpha + 1) * (2 * alpha + 3) / 3 - 1) < 4e-3
    if alpha == 1:
        torch.testing.assert_close(q, (torch.arange(4096) + 0.5).double() / 4096, rtol=0, atol=1e-7)
    if alpha == 0.5:  # the arcsine distribution
        want = torch.sin(math.pi / 2 * (torch.arange(4096) + 0.5).double() / 4096) ** 2
        torch.testing.assert_close(q, want, rtol=0, atol=1e-7)


def test_lambda_and_box_are_spread_as_the_papers_say() -> None:
    """Over epochs: lambda of mixup is Beta, half the batches are cutmix where both are asked for, boxes are centred anywhere."""
    first, size = torch.tensor(17), 32
    lam = torch.stack([draw_mix(0, e, first, size, 1.0, 0.0)[0] for e in range(3000)]).double()
    assert (lam.sort().values - (torch.arange(3000) + 0.5) / 3000).abs().max() < 1.95 / math.sqrt(3000), "Kolmogorov, 1 in 1,000"
    both = [draw_mix(0, e, first, size, 0.2, 1.0) for e in range(2000)]
    boxes = torch.stack([box for _, box in both])
    cut = boxes[:, 0] >= 0
    assert abs(int(cut.sum()) - 1000) < 150 and (boxes[~cut] == -1).all()
    area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    share = torch.stack([s for s, _ in both])
    assert torch.equal(share[cut], 1 - area[cut] / 1024) and boxes.max() == 32
    whole = (boxes[cut][:, 0] > 0) & (boxes[cut][:, 1] < 32)
    centre = boxes[cut][whole][:, :2].double().mean(1)
    assert abs(centre.mean() - 16) < 1


def test_cutout_is_a_square_round_any_pixel() -> None:
    images, ids = torch.full((600, 1, 8, 8), 255, dtype=torch.uint8), torch.arange(600)
    o: dict[str, Any] = {"size": 8, "mean": [0.0], "std": [1.0], "cutout": 4}
    got = augment(images, ids, *scalars(0, 0), **o)
    hole = got.x[0, :, 0] == 0
    rows, columns = hole.any(2).sum(1), hole.any(1).sum(1)
    assert torch.equal(hole.sum((1, 2)), rows * columns) and set(rows.tolist()) == {2, 3, 4}
    hit = hole.double().mean(0)  # a corner is in the hole for 2 x 3 of 64 centres ... the middle for 4 x 4
    assert abs(hit[3, 3] - 16 / 64) < 0.07 and abs(hit[0, 0] - 9 / 64) < 0.06
    assert torch.equal(augment(images, ids, *scalars(0, 0), **{**o, "cutout": 99}).x, torch.zeros(1, 600, 1, 8, 8))


def test_views_differ_and_the_first_is_the_single_one() -> None:
    images, ids = torch.randint(0, 256, (50, 3, 6, 6), dtype=torch.uint8), torch.arange(50)
    three = augment(images, ids, *scalars(1, 2), views=3, **PLAIN).x
    assert torch.equal(three[:1], augment(images, ids, *scalars(1, 2), **PLAIN).x)
    assert not torch.equal(three[0], three[1]) and not torch.equal(three[1], three[2])


def test_a_sample_does_not_depend_on_its_batch() -> None:
    images = torch.randint(0, 256, (9, 3, 6, 6), dtype=torch.uint8)
    whole = augment(images, torch.arange(9), *scalars(1, 2), cutout=2, **PLAIN).x
    some = augment(images, torch.tensor([7, 2]), *scalars(1, 2), cutout=2, **PLAIN).x
    assert torch.equal(some, whole[:, [7, 2]])


@pytest.mark.parametrize("mixed", [{}, {"mixup": 0.3, "cutmix": 1.0}])
def test_compiles_whole(mixed: dict[str, float]) -> None:
    images, ids, (seed, epoch) = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8), torch.tensor([3, 0]), scalars(9, 2)

    def call(epoch: Tensor) -> Any:
        return augment(images, ids, seed, epoch, labels=torch.arange(5), cutout=2, **mixed, **PLAIN)

    whole = torch.compile(call, fullgraph=True, backend="aot_eager")
    for e in (epoch, epoch + 1):
        assert torch.equal(whole(e).x, call(e).x) and torch.equal(whole(e).labels, call(e).labels)


def test_scale_and_shift_are_those_of_fp32_arithmetic() -> None:
    for r in draws(2, 300):
        mean, std = ([r.uniform(0.01, 1.0) for _ in range(3)] for _ in range(2))
        scale, shift = affine(mean, std)
        assert scale == tuple((1 / (255 * torch.tensor(std))).tolist())
        assert shift == tuple((-torch.tensor(mean) / torch.tensor(std)).tolist())


def test_modelled_bytes() -> None:
    """128 CIFAR images: 0.39 MB in, 0.79 MB out in bf16."""
    assert bytes_moved(128, 3, 32, torch.bfloat16) == 128 * (3072 + 6144 + 8) + 16
    assert bytes_moved(1, 3, 32, torch.float32, views=2, mixup=True, labels=True) == 2 * 3072 * 6 + 8 + 16 + 32 + 4


def test_stores_are_16_bytes() -> None:
    """Loads can't be wide, stores are in both layouts: two instructions' difference between 1.2 and 4 times the transactions."""
    pytest.importorskip("triton")
    for case in _compile.cases("augment"):
        if "bf16" in case.name and "cutmix" not in case.name:
            assert _compile.report(case, 90).stores == 16, case.name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"images": torch.zeros(2, 3, 6, 6)}, "images are torch.float32"),
        ({"images": torch.zeros(2, 3, 6, 5, dtype=torch.uint8)}, "expected uint8 squares"),
        ({"ids": torch.zeros(2)}, r"ids: \(2,\) torch.float32 on cpu; expected \(B,\) torch.int64"),
        ({"ids": torch.tensor(0)}, r"ids: \(\) torch.int64"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, r"seed: \(1,\)"),
        ({"epoch": torch.tensor(0, dtype=torch.int32)}, "epoch: .* torch.int32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels: \(3,\) .* expected \(2,\), one per image"),
        ({"pad_mode": "edge"}, "pad_mode='edge'; expected 'reflect' or 'zero'"),
        ({"pad": 6}, "pad=6; .* less than 6"),
        ({"pad": -1, "pad_mode": "zero"}, "pad=-1"),
        ({"size": 11}, r"size=11; expected 1..10"),
        ({"size": 0}, "size=0"),
        ({"mean": [0.5]}, "expected 3 numbers each"),
        ({"std": [0.5, 0.0, 0.5]}, "std above 0"),
        ({"dtype": torch.float64}, "dtype=torch.float64; expected bf16, fp16 or fp32"),
        ({"views": 0}, "views=0"),
        ({"cutout": -1}, "cutout=-1"),
        ({"mixup": -0.1}, "mixup=-0.1"),
        ({"cutmix": 9.0}, "cutmix=9.0; expected an alpha of 0"),
        ({"cutmix": math.nan}, "cutmix=nan"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], text: str) -> None:
    given = {"images": torch.zeros(2, 3, 6, 6, dtype=torch.uint8), "ids": torch.tensor([0, 1]), "seed": torch.tensor(0)}
    with pytest.raises(ValueError, match=text):
        augment(**{**given, "epoch": torch.tensor(0), **PLAIN, **change})


def test_triton_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    images = torch.zeros(2, 3, 6, 6, dtype=torch.uint8)
    with use("triton"), pytest.raises(ValueError, match="on cpu; Triton needs CUDA"):
        augment(images, torch.tensor([0]), *scalars(0, 0), **PLAIN)
    assert "the op has a Triton path" in explain("augment", images) and callable(augment_reference)
