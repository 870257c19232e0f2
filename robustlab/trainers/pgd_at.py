"""PGD adversarial training (Madry et al., ICLR 2018, arXiv:1706.06083), equation 2.1.

    min_w  E[ max_{|d| <= eps}  CE(f(x + d), y) ]

The inner maximum is PGD from a uniform start: 10 steps of eps / 4 (2/255 at 8/255). As in the authors' code the attack
runs in train mode and updates BatchNorm's running statistics at every step; ``attack_bn: eval`` is the modern choice.
"""

from __future__ import annotations

from robustlab.attacks.craft import Craft
from robustlab.attacks.pgd import PGD
from robustlab.objectives.cross_entropy import CrossEntropy
from robustlab.registry import register
from robustlab.types import BnMode, GradientRule, Objective, Stage, Trainer
from robustlab.weight_perturbation.plain import Plain


@register("pgd-at", cite="Madry et al., ICLR 2018, arXiv:1706.06083")
class PgdAt(Trainer):
    """Adversarial training on the images that PGD finds."""

    fidelity = "paper-verified"
    passes = "11 forwards, 10 input gradients, 1 backward"

    inner: tuple[Stage, ...] = (Craft(attack=PGD(steps=10, rel_step=0.25)),)
    objective: Objective = CrossEntropy(on=("adv",))
    gradient: GradientRule = Plain()
    attack_bn: BnMode = "train-update"
    bn_updates: tuple[str, ...] = ("adv",)
