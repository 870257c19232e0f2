"""TRADES (Zhang et al., ICML 2019, arXiv:1901.08573), algorithm 1.

    min_w  E[ CE(f(x), y) + beta * KL(softmax f(x) || softmax f(x')) ],     beta = 6
    x'     PGD on KL(softmax f(x) || softmax f(x')) from x + 0.001 N(0, 1): 10 steps of eps / 4, BatchNorm in eval mode

The clean probabilities are computed once per batch: they do not change during the attack. The authors step 0.007 at 0.031 (a share
of 0.226); eps / 4 is the step that the other trainers here use. Their loss passes the clean images twice in train mode, so running
statistics see them twice; here each view once (weights agree).
"""

from __future__ import annotations

from robustlab.attacks.craft import Craft
from robustlab.attacks.pgd import PGD
from robustlab.objectives.trades import TradesLoss
from robustlab.registry import register
from robustlab.types import BnMode, GradientRule, Objective, Stage, Trainer
from robustlab.weight_perturbation.plain import Plain


@register("trades", cite="Zhang et al., ICML 2019, arXiv:1901.08573")
class Trades(Trainer):
    """Clean cross-entropy plus a divergence that keeps predictions alike within the ball."""

    fidelity = "paper-verified"
    passes = "13 forwards, 10 input gradients, 2 backwards"

    inner: tuple[Stage, ...] = (Craft(attack=PGD(steps=10, rel_step=0.25, start="normal", loss="kl"), toward="clean"),)
    objective: Objective = TradesLoss(beta=6.0)
    gradient: GradientRule = Plain()
    attack_bn: BnMode = "eval"
    bn_updates: tuple[str, ...] = ("clean", "adv")
