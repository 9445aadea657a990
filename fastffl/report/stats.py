"""stats: mean and sample standard deviation over seeds, and Welch's t-test. Plain Python: a table needs no more."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Over n values: their mean and sample standard deviation (n - 1); std is None for one value."""

    mean: float
    std: float | None
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Exact for equal values: their standard deviation is 0, not a rounding error."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


class Welch(NamedTuple):
    """Difference of two means, t, degrees of freedom, two-sided p; the last three are None where there is no test."""

    diff: float
    t: float | None
    df: float | None
    p: float | None


def welch(a: Sequence[float], b: Sequence[float]) -> Welch:
    """Whether the means of `a` and `b` differ, their variances being unequal (Welch 1947). No test for fewer than two
    values on a side, nor where neither side varies."""
    mine, theirs = spread(a), spread(b)
    diff = mine.mean - theirs.mean
    if mine.std is None or theirs.std is None:
        return Welch(diff, None, None, None)
    va, vb = mine.std**2 / mine.n, theirs.std**2 / theirs.n
    if not va + vb > 0:
        return Welch(diff, None, None, None)
    share = va / (va + vb)  # Welch-Satterthwaite by shares: squares of small variances would underflow
    df = 1 / (share**2 / (mine.n - 1) + (1 - share) ** 2 / (theirs.n - 1))
    t = diff / math.sqrt(va + vb)
    return Welch(diff, t, df, two_sided(t, df))


def two_sided(t: float, df: float) -> float:
    """P(|T| >= |t|) for Student's T with df degrees of freedom."""
    square = t * t
    if math.isinf(square):
        return 0.0
    return beta_share(df / 2, 0.5, df / (df + square), square / (df + square))


def beta_share(a: float, b: float, x: float, y: float) -> float:
    """The regularised incomplete beta function I_x(a, b); y = 1 - x is given too, as it may be too small to be a difference."""
    if x <= 0 or y <= 0:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction below converges fast on the other side only
        return 1 - beta_share(b, a, y, x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(y))
    return front * _fraction(a, b, x) / a


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of I_x(a, b) (Abramowitz and Stegun 26.5.8), by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    value = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for term in (even, odd):
            d = 1 / (1 + term * d or tiny)
            c = 1 + term / c or tiny
            change = c * d
            value *= change
        if abs(change - 1) < 1e-15:
            break
    return value
