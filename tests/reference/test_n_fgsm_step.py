"""`n-fgsm` steps against de Jorge et al. (NeurIPS 2022), algorithm 1, written out straight (tests/reference/straight_line.py)."""

import pytest
import straight_line as paper
import torch
from beside import EPS, MODES, beside, direction, input_gradient

from robustlab import geometry


@pytest.mark.parametrize("attack_bn", [None, "eval", "train-noupdate"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_three_steps_are_the_algorithm(norm, attack_bn):
    mode = MODES[attack_bn or "train-update"]

    def step(w, stats, velocity, x, label, eta, eps):
        start = (x + eta).clamp(0, 1)
        g = input_gradient(lambda z: paper.cross_entropy(paper.logits(z, w, stats, mode), label), start)
        x_adv = (start + eps * direction(g, norm)).clamp(0, 1)  # not projected on the ball
        assert float((x_adv - x).abs().amax()) > (1.5 * eps if norm == "linf" else 0)
        here = paper.leaves(w)
        loss = paper.cross_entropy(paper.logits(x_adv, here, stats, "update"), label)
        paper.sgd(w, paper.gradient(loss, here), velocity)
        return float(loss.detach())

    def draw(rng, key):
        source = rng.child("inner", 0).at(key).child("noise")
        return geometry.sample_ball(torch.zeros(len(key), 2, 6, 6, dtype=torch.float64), norm, 2 * EPS[norm], source)

    updates = beside("n-fgsm", norm, step, draw, **({"attack_bn": attack_bn} if attack_bn else {}))
    assert updates == 3 * (2 if mode == "update" else 1)
