"""Random numbers of (seed, epoch, id): pure, uniform, and unrelated to each other."""

import math

import pytest
import torch
from torch import Tensor

from fastffl.data.rng import below, mix, order, uniform_bits


def chi2(counts: Tensor) -> float:
    """How far counts are from equal, in standard deviations of the chi-square distribution."""
    expected = counts.sum().item() / counts.numel()
    free = counts.numel() - 1
    return (((counts - expected) ** 2 / expected).sum().item() - free) / math.sqrt(2 * free)


@pytest.mark.parametrize("n", [2, 3, 9, 17])
def test_uniform_over_ids_epochs_and_seeds(n: int) -> None:
    for ids, seed, epoch in (
        (torch.arange(90000), 0, 0),
        (torch.arange(90000) * 7, 3, 299),
        (torch.arange(2**40, 2**40 + 90000), 1, 1),
    ):
        drawn = below(uniform_bits(seed, epoch, ids, 0), n)
        assert drawn.min() == 0 and drawn.max() == n - 1
        assert abs(chi2(drawn.bincount(minlength=n).double())) < 5
    one = torch.tensor([17])
    over_epochs = torch.cat([below(uniform_bits(0, e, one, 0), n) for e in range(3000)])
    assert abs(chi2(over_epochs.bincount(minlength=n).double())) < 5
    over_seeds = torch.cat([below(uniform_bits(s, 0, one, 0), n) for s in range(3000)])
    assert abs(chi2(over_seeds.bincount(minlength=n).double())) < 5


def test_the_test_of_uniformity_can_fail() -> None:
    skewed = torch.arange(90000) % 9
    skewed[:2000] = 0
    assert chi2(skewed.bincount(minlength=9).double()) > 5


def test_streams_neighbours_and_epochs_are_independent() -> None:
    ids = torch.arange(80000)
    a = below(uniform_bits(0, 5, ids, 0), 9)
    for b in (
        below(uniform_bits(0, 5, ids, 1), 9),
        below(uniform_bits(0, 6, ids, 0), 9),
        below(uniform_bits(1, 5, ids, 0), 9),
        below(uniform_bits(0, 5, ids + 1, 0), 9),
    ):
        assert abs(chi2((a * 9 + b).bincount(minlength=81).double())) < 5


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    ids = torch.tensor([5, 900, 31])
    whole = uniform_bits(3, 4, torch.arange(1000), 2)
    assert torch.equal(uniform_bits(3, 4, ids, 2), whole[ids])
    assert whole.min() >= 0 and whole.max() < 2**32


def test_order_is_a_permutation_of_seed_and_epoch() -> None:
    a = order(1, 2, 500)
    assert torch.equal(a, order(1, 2, 500)) and torch.equal(a.sort().values, torch.arange(500))
    assert not torch.equal(a, order(1, 3, 500)) and not torch.equal(a, order(2, 2, 500))
    before = torch.get_rng_state()
    order(1, 2, 10)
    assert torch.equal(before, torch.get_rng_state()), "it leaves the run's own generator alone"


def test_mix_takes_any_integer() -> None:
    seen = {mix(a, b) for a in (-1, 0, 1, 2**63, 2**80) for b in (0, 1)}
    assert len(seen) >= 8 and all(0 <= s < 2**63 for s in seen)
