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

Differences from the paper: where its text leaves m, the number of iterations and the step length open, the values are this library's.
Samples must not meet in the model: in train mode BatchNorm couples them and H v mixes their Hessians.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from robustlab import geometry
from robustlab.attacks.steps import LossName, SampleLoss, objective, passes, threat_of
from robustlab.outer import twice_differentiable
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, NonNegative, Norm, Positive

Product = Callable[[Tensor], Tensor]
NEWTON_STEPS = 20  # on the secular equation; 15 reach rounding in the hardest of cases, since Newton climbs to the root from below


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
            q = least_squares(t, -size)
            return radius * geometry.steepest(_combine(v, q), "l2")
        b = torch.zeros(len(g), self.m, dtype=t.dtype, device=g.device)
        b[:, 0] = size
        return _combine(v, trust_region(_without_dead(t), b, radius))

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


def lanczos(g: Tensor, product: Product, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal basis of span{g, H g, .., H^(m-1) g} for each sample, by Lanczos with full reorthogonalisation.

    Where the space is exhausted before m vectors, the remaining vectors are zero, and so are their rows and columns.

    Args:
        g: (N, D).
        product: v -> H v for all samples, with symmetric H.
        m: number of vectors.

    Returns:
        V (N, m, D); T (N, m + 1, m), tridiagonal, float64, with H V' = V' T[:m] + (the next vector) T[m]; ||g||_2 (N,), float64.
    """
    v, size = _normalise(g)
    basis = torch.zeros(len(g), m, g.shape[1], dtype=g.dtype, device=g.device)
    t = torch.zeros(len(g), m + 1, m, dtype=torch.float64, device=g.device)
    scale, tolerance = torch.zeros_like(size), torch.finfo(g.dtype).eps ** 0.5
    for j in range(m):
        basis[:, j] = v
        w = product(v)
        scale = scale.maximum(_normalise(w)[1])
        t[:, j, j] = (v * w).sum(1)
        for _ in range(2):  # once is not enough (Parlett, The Symmetric Eigenvalue Problem, section 6.9)
            w = w - _combine(basis, (basis * w[:, None]).sum(2))
        v, beta = _normalise(w)
        alive = beta > tolerance * scale
        v, beta = torch.where(alive[:, None], v, 0.0), torch.where(alive, beta, 0.0)
        t[:, j + 1, j] = beta
        if j + 1 < m:
            t[:, j, j + 1] = beta
    return basis, t, size


def trust_region(t: Tensor, b: Tensor, radius: float) -> Tensor:
    """argmax { <b, q> + q' T q / 2 : ||q||_2 = radius } for each sample, for any symmetric T.

    In the eigenvectors of T, q_i = b_i / (lambda - theta_i) with lambda >= theta_max. With s = radius (lambda - theta_max) and
    d_i = radius (theta_max - theta_i), p = q / radius has p_i = b_i / (s + d_i), and the secular equation is ||p(s)||_2 = 1: a root
    in max_i (|b_i| - d_i) <= s <= ||b||_2, found by Newton on 1 / ||p|| inside a bracket. In the hard case b has no component along
    the largest eigenvalue and ||p(0)||_2 < 1: the rest of the length goes along its eigenvector, in either sign.

    Args:
        t: (N, m, m).
        b: (N, m).
        radius: of the sphere.

    Returns:
        q (N, m).
    """
    theta, u = torch.linalg.eigh(t)
    c = (u.mT @ b[..., None])[..., 0]
    d = radius * (theta[:, -1:] - theta)

    def at(s: Tensor) -> Tensor:
        return torch.where(c == 0, 0.0, c / (s[:, None] + d))

    low, high = (c.abs() - d).amax(1).clamp_min(0), _length(c)
    hard = (low == 0) & (_length(at(low)) < 1)
    s = low
    for _ in range(NEWTON_STEPS):
        p = at(s)
        n = _length(p)
        low, high = torch.where(n >= 1, s, low), torch.where(n >= 1, high, s)
        slope = torch.where(c == 0, 0.0, p.square() / (s[:, None] + d)).sum(1)  # -d(n^2)/ds / 2
        new = s + n.square() * (n - 1) / slope
        s = torch.where((new >= low) & (new <= high), new, (low + high) / 2)
    p = at(s)
    p = torch.where(hard[:, None], at(torch.zeros_like(s)), p / _length(p)[:, None])
    rest = torch.where(hard, (1 - _length(p).square()).clamp_min(0).sqrt(), 0.0)
    p[:, -1] += rest
    return radius * (u @ p[..., None])[..., 0]


def least_squares(t: Tensor, first: Tensor) -> Tensor:
    """q (N, m) of least length that minimises ||first e_1 - T q||_2, T (N, m + 1, m): the GMRES step in the Lanczos basis."""
    return torch.linalg.pinv(t, rtol=1e-10)[:, :, 0] * first[:, None]


def _without_dead(t: Tensor) -> Tensor:
    """T (N, m, m). Zero vectors of the basis get T_11 on the diagonal, which is never above the largest eigenvalue."""
    dead = torch.cat([torch.zeros_like(t[:, :1, 0]), (t.diagonal(-1, 1, 2)[:, :-1] == 0)], 1).cumsum(1) > 0
    return t[:, :-1] + torch.diag_embed(dead * t[:, 0, :1])


def _combine(v: Tensor, q: Tensor) -> Tensor:
    """V q: (N, m, D), (N, m) -> (N, D)."""
    return torch.einsum("nmd,nm->nd", v, q.to(v.dtype))


def _normalise(w: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors (zero stays zero) and lengths (N,) in float64, which neither overflow nor vanish."""
    v = geometry.steepest(w, "l2")
    return v, (v.double() * w.double()).sum(1)


def _length(c: Tensor) -> Tensor:
    return geometry.norm_of(c, "l2")
