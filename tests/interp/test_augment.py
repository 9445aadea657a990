"""augment's kernel, interpreted: the slow way in float64, the same random numbers as on the CPU, and what it touches."""

import importlib
import random
from typing import Any

import pytest
import torch
from kernelkit import device_work, draws, guarded, layouts
from slow_augment import batch, options
from torch import Tensor

from fastffl.data import Arrays, Place, Resident
from fastffl.data.rng import mix, uniform_bits
from fastffl.recipe import Data
from fastffl_kernels import _launch, use
from fastffl_kernels.augment import DTYPES, Augmented, augment, augment_reference, bytes_moved
from fastffl_kernels.jit import augment as device

module: Any = importlib.import_module("fastffl_kernels.augment")  # the file, not the function of that name
MANTISSA = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}


def wrong(got: Augmented, want: Tensor, share: float | None, dtype: torch.dtype) -> str:
    """What differs from the slow way beyond rounding, in words; empty if nothing. fp32: 5e-6 relative + 1e-6 absolute. Else 2
    units in the last place of the value (the interpreter cuts off bits where a GPU rounds), on top of those 1e-6."""
    x = got.x.double()
    if x.shape != want.shape:
        return f"shape {tuple(x.shape)}, expected {tuple(want.shape)}"
    if not torch.equal(x.isnan(), want.isnan()):
        return "NaN elsewhere"
    off, want = (x - want).nan_to_num(0).abs(), want.nan_to_num(0)
    if dtype == torch.float32:
        bound = 5e-6 * want.abs()
    else:
        bound = 2 * torch.ldexp(torch.ones_like(want), want.frexp().exponent - MANTISSA[dtype]).clamp(max=want.abs())
    if bool((off > bound + 1e-6).any()):
        return f"off by {float((off - bound).max())} beyond the bound"
    if (share is None) != (got.mix is None) or (share is not None and bool(((got.mix.double() - share).abs() > 1e-7).any())):
        return f"mix {got.mix}, expected {share}"
    return ""


def compare(r: random.Random, S: int, N: int, B: int, D: int, **fixed: Any) -> str:
    """One random case: what is wrong with it, if anything. All tensors are guarded; inputs must not change."""
    pad = r.randint(0, min(S - 1, 4))
    o = {**options(r, S, D, pad, r.randint(1, S + 2 * pad)), **fixed}
    images = torch.randint(0, 256, (N, D, S, S), dtype=torch.uint8)
    images = r.choice(list(layouts(images).values()))
    ids = torch.tensor([r.randrange(N) for _ in range(B)], dtype=torch.int64)
    if B and r.random() < 0.1:
        ids[r.randrange(B)] = r.choice([-1, N, 2**40])
    labels = torch.randint(0, 9, (N,)) if r.random() < 0.5 else None
    seed, epoch = r.choice([r.randrange(-(2**63), 2**63), r.randrange(99)]), r.randrange(400)
    with guarded() as g, use("triton"):
        put = [g.put(t) for t in (images, ids, torch.tensor(seed), torch.tensor(epoch))]
        before = [t.clone() for t in put]
        named = labels if labels is None else g.put(labels)
        got = augment(*put, labels=named, **o)
        assert all(torch.equal(a, b) for a, b in zip(put, before, strict=True))
    want, share = batch(images, ids.tolist(), seed, epoch, o)
    if labels is not None:
        own = torch.tensor([int(labels[k]) if 0 <= k < N else -1 for k in ids.tolist()], dtype=torch.int64)
        assert got.labels is not None and torch.equal(got.labels, own)
        assert (got.labels2 is None) == (share is None) and (share is None or torch.equal(got.labels2, own.flip(0)))
    else:
        assert got.labels is None and got.labels2 is None
    last = (0, 1, 3, 4, 2) if o["channels_last"] else (0, 1, 2, 3, 4)
    assert got.x.permute(last).is_contiguous() and got.x.dtype == o["dtype"]
    return wrong(got, want, share, o["dtype"])


@pytest.mark.parametrize("part", range(20))
def test_equals_the_slow_way(part: int) -> None:
    """1,000 cases; sides round the blocks: 11 x 11 = 121 and 3 x 6.5^2 = 127 elements fit the block of 128, 8 x 16, 3 x 43."""
    for r in draws(part, 50):
        S, D = r.choice([(r.randint(1, 9), r.randint(1, 4)), (8, 2), (4, 8), (11, 1), (12, 1), (1, 1), (3, 3)])
        said = compare(r, S, r.randint(1, 5), r.choice([0, 1, 1, 2]) if S > 6 else r.choice([1, 1, 2, 3]), D)
        assert not said, (part, S, D, said)


