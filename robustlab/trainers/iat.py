"""Interpolated adversarial training (Lamb, Verma et al., Neural Networks 154, 2022; AISec 2019), algorithm 1.

    min_w  1/2 E[ CE(f(x~), y~) ] + 1/2 E[ CE(f(x~'), y~') ]
    x~_i = lam x_i + (1 - lam) x_j,     x~'_i = lam' x'_i + (1 - lam') x'_k,     y~, y~' mixed alike,     lam, lam' ~ Beta(1, 1)

x' is PGD on the images before they are mixed; each half has its own lam and partners. It aims at clean accuracy: expect robustness
under AutoAttack below that of ``pgd-at``. The authors' code was not found; seven steps of eps / 4 in train mode are those of a
public reimplementation (ndb796), as is the mixing.
"""

from __future__ import annotations

from robustlab.attacks.craft import Craft
from robustlab.attacks.pgd import PGD
from robustlab.mixing.mixup import Mixup
from robustlab.objectives.cross_entropy import CrossEntropy
from robustlab.registry import register
from robustlab.types import BnMode, GradientRule, Objective, Stage, Trainer
from robustlab.weight_perturbation.plain import Plain


@register("iat", cite="Lamb, Verma et al., Neural Networks 154, 2022, arXiv:1906.06784")
class Iat(Trainer):
    """Trains on mixed clean and mixed adversarial images, half and half."""

    fidelity = "paper-verified"
    passes = "9 forwards, 7 input gradients, 2 backwards"

    inner: tuple[Stage, ...] = (
        Craft(attack=PGD(steps=7, rel_step=0.25)),
        Mixup(alpha=1.0, on="clean", to="clean_mix"),
        Mixup(alpha=1.0, on="adv", to="adv_mix"),
    )
    objective: Objective = CrossEntropy(on=("clean_mix", "adv_mix"))
    gradient: GradientRule = Plain()
    attack_bn: BnMode = "train-update"
    bn_updates: tuple[str, ...] = ("clean_mix", "adv_mix")
