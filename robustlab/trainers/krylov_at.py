"""Adversarial training on second-order adversarial images in a Krylov subspace (Qian et al., AMCS 34(3), 2024).

    min_w  E[ CE(f(x'), y) ],    x' by steps that maximise the quadratic model of the loss in span{g, H g}

Three steps, each worth a gradient and two products with the Hessian, about as much as PGD-10 in passes. BatchNorm is in eval mode
during the attack: in train mode it would couple the samples' Hessians.

Differences from the paper: only its abstract could be read, and there is no public code; the number of steps and the trust
region, without which the Newton direction makes easier images, are this library's.
"""

from __future__ import annotations

from robustlab.attacks.craft import Craft
from robustlab.attacks.krylov import Krylov
from robustlab.registry import register
from robustlab.trainers.pgd_at import PgdAt
from robustlab.types import BnMode, Stage


@register("krylov-at", cite="Qian et al., AMCS 34(3) 2024, arXiv:2207.01396")
class KrylovAt(PgdAt):
    """Adversarial training on the images that a second-order attack finds."""

    fidelity = "reconstructed"
    passes = "4 forwards, 9 input gradients, 1 backward"

    inner: tuple[Stage, ...] = (Craft(attack=Krylov(steps=3, m=2)),)
    attack_bn: BnMode = "eval"
