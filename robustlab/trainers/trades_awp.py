"""TRADES with adversarial weight perturbation (Wu, Xia, Wang, NeurIPS 2020, arXiv:2004.05884), algorithm 1 and section 5.

    min_w  max_{v in V}  E[ CE(f_{w+v}(x), y) + beta * KL(softmax f_{w+v}(x) || softmax f_{w+v}(x')) ]

    V = { ||v_l|| <= gamma ||w_l|| },  gamma = 0.005,  beta = 6,    x' as in TRADES, at w, BatchNorm in eval mode

The whole loss, clean and robust term, rises over v and falls over w. The authors leave v away in the first 10 of 200 epochs: a
schedule on gamma, as in configs/cifar10/trades-awp.yaml. Differences from their code: those of TRADES and of AWP; in their ascent
pass the clean images run twice, with the same result.
"""

from __future__ import annotations

from robustlab.registry import register
from robustlab.trainers.trades import Trades
from robustlab.types import GradientRule
from robustlab.weight_perturbation.awp import Awp


@register("trades-awp", cite="Wu, Xia, Wang, NeurIPS 2020, arXiv:2004.05884")
class TradesAwp(Trades):
    """TRADES at the worst weights nearby."""

    fidelity = "code-verified"
    passes = "15 forwards, 10 input gradients, 4 backwards"

    gradient: GradientRule = Awp(gamma=0.005)
