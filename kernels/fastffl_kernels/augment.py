"""augment: uint8 images on the device to a training batch in one launch, by random numbers of (seed, epoch, sample id).

    x[v, b] = normal(crop(flip(pad(images[ids[b]]))))        normal(u) = u / (255 std) - mean / std, 0 inside the cutout
    mixed:  x[v, b] = w x[v, b] + (1 - w) x[v, B - 1 - b]     w = lambda, or for cutmix 0 inside the box and 1 outside

Letters: N images of D x S x S bytes, B samples, V views, `size` the side that comes out. Bytes at least: D size^2 of images
(twice where mixup blends two) and D size^2 of the output a sample and view, 8 a sample of ids and of every label tensor.

Reads can't be wide: a crop starts at any byte, and three channels make a pixel. Writes are 16 bytes in either layout.
"""

import math
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _launch
from ._dispatch import choice, register, run
from ._draws import below, uniform_bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VIEW = 16  # streams of random numbers a view
TOP, LEFT, FLIP, CUT_ROW, CUT_COLUMN, LAMBDA, BOX_ROW, BOX_COLUMN, BOX = range(9)
QUANTILES = 4096
CHANNELS = 16  # at most, in the kernel: a channel's constants are picked by a chain of selects
ALPHA = 8.0  # at most; the papers use 0.2 to 1


class Augmented(NamedTuple):
    """A batch of V views: x (V, B, D, size, size). `labels` and, for mixed batches, those of the partners, (B,) int64, and the
    weight of the sample's own label, (B,) fp32: loss = mix CE(labels) + (1 - mix) CE(labels2). None where not asked for."""

    x: Tensor
    labels: Tensor | None
    labels2: Tensor | None
    mix: Tensor | None


