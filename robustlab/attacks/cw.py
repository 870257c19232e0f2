"""The l2 attack of Carlini and Wagner (IEEE S&P 2017, section V and VI.A).

    min_w  ||x(w) - x||_2^2 + c max(L(x(w)), 0),    x(w) = (tanh(w) + 1) / 2,   by Adam from w = atanh((1 - 1e-6) (2 x - 1))
    L      z_c - max_{k != c} z_k, positive until the sample is fooled (targeted: max_{k != t} z_k - z_t)
    c      binary search per sample: tenfold while nothing fools, then the middle of the last that failed and the last that fooled

Pixels that are exactly 0 or 1 have an infinite atanh and would never move; the factor 1 - 1e-6 lets Adam, which does not mind how
small a gradient is, move them. Distances are measured to the image itself.

Differences from the authors' code:

- A run ends early for each sample (theirs: for the batch) when the objective fell by less than one part in 10,000 over a tenth of
  the steps.
- As long as nothing has fooled, a run goes on from where the last one ended (theirs: from the image). Adam moves w by ``rate`` a
  step, so runs of 100 steps from the image, whatever c, cannot leave a ball of one in w: on a robust net one image in a hundred
  was lost for it.
- Runs have 1000 steps, not 10,000, which is what comparisons use; the norm changes by less than a percent.
- Untargeted unless asked; the confidence kappa is 0, which is the minimum norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustlab.attacks.minimum import Adam, MinimumNorm, Weight
from robustlab.attacks.nearest import Nearest, wide
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Classifier, Count, NonNegative, Norm, Positive, Whole

SHRINK = 1 - 1e-6


@register("cw", cite="Carlini, Wagner, IEEE S&P 2017, arXiv:1608.04644")
class CW(MinimumNorm):
    """Adam on squared l2 norm plus c times the margin, in variables that keep the box, with a binary search over c (l2).

    Deterministic. Costs at most ``binary_steps * steps`` forward and backward passes, 9,000 of each (90,000 with the authors'
    10,000 steps), a fifth to two thirds of that where runs end early, and ``refine + 3`` forward and 9 backward passes.

    Attributes:
        norm: l2.
        eps: None, or the radius of the ball in which what comes back has to lie.
        steps: of Adam, for each c.
        binary_steps: values of c.
        rate: Adam's step size.
        c: the first weight of the margin.
        targeted: y is the class to reach.
        refine: bisections at the end (see ``refine.py``), one forward pass each.
    """

    norms = ("l2",)

    norm: Norm | None = None
    eps: NonNegative | None = None
    steps: Count = 1000
    binary_steps: Count = 9
    rate: Positive = 0.01
    c: Positive = 1e-3
    targeted: bool = False
    refine: Whole = 10

    def search(self, f: Classifier, near: Nearest, rng: Rng) -> Tensor:
        weight = Weight(self.c, near.distance)
        cost = torch.zeros(len(near.x0), 2, dtype=torch.long, device=near.x0.device)
        image = (SHRINK * (2 * near.x0 - 1)).atanh()
        start = image
        for _ in range(self.binary_steps):
            hit, end = self._descend(f, near, start, weight.c, cost)
            weight.update(hit)
            start = torch.where(wide(near.distance.isinf()), end, image)
        return cost

    def _descend(self, f: Classifier, near: Nearest, w: Tensor, c: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        """One run of Adam from w; adds to ``cost`` and returns which samples were fooled on the way, and where it ended."""
        rows, end, adam = torch.arange(len(c), device=c.device), w, Adam(w)
        last, ever = torch.full_like(c, torch.inf), torch.zeros_like(c, dtype=torch.bool)
        for k in range(self.steps):
            with torch.enable_grad():
                w = w.detach().requires_grad_()
                x = (w.tanh() + 1) / 2
                z = f(x).to(x.dtype)
                gap = near.gap(z, near.y[rows]).clamp_min(0)
                value = (x - near.x0[rows]).square().flatten(1).sum(1) + c[rows] * gap
                (g,) = torch.autograd.grad(value.sum(), w)
            ever[rows] |= near.offer(x.detach(), z.detach(), rows)
            cost[rows] += 1
            m, s = adam.moments(g.nan_to_num())
            w = w.detach() - self.rate * m / s
            end = end.index_put((rows,), w)
            if k % max(self.steps // 10, 1) == 0:
                falling = value.detach() <= 0.9999 * last[rows]
                last[rows] = value.detach()
                adam.keep(falling)
                rows, w = rows[falling], w[falling]
                if len(rows) == 0:
                    break
        return ever, end
