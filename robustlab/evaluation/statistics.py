"""Intervals for a proportion (k successes among n independent samples), for a mean over seeds, tests of paired verdicts, and how
many bad things a random sample has left out.

Wilson (JASA 22, 1927):  (p + z^2/2n -+ z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n),  p = k/n, z the normal quantile.
Clopper and Pearson (Biometrika 26, 1934): quantiles of Beta(k, n-k+1) and Beta(k+1, n-k); never too short, often too long.
McNemar (Psychometrika 12, 1947), exact: of the b + c images on which two models differ, b that only the first gets right are
Binomial(b + c, 1/2) where neither is better.
Student: the mean over m seeds -+ t_{m-1} s / sqrt(m).
Of N things M are bad; m of them, drawn at random without replacement, hold k bad ones. Where P(X <= k) = sum_{j<=k} C(M, j)
C(N-M, m-j) / C(N, m) is alpha or less, M is refuted; the largest M that is not is an upper limit with confidence 1 - alpha.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

Interval = tuple[float, float]
ALPHA = Fraction(1, 20)


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval for k of n; (0, 1) when n = 0, and exactly 0 or 1 at the end that k = 0 or k = n touches.

    Raises:
        ValueError: not 0 <= k <= n, or a level outside (0, 1).
    """
    _check(k, n, level)
    if n == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    p = k / n
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return (0.0 if k == 0 else middle - half), (1.0 if k == n else middle + half)


def clopper_pearson(k: int, n: int, level: float = 0.95) -> Interval:
    """The exact interval for k of n, by inverting the binomial tests.

    Raises:
        ValueError: not 0 <= k <= n, or a level outside (0, 1).
    """
    from scipy.stats import beta

    _check(k, n, level)
    tail = (1 - level) / 2
    low = 0.0 if k == 0 else float(beta.ppf(tail, k, n - k + 1))
    return low, (1.0 if k == n else float(beta.ppf(1 - tail, k + 1, n - k)))


def most_left(population: int, drawn: int, bad: int, alpha: Fraction = ALPHA) -> int:
    """How many bad things the rest of a population holds at most, with confidence 1 - alpha.

    Args:
        population: N.
        drawn: m, chosen at random without replacement.
        bad: k of these.
        alpha: the probability with which the limit may be too low.

    Raises:
        ValueError: not 0 <= k <= m <= N.
    """
    if not 0 <= bad <= drawn <= population:
        raise ValueError(f"expected 0 <= bad <= drawn <= population, got {bad}, {drawn}, {population}")
    low, high = bad, population - drawn + bad  # as many bad ones there are at least, and at most
    while low < high:
        middle = (low + high + 1) // 2
        if _plausible(population, middle, drawn, bad, alpha):
            low = middle
        else:
            high = middle - 1
    return low - bad


def draws_needed(population: int, bad: int, left: int, alpha: Fraction = ALPHA) -> int:
    """The smallest number of draws after which :func:`most_left` is at most ``left``, if they hold ``bad`` bad things."""
    low, high = min(bad, population), population
    while low < high:
        middle = (low + high) // 2
        beyond = bad + left + 1
        if beyond > population - middle + bad or not _plausible(population, beyond, middle, bad, alpha):
            high = middle
        else:
            low = middle + 1
    return low


def _plausible(population: int, total: int, drawn: int, bad: int, alpha: Fraction) -> bool:
    """Whether ``drawn`` of a population with ``total`` bad things hold ``bad`` of them or fewer with a probability above alpha."""
    ways = sum(math.comb(total, j) * math.comb(population - total, drawn - j) for j in range(min(bad, drawn) + 1))
    return ways > alpha * math.comb(population, drawn)


@dataclass(frozen=True)
class Paired:
    """Two models on the same images.

    Attributes:
        first_only, second_only: images that only this one gets right.
        both, neither: the others.
        p: two-sided exact p-value of McNemar's test.
    """

    first_only: int
    second_only: int
    both: int
    neither: int
    p: float

    @property
    def difference(self) -> float:
        """Accuracy of the second minus that of the first."""
        return (self.second_only - self.first_only) / (self.first_only + self.second_only + self.both + self.neither)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """The exact paired test of two lists of verdicts on the same images.

    Raises:
        ValueError: lists of different lengths, or empty ones.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"expected as many verdicts of both models, got {len(first)} and {len(second)}")
    pairs = Counter((bool(a), bool(b)) for a, b in zip(first, second, strict=True))
    b, c = pairs[True, False], pairs[False, True]
    return Paired(b, c, pairs[True, True], pairs[False, False], _binomial_p(b, c))


def _binomial_p(b: int, c: int) -> float:
    """P(at least as far from the middle) of Binomial(b + c, 1/2), from exact integers."""
    m = b + c
    tail = sum(math.comb(m, i) for i in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2**m) if m < 1000 else min(1.0, 2 * math.exp(math.log(tail) - m * math.log(2)))


def over_seeds(values: Sequence[float], level: float = 0.95) -> tuple[float, Interval]:
    """The mean of one figure over seeds and its interval by Student's t; the whole line for a single seed.

    Raises:
        ValueError: no values, or a level outside (0, 1).
    """
    from scipy.stats import t

    _check(0, 0, level)
    if not values:
        raise ValueError("expected at least one value")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, (-math.inf, math.inf)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * spread / math.sqrt(len(values))
    return mean, (mean - half, mean + half)


def images_needed(half_width: float, accuracy: float = 0.5, level: float = 0.95) -> int:
    """How many images give a Wilson interval of at most ``half_width`` to either side, at an expected accuracy.

    Args:
        half_width: half the interval's length, in (0, 0.5).
        accuracy: what one expects; 0.5 needs the most.
        level: of the interval.

    Raises:
        ValueError: a width, accuracy or level out of range.
    """
    if not 0 < half_width < 0.5:
        raise ValueError(f"expected a half width between 0 and 0.5, got {half_width}")
    if not 0 <= accuracy <= 1:
        raise ValueError(f"expected an accuracy in [0, 1], got {accuracy}")
    _check(0, 0, level)
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2

    def half(n: int) -> float:
        return math.sqrt(z2 * (accuracy * (1 - accuracy) / n + z2 / (4 * n * n))) / (1 + z2 / n)

    low, high = 0, 1
    while half(high) > half_width:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if half(middle) <= half_width else (middle, high)
    return high


def _check(k: int, n: int, level: float) -> None:
    if not 0 <= k <= n:
        raise ValueError(f"expected 0 <= k <= n, got k={k}, n={n}")
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval lies between 0 and 1, got {level}")
