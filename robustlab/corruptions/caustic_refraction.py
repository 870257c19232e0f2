"""Caustic refraction (C-bar: Mintun, Kirillov, Xie, NeurIPS 2021).

    h: caustics of moving water, five rounds of a sine flow, in [0, 1], smoothed by a Gaussian of one pixel
    n = (dh/drow, dh/dcolumn, 1) / |.|;   shift = L (n_row, n_column) (sqrt(1 - s^2 / 16) - n_z / 4),  s^2 = 1 - n_z^2
    x~ = clip(x(p + shift) + l (dh/drow - dh/dcolumn), 0, 1)        L = 0.05 level S,  l = 0.2 level

Differences dh are between the two neighbours, zero outside; the shift is Snell's law for a refractive index of 4, none where
n_z > 0.999. Bilinear, black outside. The water's time is uniform in (0.5, 2), its wavelength in (0.75, 1.25) S.

The severities are those of ``imagenet_c_bar.csv`` in github.com/facebookresearch/augmentation-corruption.

Differences from the authors' code: draws are seeded for each image; images need not be square, S is the smaller side.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.image_ops import at_severity, gaussian_blur, in_chunks, positions, quantize, sample
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

LEVEL = {"imagenet": (2.35, 3.2, 4.9, 6.6, 9.15)}


def caustics(row: Tensor, column: Tensor, time: Tensor, size: Tensor) -> Tensor:
    """Light on the ground of moving water (N, H, W), in [0, 1]."""
    p, q = (v.div(size).remainder(1) * (2 * torch.pi) - 250 for v in (row, column))
    p, q = torch.broadcast_tensors(p, q)
    i, j, c = p, q, torch.ones_like(p)
    for k in range(1, 6):
        t = time * (1 - 3.5 / k)
        i, j = p + (t - i).cos() + (t + j).sin(), q + (t - j).sin() + (t + i).cos()
        c = c + 200 / torch.hypot(p / (i + t).sin(), q / (j + t).cos())
    return (1.17 - (c / 5) ** 1.4).abs().pow(8).clamp(0, 1)


@register("caustic_refraction", cite="Mintun, Kirillov, Xie, NeurIPS 2021, arXiv:2102.11273")
class CausticRefraction(Corruption):
    """Looks through a rippled water surface, with its light and shade.

    Attributes:
        table: ImageNet-C-bar's severities; CIFAR-10-C-bar does not have it.
    """

    table: Literal["imagenet"] = "imagenet"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        level = at_severity(LEVEL[self.table], severity)
        side, (row, column) = min(x.shape[2:]), positions(x)
        u = rng.child("water", severity).uniform((2,)).to(x.device)[..., None, None]
        h = gaussian_blur(caustics(row, column, 0.5 + 1.5 * u[:, 0], (0.75 + 0.5 * u[:, 1]) * side), 1.0, border="symmetric")
        h = F.pad(h, (1, 1, 1, 1))
        down, right = h[:, 2:, 1:-1] - h[:, :-2, 1:-1], h[:, 1:-1, 2:] - h[:, 1:-1, :-2]
        n_z = (1 + down.square() + right.square()).rsqrt()
        bend = (1 - (1 - n_z.square()) / 16).sqrt() - n_z / 4
        bend = (0.05 * level * side * bend * n_z).where(n_z < 0.999, 0)
        seen = sample(x, row + bend * down, column + bend * right, "zero")
        return quantize(seen + 0.2 * level * (down - right)[:, None])
