"""Elastic-net attack (Chen et al., AAAI 2018, algorithm 1, decision rule "L1"): a small l1 perturbation.

    min_x'   c max(L(x'), 0) + ||x' - x||_2^2 + beta ||x' - x||_1,    x' in [0, 1]
    x_{k+1}  = S(v_k - alpha_k grad_v (c max(L, 0) + ||v - x||_2^2)),   v_{k+1} = x_{k+1} + k / (k + 3) (x_{k+1} - x_k)
    S        soft thresholding of x' - x by beta, then the box
    L        z_c - max_{k != c} z_k, positive until the sample is fooled (targeted: max_{k != t} z_k - z_t)
    alpha_k  rate sqrt(1 - k / steps)
    c        binary search per sample, as in Carlini and Wagner

Differences from the authors' code: every run has all its steps, 1000 as in the paper (10,000 in the code, which may end a run early
by the loss of the batch); untargeted unless asked; the confidence kappa is 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustlab.attacks.minimum import MinimumNorm, Nearest, Weight
from robustlab.attacks.steps import input_gradient, passes
from robustlab.geometry import prox
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Classifier, Count, NonNegative, Norm, Positive


@register("ead", cite="Chen et al., AAAI 2018, arXiv:1709.04114")
class EAD(MinimumNorm):
    """Accelerated proximal gradient descent on margin plus elastic net, with a binary search over the margin's weight (l1).

    Deterministic. Costs ``2 * binary_steps * steps + 1`` forward and half as many backward passes. It does not minimise the l1 norm
    alone: the squared l2 norm spreads the perturbation over more pixels, the less the larger ``beta`` is.

    Attributes:
        norm: l1.
        eps: None, or the radius of the ball in which what comes back has to lie.
        steps: for each c.
        binary_steps: values of c.
        rate: first step size.
        beta: weight of the l1 norm.
        c: the first weight of the margin.
        targeted: y is the class to reach.
    """

    norms = ("l1",)

    norm: Norm | None = None
    eps: NonNegative | None = None
    steps: Count = 1000
    binary_steps: Count = 9
    rate: Positive = 0.01
    beta: Positive = 1e-3
    c: Positive = 1e-3
    targeted: bool = False

    def search(self, f: Classifier, near: Nearest, rng: Rng) -> Tensor:
        weight = Weight(self.c, near.distance)
        for _ in range(self.binary_steps):
            weight.update(self._descend(f, near, weight.c))
        each = self.binary_steps * self.steps
        return passes(near.x0, 2 * each, each)

    def _descend(self, f: Classifier, near: Nearest, c: Tensor) -> Tensor:
        """One run; returns which samples were fooled on the way."""
        x0, beta = near.x0, torch.full_like(c, self.beta)
        x, v, ever = x0, x0, torch.zeros_like(c, dtype=torch.bool)
        for k in range(self.steps):
            g, _, _ = input_gradient(f, v, near.y, lambda z, y: c * near.gap(z, y).clamp_min(0))
            d = v - x0
            alpha = self.rate * math.sqrt(1 - k / self.steps)
            x, old = (x0 + prox(d - alpha * (g + 2 * d), beta, "l1")).clamp(0, 1), x
            v = x + k / (k + 3) * (x - old)
            with torch.no_grad():
                ever |= near.offer(x, f(x).to(x.dtype))
        return ever
