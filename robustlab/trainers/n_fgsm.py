"""N-FGSM (de Jorge et al., NeurIPS 2022, arXiv:2202.01181), algorithm 1.

    min_w  E[ CE(f(x'), y) ],     x' = clamp(x_0 + eps sign grad L(f(x_0), y)),     x_0 = clamp(x + U(-2 eps, 2 eps))

The perturbation is not projected on the ball: that, and the wide noise, keep single-step training from catastrophic overfitting.
BatchNorm in train mode.

Differences from the authors' code: their learning rate comes from torch's CyclicLR, which also cycles the momentum, 0.9 to 0.8
and back; here it stays at 0.9.
"""

from __future__ import annotations

from robustlab.attacks.n_fgsm import NoisyFGSM
from robustlab.objectives.cross_entropy import CrossEntropy
from robustlab.registry import register
from robustlab.types import BnMode, GradientRule, Objective, Stage, Trainer
from robustlab.weight_perturbation.plain import Plain


@register("n-fgsm", cite="de Jorge et al., NeurIPS 2022, arXiv:2202.01181")
class NFgsm(Trainer):
    """Adversarial training with one step from strong noise, not projected."""

    fidelity = "code-verified"
    passes = "2 forwards, 1 input gradient, 1 backward"

    inner: tuple[Stage, ...] = (NoisyFGSM(noise=2.0, step=1.0),)
    objective: Objective = CrossEntropy(on=("adv",))
    gradient: GradientRule = Plain()
    attack_bn: BnMode = "train-update"
    bn_updates: tuple[str, ...] = ("adv",)
