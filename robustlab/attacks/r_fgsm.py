"""R+FGSM: a random step, then FGSM with what is left of the radius (Tramer et al., ICLR 2018, equation 7).

    x'  = clamp(x + alpha sign(n)),    n ~ N(0, I)
    x'' = clamp(x' + (eps - alpha) sign(grad L(f(x'), y)))

The random step leaves the neighbourhood of x, where the loss of an adversarially trained model may be masked. The paper takes
alpha = eps / 2.

Differences from the paper: none; sign(n) is drawn as a fair bit for each value, which is the same distribution.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from robustlab import geometry
from robustlab.attacks.steps import LossName, input_gradient, objective, passes, threat_of
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Fraction, NonNegative, Norm


@register("r-fgsm", cite="Tramer, Kurakin, Papernot, Goodfellow, Boneh, McDaniel, ICLR 2018, arXiv:1705.07204")
class RFGSM(Attack):
    """A random sign step, then one sign step of the gradient there; one forward and one backward pass.

    Attributes:
        norm, eps: the threat model, linf; None takes the surrounding one.
        share: alpha / eps, the share of the radius that the random step takes; 0 is FGSM.
        loss: ``ce``, ``kl`` (to the probabilities y), ``dlr`` (three classes or more), ``margin``.
        targeted: y is the class to reach, and its loss goes down.
    """

    norms = ("linf",)

    norm: Norm | None = None
    eps: NonNegative | None = None
    share: Fraction = 0.5
    loss: LossName = "ce"
    targeted: bool = False

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        norm, eps = threat_of(self)
        sign = rng.child("sign").bits(x.shape[1:]).bitwise_and(1).to(x.dtype) * 2 - 1
        start = (x + self.share * eps * sign).clamp(0, 1)
        g = input_gradient(f, start, y, objective(self.loss, self.targeted)).g
        x_adv = geometry.project(start + (1 - self.share) * eps * g.sign(), x, norm, eps)
        return x_adv, {"grad": g, "passes": passes(x, 1, 1)}