@cache
def beta_quantiles(alpha: float) -> Tensor:
    """(4096,) fp32 on the CPU: the quantiles of Beta(alpha, alpha) at (k + 1/2) / 4096. A uniform pick among them is within
    1/8192 of the distribution (Kolmogorov's distance), takes one load and no loop that ends at random.

    The distribution function is x^a / B(a, a) sum_n (1 - a)_n / (n! (a + n)) x^n, inverted by bisection on x <= 1/2, where
    80 terms are exact in float64; the other half is its mirror image.
    """
    a = float(alpha)
    terms, factor = [], 1.0
    for n in range(80):
        terms.append(factor / (a + n))
        factor *= (n + 1 - a) / (n + 1)
    scale = math.exp(math.lgamma(2 * a) - 2 * math.lgamma(a))
    p = (torch.arange(QUANTILES // 2, dtype=torch.float64) + 0.5) / QUANTILES
    low, high = torch.zeros_like(p), torch.full_like(p, 0.5)
    for _ in range(60):
        x = (low + high) / 2
        series = torch.zeros_like(x)
        for t in reversed(terms):
            series = series * x + t
        less = scale * x**a * series < p
        low, high = torch.where(less, x, low), torch.where(less, high, x)
    return torch.cat([low, 1 - low.flip(0)]).float()


@cache
def _quantiles_on(alpha: float, device: torch.device) -> Tensor:
    return beta_quantiles(alpha).to(device)


@torch.library.custom_op("fastffl::augment_lambda", mutates_args=())
def _lambda(k: Tensor, alpha: float) -> Tensor:
    """The k-th quantile of Beta(alpha, alpha), () fp32; an op of its own: torch.compile must not trace their making."""
    return _quantiles_on(alpha, k.device).index_select(0, k[None])[0]  # indexing by a 0-d tensor would be a read by the host


@_lambda.register_fake
def _(k: Tensor, alpha: float) -> Tensor:
    return k.new_empty((), dtype=torch.float32)


def _fp32(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])


def affine(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(scale, shift) a channel, normal(u) = u scale + shift, as fp32 arithmetic has them (float64 in between changes no bit)."""
    scale = tuple(_fp32(1 / _fp32(255 * _fp32(s))) for s in std)
    return scale, tuple(_fp32(-_fp32(m) / _fp32(s)) for m, s in zip(mean, std, strict=True))


def draw_mix(
    seed: int | Tensor, epoch: int | Tensor, first: Tensor, size: int, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """What one batch is mixed by, drawn for the id `first` () of its first sample: the share () fp32 of a sample's own label and
    cutmix's box (4,) int64: top, bottom, left, right, all -1 for mixup. Where both are asked for, one in two is cutmix (timm)."""
    k = uniform_bits(seed, epoch, first, LAMBDA) >> 20
    share, box = torch.ones((), device=first.device), torch.full((4,), -1, device=first.device)
    if mixup:
        share = _lambda(k, mixup)
    if cutmix:
        side = (size * (1 - _lambda(k, cutmix)).sqrt()).long()
        centre = torch.stack([below(uniform_bits(seed, epoch, first, s), size) for s in (BOX_ROW, BOX_COLUMN)])
        low, high = (centre - side // 2).clamp(min=0), (centre + side // 2).clamp(max=size)
        chosen = torch.ones_like(k, dtype=torch.bool)
        if mixup:
            chosen = uniform_bits(seed, epoch, first, BOX) < 2**31
        share = torch.where(chosen, 1 - (high - low).prod() / (size * size), share)
        box = torch.where(chosen, torch.stack([low, high], 1).flatten(), box)
    return share, box


def augment_reference(
    images: Tensor,
    ids: Tensor,
    seed: Tensor,
    epoch: Tensor,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    pad: int = 0,
    pad_mode: str = "reflect",
    flip: bool = True,
    dtype: torch.dtype = torch.float32,
    views: int = 1,
    cutout: int = 0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    channels_last: bool = True,
    labels: Tensor | None = None,
) -> Augmented:
    """The batch in plain torch: the CPU path, the oracle of the tests and the benchmark's baseline."""
    n, d, s, _ = images.shape
    known = (ids >= 0) & (ids < n)
    row = torch.where(known, ids, 0)
    span = torch.arange(size, device=ids.device)
    scale, shift = (torch.tensor(v, device=ids.device).view(-1, 1, 1) for v in affine(mean, std))

    def draw(view: int, stream: int, n: int) -> Tensor:
        return below(uniform_bits(seed, epoch, ids, VIEW * view + stream), n)[:, None]

    made = []
    for v in range(views):
        y = (span + draw(v, TOP, s + 2 * pad - size + 1) - pad)[:, None, :, None]
        turned = uniform_bits(seed, epoch, ids, VIEW * v + FLIP)[:, None] < 2**31
        x = torch.where(turned, size - 1 - span, span) if flip else span
        x = (x + draw(v, LEFT, s + 2 * pad - size + 1) - pad)[:, None, None, :]
        inside = (y >= 0) & (y < s) & (x >= 0) & (x < s)
        if pad_mode == "reflect":
            y, x, inside = s - 1 - (s - 1 - y.abs()).abs(), s - 1 - (s - 1 - x.abs()).abs(), inside | True
        channel = torch.arange(d, device=ids.device)[:, None, None]
        cut = images[row[:, None, None, None], channel, y.clamp(0, s - 1), x.clamp(0, s - 1)]
        cut = torch.where(inside, cut, 0).float() * scale + shift
        if cutout:
            i, j = (span - (draw(v, k, size) - cutout // 2) for k in (CUT_ROW, CUT_COLUMN))
            rows, columns = (i >= 0) & (i < cutout), (j >= 0) & (j < cutout)
            cut = torch.where((rows[:, :, None] & columns[:, None, :])[:, None], 0, cut)
        made.append(torch.where(known[:, None, None, None], cut, float("nan")))
    x = torch.stack(made)
    own = None if labels is None else torch.where(known, labels[row], -1)
    other = share_B = None
    if mixup or cutmix:
        first = ids[0] if len(ids) else ids.new_zeros(())
        share, box = draw_mix(seed, epoch, first, size, mixup, cutmix)
        boxed = ((span >= box[0]) & (span < box[1]))[:, None] & ((span >= box[2]) & (span < box[3]))
        w = torch.where(box[0] < 0, share, torch.where(boxed, 0.0, 1.0))
        x = w * x + (1 - w) * x.flip(1)
        other, share_B = None if own is None else own.flip(0), share.expand(len(ids)).contiguous()
    if channels_last:
        out = x.new_empty((views, len(ids), size, size, d), dtype=dtype).permute(0, 1, 4, 2, 3)
    else:
        out = x.new_empty(x.shape, dtype=dtype)
    return Augmented(out.copy_(x), own, other, share_B)


@torch.library.custom_op("fastffl::augment", mutates_args=())
def _augment(
    images: Tensor,
    ids: Tensor,
    seed: Tensor,
    epoch: Tensor,
    labels: Tensor | None,
    size: int,
    pad: int,
    reflect: bool,
    flip: bool,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    views: int,
    cutout: int,
    mixup: float,
    cutmix: float,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch. Tensors that were not asked for are empty."""
    from .jit.augment import augment_kernel, pick

    device, (n, d, s, _), b = images.device, images.shape, len(ids)
    shape = (views, b, size, size, d) if channels_last else (views, b, d, size, size)
    out = _launch.empty(shape, dtype, device)
    mixed = bool(mixup or cutmix)
    own = _launch.empty((b if labels is not None else 0,), torch.int64, device)
    other = _launch.empty((b if labels is not None and mixed else 0,), torch.int64, device)
    share = _launch.empty((b if mixed else 0,), torch.float32, device)
    scale, shift = affine(mean, std)
    chosen = pick(views * b, d * size * size)
    _launch.launch(
        augment_kernel,
        (views * b * chosen.parts,),
        device,
        images,
        ids,
        seed,
        epoch,
        labels,
        _quantiles_on(mixup, device) if mixup else None,
        _quantiles_on(cutmix, device) if cutmix else None,
        out,
        own,
        other if labels is not None and mixed else None,
        share if mixed else None,
        n,
        b,
        *images.stride(),
        ids.stride(0),
        0 if labels is None else labels.stride(0),
        S=s,
        D=d,
        SIZE=size,
        PAD=pad,
        REFLECT=reflect,
        FLIP=flip,
        CUTOUT=cutout,
        MIXUP=bool(mixup),
        CUTMIX=bool(cutmix),
        LABELS=labels is not None,
        CHANNELS_LAST=channels_last,
        SCALE=scale,
        SHIFT=shift,
        BLOCK=chosen.block,
        PER=chosen.per,
        PARTS=chosen.parts,
        warps=chosen.warps,
    )
    return out.permute(0, 1, 4, 2, 3) if channels_last else out, own, other, share


@_augment.register_fake
def _(images, ids, seed, epoch, labels, size, pad, reflect, flip, mean, std, dtype, views, cutout, mixup, cutmix, channels_last):  # type: ignore[no-untyped-def]
    d, b = images.shape[1], ids.shape[0]
    shape = (views, b, size, size, d) if channels_last else (views, b, d, size, size)
    out = images.new_empty(shape, dtype=dtype)
    own = ids.new_empty(b if labels is not None else 0)
    other = ids.new_empty(b if labels is not None and (mixup or cutmix) else 0)
    share = ids.new_empty(b if mixup or cutmix else 0, dtype=torch.float32)
    return out.permute(0, 1, 4, 2, 3) if channels_last else out, own, other, share


_launch.LAUNCHES["fastffl::augment"] = 1


def _triton(
    images: Tensor, ids: Tensor, seed: Tensor, epoch: Tensor, *, labels: Tensor | None, pad_mode: str, **options: Any
) -> Augmented:
    if images.shape[1] > CHANNELS:
        if choice() == "triton":
            raise ValueError(f"{images.shape[1]} channels; the kernel takes at most {CHANNELS}, use auto or reference")
        return augment_reference(images, ids, seed, epoch, labels=labels, pad_mode=pad_mode, **options)
    x, own, other, share = _augment(images, ids, seed, epoch, labels, reflect=pad_mode == "reflect", **options)
    mixed = bool(options["mixup"] or options["cutmix"])
    named = labels is not None
    return Augmented(x, own if named else None, other if named and mixed else None, share if mixed else None)


register("augment", _triton)


def augment(
    images: Tensor,
    ids: Tensor,
    seed: Tensor,
    epoch: Tensor,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    pad: int = 0,
    pad_mode: str = "reflect",
    flip: bool = True,
    dtype: torch.dtype = torch.float32,
    views: int = 1,
    cutout: int = 0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    channels_last: bool = True,
    labels: Tensor | None = None,
) -> Augmented:
    """A training batch of the images `ids`: padded, cropped at random, mirrored, cut out, normalised, mixed and cast.

    images        (N, D, S, S) uint8 in any layout, as they are (`pad` > 0) or already padded (`pad` = 0 and size < S)
    ids           (B,) int64, which images; also what their random numbers are drawn for
    seed, epoch   () int64 on the same device, so that a captured graph draws anew when their values change
    size          side of a crop, at most S + 2 pad; every place of it is equally likely
    mean, std     D numbers of pixels in [0, 1]
    pad_mode      "reflect" (pad < S) or "zero" (black, before normalising)
    flip          mirror left to right one time in two
    dtype         bf16, fp16 or fp32; arithmetic is fp32, rounded once
    views         V independent draws of crop, flip and cutout; view 0 has the numbers that a single one has
    cutout        side of a square of zeros (the mean) centred at a random pixel and clipped (DeVries and Taylor 2017); 0: none
    mixup, cutmix alpha of lambda ~ Beta(alpha, alpha), 0: none, at most 8. One lambda and box a batch, drawn for its first id
                  and shared by the views; the partner of place b is place B - 1 - b (both as timm's Mixup in its batch mode).
                  `mix` is lambda (Zhang et al. 2018) or the share outside the clipped box (Yun et al. 2019). Both: one in two
    channels_last memory order (V, B, size, size, D) of x, else (V, B, D, size, size)
    labels        (N,) int64, of all images; the batch's are picked in the same launch

    An id outside 0..N-1 is the caller's mistake, seen without a read by the host: its image is NaN and its label -1. On a
    GPU a value may differ by one rounding of u scale (fused multiply-add). ValueError says what was wrong.
    """
    device = images.device
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 squares (N, channels, S, S)")
    n, d, s, _ = images.shape
    for name, x, fits, shape in (
        ("ids", ids, ids.ndim == 1, "(B,)"),
        ("seed", seed, seed.ndim == 0, "()"),
        ("epoch", epoch, epoch.ndim == 0, "()"),
        ("labels", labels, labels is None or labels.shape == (n,), f"({n},), one per image"),
    ):
        if x is not None and not (fits and x.dtype == torch.int64 and x.device == device):
            raise ValueError(f"{name}: {tuple(x.shape)} {x.dtype} on {x.device}; expected {shape} torch.int64 on {device}")
    if pad_mode not in ("reflect", "zero"):
        raise ValueError(f"pad_mode={pad_mode!r}; expected 'reflect' or 'zero'")
    if pad < 0 or (pad_mode == "reflect" and pad >= max(s, 1)):
        raise ValueError(f"pad={pad}; expected at least 0 and, to reflect images of {s} pixels, less than {s}")
    if not 0 < size <= s + 2 * pad:
        raise ValueError(f"size={size}; expected 1..{s + 2 * pad}, the {s} pixels of an image and its padding")
    if not len(mean) == len(std) == d or not all(v > 0 for v in std):
        raise ValueError(f"mean {tuple(mean)} and std {tuple(std)}; expected {d} numbers each, one a channel, std above 0")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}; expected bf16, fp16 or fp32")
    if views < 1 or cutout < 0:
        raise ValueError(f"views={views}, cutout={cutout}; expected at least one view and a side of at least 0")
    if not (0 <= mixup <= ALPHA and 0 <= cutmix <= ALPHA):
        raise ValueError(f"mixup={mixup}, cutmix={cutmix}; expected an alpha of 0 (none) to {ALPHA:g}")
    out: Augmented = run(
        *("augment", images, augment_reference),
        *(images, ids, seed, epoch),
        size=size,
        mean=[float(v) for v in mean],
        std=[float(v) for v in std],
        pad=pad,
        pad_mode=pad_mode,
        flip=flip,
        dtype=dtype,
        views=views,
        cutout=cutout,
        mixup=float(mixup),
        cutmix=float(cutmix),
        channels_last=channels_last,
        labels=labels,
    )
    return out


def bytes_moved(
    b: int,
    d: int,
    size: int,
    dtype: torch.dtype,
    *,
    views: int = 1,
    mixup: bool = False,
    cutmix: bool = False,
    labels: bool = False,
) -> int:
    """Bytes that a launch reads and writes at least, random padding and clipping aside: pixels, output, ids, labels, weights."""
    mixed = mixup or cutmix
    pixels = views * b * d * size * size
    label = 8 * b * (1 + mixed) * 2 if labels else 0
    return pixels * (1 + mixup) + pixels * dtype.itemsize + 8 * b + 16 + label + 4 * b * mixed
