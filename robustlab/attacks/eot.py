"""Expectation over transformation (Athalye, Engstrom, Ilyas, Kwok, ICML 2018): attack the mean of a random classifier.

    F(x) = 1/n sum_i f_i(x)      n forward passes of f, with n independent draws of its own randomness
    grad L(F(x), y) = (1/n sum_i J_i(x))' dL/dz       J_i: Jacobian of f_i; dL/dz at the mean logits F(x)

The inner attack is given F in place of f. Whatever it asks for is asked of the mean: its gradients average over n forwards, and so
do the losses by which it chooses its step size, its best point and its early exit. For a loss that is linear in the logits
(``margin``, while the runner-up stays) this is the mean of the n gradients; for the cross-entropy it differs from that mean in that
dL/dz is evaluated once, at the mean logits. Combinators nest either way: ``eot`` inside ``restarts`` or around it is the same, but
for the forward passes that compare the runs, which are averaged only inside ``eot``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from robustlab.attacks.inner import Combinator
from robustlab.attacks.pgd import PGD
from robustlab.attacks.steps import threat_of
from robustlab.modes import ambient
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, NonNegative, Norm


@register("eot", cite="Athalye, Engstrom, Ilyas, Kwok, ICML 2018, arXiv:1707.07397")
class EOT(Combinator):
    """Gives an attack the mean logits of ``n`` forward passes in place of one: for classifiers that draw at random.

    Multiplies the attack's passes by ``n``, and the memory of its gradients too. The global generators are forked and seeded; what
    the classifier draws depends on the batch.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        attack: what is run on the mean; its open norm and eps are these.
        n: forward passes per query.
    """

    norms = ("linf", "l2", "l1")

    norm: Norm | None = None
    eps: NonNegative | None = None
    attack: Attack = PGD()
    n: Count = 20

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        threat_of(self)

        def mean(v: Tensor) -> Tensor:
            total = f(v)
            for _ in range(self.n - 1):
                total = total + f(v)
            return total / self.n

        with ambient(rng.child("forwards").batch_seed()):
            x_adv, info = self.attack.run(mean, x, y, rng.child("attack"))
        return x_adv, {**info, **({"passes": info["passes"] * self.n} if "passes" in info else {})}
