"""Where Square starts and what it proposes (see ``square``). Every function acts per sample.

``Ground`` is what proposals are made from, the same for a whole search; a move is what the draws of one query say.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from robustlab import geometry
from robustlab.attacks.square_windows import signs, window, within
from robustlab.rng import Rng

Ground = tuple[Tensor, ...]
Move = tuple[Tensor, ...]


def start(x: Tensor, norm: str, eps: float, rng: Rng) -> Tensor:
    """Where the search begins."""
    return stripes(x, eps, rng) if norm == "linf" else tiles(x, norm, eps, rng)


def ground(x: Tensor, norm: str, eps: float) -> Ground:
    """What proposals are made from. linf: each pixel's lower and upper end; l2, l1: the clean images."""
    return tuple(geometry.project(x + v, x, norm, eps) for v in (-eps, eps)) if norm == "linf" else (x,)


def moves(norm: str, u: Tensor, s: Tensor, shape: torch.Size) -> Move:
    """What draws u (N, Q, 5 + C) say of Q queries with windows of sides s (Q,). linf: in which rows and columns the window lies
    and which channels go down, (N, Q, H), (N, Q, W), (N, Q, C); l2, l1: the draws.
    """
    if norm != "linf":
        return (u,)
    return *within(shape, s, u[..., 0], u[..., 1]), u[..., 5:] < 0.5


def propose(norm: str, base: Ground, best: Tensor, eps: float, s: int, move: Move) -> tuple[Tensor, Tensor]:
    """New points from ``ground`` and one of the ``moves`` for each sample, and which of them (N,) differ from ``best``."""
    new = in_window(*base, best, *move) if norm == "linf" else between_windows(norm, *base, best, eps, s, *move)
    return new, (new != best).flatten(1).any(1)


# ------------------------------------------------------------------------------------------------------------------- linf


def stripes(x: Tensor, eps: float, rng: Rng) -> Tensor:
    """Each column of each channel moves by eps up or down."""
    sign = signs(rng.uniform((x.shape[1], 1, x.shape[3])), x)
    return geometry.project(x + eps * sign, x, "linf", eps)


def in_window(low: Tensor, high: Tensor, best: Tensor, rows: Tensor, columns: Tensor, down: Tensor) -> Tensor:
    """linf: the pixels of one window at one end, each channel at its own."""
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(inside, torch.where(down[..., None, None], low, high), best)


# ----------------------------------------------------------------------------------------------------------------- l2, l1


@functools.cache
def _peak(height: int, width: int, power: int) -> Tensor:
    """A peak in the middle of a rectangle: at Chebyshev distance r from it, sum_{m >= r} (m + 1)^-power."""
    last = max(height, width) // 2
    r = torch.maximum((torch.arange(height) - height // 2).abs()[:, None], (torch.arange(width) - width // 2).abs())
    terms = torch.arange(1, last + 2, dtype=torch.float64) ** -power
    return terms.flip(0).cumsum(0).flip(0)[r]


@functools.cache
def pattern_of(s: int, norm: str) -> Tensor:
    """A peak above its negative, of unit norm, and its transpose: (2, s, s)."""
    power, half = (2 if norm == "l2" else 4), s // 2
    parts = [_unit(_peak(a, s, power)[None], norm)[0] * sign for a, sign in ((half, 1), (s - half, -1)) if a]
    both = torch.cat(parts)
    return _unit(torch.stack([both, both.T]), norm)


def _pattern_like(x: Tensor, s: int, norm: str) -> Tensor:
    return _pattern_on(s, norm, x.dtype, x.device)


@functools.cache
def _pattern_on(s: int, norm: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return pattern_of(s, norm).to(device, dtype)


def _unit(d: Tensor, norm: str) -> Tensor:
    return d / geometry.norm_of(d, norm).view(-1, *[1] * (d.ndim - 1)).clamp_min(1e-12)


def tiles(x: Tensor, norm: str, eps: float, rng: Rng) -> Tensor:
    """A grid of patterns, each with its own orientation and, per channel, sign; scaled or projected to the radius."""
    n, c, h, w = x.shape
    s = max(min(h, w) // 5, 1)
    rows, columns = h // s, w // s
    turned = rng.child("turn").integers((rows, columns), 2)
    sign = signs(rng.child("sign").uniform((c, rows, columns)), x)
    pattern = _pattern_like(x, s, norm)[turned]  # (n, rows, columns, s, s)
    grid = pattern[:, None] * sign[..., None, None]
    grid = grid.permute(0, 1, 2, 4, 3, 5).reshape(n, c, rows * s, columns * s)
    d = torch.zeros_like(x)
    top, left = (h - rows * s) // 2, (w - columns * s) // 2
    d[:, :, top : top + rows * s, left : left + columns * s] = grid
    return _place(x, d, norm, eps)


def _place(x0: Tensor, d: Tensor, norm: str, eps: float) -> Tensor:
    """l2: the perturbation at the radius, clamped. l1: projected on ball and box."""
    if norm == "l1":
        return geometry.project(x0 + d, x0, "l1", eps)
    return (x0 + eps * _unit(d, "l2")).clamp(0.0, 1.0)


def between_windows(norm: str, x0: Tensor, best: Tensor, eps: float, s: int, u: Tensor) -> Tensor:
    """l2, l1: the perturbation in a second window moves into the first."""
    n, c = x0.shape[:2]
    power = 2 if norm == "l2" else 1
    to, away = window(x0.shape, s, u[:, 0], u[:, 1]), window(x0.shape, s, u[:, 2], u[:, 3])
    d = (best - x0).flatten(1)
    mass = d.abs() ** power
    old = d.gather(1, to.flatten(1)).view(n, c, s * s)
    either = torch.zeros_like(d).scatter_(1, to.flatten(1), 1.0).scatter_(1, away.flatten(1), 1.0)
    of_windows = (mass * either).view(n, c, -1).sum(2)  # (n, c)
    unspent = (eps**power - mass.sum(1, keepdim=True)).clamp_min(0)
    of_old = geometry.norm_of(old.reshape(n * c, -1), norm).view(n, c, 1)
    pattern = _pattern_like(x0, s, norm)[(u[:, 4] < 0.5).long()].view(n, 1, s * s)
    new = pattern * signs(u[:, 5:], x0)[..., None] + old / (1e-12 + of_old)
    size = unspent / c + of_windows
    size = size.sqrt() if norm == "l2" else size * c
    new = _unit(new.reshape(n * c, -1), norm).view(n, c, -1) * size[..., None]
    d = d.scatter(1, away.flatten(1), 0.0).scatter(1, to.flatten(1), new.flatten(1))
    return _place(x0, d.view_as(x0), norm, eps)
