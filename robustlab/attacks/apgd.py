"""Auto-PGD (Croce and Hein, ICML 2020, algorithm 1; in l1: ICML 2021, algorithm 1): PGD that chooses its own step size.

    z       = P(x_k + eta g_k / ||g_k||)                       linf: eta sign(g_k)
    x_{k+1} = P(x_k + .75 (z - x_k) + .25 (x_k - x_{k-1}))     the first step has no momentum
    eta     = 2 eps, halved at a checkpoint w_j where
              1. L rose in at most rho (w_j - w_{j-1}) of the steps since the last checkpoint, or
              2. eta was not halved at the last checkpoint and the best loss has not grown since;
              the search then goes on from the best point so far
    w_j     after .22 K steps, then in windows shorter by .03 K each time, at least .06 K

The start lies on the sphere of radius eps around x: a uniform draw scaled up in linf, a uniform direction in l2.

    l1      x_{k+1} = P(x_k + eta s / ||s||_1),  s = the signs of the m / 1.5 largest |g_k|, no momentum
            m = how many coordinates the best point has changed; eta = eps where m fell by 5 % since the last checkpoint (the search
            then goes on from the best point), else eta / 1.5, at least eps / 10; a checkpoint each .04 of the steps
            .3 K steps in the ball of 3 eps, .3 K in that of 2 eps, the rest in that of eps, each from the best point of the
            one before, projected; the first from x + N(0, 1), projected

Differences from the authors' code:

- l2 projects on the intersection of ball and box; theirs scales into the ball, then clamps.
- Their test of condition 1 at the first checkpoint compares the loss after the first step with zero; here with the loss at the
  start, as the paper has it. That touched no verdict of 12,000 (digits; linf, l2; CE, DLR); with it put in, both codes follow
  the same path from the same start in float64 (tests/reference/test_apgd_parity.py).
- A sample leaves the search as soon as it is fooled; theirs goes on and keeps the last fooling point. Where gradients are averaged
  (``eot``) it stays: one lucky draw proves little. The mean of the logits then says whether it is fooled.
- A sample that is never fooled gets the point of largest loss; theirs gets its clean image.
- No clean pass: a sample that is misclassified from the start is attacked like the others.
- l1 counts coordinates that differ by more than 1e-6 eps; theirs also those that rounding has moved. It always shrinks the
  radius; theirs does not in the versions ``plus`` and ``rand``.

As in their code (the paper has ``<``) condition 1 includes equality, and after a return to the best point the next rise is
counted from the loss of the point that was left.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from robustlab import losses
from robustlab.attacks.apgd_walk import Settings, TargetLoss, begin_at, climb, nothing_found, take_in
from robustlab.attacks.steps import passes, threat_of
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, Fraction, NonNegative, Norm


def _dlr(z: Tensor, y: Tensor, target: Tensor) -> Tensor:
    return losses.dlr(z, y) if z.shape[-1] > 2 else losses.margin(z, y)


LOSSES: dict[str, TargetLoss] = {"ce": lambda z, y, target: losses.cross_entropy(z, y), "dlr": _dlr}


@register("apgd", cite="Croce, Hein, ICML 2020, arXiv:2003.01690")
class APGD(Attack):
    """Auto-PGD: momentum, a step size that halves when progress stops, restarts from the best point; no step size to choose.

    Costs at most ``steps + 1`` forward and backward passes per restart (l1: ``steps + 3``), times ``eot``; a sample stops costing
    once it is fooled.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        steps: K.
        loss: ``ce``, or ``dlr`` (with two classes, where that ratio is constant, the margin).
        restarts: runs from independent starts; samples that are fooled are not attacked again. None: 1, in l1 5, as in AutoAttack.
        rho: the share of rising steps below which the step size is halved.
        eot: each gradient is the mean over so many passes, for classifiers that draw at random.
    """

    norms = ("linf", "l2", "l1")

    norm: Norm | None = None
    eps: NonNegative | None = None
    steps: Count = 100
    loss: Literal["ce", "dlr"] = "ce"
    restarts: Count | None = None
    rho: Fraction = 0.75
    eot: Count = 1

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        norm, eps = threat_of(self)
        settings = Settings(norm, eps, self.steps, self.rho, self.eot)
        x = x.detach()
        nowhere = torch.zeros(len(x), dtype=torch.long, device=x.device)
        found, info = nothing_found(x), {"grad": torch.zeros_like(x), "passes": passes(x, 0, 0)}
        for r in range(self.restarts or (5 if norm == "l1" else 1)):
            rows = (~found.fooled).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            start = begin_at(x[rows], norm, eps, rng.select(rows).child("restart", r, "start"))
            take_in(found, info, rows, climb(f, x[rows], y[rows], nowhere[rows], LOSSES[self.loss], settings, start))
        return found.x, info
