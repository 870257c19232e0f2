"""Targeted Auto-PGD (Croce and Hein, ICML 2020, section 4.2): one search per wrong class, in the order of the clean logits.

    L_t(x') = (z_t - z_c) / (z_(1) - (z_(3) + z_(4)) / 2)      t = the class to reach, c = the true one, z_(1) >= z_(2) >= ...

The steps are those of ``apgd``. The ratio needs four classes. With three the denominator is z_(1) - z_(3), as in the untargeted
loss; with two, where every such ratio is constant, it is 1: the loss is the margin.

Differences from the authors' code: those of ``apgd``; the order of the targets comes from one clean pass, not from one per
target; the targets are wrong classes by definition, where theirs are all but the most likely one; with K classes there are at
most K - 1 targets (theirs fails with fewer than ten).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustlab import losses
from robustlab.attacks.apgd import Settings, climb, nothing_found, take_in
from robustlab.attacks.steps import fooled, passes, threat_of
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, Fraction, NonNegative, Norm


def targets_of(z: Tensor, y: Tensor, count: int) -> Tensor:
    """The ``count`` most likely wrong classes by logits (N, K), at most K - 1, most likely first: (N, count)."""
    wrong = z.scatter(-1, y.argmax(-1, keepdim=True), -torch.inf)
    return wrong.sort(dim=-1, descending=True, stable=True).indices[:, : min(count, z.shape[-1] - 1)]


def loss(z: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The targeted difference of logits ratio for any number of classes: (N,)."""
    if z.shape[-1] > 3:
        return losses.dlr_targeted(z, y, target)
    gain = z.gather(-1, target[:, None]).squeeze(-1) - z.gather(-1, y.argmax(-1, keepdim=True)).squeeze(-1)
    return gain / (z.amax(-1) - z.amin(-1) + 1e-12) if z.shape[-1] == 3 else gain


@register("apgd-t", cite="Croce, Hein, ICML 2020, arXiv:2003.01690")
class APGDTargeted(Attack):
    """Targeted Auto-PGD: a search towards each of the most likely wrong classes, until one succeeds.

    Costs one forward pass and at most ``steps + 1`` forward and backward passes per target (l1: ``steps + 3``).

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        steps: K, for each target.
        n_targets: how many wrong classes, or all if there are fewer. None: 9, in l1 5, as in AutoAttack.
        restarts: runs for each target.
        rho: the share of rising steps below which the step size is halved.
        eot: each gradient is the mean over so many passes, for classifiers that draw at random.
    """

    norms = ("linf", "l2", "l1")

    norm: Norm | None = None
    eps: NonNegative | None = None
    steps: Count = 100
    n_targets: Count | None = None
    restarts: Count = 1
    rho: Fraction = 0.75
    eot: Count = 1

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        """As every attack; a sample that is misclassified as it is comes back so."""
        norm, eps = threat_of(self)
        settings = Settings(norm, eps, self.steps, self.rho, self.eot)
        x = x.detach()
        with torch.no_grad():
            z = f(x).to(x.dtype)
        targets = targets_of(z, y, self.n_targets or (5 if norm == "l1" else 9))
        found, info = nothing_found(x), {"grad": torch.zeros_like(x), "passes": passes(x, 1, 0)}
        found.fooled.copy_(fooled(z, y))
        for t in range(targets.shape[1]):
            for r in range(self.restarts):
                rows = (~found.fooled).nonzero().squeeze(1)
                if len(rows) == 0:
                    return found.x, info
                start = rng.select(rows).child("target", t, "restart", r, "start")
                take_in(found, info, rows, climb(f, x[rows], y[rows], targets[rows, t], loss, settings, start))
        return found.x, info
