"""Ordinary training: min_w E[ CE(f(x), y) ]. The baseline that no attack ever taught."""

from __future__ import annotations

from robustlab.objectives.cross_entropy import CrossEntropy
from robustlab.registry import register
from robustlab.types import GradientRule, Objective, Trainer
from robustlab.weight_perturbation.plain import Plain


@register("standard")
class Standard(Trainer):
    """Ordinary training on clean images."""

    fidelity = "paper-verified"
    passes = "1 forward, 1 backward"

    objective: Objective = CrossEntropy()
    gradient: GradientRule = Plain()
