"""TRADES (Zhang et al., ICML 2019, arXiv:1901.08573), equation 5.

    min_w  E[ CE(f(x), y) + beta * max_{|d| <= eps} KL(softmax f(x) || softmax f(x + d)) ]

    beta   weight of the robust term (1 / lambda in the paper)
    x + d  the view ``adv``; the inner maximisation is the attack's

Gradients flow through both arguments of the divergence; the mean is over samples (not over classes).
Differences from the authors' code: none.
"""

from __future__ import annotations

from robustlab.losses import cross_entropy, kl_logits
from robustlab.registry import register
from robustlab.types import Forward, NonNegative, Objective, Term, Terms, Views


@register("trades", cite="Zhang et al., ICML 2019, arXiv:1901.08573")
class TradesLoss(Objective):
    """Clean cross-entropy plus beta times the divergence between clean and adversarial predictions.

    Attributes:
        beta: weight of the divergence.
        clean, adv: the two views.
    """

    beta: NonNegative = 6.0
    clean: str = "clean"
    adv: str = "adv"

    def __call__(self, forward: Forward, views: Views) -> Terms:
        z, z_adv = forward(self.clean), forward(self.adv)
        weight = views[self.clean].weight
        return {
            "natural": Term(cross_entropy(z, views[self.clean].y), weight=weight),
            "robust": Term(kl_logits(z, z_adv), coef=self.beta, weight=weight),
        }
