"""`rice-at` steps against Rice et al. (ICML 2020), section 2, written out straight (tests/reference/straight_line.py)."""

import pytest
import straight_line as paper
import torch
from beside import EPS, beside, direction, input_gradient, into

from robustlab import geometry


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_three_steps_are_the_algorithm(norm):
    def step(w, stats, velocity, x, label, delta, eps):
        x_adv = into(x + delta, x, norm, eps)
        for _ in range(10):
            g = input_gradient(lambda z: paper.cross_entropy(paper.logits(z, w, stats, "update"), label), x_adv)
            x_adv = into(x_adv + eps / 4 * direction(g, norm), x, norm, eps)
        here = paper.leaves(w)
        loss = paper.cross_entropy(paper.logits(x_adv, here, stats, "update"), label)
        paper.sgd(w, paper.gradient(loss, here), velocity)
        return float(loss.detach())

    def draw(rng, key):
        source = rng.child("inner", 0).at(key).child("restart", 0).child("start")
        return geometry.sample_ball(torch.zeros(len(key), 2, 6, 6, dtype=torch.float64), norm, EPS[norm], source)

    assert beside("rice-at", norm, step, draw) == 3 * 11
