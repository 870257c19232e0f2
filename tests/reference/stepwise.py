"""Runs a trainer beside a straight-line computation of the same steps, and compares what they leave behind.

The net of ``straight_line``, with the outputs of its layers within reach. The straight-line side gets the draws and nothing else.
"""

import pytest
import straight_line as paper
import torch
from torch.nn import functional as F

from robustlab import config
from robustlab.outer import Outer, context_of
from robustlab.rng import Rng
from robustlab.training.step import train_step
from robustlab.types import Threat, View, one_hot, with_threat

SHAPE, CLASSES = (2, 6, 6), 5


def logits(x, w, stats, mode, change=lambda layer, h: h):
    """As ``straight_line.logits``; ``change(layer, h)`` may replace the input and the output of any layer."""
    h = change("input", x)
    h = change("c1", F.conv2d(h, w["c1.weight"], w["c1.bias"], padding=1))
    h = change("r1", paper.batch_norm(h, w, stats, "b1", mode).clamp_min(0))
    h = change("c2", F.conv2d(h, w["c2.weight"], stride=2, padding=1))
    h = change("r2", paper.batch_norm(h, w, stats, "b2", mode).clamp_min(0))
    h = change("features", (h.reshape(len(x), -1) @ w["l1.weight"].T + w["l1.bias"]).clamp_min(0))
    return h @ w["l2.weight"].T + w["l2.bias"]


def soft_cross_entropy(z, y):
    """Mean over the samples of -sum_k y_k log softmax(z)_k."""
    return -(y * (z - z.exp().sum(1, keepdim=True).log())).sum() / len(z)


def pgd(x, label, start, eps, steps, step, w, stats, mode):
    """x_0 = x + start;  x_{k+1} = into_ball(x_k + step * sign(grad CE)); the last point and the last gradient."""
    x_adv, g = paper.into_ball(x + start, x, eps), None
    for _ in range(steps):
        x_k = x_adv.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(paper.cross_entropy(paper.logits(x_k, w, stats, mode), label), x_k)
        x_adv = paper.into_ball(x_adv + step * g.sign(), x, eps)
    return x_adv, g


def follow(name, fields, step, eps=0.1, norm="linf", count=3, batch=6, shapes=SHAPE):
    """``step(w, stats, velocity, x, label, draws, number) -> loss`` against the trainer's steps; ``draws`` is the step's source."""
    trainer = with_threat(config.build("trainer", name, **fields), Threat(norm, eps))
    f = paper.module()
    w = {n: p.detach().clone() for n, p in f.named_parameters()}
    stats = {n: b.clone() for n, b in f.named_buffers()}
    velocity = {}
    outer = Outer(f, trainer, context_of(f, CLASSES, count * batch, shapes))
    optimizer = torch.optim.SGD(f.parameters(), lr=paper.LR, momentum=paper.MU, weight_decay=paper.DECAY)
    rng = Rng(7).child("step")
    for number in range(count):
        x, label = torch.rand(batch, *shapes, dtype=torch.float64), torch.randint(CLASSES, (batch,))
        key = torch.arange(batch) + number * batch
        view = View(x=x, y=one_hot(label, CLASSES, torch.float64), key=key, index=key)
        terms = train_step(outer, [{"clean": view}], trainer, optimizer, rng, first=number)
        draws = rng.split(1, number)[0].at(key)
        loss = step(w, stats, velocity, x, label, draws, number)
        assert float(terms["loss"]) == pytest.approx(loss, rel=1e-8)
        paper.assert_same(f, optimizer, w, stats, velocity)
    return outer, w, stats
