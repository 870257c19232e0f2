"""An attack again and again, from independent draws."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from robustlab.attacks.inner import Combinator, Turn, in_turn
from robustlab.attacks.pgd import PGD
from robustlab.attacks.steps import threat_of
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, NonNegative, Norm


@register("restarts")
class Restarts(Combinator):
    """Runs an attack ``n`` times with independent draws; a sample that is fooled is not attacked again.

    Of an unfooled sample the point of largest cross-entropy is kept. Costs one forward pass per run on top of the attack.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        attack: what is run; its open norm and eps are these.
        n: how often.
    """

    norms = ("linf", "l2", "l1")

    norm: Norm | None = None
    eps: NonNegative | None = None
    attack: Attack = PGD()
    n: Count = 5

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        threat_of(self)
        return in_turn((Turn(self.attack, ("run", r)) for r in range(self.n)), f, x, y, rng)
