"""Norm balls: the only place that knows what a p-norm is.

All functions act per sample over every dimension but the first. For a radius ``eps`` the ball is
``{d : ||d||_p <= eps}``; l0 counts pixels (spatial positions), over all channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustlab.rng import Rng

NORMS = ("linf", "l2", "l1", "l0")
DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}


def _flat(d: Tensor) -> Tensor:
    return d.flatten(1)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """(N,) -> (N, 1, ..., 1)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _over_largest(d: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) values over the largest magnitude of their sample, and that magnitude (N, 1).

    Squares of the quotients neither overflow nor all vanish, however small or large a gradient is.
    """
    flat = _flat(d)
    largest = flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(d.dtype).tiny)  # a tenth of vector_norm's time
    return flat / largest, largest


def norm_of(d: Tensor, norm: str) -> Tensor:
    """The norm of each sample's perturbation: (N,)."""
    if norm == "linf":
        return _flat(d).abs().amax(1)
    if norm == "l2":
        return _flat(d).norm(dim=1)
    if norm == "l1":
        return _flat(d).abs().sum(1)
    if norm == "l0":
        return d.ne(0).any(1).flatten(1).sum(1).to(d.dtype)
    raise ValueError(f"unknown norm '{norm}'; expected one of {', '.join(NORMS)}")


def project_l1(d: Tensor, eps: float | Tensor) -> Tensor:
    """Euclidean projection on the l1 ball: soft thresholding (Duchi et al., ICML 2008, figure 1), per sample."""
    flat = _flat(d)
    radius = torch.as_tensor(eps, dtype=d.dtype, device=d.device).expand(len(d))
    magnitude = flat.abs()
    ordered = magnitude.sort(dim=1, descending=True).values
    excess = ordered.cumsum(1) - radius[:, None]
    count = torch.arange(1, flat.shape[1] + 1, device=d.device, dtype=d.dtype)
    rho = (ordered * count > excess).sum(1, keepdim=True).clamp_min(1)
    theta = (excess.gather(1, rho - 1) / rho).clamp_min(0)
    inside = magnitude.sum(1, keepdim=True) <= radius[:, None]
    return torch.where(inside, flat, flat.sign() * (magnitude - theta).clamp_min(0)).view_as(d)


def project_ball(d: Tensor, norm: str, eps: float | Tensor) -> Tensor:
    """The nearest perturbation inside the ball (l0: the largest pixels are kept); ``eps`` may be one radius per sample (N,)."""
    if norm == "l1":
        return project_l1(d, eps)
    eps = _wide(eps, d) if isinstance(eps, Tensor) else eps
    if norm == "linf":
        limit: Any = eps
        return d.clamp(-limit, limit)
    if norm == "l2":
        n = _wide(norm_of(d, "l2"), d)
        return torch.where(n > eps, d * (eps / n.clamp_min(torch.finfo(d.dtype).tiny)), d)
    if norm == "l0":
        size = d.square().sum(1).flatten(1)
        if isinstance(eps, Tensor):
            rank = size.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            return d * (rank < eps.floor().flatten(1)).view(len(d), 1, *d.shape[2:])
        k = min(int(eps), size.shape[1])
        keep = torch.zeros_like(size, dtype=torch.bool).scatter_(1, size.topk(k, dim=1).indices, True)
        return d * keep.view(len(d), 1, *d.shape[2:])
    raise ValueError(f"unknown norm '{norm}'; expected one of {', '.join(NORMS)}")


