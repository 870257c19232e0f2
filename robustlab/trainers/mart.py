"""MART (Wang et al., ICLR 2020), algorithm 1.

    min_w  E[ BCE(p', y) + beta KL(p || p') (1 - p_y) ],     beta = 5
    x'     PGD on CE(f(x'), y) from x + 0.001 N(0, 1): 10 steps of eps / 4, BatchNorm in eval mode

The authors step 0.007 at 0.031 (a share of 0.226); eps / 4 is the step that the other trainers here use. Their scripts take
beta = 5, the function's own default is 6. The loss hides some of the gradient: its gap between PGD and AutoAttack is about twice
that of other methods, so compare it by AutoAttack.
"""

from __future__ import annotations

from robustlab.attacks.craft import Craft
from robustlab.attacks.pgd import PGD
from robustlab.objectives.mart import MartLoss
from robustlab.registry import register
from robustlab.types import BnMode, GradientRule, Objective, Stage, Trainer
from robustlab.weight_perturbation.plain import Plain


@register("mart", cite="Wang et al., ICLR 2020, openreview rklOg6EFwS")
class Mart(Trainer):
    """Adversarial training that presses harder where the clean prediction is wrong."""

    fidelity = "code-verified"
    passes = "12 forwards, 10 input gradients, 2 backwards"

    inner: tuple[Stage, ...] = (Craft(attack=PGD(steps=10, rel_step=0.25, start="normal")),)
    objective: Objective = MartLoss(beta=5.0)
    gradient: GradientRule = Plain()
    attack_bn: BnMode = "eval"
    bn_updates: tuple[str, ...] = ("clean", "adv")
