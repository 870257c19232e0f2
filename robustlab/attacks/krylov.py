"""Second-order adversarial images in a Krylov subspace (Qian et al., AMCS 34(3), 2024; arXiv:2207.01396).

    L(f(x + d), y) ~ L + <g, d> + d' H d / 2            g, H: gradient and Hessian with respect to the image
    V = orthonormal basis of span{g, H g, .., H^(m-1) g},  T = V' H V          (Lanczos; H only as products H v, by double backward)

    trust-region   d = V q,  (lambda I - T) q = V' g,  lambda > lambda_max(T),  ||q||_2 = r: the largest value of the quadratic
                   model on the sphere of radius r, within the subspace
    newton         d ~ V q,  q = argmin ||g + H V q||_2, scaled to length r: the paper's direction d = -H^-1 g, by GMRES

What the second order can give. A net that is piecewise linear (ReLU) has H = J' (diag p - p p') J under cross-entropy, positive
semidefinite of rank at most K - 1, so that m = K - 1 is exact. The Newton direction then points to the *minimum* of the model: it
made all of 500 digits easier, and is here for the sake of the paper's text. Under a smooth activation H is indefinite; the trust
region holds for any H. Beside the gradient step of the same length (l2, 0.5, digits; ``scripts/bench_krylov.py``) m = 2 raised the
loss by 2 % more on standard nets (1.169 for 1.145) and on robust ones by 1 % (ReLU) to 6 % (SiLU); more vectors added little.

For l2 the step has radius alpha. For linf it moves by alpha along sign(d), where d has the length alpha sqrt(D) of the corners of
that box, D values in an image; m = 1 is FGSM. Then follows the projection on ball and box.

Differences from the paper: m, the number of steps and their length are this library's. Samples must not meet in the model: in train
mode BatchNorm couples them, and H v mixes their Hessians.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from robustlab import geometry
from robustlab.attacks.quadratic import Product, combine, lanczos, least_squares, trust_region, without_dead
from robustlab.attacks.steps import LossName, SampleLoss, objective, passes, threat_of
from robustlab.outer import twice_differentiable
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, NonNegative, Norm, Positive


@register("krylov", cite="Qian et al., AMCS 34(3) 2024, arXiv:2207.01396")
class Krylov(Attack):
    """A step that uses curvature: the maximum of the quadratic model of the loss in a Krylov subspace of m vectors.

    Deterministic. A step costs one forward and one backward pass and m products with the Hessian (none for m = 1 in a trust region:
    that is the gradient step). A product counts as one backward pass and takes the time of two.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        steps: how often the model of the loss is made and maximised.
        step: alpha, absolute; None is min(eps, 2.5 eps / steps).
        m: vectors of the basis. K - 1 is exact for a ReLU net with K classes, 2 gives almost all of it.
        mode: ``trust-region``; ``newton`` is the paper's direction, which can go down.
        loss: ``ce``, ``kl`` (to the probabilities y), ``dlr`` (three classes or more), ``margin``.
        targeted: y is the class to reach, and its loss goes down.
    """

    norm: Norm | None = None
    eps: NonNegative | None = None
    steps: Count = 1
    step: Positive | None = None
    m: Count = 2
    mode: Literal["trust-region", "newton"] = "trust-region"
    loss: LossName = "ce"
    targeted: bool = False

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        norm, eps = threat_of(self)
        alpha = min(eps, 2.5 * eps / self.steps) if self.step is None else self.step
        loss, x_k = objective(self.loss, self.targeted), x
        for _ in range(self.steps):
            g, product = curvature(f, x_k, y, loss)
            if norm == "l2":
                d = self.direction(g, product, alpha)
            else:
                d = alpha * self.direction(g, product, alpha * math.sqrt(g[0].numel())).sign()
            x_k = geometry.project(x_k + d.view_as(x), x, norm, eps)
        return x_k, {"grad": g.view_as(x), "passes": passes(x, self.steps, self.steps * (1 + self._products))}

    def direction(self, g: Tensor, product: Product, radius: float) -> Tensor:
        """The step (N, D), of length ``radius`` where there is a gradient."""
        if self._products == 0:
            return radius * geometry.steepest(g, "l2")
        v, t, size = lanczos(g, product, self.m)
        if self.mode == "newton":
            return radius * geometry.steepest(combine(v, least_squares(t, -size)), "l2")
        return combine(v, trust_region(*without_dead(t, size), radius))

    @property
    def _products(self) -> int:
        return 0 if self.m == 1 and self.mode == "trust-region" else self.m


def curvature(f: Classifier, x: Tensor, y: Tensor, loss: SampleLoss) -> tuple[Tensor, Product]:
    """The gradient (N, D) of the loss at ``x``, and the function v -> H v, both (N, D), each sample with its own Hessian."""
    with torch.enable_grad(), twice_differentiable():
        x = x.detach().requires_grad_()
        value = loss(f(x).to(x.dtype), y)
        (g,) = torch.autograd.grad(value.sum(), x, create_graph=True)

    def product(v: Tensor) -> Tensor:
        if not g.requires_grad:  # the loss is linear in the image
            return torch.zeros_like(v)
        (hv,) = torch.autograd.grad(g, x, v.view_as(x), retain_graph=True, materialize_grads=True)
        return hv.flatten(1).nan_to_num()

    return g.detach().flatten(1).nan_to_num(), product
