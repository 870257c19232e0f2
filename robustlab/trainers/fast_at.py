"""Fast adversarial training, FGSM from a random start (Wong, Rice, Kolter, ICLR 2020, arXiv:2001.03994), algorithm 3.

    d  ~ U(-eps, eps);     d <- clip(d + alpha sign grad L(f(x + d), y), -eps, eps);     min_w  CE(f(x + d), y)

alpha = 1.25 eps (10/255 at 8/255), BatchNorm in train mode. Training may overfit catastrophically within an epoch: FGSM accuracy
rises while PGD accuracy falls to zero. Switch ``training.guards.overfitting`` on, as ``configs/cifar10/fast-at.yaml`` does.

Differences from the authors' code: their learning rate comes from torch's CyclicLR, which also cycles the momentum, 0.9 to 0.8
and back; here it stays at 0.9.
"""

from __future__ import annotations

from robustlab.attacks.craft import Craft
from robustlab.attacks.pgd import PGD
from robustlab.objectives.cross_entropy import CrossEntropy
from robustlab.registry import register
from robustlab.types import BnMode, GradientRule, Objective, Stage, Trainer
from robustlab.weight_perturbation.plain import Plain


@register("fast-at", cite="Wong, Rice, Kolter, ICLR 2020, arXiv:2001.03994")
class FastAt(Trainer):
    """Adversarial training with one step from a random start."""

    fidelity = "code-verified"
    passes = "2 forwards, 1 input gradient, 1 backward"

    inner: tuple[Stage, ...] = (Craft(attack=PGD(steps=1, rel_step=1.25, start="uniform")),)
    objective: Objective = CrossEntropy(on=("adv",))
    gradient: GradientRule = Plain()
    attack_bn: BnMode = "train-update"
    bn_updates: tuple[str, ...] = ("adv",)
