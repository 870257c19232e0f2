"""Backward smoothing (Chen, Cheng, Gan, Gu, Liu, AAAI 2022, arXiv:2010.01278), algorithm 1: a start chosen by its output.

    t    = softmax(z(x) + gamma psi),   psi ~ U(-1, 1)^K          a random point near the clean output
    x_0  = P(x - alpha u(grad_x KL(t || p(x))))                   one step towards it
    x'   = P(x_0 + alpha u(grad KL(p(x) || p(x_0))))              then `steps` steps of the attack

    u    the steepest unit step: the sign in linf                 P   projection on ball and pixel range
    gamma  size of the noise in logits: 1                         alpha   eps

A random start in pixels hardly moves the output; this one does, so that a single step sees the loss as it is at the ball's rim.
Differences from the authors' code: theirs runs z(x) twice, once for t and once for the gradient of the start; in eval mode both are
the same pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from robustlab import geometry, losses
from robustlab.attacks.steps import input_gradient
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Classifier, Count, NonNegative, Norm, Positive, Stage, Views


@register("backward-smoothing", cite="Chen, Cheng, Gan, Gu, Liu, AAAI 2022, arXiv:2010.01278")
class BackwardSmoothing(Stage):
    """A start whose output is random, then steps that climb the divergence from the clean output.

    Costs ``steps`` + 1 forward and backward passes. The new view's ``info`` has ``start``, the images x_0.

    Attributes:
        on, to: names of views.
        gamma: size of the noise on the logits.
        steps: of the attack after the start.
        step: alpha, of the start and of the attack, over eps.
        norm, eps: the threat model; None takes the surrounding one.
    """

    crafts = True

    on: str = "clean"
    to: str = "adv"
    gamma: NonNegative = 1.0
    steps: Count = 1
    step: Positive = 1.0
    norm: Norm | None = None
    eps: NonNegative | None = None

    def __call__(self, f: Classifier, views: Views, rng: Rng) -> Views:
        if self.norm is None or self.eps is None:
            raise ValueError("backward-smoothing: no threat model; give norm and eps, for example norm='linf', eps=8/255")
        view = views[self.on]
        psi = rng.at(view.key).child("output").uniform((view.y.shape[-1],), -1.0, 1.0, dtype=view.x.dtype)

        def to_noisy(z: Tensor, y: Tensor) -> Tensor:
            return losses.kl((z.detach() + self.gamma * psi).softmax(-1), z)

        away, _, z = input_gradient(f, view.x, view.y, to_noisy)
        p = z.softmax(-1)
        start = x = self._step(view.x, -away, view.x)
        for _ in range(self.steps):
            g = input_gradient(f, x, p, lambda z, p: losses.kl(p, z)).g
            x = self._step(x, g, view.x)
        return {**views, self.to: replace(view, x=x, info={"grad": g, "start": start})}

    def _step(self, x: Tensor, g: Tensor, clean: Tensor) -> Tensor:
        assert self.norm is not None
        assert self.eps is not None
        alpha = self.step * self.eps
        if self.norm == "l1":
            x = geometry.linear_max(g, x, self.norm, alpha)
        else:
            x = torch.add(x, geometry.steepest(g, self.norm), alpha=alpha)
        return geometry.project(x, clean, self.norm, self.eps)
