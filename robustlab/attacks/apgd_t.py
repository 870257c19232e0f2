"""Targeted Auto-PGD (Croce and Hein, ICML 2020, section 4.2): one search for each of the most likely wrong classes.

    L_t(x') = (z_t - z_c) / (z_(1) - (z_(3) + z_(4)) / 2)      t = the class to reach, c = the true one, z_(1) >= z_(2) >= ...

The steps are those of ``apgd``. A sample's searches run side by side, and all end when one of them succeeds; a sample that stays
robust costs what it costs one after the other, in fewer and larger passes. In l1 they run one after the other. The ratio needs
four classes. With three the denominator is z_(1) - z_(3), as in the untargeted loss; with two, where every such ratio is constant,
it is 1: the loss is the margin.

Differences from the authors' code: those of ``apgd``; the order of the targets comes from one clean pass, not from one per
target; the targets are wrong classes by definition, where theirs are all but the most likely one; with K classes there are at
most K - 1 targets (theirs fails with fewer than ten).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from robustlab import losses
from robustlab.attacks.apgd_walk import Leaving, Settings, begin_at, climb, nothing_found, take_in
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
    """Targeted Auto-PGD: searches towards each of the most likely wrong classes, side by side, until one succeeds.

    Costs one forward pass and at most ``steps + 1`` forward and backward passes per target (l1: ``steps + 3``).

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        steps: K, for each target.
        n_targets: how many wrong classes, or all if there are fewer. None: 9, in l1 5, as in AutoAttack.
        restarts: runs for each target.
        rho: the share of rising steps below which the step size is halved.
        eot: each gradient is the mean over so many passes, for classifiers that draw at random.
        rows: images in one pass, at most (but one sample's targets stay together); None: as many as there are samples.
    """

    norms = ("linf", "l2", "l1")

    norm: Norm | None = None
    eps: NonNegative | None = None
    steps: Count = 100
    n_targets: Count | None = None
    restarts: Count = 1
    rho: Fraction = 0.75
    eot: Count = 1
    rows: Count | None = dataclasses.field(default=None, compare=False)  # how, not what

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
        beside = 1 if norm == "l1" else targets.shape[1]  # l1: a run gets through two larger balls before it can succeed
        most = max((self.rows or len(x)) // beside, 1)
        for first, r in itertools.product(range(0, targets.shape[1], beside), range(self.restarts)):
            for rows in (~found.fooled).nonzero().squeeze(1).split(most):
                some = targets[rows, first : first + beside]
                purpose = [("target", first + i, "restart", r, "start") for i in range(beside)]
                search = side_by_side(f, x[rows], y[rows], some, settings, [rng.select(rows).child(*p) for p in purpose])
                take_in(found, info, rows, search, beside)
        return found.x, info


def side_by_side(
    f: Classifier, x: Tensor, y: Tensor, targets: Tensor, settings: Settings, sources: Sequence[Rng]
) -> Iterator[Leaving]:
    """Searches towards the targets (n, T) of each sample: :func:`apgd_walk.climb` with T siblings, starts from T sources."""
    count = targets.shape[1]
    start = torch.stack([begin_at(x, settings.norm, settings.eps, source) for source in sources], 1).flatten(0, 1)
    x, y = x.repeat_interleave(count, 0), y.repeat_interleave(count, 0)
    return climb(f, x, y, targets.flatten(), loss, settings, start, count)
