"""Pinch and twirl (C-bar: Mintun, Kirillov, Xie, NeurIPS 2021).

    x~(c + p) = x(c + R(+-theta (1 - d)^2) p sin(pi d / 2)^(-a)),  d = |p| / r < 1

theta = pi level / 20, a = 0.04 level + 0.1,

in the cells of a 3 x 3 grid (5 x 5 from 224 pixels on), about their centres c, r half a cell; the direction of each is random.
Bilinear, black outside.

The severities are those of ``cifar10_c_bar.csv`` in github.com/facebookresearch/augmentation-corruption.

Differences from the authors' code: cells are sampled from the clean image, there from one whose earlier cells are done, which
matters in a seam of one pixel; draws are seeded for each image; images need not be square.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, positions, quantize, sample
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

LEVEL = {"cifar": (5.5, 6.0, 6.5, 8.5, 10.0)}


@register("pinch_and_twirl", cite="Mintun, Kirillov, Xie, NeurIPS 2021, arXiv:2102.11273")
class PinchAndTwirl(Corruption):
    """Pinches and turns the cells of a grid.

    Attributes:
        table: CIFAR-10-C-bar's severities; ImageNet-C-bar does not have it.
    """

    table: Literal["cifar"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        level = at_severity(LEVEL[self.table], severity)
        n, (height, width) = 5 if min(x.shape[2:]) >= 224 else 3, x.shape[2:]
        sign = (rng.child("turn", severity).bits((n * n,)) & 1).to(x.device) * 2.0 - 1
        row, column = positions(x)
        size = [max(height // n, 1), max(width // n, 1)]
        i, j = (p.div(s).floor().clamp_max(n - 1) for p, s in zip((row, column), size, strict=True))
        dy, dx = row - (i + 0.5) * size[0], column - (j + 0.5) * size[1]
        far = torch.hypot(dy, dx)
        d = far / (min(size) / 2)
        stretch = (torch.pi / 2 * d.clamp(1e-6, 1)).sin() ** -(0.04 * level + 0.1)
        turn = sign[:, (i * n + j).long()] * (torch.pi * level / 20 * (1 - d).square())
        moves = (d <= 1) & (far >= 5e-4) & (row < n * size[0]) & (column < n * size[1])
        p, q = (dy * turn.cos() - dx * turn.sin()) * stretch, (dy * turn.sin() + dx * turn.cos()) * stretch
        moved = sample(x, row - dy + p, column - dx + q, "zero")
        return quantize(torch.where(moves, moved, x))
