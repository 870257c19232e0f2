"""Logit variation (AdvLC: Li and Spratling, Pattern Recognition 2022).

    lam * (1/B) * sum over the top share q of the B*K entries of |z(x) - z(x')|

The top share is taken over the flattened batch, not per sample, so the term couples the batch; the whole part of q*B*K entries
counts. Gradients flow through both z(x) and z(x'); share = 1 is the full L1 distance. Differences from the authors' code: at least
one entry counts, where theirs would leave none of a tiny batch.
"""

from __future__ import annotations

from robustlab.registry import register
from robustlab.types import Forward, Fraction, NonNegative, Regularizer, Term, Terms, Views


@register("logit-variation", cite="Li and Spratling, Pattern Recognition 2022")
class LogitVariation(Regularizer):
    """L1 distance between clean and adversarial logits, over the largest entries of the batch.

    Attributes:
        lam: weight of the term.
        share: the share q of the flattened entries that counts; at least one entry does.
        clean, adv: the two views.
    """

    coupled = True

    lam: NonNegative = 0.3
    share: Fraction = 0.1
    clean: str = "clean"
    adv: str = "adv"

    def __call__(self, forward: Forward, views: Views) -> Terms:
        gap = (forward(self.clean) - forward(self.adv)).abs()
        k = max(1, int(gap.numel() * self.share))
        return {"logit_variation": Term(gap.flatten().topk(k).values.sum() / len(gap), coef=self.lam)}