def project(x: Tensor, x0: Tensor, norm: str, eps: float | Tensor) -> Tensor:
    """The point nearest to ``x`` that lies in the ball around ``x0`` and in [0, 1] (``x0`` itself lies in [0, 1]).

    ``eps`` may be one radius per sample (N,).

    Exact for linf, l2 and l1: the Euclidean projection on the intersection. Clamping after the ball, which is what most code does,
    gives away part of the radius in l2 and most of it in l1 (Croce and Hein, ICML 2021). l0: the pixels with the largest
    feasible change are kept.
    """
    d = x - x0
    if norm == "linf":
        limit: Any = _wide(eps, d) if isinstance(eps, Tensor) else eps
        return (x0 + d.clamp_(-limit, limit)).clamp_(0.0, 1.0)  # in place on temporaries: less memory to touch
    if norm == "l2":
        inside = norm_of(d, "l2") <= eps
        boxed = x.clamp(0.0, 1.0)  # enough inside the ball: the box lies around x0, so clamping cannot leave the ball
        if bool(inside.all()):
            return boxed
        return torch.where(_wide(inside, x), boxed, x0 + _scale_into(d, x0, eps, most=1.0))
    if norm == "l1":
        return x0 + _soften_into(d, x0, eps)
    return x0 + project_ball(x.clamp(0.0, 1.0) - x0, norm, eps)


def linear_max(g: Tensor, x0: Tensor, norm: str, eps: float | Tensor) -> Tensor:
    """The point of ball and box that maximises the inner product with ``g``: ``argmax {<g, x - x0>}``, exactly.

    linf: the sign. l2: ``clamp(s g)`` with the scale s that uses the radius up. l1: the coordinates with the largest |g| move as
    far as the box allows until the radius is spent. l0: the pixels with the largest gain move to their bound. ``eps`` may be one
    radius per sample (N,).
    """
    if norm not in NORMS:
        raise ValueError(f"unknown norm '{norm}'; expected one of {', '.join(NORMS)}")
    room = torch.where(g > 0, 1 - x0, x0)
    if norm == "linf":
        return (x0 + (_wide(eps, g) if isinstance(eps, Tensor) else eps) * g.sign()).clamp(0.0, 1.0)
    if norm == "l2":
        return x0 + _scale_into(g, x0, eps, most=torch.inf)
    if norm == "l1":
        eps = eps[:, None] if isinstance(eps, Tensor) else eps
        size, order = _flat(g).abs().sort(dim=1, descending=True)
        able = torch.where(size > 0, _flat(room).gather(1, order), torch.zeros_like(size))
        spent_before = able.cumsum(1) - able
        move = torch.minimum(able, (eps - spent_before).clamp_min(0))
        return x0 + torch.zeros_like(move).scatter_(1, order, move).view_as(g) * g.sign()
    full = room * g.sign()
    gain = (full * g).sum(1).flatten(1)
    if isinstance(eps, Tensor):
        rank = gain.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return x0 + full * (rank < eps.floor()[:, None]).view(len(g), 1, *g.shape[2:])
    k = min(int(eps), gain.shape[1])
    keep = torch.zeros_like(gain).scatter_(1, gain.topk(k, dim=1).indices, 1.0)
    return x0 + full * keep.view(len(g), 1, *g.shape[2:])


def _scale_into(d: Tensor, x0: Tensor, eps: float | Tensor, most: float) -> Tensor:
    """``clamp(s d, -x0, 1 - x0)`` for the largest scale s <= ``most`` whose l2 norm is at most ``eps``.

    With the coordinates C at their bounds b fixed, s^2 = (eps^2 - sum_C b^2) / sum_{not C} d^2. Raising s can only add
    coordinates to C, so this fixed-point iteration climbs to the solution in finitely many steps, all feasible.
    """
    eps = eps[:, None] if isinstance(eps, Tensor) else eps
    flat, largest = _over_largest(d)
    cap = most * largest
    bound = torch.where(flat > 0, 1 - _flat(x0), _flat(x0))
    square = flat.square()
    size = torch.where(square > 0, flat.abs(), torch.zeros_like(flat))  # what vanishes beside the largest does not move
    tiny = torch.finfo(d.dtype).tiny
    at_bound = torch.zeros_like(size, dtype=torch.bool)
    for _ in range(size.shape[1] + 1):
        spent = torch.where(at_bound, bound.square(), torch.zeros_like(bound)).sum(1, keepdim=True)
        free = torch.where(at_bound, torch.zeros_like(square), square).sum(1, keepdim=True)
        s = ((eps * eps - spent).clamp_min(0) / free.clamp_min(tiny)).sqrt()
        s = torch.where(free > 0, s, torch.full_like(s, torch.finfo(d.dtype).max)).minimum(cap)
        reached = at_bound | (s * size > bound)
        if bool((reached == at_bound).all()):
            break
        at_bound = reached
    moved = torch.where(at_bound, bound, torch.where(size > 0, s * size, size))
    return (flat.sign() * moved).view_as(d)


