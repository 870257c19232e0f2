"""Basic iterative method, I-FGSM (Kurakin, Goodfellow, Bengio, ICLR workshop 2017, section 2.2).

    x_0 = x,    x_{k+1} = P(x_k + alpha u(g_k)),    g_k = grad_x L(f(x_k), y)

    P       projection on the ball of radius eps around x and on [0, 1]
    u(g)    sign(g) for linf; g / ||g||_2 for l2 (the iterative method of Dong et al., CVPR 2018, without momentum)

With ``targeted`` and y the least likely class it is their iterative least-likely class method.

Differences from the paper: it takes steps of 1/255 and min(255 eps + 4, 1.25 * 255 eps) of them; here alpha is eps / steps
unless given, so that the last step can reach the sphere, and ``steps`` is 10, their number at 8/255.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from robustlab import geometry
from robustlab.attacks.steps import LossName, input_gradient, objective, passes, threat_of
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, NonNegative, Norm, Positive


@register("bim", cite="Kurakin, Goodfellow, Bengio, ICLR workshop 2017, arXiv:1607.02533")
class BIM(Attack):
    """FGSM in small steps from the clean image, projected after each: PGD without a random start.

    Deterministic; ``steps`` forward and backward passes.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        steps: number of steps.
        step: alpha, absolute; None is eps / steps.
        loss: ``ce``, ``kl`` (to the probabilities y), ``dlr`` (three classes or more), ``margin``.
        targeted: y is the class to reach, and its loss goes down.
    """

    norm: Norm | None = None
    eps: NonNegative | None = None
    steps: Count = 10
    step: Positive | None = None
    loss: LossName = "ce"
    targeted: bool = False

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        norm, eps = threat_of(self)
        alpha = eps / self.steps if self.step is None else self.step
        loss, x_k = objective(self.loss, self.targeted), x
        for _ in range(self.steps):
            g = input_gradient(f, x_k, y, loss).g
            x_k = geometry.project(x_k + alpha * geometry.steepest(g, norm), x, norm, eps)
        return x_k, {"grad": g, "passes": passes(x, self.steps, self.steps)}
