"""Intervals against scipy's and against their defining equations."""

import math

import pytest
from scipy.stats import binom, binomtest

from robustlab.evaluation.statistics import clopper_pearson, wilson

CASES = [(0, 1), (1, 1), (0, 128), (128, 128), (1, 2), (90, 128), (4999, 10_000), (1, 50_000)]


@pytest.mark.parametrize(("k", "n"), CASES)
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_wilson_is_scipys(k, n, level):
    ours, theirs = wilson(k, n, level), binomtest(k, n).proportion_ci(level, method="wilson")
    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(("k", "n"), CASES)
def test_wilson_ends_solve_the_score_equation(k, n):
    """Each end p0 inside (0, 1) satisfies |k/n - p0| = z sqrt(p0 (1 - p0) / n)."""
    for p0 in wilson(k, n):
        if 0 < p0 < 1:
            assert abs(k / n - p0) == pytest.approx(1.959963984540054 * math.sqrt(p0 * (1 - p0) / n), abs=1e-12)


def test_wilson_edges_are_exact():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0
    low, high = wilson(3, 7)
    assert wilson(4, 7) == pytest.approx((1 - high, 1 - low), abs=1e-15)


@pytest.mark.parametrize(("k", "n"), CASES)
def test_clopper_pearson_is_scipys_and_solves_the_tails(k, n):
    low, high = clopper_pearson(k, n)
    theirs = binomtest(k, n).proportion_ci(0.95, method="exact")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    if k > 0:
        assert binom.sf(k - 1, n, low) == pytest.approx(0.025, rel=1e-6)
    if k < n:
        assert binom.cdf(k, n, high) == pytest.approx(0.025, rel=1e-6)


@pytest.mark.parametrize("interval", [wilson, clopper_pearson])
def test_impossible_counts_are_refused(interval):
    for k, n in [(-1, 3), (4, 3)]:
        with pytest.raises(ValueError, match=f"k={k}, n={n}"):
            interval(k, n)
    with pytest.raises(ValueError, match="level"):
        interval(1, 3, 1.0)
