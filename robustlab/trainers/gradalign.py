"""GradAlign (Andriushchenko and Flammarion, NeurIPS 2020, arXiv:2007.02617), equations 4 and 5.

    min_w  E[ CE(f(x'), y) + lam (1 - cos(grad_x L(x), grad_x L(x + eta))) ],     x' = FGSM(x),  eta uniform in the ball

FGSM from x itself, its step of 1.25 eps cut to eps, as in the paper's final runs. lam = 0.2 at 8/255; the paper's rule for another
radius is lam = 0.02 * 10^(eps / (8/255)). The gradient of the FGSM step is used again for the cosine. BatchNorm in train mode.
Costs a double backward pass: about 3 times FGSM.

Differences from the authors' code: see the regularizer ``gradient-alignment``.
"""

from __future__ import annotations

from robustlab.attacks.craft import Craft
from robustlab.attacks.pgd import PGD
from robustlab.objectives.cross_entropy import CrossEntropy
from robustlab.registry import register
from robustlab.regularizers.gradient_alignment import GradientAlignment
from robustlab.types import BnMode, GradientRule, Objective, Regularizer, Stage, Trainer
from robustlab.weight_perturbation.plain import Plain


@register("gradalign", cite="Andriushchenko and Flammarion, NeurIPS 2020, arXiv:2007.02617")
class GradAlign(Trainer):
    """FGSM training that keeps the input gradient aligned within the ball, so that one step stays enough."""

    fidelity = "code-verified"
    passes = "3 forwards, 1 input gradient, 3 backwards"

    inner: tuple[Stage, ...] = (Craft(attack=PGD(steps=1, rel_step=1.25, start="zero")),)
    objective: Objective = CrossEntropy(on=("adv",))
    regularizers: tuple[Regularizer, ...] = (GradientAlignment(lam=0.2, reuse=True),)
    gradient: GradientRule = Plain()
    attack_bn: BnMode = "train-update"
    bn_updates: tuple[str, ...] = ("adv",)
