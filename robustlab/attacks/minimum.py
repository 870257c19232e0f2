"""What attacks share that look for the smallest perturbation: minimise ||d||_p over x + d that fool the classifier, in [0, 1].

A search offers the points that it visits to a ``Nearest``, which keeps, per sample, the nearest one that fools. Samples that are
misclassified from the start (targeted: that are in the class to reach) have distance 0, come back as they are and are not searched.

A last step, ``refine``, is shared (file ``refine.py``); ``refine=0`` is the paper's method by itself.
``scripts/distances_linear.py`` prints how near each comes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from robustlab import geometry
from robustlab.attacks.nearest import Nearest, wide
from robustlab.attacks.refine import prune, shrink
from robustlab.attacks.steps import fooled, passes
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier


class MinimumNorm(Attack):
    """Base of the attacks that look for the smallest perturbation. Subclasses define :meth:`search`.

    Attributes:
        refine: linf, l2, l1: bisections at the end, one forward pass each, after two forward and up to nine backward passes. l0:
            pixels that are taken back at most; each try costs up to 11 forward and 9 backward passes.
    """

    minimal = True
    targeted = False
    refine: int = 0

    def search(self, f: Classifier, near: Nearest, rng: Rng) -> Tensor:
        """Offer points to ``near``; returns the passes spent on each sample (N, 2)."""
        raise NotImplementedError

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        """As every attack. ``info``: ``distance`` (N,), the smallest norm found, infinite where nothing was; ``passes`` (N, 2).

        The nearest fooling points come back, and the last point visited where none was found. With eps, what is farther than that
        is projected on the ball, where it may no longer fool.
        """
        if self.norm is None:
            raise ValueError(f"{self.name}: no norm; give norm and eps, for example norm='{self.norms[0]}' (eps may stay open)")
        x = x.detach()
        with torch.no_grad():
            z = f(x).to(x.dtype)
        hit = fooled(z, y, self.targeted)
        found, cost, rows = x.clone(), passes(x, 1, 0), (~hit).nonzero().squeeze(1)
        distance = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        if len(rows):
            near = Nearest.around(x[rows], z[rows], y[rows], self.norm, self.targeted)
            cost[rows] += self.search(f, near, rng.select(rows))
            cost[rows] += (prune if self.norm == "l0" else shrink)(f, near, self.refine)
            found[rows], distance[rows] = near.x, near.distance
        info = {"distance": distance, "passes": cost}
        if self.eps is None:
            return found, info
        return torch.where(wide(distance <= self.eps), found, geometry.project(found, x, self.norm, self.eps)), info


class Adam:
    """Running moments of a gradient (Kingma and Ba, ICLR 2015, algorithm 1), element by element."""

    def __init__(self, like: Tensor):
        self.m, self.v, self.k = torch.zeros_like(like), torch.zeros_like(like), 0

    def keep(self, rows: Tensor) -> None:
        self.m, self.v = self.m[rows], self.v[rows]

    def moments(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a gradient; returns the first moment and the root of the second, without bias. A step is rate * m / s."""
        self.k += 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g.square()
        return self.m / (1 - 0.9**self.k), (self.v / (1 - 0.999**self.k)).sqrt() + 1e-8


class Weight:
    """The weight c of the loss against the norm, per sample: tenfold until a run fools, then bisection (Carlini, Wagner, 2017)."""

    def __init__(self, start: float, like: Tensor):
        self.c, self.low, self.high = torch.full_like(like, start), torch.zeros_like(like), torch.full_like(like, torch.inf)

    def update(self, hit: Tensor) -> None:
        """Take in which samples the last run fooled."""
        self.low, self.high = torch.where(hit, self.low, self.c), torch.where(hit, self.c, self.high)
        self.c = torch.where(self.high.isfinite(), (self.low + self.high) / 2, 10 * self.c)


def cosine(k: int, steps: int, first: float, last: float) -> float:
    """A number that falls from ``first`` at k = 0 to ``last`` at k = steps along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * k / steps)) / 2