@pytest.mark.parametrize("S", [31, 32, 33])
def test_several_blocks_an_image(S: int) -> None:
    """1,024 elements a block, one or four blocks a program."""
    for k, r in enumerate(draws(S, 3)):
        assert not compare(r, S, 2, 1 + k, 3 - k, views=1)
    pick = device.pick
    patch = pytest.MonkeyPatch()
    patch.setattr(device, "pick", lambda images, elements: pick(10**6, elements))
    assert device.pick(1, 3 * 32 * 32).per == 3 and device.pick(1, 10**5)[:3] == (1024, 4, 25)
    for r in draws(-S, 2):
        assert not compare(r, S, 2, 1, 3, views=1, size=S, mixup=0, cutmix=0)
    patch.undo()


@pytest.mark.parametrize("last", [True, False])
def test_draws_are_those_of_the_cpu(last: bool) -> None:
    """A Resident gives the same batches, bit for bit, through the kernel: the same crops, mirrored alike, the same arithmetic."""
    images, labels = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8), torch.arange(40) % 3
    arrays = Arrays("made", ("a", "b", "c"), (images, labels), (images[:3], labels[:3]), (0.4, 0.5, 0.3), (0.2, 0.25, 0.3))
    layout = torch.channels_last if last else torch.contiguous_format
    for pad, mode, flip in ((2, "reflect", True), (3, "zero", False)):
        data = Resident(arrays, Data(name="custom", pad=pad, pad_mode=mode, flip=flip), Place(memory_format=layout))
        for seed, epoch in ((0, 0), (7, 1), (2**63 + 5, 2), (7, 1)):
            want = next(data.train(16, seed, epoch))
            with use("triton"):
                got = next(data.train(16, seed, epoch))
            assert torch.equal(got.x, want.x) and torch.equal(got.y, want.y) and torch.equal(got.id, want.id)
            assert got.x.is_contiguous(memory_format=layout)


def test_the_reference_draws_the_same_with_tensors_as_with_integers() -> None:
    ids = torch.randint(0, 2**40, (20,))
    for r in draws(5, 100):
        seed, epoch, stream = r.randrange(-(2**63), 2**63), r.randrange(2**40), r.randrange(80)
        got = uniform_bits(torch.tensor(seed), torch.tensor(epoch), ids, stream)
        assert torch.equal(got, uniform_bits(seed, epoch, ids, stream)) and mix(seed, epoch) >= 0


def test_one_launch_and_nothing_else_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    images, ids = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8), torch.arange(4)
    seed, epoch, labels = torch.tensor(3), torch.tensor(1), torch.arange(9)

    def call() -> Augmented:
        return augment(images, ids, seed, epoch, size=8, pad=2, mean=[0.5] * 3, std=[0.2] * 3, cutmix=1.0, views=2, labels=labels)

    class Idle:
        """A kernel that does nothing: the interpreter's own copies of its arguments would be counted."""

        __name__ = "augment_kernel"

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **named: None

    monkeypatch.setattr(device, "augment_kernel", Idle())
    with use("triton"):
        call()
        ours, torchs = device_work(call)
    assert ours == ["augment_kernel"] and len(ours) == _launch.LAUNCHES["fastffl::augment"]
    assert not torchs


