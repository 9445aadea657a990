"""Device code of augment: each program makes a part of one finished image; a pixel is found by index, nothing is padded.

Letters: N images of D x S x S bytes, B samples, V views, SIZE the side that comes out. Flat element e of an output image is
pixel e // D, channel e % D where CHANNELS_LAST, else channel e // SIZE^2. SCALE and SHIFT are one fp32 number a channel.

Random numbers are those of `_draws.uniform_bits`, in unsigned arithmetic, from seed and epoch on the device. Streams 16 v + k
of view v: 0 top, 1 left, 2 flip, 3 and 4 the centre of the cutout. Of the whole batch, drawn for the id of its first sample:
5 lambda, 6 and 7 the centre of cutmix's box, 8 mixup or cutmix.
"""

# mypy: allow-untyped-defs
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._compile import Case


class Pick(NamedTuple):
    block: int  # elements a program makes at once
    per: int  # times it does so
    parts: int  # programs per image
    warps: int


def pick(images: int, elements: int) -> Pick:
    """For `images` outputs of `elements` each. 8 elements a thread are one 16-byte store of bf16; where there are more
    programs than 132 processors hold at once (16 each), four blocks share the drawing of the random numbers."""
    block = min(1024, max(128, 1 << (elements - 1).bit_length()))
    blocks = -(-elements // block)
    per = 1 if images * blocks <= 132 * 16 else min(4, blocks)
    return Pick(block, per, -(-blocks // per), max(1, block // 256))


@triton.jit
def _step(h, word):
    """One word into the key: a step of splitmix64."""
    h = (h ^ word) * 0xBF58476D1CE4E5B9
    h = (h ^ (h >> 27)) * 0x94D049BB133111EB
    return h ^ (h >> 31)


@triton.jit
def _bits(h, stream, id):
    """uint32, uniform: `_draws.uniform_bits` from the key `h` of seed and epoch."""
    key = _step(h, stream.to(tl.uint64)) & 0x7FFFFFFFFFFFFFFF
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    b = id.to(tl.uint32) ^ low
    b = ((b ^ (b >> 16)) * 0x85EBCA6B) ^ high
    b = ((b ^ (b >> 16)) * 0xC2B2AE35) ^ high
    b = (b ^ (b >> 13)) * 0x85EBCA6B
    return b ^ (b >> 16)


@triton.jit
def _below(bits, n: tl.constexpr):
    return ((bits.to(tl.uint64) * n) >> 32).to(tl.int32)


@triton.jit
def _offset(row, d, y, x, stride_n, stride_d, stride_h, stride_w):
    """Bytes from the first pixel of the first image, int64: a data set may have more than 2^31."""
    return row * stride_n + d.to(tl.int64) * stride_d + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w


@triton.jit
def _view(
    images, row, known, h, view, i, j, d, live, stride_n, stride_d, stride_h, stride_w,
    S: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, REFLECT: tl.constexpr, FLIP: tl.constexpr,
    CUTOUT: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Pixels (i, j, d) of one view of image `row`, fp32 and normalised; NaN where there is no such image."""
    stream = view * 16
    y = i + _below(_bits(h, stream, row), S + 2 * PAD - SIZE + 1) - PAD
    x = j
    if FLIP:
        x = tl.where(_bits(h, stream + 2, row) < 0x80000000, SIZE - 1 - j, j)
    x += _below(_bits(h, stream + 1, row), S + 2 * PAD - SIZE + 1) - PAD
    inside = live
    if REFLECT:
        y = (S - 1) - tl.abs((S - 1) - tl.abs(y))
        x = (S - 1) - tl.abs((S - 1) - tl.abs(x))
    else:
        inside = inside & (y >= 0) & (y < S) & (x >= 0) & (x < S)
    at = images + _offset(row, d, y, x, stride_n, stride_d, stride_h, stride_w)
    v = tl.load(at, mask=inside, other=0).to(tl.float32)
    scale, shift = tl.full(d.shape, SCALE[0], tl.float32), tl.full(d.shape, SHIFT[0], tl.float32)
    for c in tl.static_range(1, D):
        scale, shift = tl.where(d == c, SCALE[c], scale), tl.where(d == c, SHIFT[c], shift)
    v = v * scale + shift
    if CUTOUT > 0:
        top = _below(_bits(h, stream + 3, row), SIZE) - CUTOUT // 2
        left = _below(_bits(h, stream + 4, row), SIZE) - CUTOUT // 2
        v = tl.where((i >= top) & (i < top + CUTOUT) & (j >= left) & (j < left + CUTOUT), 0.0, v)
    return tl.where(known, v, float("nan"))


@triton.jit
def _share(h, first, quantiles, box_quantiles, SIZE: tl.constexpr, MIXUP: tl.constexpr, CUTMIX: tl.constexpr):
    """The sample's share of its own batch place, fp32, and the box [top, bottom) x [left, right) that its partner fills; without
    a box all four are -1."""
    share = tl.full([], 1.0, tl.float32)
    top = tl.full([], -1, tl.int32)
    bottom, left, right = top, top, top
    k = (_bits(h, tl.full([], 5, tl.int32), first) >> 20).to(tl.int32)
    if MIXUP:
        share = tl.load(quantiles + k)
    if CUTMIX:
        side = (SIZE * tl.math.sqrt_rn(1.0 - tl.load(box_quantiles + k))).to(tl.int32)
        y = _below(_bits(h, tl.full([], 6, tl.int32), first), SIZE)
        x = _below(_bits(h, tl.full([], 7, tl.int32), first), SIZE)
        y0, y1 = tl.maximum(y - side // 2, 0), tl.minimum(y + side // 2, SIZE)
        x0, x1 = tl.maximum(x - side // 2, 0), tl.minimum(x + side // 2, SIZE)
        area = ((y1 - y0) * (x1 - x0)).to(tl.float32)
        chosen = tl.full([], 1, tl.int1)
        if MIXUP:
            chosen = _bits(h, tl.full([], 8, tl.int32), first) < 0x80000000
        share = tl.where(chosen, 1.0 - tl.math.div_rn(area, tl.full([], SIZE * SIZE, tl.float32)), share)
        top, bottom = tl.where(chosen, y0, top), tl.where(chosen, y1, bottom)
        left, right = tl.where(chosen, x0, left), tl.where(chosen, x1, right)
    return share, top, bottom, left, right


@triton.jit
def augment_kernel(
    images, ids, seed, epoch, labels, quantiles, box_quantiles, out, out_labels, out_labels2, out_mix,
    N, B, stride_n, stride_d, stride_h, stride_w, stride_ids, stride_labels,
    S: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, REFLECT: tl.constexpr, FLIP: tl.constexpr,
    CUTOUT: tl.constexpr, MIXUP: tl.constexpr, CUTMIX: tl.constexpr, LABELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr, PER: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Program (view, sample, part): PER blocks of BLOCK elements of one output image."""
    MIXED: tl.constexpr = MIXUP or CUTMIX
    image, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    view, b = image // B, (image % B).to(tl.int64)
    row = tl.load(ids + b * stride_ids)
    known = (row >= 0) & (row < N)
    end = tl.where(known, D * SIZE * SIZE, 0)  # elements to read; the interpreter turns a mask with a scalar condition into int32
    h = _step(tl.full([], 0x9E3779B97F4A7C15, tl.uint64), tl.load(seed).to(tl.uint64))
    h = _step(h, tl.load(epoch).to(tl.uint64))
    if MIXED:
        row2 = tl.load(ids + (B - 1 - b) * stride_ids)
        known2 = (row2 >= 0) & (row2 < N)
        end2 = tl.where(known2, D * SIZE * SIZE, 0)
        share, top, bottom, left, right = _share(h, tl.load(ids), quantiles, box_quantiles, SIZE, MIXUP, CUTMIX)
    writes = image * PARTS + part < B * PARTS  # those of view 0
    if writes & (part == 0):
        if LABELS:
            tl.store(out_labels + b, tl.load(labels + row * stride_labels, mask=known, other=-1))
        if MIXED:
            if LABELS:
                tl.store(out_labels2 + b, tl.load(labels + row2 * stride_labels, mask=known2, other=-1))
            tl.store(out_mix + b, share)
    image_out = out + image.to(tl.int64) * (D * SIZE * SIZE)
    for k in tl.range(PER):
        e = (part * PER + k) * BLOCK + tl.arange(0, BLOCK)
        if CHANNELS_LAST:
            d, i, j = e % D, e // (D * SIZE), e // D % SIZE
        else:
            d, i, j = e // (SIZE * SIZE), e // SIZE % SIZE, e % SIZE
        if MIXED:
            boxed = (i >= top) & (i < bottom) & (j >= left) & (j < right)
            w = tl.where(top < 0, share, tl.where(boxed, 0.0, 1.0))
            own = _view(
                images, row, known, h, view, i, j, d, (e < end) & (w > 0), stride_n, stride_d, stride_h, stride_w,
                S, D, SIZE, PAD, REFLECT, FLIP, CUTOUT, SCALE, SHIFT,
            )  # fmt: skip
            other = _view(
                images, row2, known2, h, view, i, j, d, (e < end2) & (w < 1), stride_n, stride_d, stride_h, stride_w,
                S, D, SIZE, PAD, REFLECT, FLIP, CUTOUT, SCALE, SHIFT,
            )  # fmt: skip
            v = w * own + (1.0 - w) * other
        else:
            v = _view(
                images, row, known, h, view, i, j, d, e < end, stride_n, stride_d, stride_h, stride_w,
                S, D, SIZE, PAD, REFLECT, FLIP, CUTOUT, SCALE, SHIFT,
            )  # fmt: skip
        tl.store(image_out + e, v.to(out.dtype.element_ty), mask=e < D * SIZE * SIZE)


def cases() -> list[Case]:
    """CIFAR, digits and a mixed batch of larger images, both layouts. Loads are bytes: a crop starts at any byte of a row."""

    def case(name: str, S: int, SIZE: int, D: int, images: int, out: str, **options: Any) -> Case:
        chosen = pick(images, D * SIZE * SIZE)
        mixed = bool(options.get("MIXUP") or options.get("CUTMIX"))
        constants: dict[str, Any] = {
            **{"S": S, "D": D, "SIZE": SIZE, "PAD": 4, "REFLECT": True, "FLIP": True, "CUTOUT": 0, "MIXUP": False},
            **{"CUTMIX": False, "LABELS": True, "CHANNELS_LAST": True, "SCALE": (0.015,) * D, "SHIFT": (-1.9,) * D},
            **{"BLOCK": chosen.block, "PER": chosen.per, "PARTS": chosen.parts, **options},
        }
        pointers = {
            **{"images": "*u8", "ids": "*i64", "seed": "*i64", "epoch": "*i64", "labels": "*i64", "out": "*" + out},
            **{"out_labels": "*i64"},
        }
        for name_, kind, used in (
            ("quantiles", "*fp32", constants["MIXUP"]),
            ("box_quantiles", "*fp32", constants["CUTMIX"]),
            ("out_labels2", "*i64", mixed),
            ("out_mix", "*fp32", mixed),
        ):
            if used:
                pointers[name_] = kind
            else:
                constants[name_] = None
        numbers = dict.fromkeys(("N", "B", "stride_n", "stride_d", "stride_h", "stride_w", "stride_ids", "stride_labels"), "i32")
        signature = {**pointers, **numbers, **dict.fromkeys(constants, "constexpr")}
        return Case(
            f"{name} -> {out}, byte loads: rows are shifted",
            augment_kernel,
            {k: signature[k] for k in augment_kernel.arg_names},
            constants,
            warps=chosen.warps,
            loads=1,
            unaligned=tuple(numbers),
        )

    return [
        case("cifar", 32, 32, 3, 128, "bf16"),
        case("cifar, large batch", 32, 32, 3, 1024, "bf16"),
        case("cifar, large batch", 32, 32, 3, 1024, "fp32"),
        case("cifar, planes", 32, 32, 3, 128, "bf16", CHANNELS_LAST=False, REFLECT=False),
        case("cifar, mixup, cutmix, cutout, large batch", 32, 32, 3, 1024, "bf16", MIXUP=True, CUTMIX=True, CUTOUT=8),
        case("images 256, cutmix, large batch", 256, 224, 3, 256, "bf16", PAD=0, CUTMIX=True),
        case("digits", 8, 8, 1, 64, "fp32"),
    ]
