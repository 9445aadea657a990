"""Device code of sgd_flat: a program updates one chunk of CHUNK elements, all of one parameter and so of one group."""

# mypy: allow-untyped-defs
from typing import Any

import triton
import triton.language as tl

from .._compile import Case

CHUNK, WARPS = 1024, 4  # 8 elements a thread: two 16-byte loads of fp32, one 16-byte store of a shadow


@triton.jit
def _elements(chunk, CHUNK: tl.constexpr):
    """The flat indices of a chunk, int64: there may be more than 2^31 elements."""
    return chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)


@triton.jit
def sgd_flat_kernel(
    p, g, m, shadow, groups, lr, lr_stride, decay, found_inf, scale, momentum,
    NESTEROV: tl.constexpr, ZERO: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Chunks are whole: no load of an element needs a mask. `groups` is -1 where nothing is to change."""
    chunk = tl.program_id(0)
    group = tl.load(groups + chunk)
    at = _elements(chunk, CHUNK)
    live = group >= 0
    if found_inf is not None:
        live = live & (tl.load(found_inf).to(tl.float32) == 0)
    if live:
        w = tl.load(p + at)
        d = tl.load(g + at).to(tl.float32)
        if scale is not None:
            d = d * tl.load(scale).to(tl.float32)
        d = d + tl.load(decay + group) * w
        if m is not None:
            b = momentum * tl.load(m + at) + d
            tl.store(m + at, b)
            if NESTEROV:
                d = d + momentum * b
            else:
                d = b
        w = w - tl.load(lr + group * lr_stride).to(tl.float32) * d
        tl.store(p + at, w)
        if shadow is not None:
            tl.store(shadow + at, w.to(shadow.dtype.element_ty))
    if ZERO:
        tl.store(g + at, tl.zeros([CHUNK], g.dtype.element_ty))


def cases() -> list[Case]:
    """What a bf16 run needs, gradients in fp32 or bf16, and the plainest and the fullest update."""

    def case(name: str, grads: str, shadow: str | None, **options: Any) -> Case:
        signature: dict[str, Any] = {
            **{"p": "*fp32", "g": "*" + grads, "m": "*fp32", "shadow": f"*{shadow}", "groups": "*i32", "lr": "*fp32"},
            **{"lr_stride": "i32", "decay": "*fp32", "found_inf": "*fp32", "scale": "*fp32", "momentum": "fp32"},
        }
        constants: dict[str, Any] = {"NESTEROV": False, "ZERO": False, "CHUNK": CHUNK, **options}
        if shadow is None:
            constants["shadow"] = None
        signature.update(dict.fromkeys(constants, "constexpr"))
        return Case(name, sgd_flat_kernel, signature, constants, warps=WARPS, unaligned=("lr_stride",))

    return [
        case("momentum, bf16 shadow", "fp32", "bf16", scale=None),
        case("nesterov, bf16 gradients and shadow, scaled, zeroed", "bf16", "bf16", NESTEROV=True, ZERO=True),
        case("momentum, fp16 shadow, scaled, zeroed", "fp32", "fp16", ZERO=True),
        case("momentum, fp32 only", "fp32", None, scale=None, found_inf=None),
        case("no momentum, fp32 only, scaled", "fp32", None, m=None),
    ]
