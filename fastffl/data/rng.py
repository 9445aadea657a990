"""Random numbers as a pure function of (seed, epoch, sample id, stream): no state, so any sample can be redrawn alone."""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def mix(*words: int) -> int:
    """One 63-bit seed from several integers (splitmix64 steps)."""
    h = 0x9E3779B97F4A7C15
    for w in words:
        h = (h ^ (w & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        h ^= h >> 31
    return h & 0x7FFFFFFFFFFFFFFF


def uniform_bits(seed: int, epoch: int, ids: Tensor, stream: int) -> Tensor:
    """(B,) int64 in [0, 2^32), one per sample id: murmur3's finaliser over id and a key of seed, epoch and stream."""
    key = mix(seed, epoch, stream)
    low, high = key & MASK, key >> 32
    h = (ids ^ low) & MASK
    for constant in (0x85EBCA6B, 0xC2B2AE35):
        h = (h ^ (h >> 16)) * constant & MASK
        h = (h ^ high) & MASK
    h = (h ^ (h >> 13)) * 0x85EBCA6B & MASK
    return h ^ (h >> 16)


def below(bits: Tensor, n: int) -> Tensor:
    """(B,) int64 in [0, n) from 32 random bits (bias under n / 2^32)."""
    return (bits * n) >> 32


def order(seed: int, epoch: int, samples: int) -> Tensor:
    """(samples,) int64: the order of an epoch, on the CPU."""
    generator = torch.Generator().manual_seed(mix(seed, epoch, 0x0E9))
    return torch.randperm(samples, generator=generator)
