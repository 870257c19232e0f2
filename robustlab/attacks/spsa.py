"""SPSA (Uesato, O'Donoghue, van den Oord, Kohli, ICML 2018, algorithm 1): Adam on gradients that finite differences estimate.

    g     = 1/n sum_i (L(x_k + delta v_i) - L(x_k - delta v_i)) / (2 delta) v_i,     v_i uniform on {-1, 1}^D
    x_k+1 = P(x_k + alpha m / (sqrt(s) + 1e-8)),     m, s: Adam's averages of g and g^2, unbiased (0.9, 0.999)

    L      the margin max_{k != c} z_k - z_c     n  pairs of queries per step
    delta  size of the differences, alpha  step size: both in pixel units
    P      projection on ball and box

Only logits are asked for: a classifier without gradients will do. One query per step tests the new point; a sample leaves when it
is fooled.

Differences from the paper: queries are clamped to [0, 1], which a deployed classifier demands; at a bound the difference is
one-sided.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustlab import geometry
from robustlab.attacks.steps import fooled, objective, passes, threat_of
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, NonNegative, Norm, Positive

BETA_1, BETA_2, TINY = 0.9, 0.999, 1e-8  # of Adam
ROWS = 2048  # images in one forward pass, at most (or two per sample)


@register("spsa", cite="Uesato, O'Donoghue, van den Oord, Kohli, ICML 2018, arXiv:1802.05666")
class SPSA(Attack):
    """Black box: follows gradients that are estimated from logits at random pairs of points.

    Costs at most ``queries`` forward passes per sample, 2 ``pairs`` + 1 per step, and no backward pass.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        queries: forward passes per sample, at most.
        pairs: n; fewer where the budget is smaller.
        step: alpha, in pixel units.
        delta: of the finite differences, in pixel units.
        targeted: y is the class to reach.
    """

    norms = ("linf",)

    norm: Norm | None = None
    eps: NonNegative | None = None
    queries: Count = 10_000
    pairs: Count = 64
    step: Positive = 0.01
    delta: Positive = 0.01
    targeted: bool = False

    @torch.no_grad()
    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        norm, eps = threat_of(self)
        x0, best, cost = x.detach(), x.detach().clone(), passes(x, 0, 0)
        row, x_k = torch.arange(len(x), device=x.device), x.detach()
        m, s = torch.zeros_like(x_k), torch.zeros_like(x_k)
        pairs = min(self.pairs, (self.queries - 1) // 2)
        steps = self.queries // (2 * pairs + 1) if pairs and eps else 0
        for k in range(1, steps + 1):
            g = self._gradient(f, x_k, y[row], pairs, rng.select(row).child("step", k))
            m, s = BETA_1 * m + (1 - BETA_1) * g, BETA_2 * s + (1 - BETA_2) * g.square()
            move = (m / (1 - BETA_1**k)) / ((s / (1 - BETA_2**k)).sqrt() + TINY)
            x_k = geometry.project(x_k + self.step * move, x0[row], norm, eps)
            best[row] = x_k
            cost[row, 0] += 2 * pairs + 1
            left = ~fooled(f(x_k).to(x.dtype), y[row], self.targeted)
            row, x_k, m, s = row[left], x_k[left], m[left], s[left]
            if len(row) == 0:
                break
        return best, {"passes": cost}

    def _gradient(self, f: Classifier, x: Tensor, y: Tensor, pairs: int, rng: Rng) -> Tensor:
        loss, g = objective("margin", self.targeted), torch.zeros_like(x)
        at_once = max(1, ROWS // (2 * len(x)))
        for first in range(0, pairs, at_once):
            draws = [rng.child("pair", i).bits(x.shape[1:]) for i in range(first, min(first + at_once, pairs))]
            v = (torch.stack(draws).bitwise_and(1) * 2 - 1).to(x.dtype)
            both = torch.stack([x + self.delta * v, x - self.delta * v]).clamp_(0, 1)
            z = f(both.flatten(0, 2)).to(x.dtype)
            value = loss(z, y.repeat(2 * len(v), 1)).view(2, len(v), len(x), 1, 1, 1)
            g += ((value[0] - value[1]) * v).sum(0) / (2 * self.delta * pairs)
        return g
