"""Fast gradient sign method (Goodfellow, Shlens, Szegedy, ICLR 2015, section 4), for every norm.

    x' = argmax { <g, x' - x> : ||x' - x||_p <= eps, x' in [0, 1] },    g = grad_x L(f(x), y)

For linf this is clamp(x + eps sign(g)), the method as published; for l2 the fast gradient method.

Differences from the authors' formula: the box is part of the maximisation. For linf the solution is the same; for l2 the
radius that pixels at a bound cannot use goes to the others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from robustlab.attacks.steps import LossName, input_gradient, objective, passes, threat_of
from robustlab.geometry import linear_max
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, NonNegative, Norm


@register("fgsm", cite="Goodfellow, Shlens, Szegedy, ICLR 2015, arXiv:1412.6572")
class FGSM(Attack):
    """One step: the point of ball and box that maximises the linearised loss (linf: the sign of the gradient).

    Deterministic; one forward and one backward pass.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        loss: ``ce``, ``kl`` (to the probabilities y), ``dlr`` (three classes or more), ``margin``.
        targeted: y is the class to reach, and its loss goes down.
    """

    norms = ("linf", "l2", "l1")

    norm: Norm | None = None
    eps: NonNegative | None = None
    loss: LossName = "ce"
    targeted: bool = False

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        norm, eps = threat_of(self)
        g = input_gradient(f, x, y, objective(self.loss, self.targeted)).g
        return linear_max(g, x, norm, eps), {"grad": g, "passes": passes(x, 1, 1)}
