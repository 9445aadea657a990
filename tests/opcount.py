"""How many kernels a GPU would launch, counted on tensors without data: `with OpCount() as seen: step(...)` on device "meta"."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastffl_kernels import _launch

# Not views by their schema, and no kernel either: memory is allocated, or given another name.
ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "set_", "resize_")
RENAME = ("squeeze_", "unsqueeze_", "transpose_", "t_", "detach_", "as_strided_")


def launches(func: Any, args: tuple[Any, ...]) -> int:
    """Kernels of one call: 0 for views, allocations and the profiler's marks, a custom op's entry in LAUNCHES (KeyError without
    one), the wanted gradients of data and weight for a convolution's backward, else 1, also for lists of any length."""
    space, name = func._schema.name.split("::")
    if space == "fastffl":
        return _launch.LAUNCHES[func._schema.name]
    if space == "profiler" or func.is_view or name in ALLOCATE or name in RENAME:
        return 0
    return sum(args[-1][:2]) if name == "convolution_backward" else 1


def as_on_a_gpu(func: Any, args: tuple[Any, ...], out: Any) -> Any:
    """A convolution's result is channels_last where an operand is; torch forgets it on meta, and copies would be counted."""
    if func._schema.name not in ("aten::convolution", "aten::convolution_backward"):
        return out
    maps = args[:2] if func._schema.name == "aten::convolution" else args[:3]
    if all(x.ndim != 4 or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last) for x in maps):
        return out
    if isinstance(out, torch.Tensor):
        return out.contiguous(memory_format=torch.channels_last)
    return tuple(x.contiguous(memory_format=torch.channels_last) if x is not None and x.ndim == 4 else x for x in out)


class OpCount(TorchDispatchMode):
    """Inside the block, `kernels[name]` counts launches by the name of what makes them ("aten::add_", "fastffl::bn_act_stats");
    `total` is their sum, `aten` what is torch's own. What autograd runs in backward is counted too."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        n = launches(func, args)
        if n:
            self.kernels[func._schema.name] += n
        return as_on_a_gpu(func, args, func(*args, **(kwargs or {})))

    @property
    def total(self) -> int:
        return self.kernels.total()

    @property
    def aten(self) -> Counter[str]:
        return Counter({name: n for name, n in self.kernels.items() if not name.startswith("fastffl::")})
