"""`awp`, `trades-awp` and `mart-awp` steps against Wu, Xia, Wang (NeurIPS 2020), algorithm 1, written out straight."""

import pytest
import straight_line as paper
import torch

from robustlab import config
from robustlab.outer import Outer, context_of
from robustlab.rng import Rng
from robustlab.training.step import train_step
from robustlab.types import Threat, View, one_hot, with_threat

EPS, STEPS, GAMMA, BATCH = 0.1, 10, 0.01, 6


def awp_step(w, stats, velocity, x, label, noise, mode):
    """One step; ``noise`` (N, C, H, W) is the attack's start, ``mode`` the BatchNorm mode of its forwards."""
    x_adv = paper.into_ball(x + noise, x, EPS)  # x' = PGD(f_w)
    for _ in range(STEPS):
        x_k = x_adv.clone().requires_grad_(True)
        loss = paper.cross_entropy(paper.logits(x_k, w, stats, mode), label)
        (g,) = torch.autograd.grad(loss, x_k)
        x_adv = paper.into_ball(x_adv + EPS / 4 * g.sign(), x, EPS)

    here = paper.leaves(w)  # v_l = gamma ||w_l|| g_l / ||g_l||, without new statistics
    g = paper.gradient(paper.cross_entropy(paper.logits(x_adv, here, stats, "train"), label), here)
    there = {}
    for name in w:
        v = torch.zeros_like(w[name])
        if w[name].dim() > 1:
            v = GAMMA * (w[name] ** 2).sum().sqrt() * g[name] / (g[name] ** 2).sum().sqrt()
        there[name] = w[name] + v

    there = paper.leaves(there)  # the gradient at w + v, with new statistics; the step is taken at w
    loss = paper.cross_entropy(paper.logits(x_adv, there, stats, "update"), label)
    paper.sgd(w, paper.gradient(loss, there), velocity)
    return float(loss.detach())


@pytest.mark.parametrize("attack_bn", [None, "eval", "train-noupdate"])
def test_three_steps_are_the_algorithm(attack_bn):
    """``None`` is the preset as shipped: it attacks in train mode, and every forward of the attack renews the statistics."""
    trainer = with_threat(config.build("trainer", "awp", **({"attack_bn": attack_bn} if attack_bn else {})), Threat("linf", EPS))
    mode = {None: "update", "eval": "eval", "train-noupdate": "train"}[attack_bn]
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
        noise = rng.child("inner", 0).at(key).child("restart", 0).child("start").uniform((2, 6, 6), -EPS, EPS, torch.float64)
        view = View(x=x, y=one_hot(label, 5, torch.float64), key=key)
        terms = train_step(outer, [{"clean": view}], trainer, optimizer, rng, first=step)
        loss = awp_step(w, stats, velocity, x, label, noise, mode)
        assert float(terms["loss"]) == pytest.approx(loss, rel=1e-9)
        paper.assert_same(f, optimizer, w, stats, velocity)
    assert int(f.b1.num_batches_tracked) == (3 * (STEPS + 1) if mode == "update" else 3)


def awp_on_two_views(w, stats, velocity, x, label, noise, gamma, attacked, loss_of):
    """A step at the worst weights of ``loss_of(z, z_adv)``; ``noise`` (N, C, H, W) is standard normal, the attack in eval mode."""
    p = paper.softmax(paper.logits(x, w, stats, "eval"))
    x_adv = x + 0.001 * noise
    for _ in range(STEPS):
        x_k = x_adv.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(attacked(p, paper.logits(x_k, w, stats, "eval"), label), x_k)
        x_adv = paper.into_ball(x_adv + EPS / 4 * g.sign(), x, EPS)

    def loss_at(w, mode):
        return loss_of(paper.logits(x, w, stats, mode), paper.logits(x_adv, w, stats, mode), label)

    here = paper.leaves(w)
    g = paper.gradient(loss_at(here, "train"), here)
    there = {}
    for name in w:
        v = gamma * (w[name] ** 2).sum().sqrt() * g[name] / (g[name] ** 2).sum().sqrt() if w[name].dim() > 1 else 0
        there[name] = w[name] + v
    there = paper.leaves(there)
    loss = loss_at(there, "update")
    paper.sgd(w, paper.gradient(loss, there), velocity)
    return float(loss.detach())


def trades(z, z_adv, label):
    return paper.cross_entropy(z, label) + 6 * paper.divergence(paper.softmax(z), z_adv)


def mart(z, z_adv, label):
    p, p_adv = paper.softmax(z), paper.softmax(z_adv)
    total = 0
    for i, y in enumerate(label.tolist()):
        wrong = torch.stack([p_adv[i, k] for k in range(5) if k != y]).max()
        divergence = (p[i] * (p[i].log() - p_adv[i].log())).sum()
        total = total - p_adv[i, y].log() - (1.0001 - wrong).log() + 5 * divergence * (1 - p[i, y])
    return total / len(z)


@pytest.mark.parametrize(
    ("name", "attacked", "loss_of"),
    [
        ("trades-awp", lambda p, z, label: paper.divergence(p, z), trades),
        ("mart-awp", lambda p, z, label: paper.cross_entropy(z, label), mart),
    ],
)
def test_three_steps_with_another_objective(name, attacked, loss_of):
    trainer = with_threat(config.build("trainer", name), Threat("linf", EPS))
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
        loss = awp_on_two_views(w, stats, velocity, x, label, noise, 0.005, attacked, loss_of)
        assert float(terms["loss"]) == pytest.approx(loss, rel=1e-9)
        paper.assert_same(f, optimizer, w, stats, velocity)
    assert int(f.b1.num_batches_tracked) == 3 * 2
