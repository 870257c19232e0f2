"""Noise, then FGSM, without a projection (N-FGSM: de Jorge et al., NeurIPS 2022, arXiv:2202.01181), algorithm 1.

    eta ~ U(-k eps, k eps),     x_0 = clamp(x + eta),     x' = clamp(x_0 + alpha sign grad L(f(x_0), y))

    k       size of the noise over eps: 2          alpha   step over eps: 1

x' may lie up to (k + 1) eps from x: that is the method, so it is a stage of training and not an attack. In other norms eta is
uniform in the ball of radius k eps, and the step the best point of ball and pixel range around x_0.
Differences from the authors' code: none in linf; theirs has no other norm.
"""

from __future__ import annotations

from dataclasses import replace

from robustlab import geometry, losses
from robustlab.attacks.steps import input_gradient
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Classifier, NonNegative, Norm, Positive, Stage, Views


@register("n-fgsm", cite="de Jorge et al., NeurIPS 2022, arXiv:2202.01181")
class NoisyFGSM(Stage):
    """Uniform noise of k times the radius, then one step of the gradient there; the sum is not projected.

    Costs one forward and one backward pass. Without noise it is FGSM.

    Attributes:
        on, to: names of views.
        noise: k, the radius of the noise over eps.
        step: alpha, the step over eps.
        norm, eps: the threat model; None takes the surrounding one.
    """

    crafts = True

    on: str = "clean"
    to: str = "adv"
    noise: NonNegative = 2.0
    step: Positive = 1.0
    norm: Norm | None = None
    eps: NonNegative | None = None

    def __call__(self, f: Classifier, views: Views, rng: Rng) -> Views:
        if self.norm is None or self.eps is None:
            raise ValueError("n-fgsm: no threat model; give norm and eps, for example norm='linf', eps=8/255")
        view = views[self.on]
        eta = geometry.sample_ball(view.x, self.norm, self.noise * self.eps, rng.at(view.key).child("noise"))
        start = (view.x + eta).clamp(0, 1)
        g = input_gradient(f, start, view.y, losses.cross_entropy).g
        x_adv = geometry.linear_max(g, start, self.norm, self.step * self.eps)
        return {**views, self.to: replace(view, x=x_adv, info={"grad": g})}
