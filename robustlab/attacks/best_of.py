"""Several attacks in order, each on what the ones before it left: the worst case over attacks, per sample."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from robustlab.attacks.apgd import APGD
from robustlab.attacks.inner import Combinator, Turn, in_turn
from robustlab.attacks.pgd import PGD
from robustlab.attacks.steps import threat_of
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, NonNegative, Norm


@register("best-of")
class BestOf(Combinator):
    """Runs attacks in order; a sample that one of them fools is not attacked by the next.

    Of a sample that none fools the point of largest cross-entropy is kept. Costs one forward pass per attack on top of theirs.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        attacks: what is run, the cheap ones first; their open norm and eps are these.
    """

    norm: Norm | None = None
    eps: NonNegative | None = None
    attacks: tuple[Attack, ...] = (PGD(), APGD())

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        threat_of(self)
        return in_turn((Turn(a, (i, a.name)) for i, a in enumerate(self.attacks)), f, x, y, rng)
