"""Where Square starts and what it proposes: windows, stripes, tiles, patterns (see ``square``). Every function acts per sample."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from robustlab import geometry
from robustlab.rng import Rng

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def start(x: Tensor, norm: str, eps: float, rng: Rng) -> Tensor:
    """Where the search begins."""
    return stripes(x, eps, rng) if norm == "linf" else tiles(x, norm, eps, rng)


def propose(norm: str, x0: Tensor, best: Tensor, eps: float, s: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """New points from draws u (N, 5 + C), and which of them (N,) differ from ``best``."""
    if norm == "linf":
        return in_window(x0, best, eps, s, u)
    new = between_windows(norm, x0, best, eps, s, u)
    return new, (new != best).flatten(1).any(1)


def side(p_init: float, query: int, shape: torch.Size, norm: str) -> int:
    """The side of the window in pixels; odd and at least 3 in l2 and l1, where the image has room."""
    h, w = shape[-2:]
    p = p_init / 2 ** sum(query > last for last in HALVINGS)
    s = max(round(math.sqrt(p * h * w)), 1 if norm == "linf" else 3)
    return min(s if norm == "linf" else s + 1 - s % 2, h, w)


def window(shape: torch.Size, s: int, u: Tensor, v: Tensor) -> Tensor:
    """Positions in the flattened image of windows of side s, placed by the draws u, v (N,): (N, C, s * s)."""
    c, h, w = shape[1:]
    top, left = ((u * (h - s + 1)).long(), (v * (w - s + 1)).long())
    along = torch.arange(s, device=u.device)
    inside = (along[:, None] * w + along).flatten()
    channel = torch.arange(c, device=u.device) * (h * w)
    return (top * w + left)[:, None, None] + channel[:, None] + inside


def _signs(u: Tensor, like: Tensor) -> Tensor:
    return torch.where(u < 0.5, -1.0, 1.0).to(like.dtype)


# ------------------------------------------------------------------------------------------------------------------- linf


def stripes(x: Tensor, eps: float, rng: Rng) -> Tensor:
    """Each column of each channel moves by eps up or down."""
    sign = _signs(rng.uniform((x.shape[1], 1, x.shape[3])), x)
    return geometry.project(x + eps * sign, x, "linf", eps)


def in_window(x0: Tensor, best: Tensor, eps: float, s: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """linf: one window at the radius. Only its values are computed and compared."""
    at = window(x0.shape, s, u[:, 0], u[:, 1]).flatten(1)
    sign = _signs(u[:, 5:], x0).repeat_interleave(s * s, 1)
    clean, old = x0.flatten(1).gather(1, at), best.flatten(1)
    patch = geometry.project(clean + eps * sign, clean, "linf", eps)
    moved = (patch != old.gather(1, at)).any(1)
    return old.scatter(1, at, patch).view_as(x0), moved


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
    sign = _signs(rng.child("sign").uniform((c, rows, columns)), x)
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
    new = pattern * _signs(u[:, 5:], x0)[..., None] + old / (1e-12 + of_old)
    size = unspent / c + of_windows
    size = size.sqrt() if norm == "l2" else size * c
    new = _unit(new.reshape(n * c, -1), norm).view(n, c, -1) * size[..., None]
    d = d.scatter(1, away.flatten(1), 0.0).scatter(1, to.flatten(1), new.flatten(1))
    return _place(x0, d.view_as(x0), norm, eps)
