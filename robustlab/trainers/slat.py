"""Single-step latent adversarial training, SLAT (Park and Lee, ICCV 2021), algorithm 1.

    min_w  E[ CE(f_w(x + d_0; h_k + d_k for k in S), y) ],    d_k = eta sign grad_{h_k} CE(f(x), y),    d_0 alike at 0.9 eps

One backward pass through the clean images gives every perturbation; to first order the loss then carries a penalty on the L1 norms
of the latent gradients. The authors' S is the outputs of the first convolution and the first block, ``sites: [stem, block1]``
in a Wide-ResNet; the default is the one that every convolutional net has. eta is in the units of the layers: tune it with the net.
Both passes are in train mode and renew the statistics.
"""

from __future__ import annotations

from robustlab.latent.slat import SLAT
from robustlab.objectives.cross_entropy import CrossEntropy
from robustlab.registry import register
from robustlab.types import BnMode, GradientRule, Objective, Stage, Trainer
from robustlab.weight_perturbation.plain import Plain


@register("slat", cite="Park, Lee, ICCV 2021, arXiv:2104.01575")
class Slat(Trainer):
    """Perturbs the image and layers inside by one sign step each, at the price of FGSM training."""

    fidelity = "code-verified"
    passes = "2 forwards, 1 input gradient, 1 backward"

    inner: tuple[Stage, ...] = (SLAT(sites=("stem",)),)
    objective: Objective = CrossEntropy(on=("adv",))
    gradient: GradientRule = Plain()
    attack_bn: BnMode = "train-update"
    bn_updates: tuple[str, ...] = ("adv",)
