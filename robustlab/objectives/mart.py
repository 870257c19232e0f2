"""MART, misclassification-aware adversarial training (Wang et al., ICLR 2020), equations 7 to 9.

    min_w  E[ BCE(p', y) + beta KL(p || p') (1 - p_y) ],     p = softmax f(x),  p' = softmax f(x')
    BCE(p', y) = -log p'_y - log(1.0001 - max_{k != y} p'_k)

    beta   weight of the divergence        x'   the view ``adv``

A sample that the clean prediction already misses gets the full divergence, a confident one almost none. Gradients flow through p,
p' and p_y. For soft targets y: -sum_k y_k log p'_k, the class y = argmax, and p_y = sum_k y_k p_k.
Differences from the authors' code: the divergence comes from logits, so it needs none of its constants 1e-12 and 1.0000001; the
1.0001 is kept: it bounds the margin term by log 10^4.
"""

from __future__ import annotations

from robustlab.losses import cross_entropy, kl_logits
from robustlab.registry import register
from robustlab.types import Forward, NonNegative, Objective, Term, Terms, Views

ONE = 1.0001


@register("mart", cite="Wang et al., ICLR 2020, openreview rklOg6EFwS")
class MartLoss(Objective):
    """Boosted cross-entropy of the adversarial images plus a divergence weighted by how wrong the clean prediction is.

    Attributes:
        beta: weight of the divergence.
        clean, adv: the two views.
    """

    beta: NonNegative = 5.0
    clean: str = "clean"
    adv: str = "adv"

    def __call__(self, forward: Forward, views: Views) -> Terms:
        z, z_adv = forward(self.clean), forward(self.adv)
        y, weight = views[self.adv].y, views[self.adv].weight
        wrong = z_adv.softmax(-1).scatter(-1, y.argmax(-1, keepdim=True), 0.0).amax(-1)
        missed = 1 - (views[self.clean].y * z.softmax(-1)).sum(-1)
        return {
            "adv": Term(cross_entropy(z_adv, y), weight=weight),
            "margin": Term(-(ONE - wrong).log(), weight=weight),
            "robust": Term(kl_logits(z, z_adv) * missed, coef=self.beta, weight=weight),
        }
