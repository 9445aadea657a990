"""Where and how a run computes: device, mixed-precision dtype, memory format; each with the rule that chose it."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastffl_kernels import explain

from ..errors import UsageError
from ..recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """The resolved choices; `text` is the line a user sees."""

    device: torch.device
    dtype: torch.dtype | None  # of autocast; None: fp32
    memory_format: torch.memory_format
    text: str

    @property
    def images(self) -> torch.dtype:
        """What images are made in: on CUDA half precision where autocast would round them to it once per peer."""
        return self.dtype if self.dtype is not None and self.device.type == "cuda" else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def channels_last_pays() -> bool:
    """Whether channels_last is this CPU's layout: those with AMX, by rule, so that the same command gives the same bits.

    Timed once on one with AMX, forward and backward, 8 cases (7 nets) in fp32 and bf16: 0.56 to 1.18 times the contiguous
    time, median 0.82. On an older CPU without it fp32 backward took 8 times as long. A measurement at start would flip
    under load.
    """
    return bool(torch.cpu._is_amx_tile_supported())


def plan(recipe: Recipe) -> Plan:
    """Resolve the recipe's run and amp sections on this machine. UsageError where it asks for what is not here."""
    asked = recipe.run.device
    cuda = torch.cuda.is_available()
    if asked == "cuda" and not cuda:
        raise UsageError("--device cuda: torch finds no CUDA device; use --device cpu, and see `fastffl doctor`")
    device = torch.device("cuda" if asked == "cuda" or (asked == "auto" and cuda) else "cpu")
    try:
        explain("distill_graph", torch.empty(0, device=device))
    except ValueError as error:  # FASTFFL_KERNELS asks for what is not, or for Triton where it can't run
        raise UsageError(str(error)) from error
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    dtype = None
    if recipe.amp.enabled:
        choice = recipe.amp.dtype
        if choice == "auto":
            choice = "fp16" if device.type == "cuda" and not has_bf16(device) else "bf16"
        dtype = torch.bfloat16 if choice == "bf16" else torch.float16
    layout = recipe.run.memory_format
    if layout == "auto":
        layout = "channels_last" if device.type == "cuda" or channels_last_pays() else "contiguous"
    words = [device.type, str(dtype or torch.float32).removeprefix("torch."), layout]
    if device.type == "cpu":
        words.append(f"{torch.get_num_threads()} threads")
        if dtype == torch.bfloat16 and not has_bf16(device):
            words.append("no native bf16 here: --amp will not be faster")
    return Plan(device, dtype, torch.channels_last if layout == "channels_last" else torch.contiguous_format, ", ".join(words))


TRIM, PAD, MMAP_FROM, MMAPS = -1, -2, -3, -4  # glibc's names: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within the block, what a step frees on a CPU stays with the process (glibc; elsewhere nothing happens).

    Left to itself glibc gives freed maps back to the kernel, which clears every page of them anew for the next step: 32,000
    page faults, 10 % of a step of two ResNet-32 at batch 128, none within the block (bench/results/cpu/memory.jsonl).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        yield
        return
    for option, value in ((MMAPS, 0), (TRIM, -1), (PAD, 64 << 20)):
        mallopt(option, value)
    try:
        yield
    finally:
        # glibc's own thresholds adapt until one is set; from here they are what they adapt to at most
        for option, value in ((MMAPS, 65536), (MMAP_FROM, 32 << 20), (TRIM, 64 << 20), (PAD, 128 << 10)):
            mallopt(option, value)
