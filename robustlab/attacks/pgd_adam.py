"""Projected gradient ascent with Adam, as in Gowal et al., arXiv:2010.03593, and Rebuffi et al., arXiv:2103.01946.

    x_0 = P(x + start),    x_{k+1} = P(x_k + alpha_k m_k / (sqrt(v_k) + nu)),    g_k = grad_x L(f(x_k), y)

    m_k, v_k   Adam's bias-corrected means of g and g^2 (Kingma and Ba, ICLR 2015; 0.9, 0.999, nu = 1e-9), for each pixel
    P          projection on {x' : ||x' - x||_p <= eps} and [0, 1]
    alpha_k    rate, times 0.1 from each milestone on

Their inner maximisation: 10 steps, rate 0.1 in pixel units at eps = 8/255 (the first steps reach the border of the ball), 0.01 from
step 5 on. Differences from the authors' code: none in linf; l2 projects on the intersection of ball and box.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustlab import geometry
from robustlab.attacks.steps import LossName, input_gradient, objective, passes, threat_of
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, Fraction, NonNegative, Norm, Positive

BETA1, BETA2, NU = 0.9, 0.999, 1e-9


@register("pgd-adam", cite="Gowal, Qin, Uesato, Mann, Kohli, 2020, arXiv:2010.03593")
class PgdAdam(Attack):
    """Projected gradient ascent whose steps are Adam's.

    Costs ``steps`` forward and backward passes.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        steps: K.
        rate: alpha_0, in pixel units.
        milestones: shares of the steps from which on alpha is multiplied by 0.1 (once more each).
        loss: ``ce``, ``kl`` (to the probabilities y), ``dlr`` (three classes or more), ``margin``.
    """

    norm: Norm | None = None
    eps: NonNegative | None = None
    steps: Count = 10
    rate: Positive = 0.1
    milestones: tuple[Fraction, ...] = (0.5,)
    loss: LossName = "ce"

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        norm, eps = threat_of(self)
        loss = objective(self.loss)
        x_k = geometry.project(x + geometry.sample_ball(x, norm, eps, rng.child("start")), x, norm, eps)
        m, v = torch.zeros_like(x), torch.zeros_like(x)
        for k in range(self.steps):
            g = input_gradient(f, x_k, y, loss).g
            m = torch.lerp(g, m, BETA1)
            v = torch.lerp(g.square(), v, BETA2)
            alpha = self.rate * 0.1 ** sum(k >= share * self.steps for share in self.milestones)
            step = m / (1 - BETA1 ** (k + 1)) / ((v / (1 - BETA2 ** (k + 1))).sqrt() + NU)
            x_k = geometry.project(x_k.add(step, alpha=alpha), x, norm, eps)
        return x_k, {"grad": g, "passes": passes(x, self.steps, self.steps)}
