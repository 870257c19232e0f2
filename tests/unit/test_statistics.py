"""Intervals and limits against scipy's, against their defining equations and against every possible draw."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binom, binomtest, hypergeom, ttest_1samp

from robustlab.evaluation.statistics import (
    clopper_pearson,
    draws_needed,
    images_needed,
    mcnemar,
    most_left,
    over_seeds,
    wilson,
)

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


# ----------------------------------------------------------------------------------------- what a random sample leaves out


def chance_of_at_most(population, total, drawn, bad):
    """P(X <= bad), by going through every possible draw."""
    draws = list(itertools.combinations(range(population), drawn))
    return Fraction(sum(sum(i < total for i in draw) <= bad for draw in draws), len(draws))


@pytest.mark.parametrize("population", [1, 5, 8])
@pytest.mark.parametrize("alpha", [Fraction(1, 20), Fraction(1, 3)])
def test_what_is_left_is_the_largest_number_that_the_draw_does_not_refute(population, alpha):
    for drawn in range(population + 1):
        for bad in range(drawn + 1):
            possible = range(bad, population - drawn + bad + 1)
            kept = [total for total in possible if chance_of_at_most(population, total, drawn, bad) > alpha]
            assert most_left(population, drawn, bad, alpha) == max(kept) - bad, (drawn, bad)


@pytest.mark.parametrize(
    ("population", "drawn", "bad"), [(450, 60, 0), (450, 100, 2), (4500, 300, 0), (50_000, 60, 1), (200, 199, 5)]
)
def test_what_is_left_agrees_with_scipy(population, drawn, bad):
    total = most_left(population, drawn, bad) + bad
    assert hypergeom.cdf(bad, population, total, drawn) > 0.05
    assert hypergeom.cdf(bad, population, total + 1, drawn) <= 0.05 or total == population - drawn + bad


def test_what_is_left_when_nothing_or_everything_is_drawn():
    assert most_left(30, 0, 0) == 30
    assert most_left(30, 30, 4) == 0
    assert most_left(0, 0, 0) == 0
    for population, drawn, bad in [(3, 4, 0), (3, 2, 3), (3, 2, -1)]:
        with pytest.raises(ValueError, match="0 <= bad <= drawn <= population"):
            most_left(population, drawn, bad)


@pytest.mark.parametrize("population", [10, 25])
def test_the_limit_holds_in_95_of_100_draws_whatever_the_truth(population):
    """Exactly: the probabilities of the draws whose limit is too low are added up."""
    closest = 1.0
    for drawn in range(population + 1):
        for total in range(population + 1):
            counts = range(max(0, total + drawn - population), min(total, drawn) + 1)
            good = [k for k in counts if total - k <= most_left(population, drawn, k)]
            coverage = sum(hypergeom.pmf(k, population, total, drawn) for k in good)
            assert coverage >= 0.95 - 1e-9
            closest = min(closest, coverage)
    assert closest < 0.97  # and no wider than it has to be


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_draws_needed_is_the_first_number_that_is_enough(bad):
    for population in (12, 40):
        for left in (0, 2, 5):
            needed = draws_needed(population, bad, left)
            enough = [m for m in range(bad, population + 1) if most_left(population, m, bad) <= left]
            assert needed == enough[0]
            assert enough == list(range(needed, population + 1))


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (3, 9), (50, 61), (600, 700)])
def test_mcnemar_is_the_binomial_test(b, c):
    first = [True] * 5 + [True] * b + [False] * c + [False] * 7
    second = [True] * 5 + [False] * b + [True] * c + [False] * 7
    found = mcnemar(first, second)
    assert (found.first_only, found.second_only, found.both, found.neither) == (b, c, 5, 7)
    assert found.p == pytest.approx(binomtest(b, b + c, 0.5).pvalue if b + c else 1.0, abs=1e-9)
    assert found.difference == pytest.approx((c - b) / len(first))


def test_mcnemar_needs_pairs():
    with pytest.raises(ValueError, match="as many verdicts"):
        mcnemar([True], [True, False])
    with pytest.raises(ValueError, match="as many verdicts"):
        mcnemar([], [])


def test_mean_over_seeds_is_scipys():
    values = [0.71, 0.74, 0.735, 0.70]
    mean, interval = over_seeds(values)
    theirs = ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert mean == pytest.approx(sum(values) / 4, abs=1e-15)
    assert interval == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert over_seeds([0.7]) == (0.7, (-math.inf, math.inf))
    with pytest.raises(ValueError, match="at least one"):
        over_seeds([])


@pytest.mark.parametrize("width", [0.2, 0.05, 0.01, 0.005])
@pytest.mark.parametrize("accuracy", [0.5, 0.7, 0.25])
def test_images_needed_is_the_smallest_number(width, accuracy):
    """From brute force over Wilson's own interval, at numbers of images where accuracy * n is whole."""
    n = images_needed(width, accuracy)

    def half(m):
        low, high = wilson(round(accuracy * m), m)
        return (high - low) / 2

    above, below = -(-n // 20) * 20, (n - 1) // 20 * 20
    assert half(above) <= width + 1e-12
    assert below == 0 or half(below) > width


@pytest.mark.parametrize(("width", "accuracy"), [(0, 0.5), (0.5, 0.5), (0.1, 1.5)])
def test_images_needed_refuses(width, accuracy):
    with pytest.raises(ValueError, match="expected"):
        images_needed(width, accuracy)


@pytest.mark.parametrize("p", [0.5, 0.75, 0.9])
def test_wilson_covers_in_a_simulation(p):
    """10,000 draws: the nominal 95 % interval covers the truth in 94 to 96.5 %."""
    n = 500
    ks = np.random.default_rng(0).binomial(n, p, 10_000)
    covered = {k: wilson(k, n)[0] <= p <= wilson(k, n)[1] for k in map(int, np.unique(ks))}
    share = np.mean([covered[int(k)] for k in ks])
    assert 0.94 <= share <= 0.965
