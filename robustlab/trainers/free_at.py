"""Free adversarial training (Shafahi et al., NeurIPS 2019, arXiv:1904.12843), algorithm 1.

    for m replays of each batch:   (g_w, g_d) = gradients of CE(f_w(x + d), y);   w <- w - lr g_w;   d <- P(d + eps sign g_d)

m = 8. One backward pass serves both; d goes on from replay to replay and from batch to batch. An epoch here visits the data once,
with m steps on each batch: for equal cost divide the epochs by m, as the paper does. The batch is not augmented anew between
replays.
BatchNorm in train mode. With m = 1 it is training on perturbations that are one step old.

Differences from the authors' code: see the stage ``free``.
"""

from __future__ import annotations

from robustlab.attacks.free import FreePerturbation
from robustlab.objectives.cross_entropy import CrossEntropy
from robustlab.registry import register
from robustlab.types import BnMode, Count, GradientRule, Objective, Stage, Trainer
from robustlab.weight_perturbation.plain import Plain


@register("free-at", cite="Shafahi et al., NeurIPS 2019, arXiv:1904.12843")
class FreeAt(Trainer):
    """Adversarial training that recycles the backward pass; each batch takes ``replays`` steps."""

    fidelity = "code-verified"
    passes = "1 forward, 1 backward"

    inner: tuple[Stage, ...] = (FreePerturbation(),)
    objective: Objective = CrossEntropy(on=("adv",))
    gradient: GradientRule = Plain()
    attack_bn: BnMode = "train-update"
    bn_updates: tuple[str, ...] = ("adv",)
    replays: Count = 8
