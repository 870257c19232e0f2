"""`trades` steps against Zhang et al. (ICML 2019), algorithm 1, written out straight (tests/reference/straight_line.py)."""

import pytest
import straight_line as paper
import torch

from robustlab import config
from robustlab.outer import Outer, context_of
from robustlab.rng import Rng
from robustlab.training.step import train_step
from robustlab.types import Threat, View, one_hot, with_threat

EPS, STEPS, BETA, BATCH = 0.1, 10, 6.0, 6


def trades_step(w, stats, velocity, x, label, noise, mode):
    """One step; ``noise`` (N, C, H, W) is standard normal, ``mode`` the BatchNorm mode of the attack's forwards."""
    p = paper.softmax(paper.logits(x, w, stats, mode))  # fixed during the attack
    x_adv = x + 0.001 * noise
    for _ in range(STEPS):
        x_k = x_adv.clone().requires_grad_(True)
        loss = paper.divergence(p, paper.logits(x_k, w, stats, mode))
        (g,) = torch.autograd.grad(loss, x_k)
        x_adv = paper.into_ball(x_adv + EPS / 4 * g.sign(), x, EPS)

    here = paper.leaves(w)  # CE(f(x), y) + beta KL(softmax f(x) || softmax f(x')): two passes, gradients through both
    z = paper.logits(x, here, stats, "update")
    z_adv = paper.logits(x_adv, here, stats, "update")
    loss = paper.cross_entropy(z, label) + BETA * paper.divergence(paper.softmax(z), z_adv)
    paper.sgd(w, paper.gradient(loss, here), velocity)
    return float(loss.detach())


@pytest.mark.parametrize("attack_bn", [None, "eval", "train-update"])
def test_three_steps_are_the_algorithm(attack_bn):
    """``None`` is the preset as shipped: it attacks in eval mode, and the clean and the adversarial pass renew the statistics."""
    trainer = with_threat(config.build("trainer", "trades", **({"attack_bn": attack_bn} if attack_bn else {})), Threat("linf", EPS))
    mode = "update" if attack_bn == "train-update" else "eval"
    f = paper.module()
    w = {name: p.detach().clone() for name, p in f.named_parameters()}
    stats = {name: b.clone() for name, b in f.named_buffers()}
    velocity = {}
    outer = Outer(f, trainer, context_of(f, 5, 3 * BATCH, (2, 6, 6)))
    optimizer = torch.optim.SGD(outer.parameters(), lr=paper.LR, momentum=paper.MU, weight_decay=paper.DECAY)
    rng = Rng(7).child("step")
    for step in range(3):
        x, label = torch.rand(BATCH, 2, 6, 6, dtype=torch.float64), torch.randint(5, (BATCH,))
        key = torch.arange(BATCH) + step * BATCH
        noise = rng.child("inner", 0).at(key).child("restart", 0).child("start").normal((2, 6, 6), torch.float64)
        view = View(x=x, y=one_hot(label, 5, torch.float64), key=key)
        terms = train_step(outer, [{"clean": view}], trainer, optimizer, rng, first=step)
        loss = trades_step(w, stats, velocity, x, label, noise, mode)
        assert float(terms["loss"]) == pytest.approx(loss, rel=1e-9)
        paper.assert_same(f, optimizer, w, stats, velocity)
    assert int(f.b1.num_batches_tracked) == (3 * (STEPS + 3) if mode == "update" else 3 * 2)
