"""MART with adversarial weight perturbation (Wu, Xia, Wang, NeurIPS 2020, arXiv:2004.05884), algorithm 1 and section 5.

    min_w  max_{v in V}  E[ BCE(p', y) + beta KL(p || p') (1 - p_y) ],     p, p' = softmax f_{w+v} at x and x',    beta = 5

    V = { ||v_l|| <= gamma ||w_l|| },  gamma = 0.005,     x' as in MART, at w, BatchNorm in eval mode

The whole loss rises over v and falls over w. The authors publish results (84.4 % clean, 54.2 % AutoAttack for a WideResNet-34-10)
but no code; gamma is that of their TRADES-AWP. MAIR reports a collapse to chance for this pair on that network: keep the guards
on, and lower gamma or the learning rate when it comes.
"""

from __future__ import annotations

from robustlab.registry import register
from robustlab.trainers.mart import Mart
from robustlab.types import GradientRule
from robustlab.weight_perturbation.awp import Awp


@register("mart-awp", cite="Wu, Xia, Wang, NeurIPS 2020, arXiv:2004.05884")
class MartAwp(Mart):
    """MART at the worst weights nearby."""

    fidelity = "paper-verified"
    passes = "14 forwards, 10 input gradients, 4 backwards"

    gradient: GradientRule = Awp(gamma=0.005)
