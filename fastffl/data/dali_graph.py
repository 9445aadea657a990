"""dali_graph: what DALI does to an image file, by geometry and changes that are given to it sample by sample."""

from functools import partial
from typing import Any

import numpy as np
from nvidia.dali import fn, math, pipeline_def
from nvidia.dali.types import Constant, DALIDataType, DALIImageType, DALIInterpType

from .rand_augment import FILL, strength
from .views import Change

HW_SHARE = 0.65  # of the JPEGs for the decoding engine of A100 and later, the rest for the GPU's cores: DALI's own choice
IDENTITY, AUTO, EQUALIZE, ROTATE, SOLARIZE, COLOR, POSTERIZE, CONTRAST, BRIGHTNESS, SHARPNESS, SHEAR_X = range(11)  # as in OPS
BLUR = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def _float(image: Any) -> Any:
    return fn.cast(image, dtype=DALIDataType.FLOAT)


def _byte(image: Any) -> Any:
    """Cut down to whole numbers as torchvision does; DALI's cast alone would round."""
    return fn.cast(math.floor(math.clamp(image, 0.0, 255.0)), dtype=DALIDataType.UINT8)


def _grey(image: Any) -> Any:
    """(S, S, 1), torchvision's weights and rounding."""
    return math.floor(image[:, :, 0:1] * 0.2989 + image[:, :, 1:2] * 0.587 + image[:, :, 2:3] * 0.114)


def _changed(image: Any, op: Any, by: Any, source: Any, on_gpu: bool) -> Any:
    """image after operation number `op` of RandAugment; DALI takes each `if` sample by sample."""
    amount = by.gpu() if on_gpu else by
    if op == AUTO:
        x = _float(image)
        low, high = (f(x, axes=(0, 1), keep_dims=True) for f in (fn.reductions.min, fn.reductions.max))
        flat = _float(high == low)
        image = _byte((x - low * (1.0 - flat)) / ((high - low) * (1 / 255) + flat))
    if op == EQUALIZE:
        image = fn.equalize(image)
    if op == SOLARIZE:
        x = fn.cast(image, dtype=DALIDataType.INT32)
        image = fn.cast(x + fn.cast(x >= amount, dtype=DALIDataType.INT32) * (255 - 2 * x), dtype=DALIDataType.UINT8)
    if op == COLOR:
        x = _float(image)
        image = _byte(x * amount + _grey(x) * (1.0 - amount))
    if op == POSTERIZE:
        image = image & fn.cast(amount, dtype=DALIDataType.UINT8)
    if op == CONTRAST:
        x = _float(image)
        image = _byte(x * amount + fn.reductions.mean(_grey(x), axes=(0, 1), keep_dims=True) * (1.0 - amount))
    if op == BRIGHTNESS:
        image = _byte(_float(image) * amount)
    if op == SHARPNESS:
        x = _float(image)
        soft = math.floor(fn.filter(x, Constant(BLUR, device="gpu") if on_gpu else BLUR) + 0.5)
        image = _byte(x + (soft - x) * (1.0 - amount))
    if op == ROTATE or op >= SHEAR_X:
        image = fn.warp_affine(image, matrix=source, fill_value=FILL, interp_type=DALIInterpType.INTERP_NN)
    return image


@pipeline_def(enable_conditionals=True)
def graph(whole: bool, changes: int, on_gpu: bool) -> Any:
    """Encoded bytes to (size, size, 3) uint8; not `whole`: to the window of the image that is wanted, as it is stored."""
    given = partial(fn.external_source, ndim=1)
    decode = partial(fn.decoders.image_slice, device="mixed", hw_decoder_load=HW_SHARE) if on_gpu else fn.decoders.image_slice
    image: Any = decode(
        given(name="file", dtype=DALIDataType.UINT8, no_copy=True),
        given(name="corner", dtype=DALIDataType.INT32),
        given(name="extent", dtype=DALIDataType.INT32),
        axes=(0, 1),
        output_type=DALIImageType.RGB,
        adjust_orientation=False,
    )
    if not whole:
        return image
    image = fn.resize(image, size=given(name="rows_columns", dtype=DALIDataType.FLOAT), antialias=True)
    image = fn.slice(
        image, given(name="square", dtype=DALIDataType.INT32), given(name="sides", dtype=DALIDataType.INT32), axes=(0, 1)
    )
    for k in range(changes):
        op = fn.external_source(name=f"op{k}", dtype=DALIDataType.INT32, ndim=0)
        by = fn.external_source(name=f"by{k}", dtype=DALIDataType.FLOAT, ndim=0)
        source = fn.external_source(name=f"source{k}", dtype=DALIDataType.FLOAT, ndim=2)
        image = _changed(image, op, by, source, on_gpu)
    return image


def amount(change: Change, magnitude: int, size: int) -> float:
    """What the graph is given of an operation: its strength, for posterize the mask of the bits that stay."""
    by = strength(change, magnitude, size)
    return float(0xFF00 >> int(by) & 0xFF) if change.op == POSTERIZE else by
