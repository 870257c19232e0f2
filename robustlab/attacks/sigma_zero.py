"""sigma-zero (Cina et al., ICLR 2025, algorithm 1): the smallest number of changed pixels.

    L       = max(z_c - max_{k != c} z_k, 0) + (1 / P) sum_p s_p / (s_p + sigma),    s_p = sum over the channels of d_p^2
    g       = grad_d L / ||grad_d L||_inf
    d       <- clamp(x + d - eta_k Adam(g)) - x
    tau     <- tau +- t eta_k: up where x + d fools, down where it does not, within [0, 1]
    d_p     <- 0 where max over the channels of |d_p| is below tau

    P       number of pixels;  sigma  sharpness of the smooth stand-in of the l0 norm
    eta_k   step size, from eta to eta / 10 along half a cosine

Differences from the authors' code: it counts values, over pixels and channels; here l0 counts pixels, so the channels of a pixel
are kept or zeroed together. For one channel both agree. Targeted is new: the margin is then max_{k != t} z_k - z_t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustlab.attacks.minimum import Adam, MinimumNorm, cosine
from robustlab.attacks.nearest import Nearest, wide
from robustlab.attacks.steps import input_gradient, passes
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Classifier, Count, Fraction, NonNegative, Norm, Positive, Whole


@register("sigma-zero", cite="Cina et al., ICLR 2025, arXiv:2402.01879")
class SigmaZero(MinimumNorm):
    """Descends on the margin plus a smooth count of pixels, and drops small changes by a threshold that adapts itself (l0).

    Deterministic. Costs ``steps + 1`` forward and ``steps`` backward passes, and up to 11 and 9 for each pixel that
    ``refine`` tries to take back.

    Attributes:
        norm: l0.
        eps: None, or the largest number of pixels in what comes back.
        steps: K.
        eta: first step size.
        sigma: sharpness of the smooth count.
        tau: first threshold.
        tau_step: t, change of the threshold per step and step size.
        targeted: y is the class to reach.
        refine: pixels taken back at the end, at most (see ``refine.py``).
    """

    norms = ("l0",)

    norm: Norm | None = None
    eps: NonNegative | None = None
    steps: Count = 1000
    eta: Positive = 1.0
    sigma: Positive = 1e-3
    tau: Fraction = 0.3
    tau_step: Fraction = 0.01
    targeted: bool = False
    refine: Whole = 10

    def search(self, f: Classifier, near: Nearest, rng: Rng) -> Tensor:
        x0, x, adam = near.x0, near.x0, Adam(near.x0)
        tau = torch.full_like(near.distance, self.tau)
        for k in range(self.steps):
            g, _, z = input_gradient(f, x, near.y, lambda z, y: near.gap(z, y).clamp_min(0))
            hit = near.offer(x, z)
            g = g + self._count_gradient(x - x0)
            g = g / wide(g.flatten(1).abs().amax(1).clamp_min(1e-12))
            m, s = adam.moments(g)
            eta = cosine(k, self.steps, self.eta, self.eta / 10)
            d = (x - eta * m / s).clamp(0, 1) - x0
            tau = torch.where(hit, tau + self.tau_step * eta, tau - self.tau_step * eta).clamp(0, 1)
            x = torch.where(d.abs().amax(1, keepdim=True) >= wide(tau), x0 + d, x0).clamp(0, 1)
        return passes(x0, self.steps, self.steps)

    def _count_gradient(self, d: Tensor) -> Tensor:
        """The gradient of (1 / P) sum_p s_p / (s_p + sigma)."""
        s = d.square().sum(1, keepdim=True)
        return 2 * d * self.sigma / (s + self.sigma).square() / s[0].numel()
