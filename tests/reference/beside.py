"""Three steps of a trainer beside the same steps written out straight; the net and the update are those of ``straight_line``."""

import pytest
import straight_line as paper
import torch

from robustlab import config
from robustlab.outer import Outer, context_of
from robustlab.rng import Rng
from robustlab.training.step import train_step
from robustlab.types import Threat, View, one_hot, with_threat

BATCH, CLASSES, SHAPE = 6, 5, (2, 6, 6)
EPS = {"linf": 0.1, "l2": 0.3}
MODES = {"eval": "eval", "train-noupdate": "train", "train-update": "update"}  # robustlab's names and straight_line's


def images(norm):
    """Double precision; in l2 so far from 0 and 1 that no perturbation gets there, and the ball alone counts."""
    x = torch.rand(BATCH, *SHAPE, dtype=torch.float64)
    return x if norm == "linf" else 0.35 + 0.3 * x


def direction(g, norm):
    """The steepest unit step."""
    return g.sign() if norm == "linf" else g / g.flatten(1).pow(2).sum(1).sqrt().view(-1, 1, 1, 1)


def into(x_new, x, norm, eps):
    """The ball around x and the pixel range."""
    if norm == "linf":
        return paper.into_ball(x_new, x, eps)
    d = x_new - x
    return (x + d * (eps / d.flatten(1).pow(2).sum(1).sqrt()).clamp_max(1).view(-1, 1, 1, 1)).clamp(0, 1)


def input_gradient(loss, x):
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(loss(x), x)[0]


def beside(name, norm, straight, draw, replays=1, **fields):
    """``straight(w, stats, velocity, x, label, draws, eps)`` -> loss; ``draw(rng, key)`` -> its random numbers.

    Returns the number of passes that renewed BatchNorm's statistics.
    """
    eps = EPS[norm]
    trainer = with_threat(config.build("trainer", name, **fields), Threat(norm, eps))
    f = paper.module()
    w = {n: p.detach().clone() for n, p in f.named_parameters()}
    stats = {n: b.clone() for n, b in f.named_buffers()}
    velocity, rng = {}, Rng(7).child("step")
    outer = Outer(f, trainer, context_of(f, CLASSES, 3 * BATCH, SHAPE, batch_size=BATCH))
    optimizer = torch.optim.SGD(outer.parameters(), lr=paper.LR, momentum=paper.MU, weight_decay=paper.DECAY)
    for step in range(3):
        x, label = images(norm), torch.randint(CLASSES, (BATCH,))
        key = torch.arange(BATCH) + step * BATCH
        view = View(x=x, y=one_hot(label, CLASSES, torch.float64), key=key)
        for _ in range(replays):
            terms = train_step(outer, [{"clean": view}], trainer, optimizer, rng, first=step)
            loss = straight(w, stats, velocity, x, label, draw(rng, key), eps)
            assert float(terms["loss"]) == pytest.approx(loss, rel=1e-9)
            paper.assert_same(f, optimizer, w, stats, velocity)
    return int(f.b1.num_batches_tracked)
