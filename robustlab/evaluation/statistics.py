"""Intervals for a proportion: k successes among n independent samples.

Wilson (JASA 22, 1927):  (p + z^2/2n -+ z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n),  p = k/n, z the normal quantile.
Clopper and Pearson (Biometrika 26, 1934): quantiles of Beta(k, n-k+1) and Beta(k+1, n-k); never too short, often too long.
"""

from __future__ import annotations

import math
from statistics import NormalDist

Interval = tuple[float, float]


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


def _check(k: int, n: int, level: float) -> None:
    if not 0 <= k <= n:
        raise ValueError(f"expected 0 <= k <= n, got k={k}, n={n}")
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval lies between 0 and 1, got {level}")
