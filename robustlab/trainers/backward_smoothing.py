"""Fast adversarial training by backward smoothing (Chen, Cheng, Gan, Gu, Liu, AAAI 2022, arXiv:2010.01278), algorithm 1.

    min_w  E[ CE(f(x), y) + beta KL(softmax f(x) || softmax f(x')) ],     beta = 10
    x'     one step on the divergence, from a start whose output is random (the stage ``backward-smoothing``)

The objective of TRADES at a third of its cost. BatchNorm in eval mode during the attack; the gradient flows through both sides of
the divergence. beta is 10 in the authors' command for a ResNet-18; their program's default is 6. They train at eps = 0.031 with
alpha = eps.

Differences from the authors' code: none in the loss; see the stage.
"""

from __future__ import annotations

from robustlab.attacks.backward_smoothing import BackwardSmoothing
from robustlab.objectives.trades import TradesLoss
from robustlab.registry import register
from robustlab.types import BnMode, GradientRule, Objective, Stage, Trainer
from robustlab.weight_perturbation.plain import Plain


@register("backward-smoothing", cite="Chen, Cheng, Gan, Gu, Liu, AAAI 2022, arXiv:2010.01278")
class BackwardSmoothingAt(Trainer):
    """TRADES with a single step, from a start that is random in the output."""

    fidelity = "code-verified"
    passes = "4 forwards, 2 input gradients, 2 backwards"

    inner: tuple[Stage, ...] = (BackwardSmoothing(gamma=1.0),)
    objective: Objective = TradesLoss(beta=10.0)
    gradient: GradientRule = Plain()
    attack_bn: BnMode = "eval"
    bn_updates: tuple[str, ...] = ("clean", "adv")
