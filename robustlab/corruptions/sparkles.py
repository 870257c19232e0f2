"""Sparkles (C-bar: Mintun, Kirillov, Xie, NeurIPS 2021).

    five times:  x <- x + w (1 - x),        w = clip((1 - (f - 1/2)^2) l^2 / (r^2 + 1e-4), 0, 1)

r: distance to a random centre; f: the position between two neighbouring rays, of 50 to 199; l: their length there, interpolated;
lengths are R (1 + n / 4) with n ~ N(0, 1), at least 1, and R = 0.01 level S.

The severities are those of ``cifar10_c_bar.csv`` and ``imagenet_c_bar.csv`` in github.com/facebookresearch/augmentation-corruption.

Differences from the authors' code: draws are seeded for each image; images need not be square, S is the smaller side.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, positions, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

LEVEL = {"cifar": (0.7, 3.5, 5.6, 6.3, 7.0), "imagenet": (1.0, 2.0, 3.0, 5.0, 6.0)}

RAYS = 200


def glow(x: Tensor, centre: Tensor, lengths: Tensor, rays: Tensor, power: float) -> Tensor:
    """How bright a sparkle is, (N, 1, H, W) in [0, 1].

    Args:
        x: the images.
        centre: (N, 2), row and column.
        lengths: (N, RAYS), in pixels.
        rays: (N,), how many of the lengths are used.
        power: of the fall with the distance.
    """
    row, column = positions(x)
    dy, dx = row - centre[:, :1, None], column - centre[:, 1:, None]
    rays = rays[:, None, None]
    at = (torch.atan2(dx, dy) + torch.pi) / (2 * torch.pi) * rays
    f = at - at.floor()
    here, there = (((at.floor() + k) % rays).long().flatten(1) for k in (0, 1))
    first, second = lengths.gather(1, here).view_as(at), lengths.gather(1, there).view_as(at)
    fall = ((first + f * (second - first)).square() / (dy.square() + dx.square() + 1e-4)) ** power
    return ((1 - (f - 0.5).square()) * fall).clamp(0, 1)[:, None]


@register("sparkles", cite="Mintun, Kirillov, Xie, NeurIPS 2021, arXiv:2102.11273")
class Sparkles(Corruption):
    """Adds five bright spots with rays.

    Attributes:
        table: the severities of CIFAR-10-C-bar (small images) or of ImageNet-C-bar.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        level = at_severity(LEVEL[self.table], severity)
        rng, radius = rng.child("sparkles", severity), 0.01 * level * min(x.shape[2:])
        for i in range(5):
            u = rng.child("where", i).uniform((3,)).to(x.device)
            lengths = (radius * (1 + rng.child("rays", i).normal((RAYS,)).to(x.device) / 4)).clamp_min(1)
            centre = u[:, :2] * torch.tensor(x.shape[2:], device=x.device)
            x = x + glow(x, centre, lengths, 50 + (150 * u[:, 2]).floor(), 1.0) * (1 - x)
        return quantize(x)
