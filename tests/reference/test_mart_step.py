"""`mart` steps against Wang et al. (ICLR 2020), equations 7 to 9, written out straight (tests/reference/straight_line.py)."""

import pytest
import straight_line as paper
import torch
from beside import MODES, beside, direction, input_gradient, into

STEPS, BETA = 10, 5.0


def mart_loss(w, stats, x, x_adv, label):
    """-log p'_y - log(1.0001 - max_{k != y} p'_k) + beta KL(p || p') (1 - p_y), averaged; clean pass first."""
    p = paper.softmax(paper.logits(x, w, stats, "update"))
    q = paper.softmax(paper.logits(x_adv, w, stats, "update"))
    total = 0
    for i, c in enumerate(label.tolist()):
        others = torch.cat([q[i, :c], q[i, c + 1 :]])
        kl = (p[i] * (p[i].log() - q[i].log())).sum()
        total = total - q[i, c].log() - (1.0001 - others.max()).log() + BETA * kl * (1 - p[i, c])
    return total / len(x)


@pytest.mark.parametrize("attack_bn", [None, "train-update"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_three_steps_are_the_algorithm(norm, attack_bn):
    mode = MODES[attack_bn or "eval"]

    def step(w, stats, velocity, x, label, noise, eps):
        x_adv = x + 0.001 * noise
        for _ in range(STEPS):
            g = input_gradient(lambda z: paper.cross_entropy(paper.logits(z, w, stats, mode), label), x_adv)
            x_adv = into(x_adv + eps / 4 * direction(g, norm), x, norm, eps)
        here = paper.leaves(w)
        loss = mart_loss(here, stats, x, x_adv, label)
        paper.sgd(w, paper.gradient(loss, here), velocity)
        return float(loss.detach())

    def draw(rng, key):
        return rng.child("inner", 0).at(key).child("restart", 0).child("start").normal((2, 6, 6), torch.float64)

    updates = beside("mart", norm, step, draw, **({"attack_bn": attack_bn} if attack_bn else {}))
    assert updates == 3 * (2 if mode == "eval" else 2 + STEPS)
