"""AdvLC: adversarial training with logit variation (Li and Spratling, Pattern Recognition 2022).

    min_w  E[ CE(f(x'), y) ] + lam * (1/B) * sum over the top share q of |z(x) - z(x')|,      lam = 0.3, q = 0.1

x' is PGD from x itself: 10 steps of eps / 4. All passes are in train mode. With weights averaged by ``swa`` the authors take
lam = 0.4.

Differences from the authors' code: theirs means to reuse the clean pass's gradient for the first attack step, but hands it
over as the perturbation to start from, so that the attack starts at x + gradient; here it starts at x. Theirs runs the clean pass
before the attack, here it comes after it, which only changes the order in which BatchNorm's statistics are renewed.
"""

from __future__ import annotations

from robustlab.attacks.craft import Craft
from robustlab.attacks.pgd import PGD
from robustlab.registry import register
from robustlab.regularizers.logit_variation import LogitVariation
from robustlab.trainers.pgd_at import PgdAt
from robustlab.types import Regularizer, Stage


@register("advlc", cite="Li and Spratling, Pattern Recognition 2022")
class AdvLC(PgdAt):
    """PGD adversarial training that keeps the most variable logits of the batch still."""

    fidelity = "code-verified"
    passes = "12 forwards, 10 input gradients, 2 backwards"

    inner: tuple[Stage, ...] = (Craft(attack=PGD(steps=10, rel_step=0.25, start="zero")),)
    regularizers: tuple[Regularizer, ...] = (LogitVariation(lam=0.3, share=0.1),)
    bn_updates: tuple[str, ...] = ("clean", "adv")
