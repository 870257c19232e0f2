"""The sizes of Square's windows over the queries, against the published thresholds."""

import math

import pytest
import torch

from robustlab.attacks.square import SCHEDULE
from robustlab.attacks.square_walk import How
from robustlab.rng import Rng

LADDER = ((10, 1), (50, 2), (200, 4), (500, 8), (1000, 16), (2000, 32), (4000, 64), (6000, 128), (8000, 256), (10**9, 512))


def published(query, queries, rescale, p_init=0.8, size=32):
    place = int(query / queries * 10000) if rescale else query
    divisor = next(d for last, d in LADDER if place <= last)
    return max(round(math.sqrt(p_init / divisor * size * size)), 1)


@pytest.mark.parametrize("queries", [100, 1000, 5000, 10_000])
@pytest.mark.parametrize("rescale", [False, True])
def test_sizes_are_the_published_ones(queries, rescale):
    how = How("linf", 0.1, queries, 0.8, SCHEDULE / queries if rescale else 1.0, Rng(0))
    asked = range(0, queries, max(queries // 500, 1))
    assert [how.side(q, torch.Size((1, 3, 32, 32))) for q in asked] == [published(q, queries, rescale) for q in asked]
