"""Quadratic models of many samples at once: Krylov bases, and their maximisers on a sphere or in the sense of least squares.

    H V' = V' T + (next vector) beta e_m'             Lanczos: V (m, D) orthonormal, T tridiagonal, one product H v for each vector

All functions act per sample: the first dimension counts samples. The small problems are solved in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustlab import geometry

Product = Callable[[Tensor], Tensor]
NEWTON_STEPS = 20  # on the secular equation; 15 reach rounding in the hardest cases, as Newton climbs to the root from below


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
            w = w - combine(basis, (basis * w[:, None]).sum(2))
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
    return torch.linalg.pinv(t)[:, :, 0] * first[:, None]


def without_dead(t: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The trust-region problem of a Lanczos basis: T (N, m, m) and V g (N, m), from ``lanczos``'s T and ||g||_2.

    Zero vectors of the basis get T_11 on the diagonal, which is never above the largest eigenvalue, and so take no part.
    """
    first = torch.zeros_like(t[:, 0])
    first[:, 0] = size
    dead = torch.cat([torch.zeros_like(t[:, :1, 0]), (t.diagonal(-1, 1, 2)[:, :-1] == 0)], 1).cumsum(1) > 0
    return t[:, :-1] + torch.diag_embed(dead * t[:, 0, :1]), first


def combine(v: Tensor, q: Tensor) -> Tensor:
    """V q: (N, m, D), (N, m) -> (N, D)."""
    return torch.einsum("nmd,nm->nd", v, q.to(v.dtype))


def _normalise(w: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors (zero stays zero) and lengths (N,) in float64, which neither overflow nor vanish."""
    v = geometry.steepest(w, "l2")
    return v, (v.double() * w.double()).sum(1)


def _length(c: Tensor) -> Tensor:
    return geometry.norm_of(c, "l2")