def _soften_into(d: Tensor, x0: Tensor, eps: float | Tensor) -> Tensor:
    """Euclidean projection of ``d`` on ``{d : ||d||_1 <= eps, x0 + d in [0, 1]}``.

    The solution is ``clamp(soft(d, t), -x0, 1 - x0)`` for the smallest threshold t >= 0 whose l1 norm is at most eps. The
    norm is a falling, piecewise linear function of t; bisection brackets t, one secant step inside the last bracket is exact
    there up to rounding.
    """
    eps = eps[:, None] if isinstance(eps, Tensor) else eps
    low_b, high_b = -_flat(x0), 1 - _flat(x0)
    flat = _flat(d)

    def at(t: Tensor) -> Tensor:
        return (flat.sign() * (flat.abs() - t).clamp_min(0)).clamp(low_b, high_b)

    def norm1(t: Tensor) -> Tensor:
        return at(t).abs().sum(1, keepdim=True)

    low = torch.zeros(len(d), 1, dtype=d.dtype, device=d.device)
    high = flat.abs().amax(1, keepdim=True)
    done = norm1(low) <= eps
    for _ in range(60 if d.dtype == torch.float64 else 32):
        mid = (low + high) / 2
        over = norm1(mid) > eps
        low, high = torch.where(over, mid, low), torch.where(over, high, mid)
    n_low, n_high = norm1(low), norm1(high)
    slope = (n_low - n_high).clamp_min(torch.finfo(d.dtype).tiny)
    t = low + (high - low) * ((n_low - eps) / slope).clamp(0, 1)
    t = torch.where(norm1(t) <= eps, t, high)  # rounding may leave the secant point a hair outside
    return at(torch.where(done, torch.zeros_like(t), t)).view_as(d)


def prox(d: Tensor, t: Tensor, norm: str) -> Tensor:
    """argmin_u { t ||u||_p + ||u - d||_2^2 / 2 } for linf, l2 or l1 and one t > 0 per sample (N,).

    linf: d minus its projection on the l1 ball of radius t (Moreau). l2: the length shrinks by t. l1: soft thresholding.
    """
    wide = _wide(t, d)
    if norm == "linf":
        return d - project_l1(d, t)
    if norm == "l2":
        return d * (1 - wide / _wide(norm_of(d, "l2"), d).clamp_min(torch.finfo(d.dtype).tiny)).clamp_min(0)
    if norm == "l1":
        return d.sign() * (d.abs() - wide).clamp_min(0)
    raise ValueError(f"no proximal operator for norm '{norm}'; expected linf, l2 or l1")


