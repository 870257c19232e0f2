"""`gradalign` steps against Andriushchenko and Flammarion (NeurIPS 2020), equation 4, written out straight."""

import pytest
import straight_line as paper
import torch
from beside import EPS, MODES, beside, direction, input_gradient, into

from robustlab import geometry

LAM = 0.2


@pytest.mark.parametrize("attack_bn", [None, "eval", "train-noupdate"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_three_steps_are_the_algorithm(norm, attack_bn):
    mode = MODES[attack_bn or "train-update"]

    def step(w, stats, velocity, x, label, eta, eps):
        g1 = input_gradient(lambda z: paper.cross_entropy(paper.logits(z, w, stats, mode), label), x)
        x_adv = into(x + 1.25 * eps * direction(g1, norm), x, norm, eps)
        here = paper.leaves(w)
        loss = paper.cross_entropy(paper.logits(x_adv, here, stats, "update"), label)
        x_eta = (x + eta).requires_grad_(True)
        value = paper.cross_entropy(paper.logits(x_eta, here, stats, "train"), label)
        (g2,) = torch.autograd.grad(value, x_eta, create_graph=True)
        for a, b in zip(g1, g2, strict=True):  # the first gradient is a constant
            cosine = (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())
            loss = loss + LAM * (1 - cosine) / len(x)
        paper.sgd(w, paper.gradient(loss, here), velocity)
        return float(loss.detach())

    def draw(rng, key):
        source = rng.child("loss").child("gradient-alignment").at(key)
        return geometry.sample_ball(torch.zeros(len(key), 2, 6, 6, dtype=torch.float64), norm, EPS[norm], source)

    updates = beside("gradalign", norm, step, draw, **({"attack_bn": attack_bn} if attack_bn else {}))
    assert updates == 3 * (2 if mode == "update" else 1)
