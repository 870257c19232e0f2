"""Adversarial training with example-normalised gradients, their lengths estimated (Dabouei et al., ECCV 2022).

    w <- w - lr u,    u = (1/N) sum_i min(1, beta / n_i) g_i,    n_i = a ||grad_x CE(f(x'_i), y_i)|| + b

As ``engm``, but exact lengths are had every 50th step only, to refit a and b; in between the attack's last gradient gives the
estimates for nothing. ``passes`` counts a step between two fits.
"""

from __future__ import annotations

from robustlab.registry import register
from robustlab.trainers.pgd_at import PgdAt
from robustlab.types import GradientRule
from robustlab.weight_perturbation.engm_approx import EngmApprox


@register("engm-approx", cite="Dabouei et al., ECCV 2022, arXiv:2209.01199")
class EngmApproxAt(PgdAt):
    """PGD adversarial training with bounded gradients per sample, their lengths read off the attack's last gradient."""

    fidelity = "reconstructed"
    passes = "11 forwards, 10 input gradients, 1 backward"

    gradient: GradientRule = EngmApprox()
