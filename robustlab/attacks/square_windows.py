"""Square's windows: how large, and where (see ``square``)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def side(p_init: float, query: int, shape: torch.Size, norm: str) -> int:
    """The side of the window in pixels; odd and at least 3 in l2 and l1, where the image has room."""
    h, w = shape[-2:]
    p = p_init / 2 ** sum(query > last for last in HALVINGS)
    s = max(round(math.sqrt(p * h * w)), 1 if norm == "linf" else 3)
    return min(s if norm == "linf" else s + 1 - s % 2, h, w)


def corner(shape: torch.Size, s: int | Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The first row and the first column of windows of side s, placed by the draws u, v; all of one shape, such as (N,)."""
    return (u * (shape[-2] - s + 1)).long(), (v * (shape[-1] - s + 1)).long()


def within(shape: torch.Size, s: int | Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows (..., H) and columns (..., W) such windows cover."""
    at = (torch.arange(size, device=u.device) for size in shape[-2:])
    inside = (i - first[..., None] for i, first in zip(at, corner(shape, s, u, v), strict=True))
    last = torch.as_tensor(s, device=u.device)[..., None]
    rows, columns = ((i >= 0) & (i < last) for i in inside)
    return rows, columns


def window(shape: torch.Size, s: int, u: Tensor, v: Tensor) -> Tensor:
    """Positions in the flattened image of windows of side s, placed by the draws u, v (N,): (N, C, s * s)."""
    c, h, w = shape[1:]
    top, left = corner(shape, s, u, v)
    along = torch.arange(s, device=u.device)
    inside = (along[:, None] * w + along).flatten()
    channel = torch.arange(c, device=u.device) * (h * w)
    return (top * w + left)[:, None, None] + channel[:, None] + inside


def signs(u: Tensor, like: Tensor) -> Tensor:
    """-1 or 1, by draws u."""
    return torch.where(u < 0.5, -1.0, 1.0).to(like.dtype)
