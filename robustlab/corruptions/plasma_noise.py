"""Plasma noise (C-bar: Mintun, Kirillov, Xie, NeurIPS 2021).

    p <- p + M (cos(s_i q - t / c_i), ...) / d_i        i = 1 .. 4 to 6: a flow that folds the plane;  p: (column, row) / scale
    x~ = clip((1 - a) x + a n, 0, 1)                    a = 6.4 level / 255;  n: sines of the flow's end, one for each channel

s_i = 1.93^i, c_i = 1.15^i, d_i = (2.25 - sharpness)^i; t uniform in (0, 6 pi), sharpness in (0.5, 1), scale in (0.075, 0.2) S.

The severities are those of ``imagenet_c_bar.csv`` in github.com/facebookresearch/augmentation-corruption.

Differences from the authors' code: draws are seeded for each image; images need not be square, S is the smaller side.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, luminance, positions, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

LEVEL = {"imagenet": (4.75, 7.0, 8.5, 9.25, 10.0)}


@register("plasma_noise", cite="Mintun, Kirillov, Xie, NeurIPS 2021, arXiv:2102.11273")
class PlasmaNoise(Corruption):
    """Mixes in swirls of coloured sines.

    Attributes:
        table: ImageNet-C-bar's severities; CIFAR-10-C-bar does not have it.
    """

    table: Literal["imagenet"] = "imagenet"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        level = at_severity(LEVEL[self.table], severity)
        u = rng.child("flow", severity).uniform((4,)).to(x.device)
        t, sharpness, scale = 6 * torch.pi * u[:, 0], 0.5 + 0.5 * u[:, 1], (0.075 + 0.125 * u[:, 2]) * min(x.shape[2:])
        rounds = 4 + (3 * u[:, 3]).floor()
        t, sharpness, scale, rounds = (v[:, None, None] for v in (t, sharpness, scale, rounds))
        row, column = positions(x)
        p, q = (v.expand(len(x), *x.shape[2:]) for v in (column / scale, row / scale))
        for i in range(6):
            s, c, d = 1.93**i, 1.15**i, (2.25 - sharpness) ** i
            along, across = (q * s + t / c).cos() / d, (p * s + t / c).sin() / d
            moves = rounds > i
            p = torch.where(moves, p + along - 0.3 * across, p)
            q = torch.where(moves, q + across + 0.3 * along, q)
        noise = torch.stack([(p - t).sin(), ((p + q + t.sin()) / 2).sin(), (q + t).sin()], 1)
        a = 6.4 * level / 255
        return quantize((1 - a) * x + a * (noise if x.shape[1] == 3 else luminance(noise)))
