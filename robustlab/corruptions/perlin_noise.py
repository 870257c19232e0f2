"""Perlin noise (C-bar: Mintun, Kirillov, Xie, NeurIPS 2021).

    n = 1/2 + 1/2 sum_f |g(f p)| / f        f = 1, 2, 4, 8, 16;  p: (row, column) / (S / 7)
    x~ = (1 - a) x + a clip(n, 0, 1)        a = 0.05 level

g: gradient noise (Perlin, SIGGRAPH 1985): random directions at whole positions, interpolated by 3 t^2 - 2 t^3, times 1.5. All
frequencies share one lattice of directions, which starts at the upper left pixel.

The severities are those of ``imagenet_c_bar.csv`` in github.com/facebookresearch/augmentation-corruption.

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

LEVEL = {"imagenet": (4.6, 5.2, 5.8, 7.6, 8.8)}


def gradient_noise(v: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Perlin's noise (N, H, W) of the directions v (N, 2, h, w) at positions (H, 1) and (W)."""
    i, j = row.floor(), column.floor()
    dy, dx = row - i, column - j
    up, left = dy * dy * (3 - 2 * dy), dx * dx * (3 - 2 * dx)
    i, j = i.flatten().long(), j.long()

    def slope(below: int, right: int) -> Tensor:
        g = v.index_select(2, i + below).index_select(3, j + right)
        return g[:, 0] * (dy - below) + g[:, 1] * (dx - right)

    first = slope(0, 0).lerp(slope(1, 0), up)
    return 1.5 * first.lerp(slope(0, 1).lerp(slope(1, 1), up), left)


@register("perlin_noise", cite="Mintun, Kirillov, Xie, NeurIPS 2021, arXiv:2102.11273")
class PerlinNoise(Corruption):
    """Mixes in turbulence, like marble.

    Attributes:
        table: ImageNet-C-bar's severities; CIFAR-10-C-bar does not have it.
    """

    table: Literal["imagenet"] = "imagenet"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        level = at_severity(LEVEL[self.table], severity)
        scale = 7 / min(x.shape[2:])
        cells = [int(16 * (n - 1) * scale) + 2 for n in x.shape[2:]]
        v = rng.child("directions", severity).uniform((2, *cells), -1.0, 1.0).to(x.device)
        v = v / torch.hypot(v[:, :1], v[:, 1:]).clamp_min(1e-6)
        row, column = positions(x)
        noise = sum(gradient_noise(v, row * (f * scale), column * (f * scale)).abs() / f for f in (1, 2, 4, 8, 16))
        a = 0.05 * level
        return quantize((1 - a) * x + a * (0.5 + 0.5 * noise).clamp(0, 1)[:, None])
