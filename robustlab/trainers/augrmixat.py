"""AugRmixAT (Liu, Shen, Zhao, Nie, ICME 2022): augmented, adversarial and clean images, each mixed at random. A reconstruction.

    min_w  1/3 sum over v of E[ CE(f(x~_v), y~_v) ],    v: clean x, augmented x (AugMix), adversarial x' (PGD)
    x~_v, y~_v   x_v mixed by mixup, CutMix or ResizeMix, drawn anew for each view of each step

Only the abstract and summaries of the paper could be read, and there is no public code. That the three kinds of images are mixed at
random and that the losses are added up is theirs; the augmentation, the list of mixes, equal weights and PGD-10 are this library's.
The mean instead of the sum of the three losses is a third of the learning rate.
"""

from __future__ import annotations

from robustlab.attacks.craft import Craft
from robustlab.attacks.pgd import PGD
from robustlab.augment.augmix import AugMix
from robustlab.mixing.random_mix import RandomMix
from robustlab.objectives.cross_entropy import CrossEntropy
from robustlab.registry import register
from robustlab.types import BnMode, GradientRule, Objective, Stage, Trainer
from robustlab.weight_perturbation.plain import Plain


@register("augrmixat", cite="Liu, Shen, Zhao, Nie, ICME 2022, arXiv:2207.10290")
class AugRmixAT(Trainer):
    """Trains on mixed clean, mixed augmented and mixed adversarial images, a third each."""

    fidelity = "reconstructed"
    passes = "13 forwards, 10 input gradients, 3 backwards"

    inner: tuple[Stage, ...] = (
        Craft(attack=PGD(steps=10, rel_step=0.25)),
        AugMix(to="aug"),
        RandomMix(on="clean", to="clean_mix"),
        RandomMix(on="aug", to="aug_mix"),
        RandomMix(on="adv", to="adv_mix"),
    )
    objective: Objective = CrossEntropy(on=("clean_mix", "aug_mix", "adv_mix"))
    gradient: GradientRule = Plain()
    attack_bn: BnMode = "eval"
    bn_updates: tuple[str, ...] = ("clean_mix", "aug_mix", "adv_mix")
