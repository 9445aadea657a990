"""The numbers of data: those of a sample come from the kernels' floor, so that a kernel draws the same; the order of an epoch."""

import torch
from torch import Tensor

from fastffl_kernels._draws import MASK as MASK
from fastffl_kernels._draws import below as below
from fastffl_kernels._draws import mix as mix
from fastffl_kernels._draws import signed as signed
from fastffl_kernels._draws import uniform_bits as uniform_bits


def order(seed: int, epoch: int, samples: int) -> Tensor:
    """(samples,) int64: the order of an epoch, on the CPU."""
    generator = torch.Generator().manual_seed(mix(seed, epoch, 0x0E9))
    return torch.randperm(samples, generator=generator)