@pytest.mark.parametrize(("mixup", "labelled"), [(0.0, False), (0.0, True), (1.0, True)])
def test_modelled_bytes(monkeypatch: pytest.MonkeyPatch, mixup: float, labelled: bool) -> None:
    """Every byte that the kernel's loads and stores ask for, unpadded so that none is masked."""
    import triton.runtime.interpreter as interpreter

    moved = {"load": 0, "store": 0}
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def loaded(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        moved["load"] += int(mask.data.sum()) * ptrs.dtype.element_ty.primitive_bitwidth // 8
        return load(self, ptrs, mask, other, *rest)

    def stored(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        moved["store"] += int(mask.data.sum()) * ptrs.dtype.element_ty.primitive_bitwidth // 8
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", loaded)
    monkeypatch.setattr(builder, "create_masked_store", stored)
    images, ids = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8), torch.arange(6)
    with use("triton"):
        augment(
            *(images, ids, torch.tensor(3), torch.tensor(1)),
            **{"size": 8, "mean": [0.5] * 3, "std": [0.2] * 3, "mixup": mixup, "dtype": torch.bfloat16, "views": 2},
            labels=torch.arange(9) if labelled else None,
        )
    want = bytes_moved(6, 3, 8, torch.bfloat16, views=2, mixup=mixup > 0, labels=labelled)
    # a program asks for the seed, the epoch, its id, and the batch's numbers where it is mixed: from the cache after the first
    again = 2 * 6 * (8 + 8 + 8) - (8 * 6 + 16) + (2 * 6 * (8 + 8 + 4) if mixup else 0)
    assert moved["load"] + moved["store"] == want + again


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fastffl.augment_lambda.default, (torch.tensor(7), 0.4))
    images, ids = torch.randint(0, 256, (5, 2, 4, 4), dtype=torch.uint8), torch.tensor([3, 0, 1])
    fixed = (torch.tensor(3), torch.tensor(1))
    for labels, dtype, mixup, last in ((None, torch.float32, 0.0, True), (torch.arange(5), torch.float16, 1.0, False)):
        rest = (labels, 4, 1, True, True, [0.5, 0.4], [0.2, 0.3], dtype, 2, 2, mixup, 0.0, last)
        torch.library.opcheck(torch.ops.fastffl.augment.default, (images, ids, *fixed, *rest))


def test_compiles_whole_and_equals_eager() -> None:
    images, ids = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8), torch.tensor([3, 0, 1])
    seed, epoch, labels = torch.tensor(9), torch.tensor(2), torch.arange(5)

    def call(epoch: Tensor) -> Augmented:
        return augment(images, ids, seed, epoch, size=6, pad=2, mean=[0.5] * 3, std=[0.2] * 3, cutout=2, mixup=0.4, labels=labels)

    with use("triton"):
        whole = torch.compile(call, fullgraph=True, backend="aot_eager")
        for e in (epoch, epoch + 1):
            for a, b in zip(whole(e), call(e), strict=True):
                assert torch.equal(a, b)
        assert not torch.equal(call(epoch).x, call(epoch + 1).x), "another epoch draws other crops"


def test_an_empty_batch_and_far_images() -> None:
    """B = 0 launches nothing. Strides beyond int32: 2^34 bytes from image to image, of which only the first is touched."""
    one = torch.randint(0, 256, (1, 2, 4, 4), dtype=torch.uint8)
    seed, epoch, o = torch.tensor(1), torch.tensor(0), {"size": 4, "pad": 1, "mean": [0.5, 0.5], "std": [0.25, 0.25]}
    with use("triton"):
        no_ids, labels = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        got = augment(one, no_ids, seed, epoch, mixup=1.0, labels=labels, **o)
        assert got.x.shape == (1, 0, 2, 4, 4) and got.mix is not None and len(got.mix) == 0
        none = augment(one[:0], torch.zeros(2, dtype=torch.int64), seed, epoch, labels=no_ids, **o)
        assert none.x.isnan().all() and none.labels is not None and none.labels.tolist() == [-1, -1]
        far = one.as_strided(one.shape, (2**34, *one.stride()[1:]))
        assert torch.equal(augment(far, epoch[None], seed, epoch, **o).x, augment(one, epoch[None], seed, epoch, **o).x)
        # the last row of the last channel lies 3 x 2^29 bytes away: the product of two int32 would have wrapped at 2^32
        wide = torch.zeros(1, dtype=torch.uint8).expand(3, 2, 4, 4)
        assert torch.equal(augment(wide, epoch[None], seed, epoch, **o).x, torch.full((1, 1, 2, 4, 4), -2.0))


