"""Adversarial training with weighted truncated AWP (Wu, Bojchevski, Huang, AAAI 2023, arXiv:2212.04983), algorithm 1.

    min_w  (1 - lam) E[ CE(f_w(x'), y) ] + lam max_{v in V} E[ CE(f_{w+v}(x'), y) ],    x' = PGD(f_w),    lam = 0.5

PGD-AT with another gradient rule; V leaves the last layer out. The paper is about graphs: the rule is theirs, the attack,
its BatchNorm mode and gamma = 0.01 are those of AWP on images.
"""

from __future__ import annotations

from robustlab.registry import register
from robustlab.trainers.pgd_at import PgdAt
from robustlab.types import GradientRule
from robustlab.weight_perturbation.wt_awp import WtAwp


@register("wt-awp", cite="Wu, Bojchevski, Huang, AAAI 2023, arXiv:2212.04983")
class AtWtAwp(PgdAt):
    """PGD adversarial training on a mix of the loss here and at the worst weights nearby, of all layers but the last."""

    fidelity = "reconstructed"
    passes = "12 forwards, 10 input gradients, 2 backwards"

    gradient: GradientRule = WtAwp(gamma=0.01, lam=0.5)
