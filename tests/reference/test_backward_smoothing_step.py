"""`backward-smoothing` steps against Chen et al. (AAAI 2022), algorithm 1, written out straight."""

import pytest
import straight_line as paper
import torch
from beside import MODES, beside, direction, input_gradient, into

GAMMA, BETA = 1.0, 10.0


@pytest.mark.parametrize("attack_bn", [None, "train-noupdate"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_three_steps_are_the_algorithm(norm, attack_bn):
    mode = MODES[attack_bn or "eval"]

    def step(w, stats, velocity, x, label, psi, eps):
        def toward(p):
            return lambda z: paper.divergence(p, paper.logits(z, w, stats, mode))

        z = paper.logits(x, w, stats, mode)
        away = input_gradient(toward(paper.softmax(z + GAMMA * psi)), x)
        start = into(x - eps * direction(away, norm), x, norm, eps)  # closer to the noisy output
        x_adv = into(start + eps * direction(input_gradient(toward(paper.softmax(z)), start), norm), x, norm, eps)
        here = paper.leaves(w)
        z, z_adv = paper.logits(x, here, stats, "update"), paper.logits(x_adv, here, stats, "update")
        loss = paper.cross_entropy(z, label) + BETA * paper.divergence(paper.softmax(z), z_adv)
        paper.sgd(w, paper.gradient(loss, here), velocity)
        return float(loss.detach())

    def draw(rng, key):
        return rng.child("inner", 0).at(key).child("output").uniform((5,), -1.0, 1.0, dtype=torch.float64)

    updates = beside("backward-smoothing", norm, step, draw, **({"attack_bn": attack_bn} if attack_bn else {}))
    assert updates == 3 * 2
