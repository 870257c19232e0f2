"""Projected gradient descent (Madry et al., ICLR 2018, section 2.1).

    x_0 = x + start,    x_{k+1} = P(x_k + alpha u(g_k)),    g_k = grad_x L(f(x_k), y)

    P       Euclidean projection on {x' : ||x' - x||_p <= eps} and [0, 1]
    u(g)    the steepest unit step: sign(g) for linf, g / ||g||_2 for l2
    alpha   step size, in pixel units of the norm
    K       number of steps

l1: the steepest unit step moves one pixel, and the box stops it. The step is therefore the point that maximises <g, x' - x_k> over
{||x' - x_k||_1 <= alpha} and [0, 1] together (Croce and Hein, ICML 2021, section 3): the pixels with the largest |g| move as far as
they can until alpha is spent. On digits it comes within 0.005 in loss of the fixed sparsity of SLIDE (Tramer and Boneh, NeurIPS
2019) at its best setting, and has no setting.

Differences from the authors' code: none in linf, except that they start training with a step of 2/255 at 8/255, which is
``rel_step`` 0.25. l2 and l1 project on the intersection of ball and box, where most code clamps after projecting on the ball.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from robustlab import geometry
from robustlab.attacks.steps import LossName, Point, fooled, input_gradient, keep_better, objective, passes, put_better, threat_of
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, NonNegative, Norm, Positive

NOISE = 0.001  # standard deviation of the "normal" start (TRADES, algorithm 1)


@register("pgd", cite="Madry et al., ICLR 2018, arXiv:1706.06083")
class PGD(Attack):
    """Projected gradient descent: steps along the steepest direction, projected on ball and box.

    Costs ``steps`` forward and backward passes per restart; one more forward pass where the points have to be compared
    (``keep="best"`` or more than one restart).

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        steps: K.
        step: alpha, absolute. It wins over ``rel_step``.
        rel_step: alpha as a fraction of eps. With neither given alpha is 2.5 eps / steps.
        restarts: runs from independent starts; samples that are fooled are not attacked again, the best point is kept.
        start: ``zero``; ``uniform`` in the ball; ``normal``, x + 0.001 N(0, 1), not projected, as in TRADES.
        loss: ``ce``, ``kl`` (to the probabilities y), ``dlr`` (three classes or more), ``margin``.
        targeted: y is the class to reach, and its loss goes down.
        keep: ``last`` returns x_K; ``best`` the best of x_1 .. x_K: one that fools the classifier, then the largest loss.
    """

    norms = ("linf", "l2", "l1")

    norm: Norm | None = None
    eps: NonNegative | None = None
    steps: Count = 10
    step: Positive | None = None
    rel_step: Positive | None = None
    restarts: Count = 1
    start: Literal["zero", "uniform", "normal"] = "uniform"
    loss: LossName = "ce"
    targeted: bool = False
    keep: Literal["last", "best"] = "last"

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        point, g = self._climb(f, x, y, rng.child("restart", 0))
        cost = passes(x, self.steps + self._compares, self.steps)
        each = cost[:1].clone()
        for r in range(1, self.restarts):
            rows = (~point.fooled).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            new, g[rows] = self._climb(f, x[rows], y[rows], rng.select(rows).child("restart", r))
            put_better(point, rows, new)
            cost[rows] += each
        return point.x, {"grad": g, "passes": cost}

    def _climb(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Point, Tensor]:
        """One run: the point to return (compared only where it has to be) and the last gradient."""
        norm, eps = threat_of(self)
        alpha, loss, best = self._alpha(eps), objective(self.loss, self.targeted), None
        x_k = self._first(x, norm, eps, rng)
        for k in range(self.steps):
            g, value, z = input_gradient(f, x_k, y, loss)
            if k and self.keep == "best":
                best = keep_better(best, Point(x_k, value, fooled(z, y, self.targeted)))
            if norm == "l1":
                x_k = geometry.linear_max(g, x_k.clamp(0, 1), norm, alpha)
            else:
                x_k = x_k.add(geometry.steepest(g, norm), alpha=alpha)
            x_k = geometry.project(x_k, x, norm, eps)
        if not self._compares:
            nothing = torch.zeros(len(x), device=x.device)
            return Point(x_k, nothing, nothing.bool()), g
        with torch.no_grad():
            z = f(x_k).to(x.dtype)
            last = Point(x_k, loss(z, y), fooled(z, y, self.targeted))
        return keep_better(best, last), g

    def _first(self, x: Tensor, norm: str, eps: float, rng: Rng) -> Tensor:
        if self.start == "zero" or eps == 0:
            return x
        if self.start == "normal":
            return x + NOISE * rng.child("start").normal(x.shape[1:], dtype=x.dtype)
        return geometry.project(x + geometry.sample_ball(x, norm, eps, rng.child("start")), x, norm, eps)

    def _alpha(self, eps: float) -> float:
        if self.step is not None:
            return self.step
        return eps * (2.5 / self.steps if self.rel_step is None else self.rel_step)

    @property
    def _compares(self) -> bool:
        return self.keep == "best" or self.restarts > 1
