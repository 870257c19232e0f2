"""Lines (C-bar: Mintun, Kirillov, Xie, NeurIPS 2021).

    for each of int(level S / 10) lines:  x <- (1 - v) x + v 128 / 255        v = max(0, 1 - distance to the line)

in 8 bits each; a line is 2 S long about a random point, and its direction is that of the image plus up to a share, drawn
uniformly from (0.1, 1), of half a turn to either side. Ends are whole pixels.

The severities are those of ``cifar10_c_bar.csv`` in github.com/facebookresearch/augmentation-corruption.

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

LEVEL = {"cifar": (0.5, 1.0, 1.5, 2.0, 2.5)}


@register("lines", cite="Mintun, Kirillov, Xie, NeurIPS 2021, arXiv:2102.11273")
class Lines(Corruption):
    """Draws grey lines, roughly in one direction.

    Attributes:
        table: CIFAR-10-C-bar's severities; ImageNet-C-bar does not have it.
    """

    table: Literal["cifar"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        level = at_severity(LEVEL[self.table], severity)
        side, rng = min(x.shape[2:]), rng.child("lines", severity)
        u = rng.child("direction").uniform((2,)).to(x.device)
        row, column = positions(x)
        for k in range(int(level / 10 * side)):
            p, q, turn = rng.child("line", k).uniform((3,)).to(x.device).unbind(1)
            angle = 2 * torch.pi * (u[:, 0] + (0.1 + 0.9 * u[:, 1]) * (turn - 0.5))
            p, q = p * x.shape[2], q * x.shape[3]
            s, c = angle.sin() * side, angle.cos() * side
            r0, r1, c0, c1 = (e.trunc()[:, None, None] for e in (p - c, p + c, q - s, q + s))
            dy, dx = r1 - r0, c1 - c0
            away = ((row - r0) * dx - (column - c0) * dy).abs() / torch.hypot(dy, dx).clamp_min(1)
            along = torch.where(dy.abs() > dx.abs(), (row - r0) / dy, (column - c0) / dx)
            v = ((1 - away).clamp_min(0) * ((along >= 0) & (along <= 1)))[:, None]
            x = quantize(x + v * (128 / 255 - x))
        return quantize(x)
