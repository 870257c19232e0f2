"""`fast-at` steps against Wong et al. (ICLR 2020), algorithm 3, written out straight (tests/reference/straight_line.py)."""

import pytest
import straight_line as paper
import torch
from beside import EPS, MODES, beside, direction, input_gradient, into

from robustlab import geometry


@pytest.mark.parametrize("attack_bn", [None, "eval", "train-noupdate"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_three_steps_are_the_algorithm(norm, attack_bn):
    mode = MODES[attack_bn or "train-update"]

    def step(w, stats, velocity, x, label, delta, eps):
        start = into(x + delta, x, norm, eps)
        g = input_gradient(lambda z: paper.cross_entropy(paper.logits(z, w, stats, mode), label), start)
        x_adv = into(start + 1.25 * eps * direction(g, norm), x, norm, eps)
        here = paper.leaves(w)
        loss = paper.cross_entropy(paper.logits(x_adv, here, stats, "update"), label)
        paper.sgd(w, paper.gradient(loss, here), velocity)
        return float(loss.detach())

    def draw(rng, key):
        source = rng.child("inner", 0).at(key).child("restart", 0).child("start")
        return geometry.sample_ball(torch.zeros(len(key), 2, 6, 6, dtype=torch.float64), norm, EPS[norm], source)

    updates = beside("fast-at", norm, step, draw, **({"attack_bn": attack_bn} if attack_bn else {}))
    assert updates == 3 * (2 if mode == "update" else 1)
