"""finish: uint8 pixels on the device to what a net takes: normalised, mixed (mixup, cutmix), cast. One kernel on a GPU."""

import torch
from torch import Tensor

from fastffl_kernels._dispatch import triton_path
from fastffl_kernels.augment import affine, augment, draw_mix

from .rng import signed
from .source import Place


def blend(x: Tensor, seed: int, epoch: int, first: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Each image with its partner, place B - 1 - b: x (B, D, S, S) fp32 -> the same, and the share of its own label (B,) fp32.

    The draw is that of (seed, epoch, first), `first` () int64; bit for bit what the reference of the augment kernel does.
    """
    share, box = draw_mix(seed, epoch, first, x.shape[-1], mixup, cutmix)
    span = torch.arange(x.shape[-1], device=x.device)
    boxed = ((span >= box[0]) & (span < box[1]))[:, None] & ((span >= box[2]) & (span < box[3]))
    w = torch.where(box[0] < 0, share, torch.where(boxed, 0.0, 1.0))
    return w * x + (1 - w) * x.flip(0), share.expand(len(x)).contiguous()


class Finish:
    """Of one source at one place: `normal(x)` alone, or all of it by calling it."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], place: Place):
        self.mean, self.std, self._place = mean, std, place
        scale, shift = (torch.tensor(v, device=place.device).view(1, -1, 1, 1) for v in affine(mean, std))
        self._scale, self._shift = scale, shift
        self._clock = tuple(torch.zeros((), dtype=torch.int64, device=place.device) for _ in range(2))

    def normal(self, x: Tensor) -> Tensor:
        """(B, D, S, S) uint8 -> fp32, u / (255 std) - mean / std."""
        return x.to(torch.float32).mul_(self._scale).add_(self._shift)

    def __call__(self, x: Tensor, seed: int = 0, mixup: float = 0.0, cutmix: float = 0.0) -> tuple[Tensor, Tensor | None]:
        """x (B, D, S, S) uint8 in any layout -> the same in the place's layout and dtype, and the share of its own label in
        every image, (B,) fp32, where images are mixed. `seed` decides how."""
        place = self._place
        if not triton_path("augment", x):
            made, share = self.normal(x.contiguous(memory_format=place.memory_format)), None
            if mixup or cutmix:
                made, share = blend(made, seed, 0, torch.zeros((), dtype=torch.int64, device=x.device), mixup, cutmix)
            return made.to(place.dtype).contiguous(memory_format=place.memory_format), share
        self._clock[0].fill_(signed(seed))
        out = augment(
            *(x, torch.arange(len(x), device=x.device), *self._clock),
            size=x.shape[-1],
            mean=self.mean,
            std=self.std,
            flip=False,
            dtype=place.dtype,
            mixup=mixup,
            cutmix=cutmix,
            channels_last=place.memory_format == torch.channels_last,
        )
        return out.x[0], out.mix
