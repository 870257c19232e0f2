"""Adversarial training with example-normalised gradients, ENGM (Dabouei et al., ECCV 2022).

    w <- w - lr u,    u = (1/N) sum_i min(1, beta / ||g_i||) g_i,    g_i = gradient of CE(f(x'_i), y_i) in the weights

beta is the mean of the ||g_i||. PGD-AT with another gradient rule: the lengths are exact, from one more forward and backward pass
that keeps the samples apart and needs memory for as many copies of the gradient as are held at once. A reconstruction: see the
gradient rule of the same name.
"""

from __future__ import annotations

from robustlab.registry import register
from robustlab.trainers.pgd_at import PgdAt
from robustlab.types import GradientRule
from robustlab.weight_perturbation.engm import Engm


@register("engm", cite="Dabouei et al., ECCV 2022, arXiv:2209.01199")
class EngmAt(PgdAt):
    """PGD adversarial training in which no sample's gradient is longer than a bound."""

    fidelity = "reconstructed"
    passes = "12 forwards, 10 input gradients, 2 backwards"

    gradient: GradientRule = Engm()
