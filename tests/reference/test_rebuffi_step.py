"""`rebuffi` steps against Rebuffi et al. (arXiv:2103.01946), section 4 and appendix, written out straight (straight_line.py)."""

import math

import pytest
import straight_line as paper
import torch

from robustlab import config
from robustlab.outer import Outer, context_of
from robustlab.rng import Rng
from robustlab.training.step import train_step
from robustlab.types import Threat, View, one_hot, with_threat

EPS, STEPS, BETA, TAU, BATCH, SIZE = 0.1, 10, 6.0, 0.995, 6, 6
BETA1, BETA2, NU = 0.9, 0.999, 1e-9  # Adam


def cutmix(x, y, lam, row, column, partner):
    """One box for the whole batch: sides sqrt(1 - lam) of the image, centred on a pixel, cut off at the border."""
    side = int(SIZE * math.sqrt(1 - lam))
    top, bottom = max(row - side // 2, 0), min(row + side // 2, SIZE)
    left, right = max(column - side // 2, 0), min(column + side // 2, SIZE)
    share = 1 - (bottom - top) * (right - left) / SIZE**2
    x_mix, y_mix = x.clone(), y.clone()
    for i in range(len(x)):
        x_mix[i, :, top:bottom, left:right] = x[partner[i], :, top:bottom, left:right]
        y_mix[i] = share * y[i] + (1 - share) * y[partner[i]]
    return x_mix, y_mix


def soft_cross_entropy(z, y):
    return -(y * (z - z.exp().sum(1, keepdim=True).log())).sum() / len(z)


def project(x_new, x):
    """The linf ball, then the box, as in the authors' code."""
    return (x + (x_new - x).clamp(-EPS, EPS)).clamp(0, 1)


def rebuffi_step(w, stats, velocity, x, y, noise, mode):
    """Adam away from the mixed label, TRADES on the mixed images; only the adversarial pass updates statistics."""
    x_adv, m, v = project(x + noise, x), torch.zeros_like(x), torch.zeros_like(x)
    for k in range(STEPS):
        x_k = x_adv.clone().requires_grad_(True)
        loss = len(x) * soft_cross_entropy(paper.logits(x_k, w, stats, mode), y)  # each sample's own gradient
        (g,) = torch.autograd.grad(loss, x_k)
        m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
        rate = 0.1 if k < 5 else 0.01
        step = m / (1 - BETA1 ** (k + 1)) / ((v / (1 - BETA2 ** (k + 1))).sqrt() + NU)
        x_adv = project(x_adv + rate * step, x)

    here = paper.leaves(w)
    z = paper.logits(x, here, stats, "train")
    z_adv = paper.logits(x_adv, here, stats, "update")
    loss = soft_cross_entropy(z, y) + BETA * paper.divergence(paper.softmax(z), z_adv)
    paper.sgd(w, paper.gradient(loss, here), velocity)
    return float(loss.detach())


@pytest.mark.parametrize("attack_bn", [None, "eval"])
def test_three_steps_are_the_recipe(attack_bn):
    """``None`` is the preset as shipped: the attack normalises by batch statistics and leaves the running ones alone."""
    trainer = config.build("trainer", "rebuffi", **({"attack_bn": attack_bn} if attack_bn else {}))
    trainer = with_threat(trainer, Threat("linf", EPS))
    mode = attack_bn or "train"
    f = paper.module()
    w = {name: p.detach().clone() for name, p in f.named_parameters()}
    stats = {name: b.clone() for name, b in f.named_buffers()}
    velocity, average = {}, {name: p.clone() for name, p in w.items()}
    outer = Outer(f, trainer, context_of(f, 5, 3 * BATCH, (2, SIZE, SIZE)))
    optimizer = torch.optim.SGD(
        [p for p in outer.parameters() if p.requires_grad], lr=paper.LR, momentum=paper.MU, weight_decay=paper.DECAY
    )
    rng, mixed = Rng(7).child("step"), 0
    for step in range(3):
        x, label = torch.rand(BATCH, 2, SIZE, SIZE, dtype=torch.float64), torch.randint(5, (BATCH,))
        y = one_hot(label, 5, torch.float64)
        key = torch.arange(BATCH) + step * BATCH
        (r,) = rng.split(1, step)
        whole = r.child("inner", 0).at(torch.tensor([step]))
        lam = float(whole.child("lam").beta((), 1.0, 1.0))
        row, column = whole.child("centre").integers((2,), SIZE)[0].tolist()
        partner = r.child("inner", 0).child("partner").permutation(BATCH)
        x_mix, y_mix = cutmix(x, y, lam, row, column, partner)
        mixed += int(not torch.equal(y, y_mix))
        noise = rng.child("inner", 1).at(key).child("start").uniform((2, SIZE, SIZE), -EPS, EPS, torch.float64)
        terms = train_step(outer, [{"clean": View(x=x, y=y, key=key)}], trainer, optimizer, rng, first=step)
        loss = rebuffi_step(w, stats, velocity, x_mix, y_mix, noise, mode)
        assert float(terms["loss"]) == pytest.approx(loss, rel=1e-9)
        paper.assert_same(f, optimizer, w, stats, velocity)
        tau = min(TAU, (1 + step) / (10 + step))
        average = {name: tau * average[name] + (1 - tau) * w[name] for name in w}
        for name, p in outer.averaged().named_parameters():
            torch.testing.assert_close(p, average[name], rtol=1e-6, atol=1e-10)
        for name, b in outer.averaged().named_buffers():
            torch.testing.assert_close(b, stats[name], rtol=1e-6, atol=0)
    assert mixed >= 2
    assert int(f.b1.num_batches_tracked) == 3