def to_hyperplane(x: Tensor, w: Tensor, c: Tensor, norm: str) -> Tensor:
    """The smallest d with ``<w, d> = -c`` and ``x + d`` in [0, 1]: the way from ``x`` to where a linear function vanishes.

    ``c`` (N,) is the function's value at ``x``, ``w`` its gradient. Coordinate i moves against c w_i by min(t r_i, b_i): b_i is the
    distance to its bound; the rate r_i is 1 in linf, |w_i| in l2. The value gained is a concave, piecewise linear function of
    t: Newton's method from t = 0 climbs to the solution in finitely many steps, without sorting. l1: the coordinates with the
    largest |w_i| move as far as the box allows until c is used up. Where the box holds no such point, all go to their bounds.
    """
    flat, largest = _over_largest(w)
    v = -c.sign()[:, None] * flat
    size = v.abs()
    need = c.abs()[:, None] / largest
    room = torch.where(size > 0, torch.where(v > 0, 1 - _flat(x), _flat(x)), torch.zeros_like(size))
    if norm == "l1":
        ordered, order = size.sort(dim=1, descending=True)
        able = room.gather(1, order)
        gain = ordered * able
        missing = (need - (gain.cumsum(1) - gain)).clamp_min(0)
        part = torch.where(missing < gain, missing / ordered.clamp_min(torch.finfo(x.dtype).tiny), able)
        return (v.sign() * torch.zeros_like(part).scatter_(1, order, part)).view_as(x)
    if norm not in ("linf", "l2"):
        raise ValueError(f"no projection on a hyperplane in '{norm}'; expected one of linf, l2, l1")
    tiny, most = torch.finfo(x.dtype).tiny, torch.finfo(x.dtype).max
    rate = size if norm == "l2" else 1.0
    gain, pull = size * room, size * rate
    t, step, free, part = torch.zeros_like(need), torch.zeros_like(size), torch.empty_like(size), torch.empty_like(size)
    for _ in range(size.shape[1] + 1):
        torch.sub(room, step, out=free).mul_(most).clamp_(0, 1)  # 0 at the bound, else 1; a comparison takes five times as long
        spent = torch.addcmul(gain, free, gain, value=-1, out=part).sum(1, keepdim=True)
        slope = torch.mul(free, pull, out=part).sum(1, keepdim=True)
        further = ((need - spent).clamp_min_(0) / slope.clamp_min_(tiny)).clamp_max_(most)  # a gradient of zero: all the room
        if bool((further <= t).all()):
            break
        t = torch.maximum(t, further)
        step = torch.minimum(t * rate, room)
    return (v.sign() * step).view_as(x)


def steepest(g: Tensor, norm: str) -> Tensor:
    """The unit vector of the norm that maximises the inner product with ``g``; zero where ``g`` is zero.

    linf: the sign. l2: g over its norm. l1: all on the largest coordinate. l0: the unit l2 direction (no unit ball to speak of).
    """
    if norm == "linf":
        return g.sign()
    if norm in ("l2", "l0"):
        flat, _ = _over_largest(g)
        n = flat.norm(dim=1, keepdim=True)
        return (flat / n.clamp_min(1.0)).view_as(g)  # the norm is at least one, or all is zero
    if norm == "l1":
        flat = _flat(g)
        top = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter_(1, top, flat.gather(1, top).sign()).view_as(g)
    raise ValueError(f"unknown norm '{norm}'; expected one of {', '.join(NORMS)}")


def sample_ball(x: Tensor, norm: str, eps: float, rng: Rng) -> Tensor:
    """A perturbation drawn uniformly from the ball, shaped like ``x``; the box is not considered.

    linf: independent uniforms. l2: a normal direction with radius eps * u^(1/D). l1: exponentials with random signs, scaled
    by one more exponential (Barthe et al., Ann. Probab. 33, 2005). l0: uniform values on eps random pixels.
    """
    shape = x.shape[1:]
    if norm == "linf":
        return rng.uniform(shape, -eps, eps, dtype=x.dtype)
    if norm == "l2":
        g = rng.child("direction").normal(shape, dtype=x.dtype)
        u = rng.child("radius").uniform((), dtype=x.dtype) ** (1 / shape.numel())
        return steepest(g, "l2") * _wide(eps * u, x)
    if norm == "l1":
        sign = rng.child("sign").bits(shape).bitwise_and(1) * 2 - 1
        e = -(rng.child("direction").uniform(shape, dtype=torch.float64).clamp_min(2.0**-25)).log()
        last = -(rng.child("radius").uniform((), dtype=torch.float64).clamp_min(2.0**-25)).log()
        total = _flat(e).sum(1) + last
        return (eps * sign * e / _wide(total, e)).to(x.dtype)
    if norm == "l0":
        score = rng.child("pixels").uniform(shape[1:])
        k = min(int(eps), shape[1:].numel())
        keep = torch.zeros_like(_flat(score)).scatter_(1, _flat(score).topk(k, dim=1).indices, 1.0)
        values = rng.child("values").uniform(shape, -1.0, 1.0, dtype=x.dtype)
        return values * keep.view(len(x), 1, *shape[1:]).to(x.dtype)
    raise ValueError(f"unknown norm '{norm}'; expected one of {', '.join(NORMS)}")
