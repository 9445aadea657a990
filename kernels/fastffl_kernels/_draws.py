"""Random numbers as a pure function of (seed, epoch, sample id, stream): no state, so any sample can be redrawn alone.

Seed and epoch may be Python integers or 0-d int64 tensors, whose value may change between the replays of a captured graph;
the numbers are the same.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
START, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64
_WORD = 0xFFFFFFFFFFFFFFFF


def signed(word: int) -> int:
    """The int64 with the low 64 bits of `word`."""
    return ((word + 2**63) & _WORD) - 2**63


def mix(*words: int) -> int:
    """One 63-bit seed from several integers (splitmix64 steps)."""
    h = START
    for w in words:
        h = (h ^ (w & _WORD)) * FIRST & _WORD
        h = (h ^ (h >> 27)) * SECOND & _WORD
        h ^= h >> 31
    return h & 0x7FFFFFFFFFFFFFFF


def _mix_tensors(*words: int | Tensor) -> Tensor:
    """`mix` of 0-d int64 tensors, () int64: products wrap, and a mask makes int64's shift a logical one."""
    h: int | Tensor = signed(START)
    for w in words:
        h = (h ^ (signed(w) if isinstance(w, int) else w)) * torch.full((), signed(FIRST))
        h = (h ^ ((h >> 27) & (2**37 - 1))) * torch.full((), signed(SECOND))
        h = h ^ ((h >> 31) & (2**33 - 1))
    assert isinstance(h, Tensor)
    return h & 0x7FFFFFFFFFFFFFFF


def uniform_bits(seed: int | Tensor, epoch: int | Tensor, ids: Tensor, stream: int) -> Tensor:
    """(B,) int64 in [0, 2^32), one per sample id: murmur3's finaliser over id and a key of seed, epoch and stream."""
    if isinstance(seed, int) and isinstance(epoch, int):
        key: int | Tensor = mix(seed, epoch, stream)
    else:
        key = _mix_tensors(seed, epoch, stream)
    low, high = key & MASK, key >> 32
    h = (ids ^ low) & MASK
    for constant in (0x85EBCA6B, 0xC2B2AE35):
        h = (h ^ (h >> 16)) * constant & MASK
        h = (h ^ high) & MASK
    h = (h ^ (h >> 13)) * 0x85EBCA6B & MASK
    return h ^ (h >> 16)


def below(bits: Tensor, n: int | Tensor) -> Tensor:
    """(B,) int64 in [0, n) from 32 random bits (bias under n / 2^32)."""
    return (bits * n) >> 32
