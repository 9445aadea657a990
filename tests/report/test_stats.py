"""Standard deviation, Welch's t and its p against closed forms and scipy."""

import math
import random

import pytest
from scipy import stats as scipy_stats

from fastffl.report.stats import spread, two_sided, welch


def test_p_by_closed_forms() -> None:
    for t in (0.0, 1e-9, 0.3, 1.0, 2.5, 12.0, 1e4):
        assert two_sided(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-10, abs=1e-10)
        assert two_sided(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-10, abs=1e-10)
        assert two_sided(-t, 3.7) == two_sided(t, 3.7)
    assert two_sided(12.706204736432095, 1) == pytest.approx(0.05, rel=1e-10)  # the tables' value
    assert two_sided(1e200, 4) == 0 and two_sided(0.0, 5) == 1


def test_p_and_welch_as_scipy_has_them() -> None:
    rng = random.Random(1)
    for _ in range(400):
        t, df = rng.choice((1e-3, 0.1, 1, 3, 10, 60)) * rng.random(), rng.choice((1, 2, 5, 40, 1000)) * (0.5 + rng.random())
        assert two_sided(t, df) == pytest.approx(2 * scipy_stats.t.sf(t, df), rel=1e-10)
        a = [rng.gauss(70, 0.3) for _ in range(rng.randint(2, 9))]
        b = [rng.gauss(70.4, 1.5) for _ in range(rng.randint(2, 9))]
        got, want = welch(a, b), scipy_stats.ttest_ind(a, b, equal_var=False)
        assert (got.t, got.df, got.p) == pytest.approx((want.statistic, want.df, want.pvalue), rel=1e-10)
        assert got.diff == pytest.approx(sum(a) / len(a) - sum(b) / len(b), rel=1e-12)


def test_spread_is_the_samples_and_exact_for_equal_values() -> None:
    assert spread([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(14 / 2), 3))  # (4 + 1 + 9) / (n - 1)
    assert spread([98.88888549804688] * 7).std == 0
    assert spread([5.0]) == (5.0, None, 1)


def test_no_test_where_there_is_nothing_to_test() -> None:
    assert welch([1.0], [2.0, 3.0]) == (-1.5, None, None, None) == welch([1.5], [3.0])
    assert welch([1.0, 1.0], [2.0, 2.0]) == (-1.0, None, None, None)
    one_still = welch([1.0, 1.0, 1.0], [2.0, 3.0, 4.0])  # df is then the other side's n - 1
    assert one_still.df == 2 and one_still.t == pytest.approx(-2 / math.sqrt(1 / 3))
    tiny = welch([0.0, 1e-170], [0.0, 2e-170])  # their variances are no numbers any more
    assert tiny.p is None or 0 <= tiny.p <= 1