def test_stepped_and_expanded_ids_and_labels() -> None:
    images, seed, epoch = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8), torch.tensor(1), torch.tensor(0)
    ids, labels = torch.tensor([3, 9, 0, 9, 5, 9])[::2], torch.tensor([4, 0, 5, 0, 6, 0, 7, 0, 8, 0, 9, 0])[::2]
    o: dict[str, Any] = {"size": 4, "pad": 1, "mean": [0.5], "std": [0.25], "cutmix": 1.0}
    with use("triton"):
        for i, y in ((ids, labels), (ids[:1].expand(3), labels[:1].expand(6))):
            got = augment(images, i, seed, epoch, labels=y, **o)
            want = augment_reference(images, i.contiguous(), seed, epoch, labels=y.contiguous(), **o)
            assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_offsets_are_64_bit() -> None:
    """The kernel's own address function, called alone with huge strides and compared with Python's integers."""
    import triton
    import triton.language as tl

    @triton.jit
    def alone(out, row, d, y, x, stride_n, stride_d, stride_h, stride_w):
        tl.store(out, device._offset(tl.load(row), d, y, x, stride_n, stride_d, stride_h, stride_w))

    out, row = torch.zeros(1, dtype=torch.int64), torch.tensor([70_000])
    alone[(1,)](out, row, 2, 223, 200, 150_528, 2_000_000_000, 100_000_000, 90_000_000)
    assert int(out) == 70_000 * 150_528 + 2 * 2_000_000_000 + 223 * 100_000_000 + 200 * 90_000_000


def test_more_channels_than_the_kernel_takes() -> None:
    images, ids, scalar = torch.randint(0, 256, (2, 17, 3, 3), dtype=torch.uint8), torch.tensor([1]), torch.tensor(0)
    o = {"size": 3, "mean": [0.5] * 17, "std": [0.2] * 17}
    with use("triton"), pytest.raises(ValueError, match="17 channels; the kernel takes at most 16"):
        augment(images, ids, scalar, scalar, **o)
    assert augment(images, ids, scalar, scalar, **o).x.shape == (1, 1, 17, 3, 3)
    with use("triton"):
        images, o = images[:, :16], {"size": 3, "mean": [0.5] * 16, "std": [0.2] * 16}
        got = augment(images, ids, scalar, scalar, **o)
    assert torch.equal(got.x, augment(images, ids, scalar, scalar, **o).x)


BUGS = {
    "mirrors the source row": ("tl.where(_bits(h, stream + 2, row) < 0x80000000, SIZE - 1 - j, j)", "SIZE - 1 - j"),
    "no reflection on the right": ("x = (S - 1) - tl.abs((S - 1) - tl.abs(x))", "x = tl.abs(x) % S"),
    "a crop never at the end": ("S + 2 * PAD - SIZE + 1) - PAD\n    x = j", "S + 2 * PAD - SIZE) - PAD\n    x = j"),
    "cutout one too wide": ("(j < left + CUTOUT)", "(j <= left + CUTOUT)"),
    "1 % too bright": ("v = v * scale + shift", "v = v * scale * 1.01 + shift"),
    "share not of the clipped box": ("((y1 - y0) * (x1 - x0)).to(tl.float32)", "(side * side).to(tl.float32)"),
    "views alike": ("stream = view * 16", "stream = view * 0"),
    "partner is the next": ("ids + (B - 1 - b) * stride_ids", "ids + ((b + 1) % B) * stride_ids"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_comparison_sees_seeded_bugs(bug: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import importlib.util
    from pathlib import Path

    good, bad = BUGS[bug]
    text = Path(device.__file__).read_text()
    assert text.count(good) == 1, "the line that the bug replaces is gone"
    path = tmp_path / "seeded.py"
    path.write_text(text.replace(good, bad).replace("from .._compile", "from fastffl_kernels._compile"))
    spec = importlib.util.spec_from_file_location("seeded", path)
    assert spec and spec.loader
    seeded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded)
    monkeypatch.setattr(device, "augment_kernel", seeded.augment_kernel)
    o = {"pad_mode": "reflect", "flip": True, "cutout": 3, "mixup": 0, "cutmix": 1.0 if "box" in bug or "partner" in bug else 0}

    def seen(r: random.Random) -> bool:
        try:
            return bool(compare(r, 6, 4, 3, 1, views=2, **o))
        except (AssertionError, RuntimeError):  # a bug may show as a wrong label instead
            return True

    assert any(seen(r) for r in draws(1, 12))


def test_module_and_reference_share_their_streams() -> None:
    """The kernel's literals are the reference's names."""
    assert (module.TOP, module.LEFT, module.FLIP, module.CUT_ROW, module.CUT_COLUMN) == (0, 1, 2, 3, 4)
    assert (module.LAMBDA, module.BOX_ROW, module.BOX_COLUMN, module.BOX, module.VIEW) == (5, 6, 7, 8, 16)
    assert set(DTYPES) == set(MANTISSA) and callable(augment_reference)
