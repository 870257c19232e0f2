"""Adversarial training with adversarial weight perturbation (Wu, Xia, Wang, NeurIPS 2020, arXiv:2004.05884), algorithm 1.

    min_w  max_{v in V}  E[ CE(f_{w+v}(x'), y) ],    x' = PGD(f_w),    V = { ||v_l|| <= gamma ||w_l|| },    gamma = 0.01

PGD-AT with another gradient rule. The authors' code attacks in train mode (their first batch of each epoch excepted); the ascent
pass on the weights leaves running statistics alone, the descent pass at w + v updates them.
"""

from __future__ import annotations

from robustlab.registry import register
from robustlab.trainers.pgd_at import PgdAt
from robustlab.types import GradientRule
from robustlab.weight_perturbation.awp import Awp


@register("awp", cite="Wu, Xia, Wang, NeurIPS 2020, arXiv:2004.05884")
class AtAwp(PgdAt):
    """PGD adversarial training at the worst weights nearby."""

    fidelity = "paper-verified"
    passes = "12 forwards, 10 input gradients, 2 backwards"

    gradient: GradientRule = Awp(gamma=0.01)
