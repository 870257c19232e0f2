"""A cheap look at every sample: which are broken at once, and how near to it the others are.

    1. APGD on the cross-entropy, K steps
    2. APGD on the targeted DLR towards each of the T nearest classes (the order ``malt`` of targeted_all), K steps, side by side
    3. at the best point of each search   nearness = (z_c - max_{k != c} z_k) / (eps ||grad_x of that difference||_q)

q is dual to the threat's norm: to first order, ``nearness`` is how much further than the ball the boundary lies, in radii, whatever
the scale of the logits. The smallest over the searches is the sample's. The budgets are a third of AutoAttack's; what makes them
safe to use is that samples which a longer search would break come out near.

The estimate is void, and not finite, where gradients say nothing: they are zero or no number, or so small that to first order no
image in [0, 1] would change its class; or the cross-entropy's vanished at the best point of the first search (saturated logits).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from robustlab import geometry, losses
from robustlab.attacks.apgd import LOSSES
from robustlab.attacks.apgd_t import side_by_side
from robustlab.attacks.apgd_walk import Leaving, Settings, begin_at, climb, foremost, nothing_found
from robustlab.attacks.steps import Point, input_gradient, passes, put_better, threat_of
from robustlab.attacks.targeted_all import ranked_targets
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, NonNegative, Norm


@register("screen", cite="Croce, Hein, ICML 2020; Melamed, Yehudai, Shamir, NeurIPS 2024, arXiv:2407.02240")
class Screen(Attack):
    """Short searches along five losses that report how near each survivor is to being broken.

    Costs at most (1 + targets) (steps + 2) forward and backward passes (l1: steps + 4), one forward pass for the order of the
    targets, and one backward pass per class (at most 100) for it. A sample stops costing once it is fooled; most are at once.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        steps: K, of each search.
        targets: T, or every other class where there are fewer.
        rows: images in one pass, at most (but one sample's targets stay together); None: as many as there are samples.
    """

    norms = ("linf", "l2", "l1")

    norm: Norm | None = None
    eps: NonNegative | None = None
    steps: Count = 40
    targets: Count = 4
    rows: Count | None = dataclasses.field(default=None, compare=False)  # how, not what

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        """As every attack; ``info["nearness"]`` (N,): zero where fooled, not finite where it cannot be told."""
        norm, eps = threat_of(self)
        settings, x = Settings(norm, eps, self.steps), x.detach()
        found, cost, nearness = nothing_found(x), passes(x, 0, 0), torch.full_like(x[:, 0, 0, 0], torch.inf)

        def take_in(rows: Tensor, leaving: Iterator[Leaving], siblings: int) -> None:
            for s, point, spent in leaving:
                done = rows[s.row[::siblings] // siblings]
                cost[done] += spent * siblings
                if bool(point.fooled.any()):  # then each of these samples is: they leave once fooled, or together at the end
                    nearness[done] = 0.0
                else:
                    gap, far = _distance(f, point.x, y[done].repeat_interleave(siblings, 0), norm)
                    cost[done] += siblings
                    blind = (siblings == 1) & (s.g_best == 0).flatten(1).all(1)
                    far = (far / eps).masked_fill(blind, torch.nan).view(-1, siblings).amin(1)
                    nearness[done] = torch.minimum(nearness[done], far)
                    point = Point(point.x, -gap, point.fooled)
                best = foremost(point, siblings)
                put_better(found, done, Point(*(v[best] for v in point)))

        everyone = torch.arange(len(x), device=x.device)
        start = begin_at(x, norm, eps, rng.child("search", 0, "start"))
        take_in(everyone, climb(f, x, y, torch.zeros_like(everyone), LOSSES["ce"], settings, start), 1)
        if len(rows := (~found.fooled).nonzero().squeeze(1)):
            targets, spent = ranked_targets(f, x[rows], y[rows], norm, "malt", self.targets)
            cost[rows] += spent
            count = targets.shape[1]
            most = max((self.rows or len(x)) // count, 1)
            for some, towards in zip(rows.split(most), targets.split(most), strict=True):
                sources = [rng.select(some).child("search", 1 + i, "start") for i in range(count)]
                search = side_by_side(f, x[some], y[some], towards, settings, sources)
                take_in(some, search, count)
        return found.x, {"passes": cost, "nearness": nearness}


def _distance(f: Classifier, x: Tensor, y: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """How far the true class is ahead (N,), and at which distance to first order it no longer is; infinite if beyond the box."""
    g, behind, _ = input_gradient(f, x, y, losses.margin)
    reach = (g * (geometry.linear_max(g, x, "linf", 1.0) - x)).flatten(1).sum(1)
    far = -behind / geometry.norm_of(g, geometry.DUAL[norm])
    return -behind, torch.where(-behind < reach, far, torch.inf)
