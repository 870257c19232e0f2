"""Checkerboard cutout (C-bar: Mintun, Kirillov, Xie, NeurIPS 2021).

    x~ = 128 / 255 in a share level / 10 of one colour's squares of a checkerboard, else x

The board is turned by a random angle, and its squares have sides uniform in (0.1, 0.25) S. As in the authors' code, the squares
around the axes through the upper left pixel are drawn together, because indices are cut off towards zero.

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

LEVEL = {"cifar": (1.0, 2.0, 3.0, 4.0, 5.0), "imagenet": (2.0, 3.0, 4.0, 5.0, 6.0)}

REACH = 64  # squares in any direction: enough for images four times as long as high


@register("checkerboard_cutout", cite="Mintun, Kirillov, Xie, NeurIPS 2021, arXiv:2102.11273")
class CheckerboardCutout(Corruption):
    """Covers squares of a turned checkerboard with grey.

    Attributes:
        table: the severities of CIFAR-10-C-bar (small images) or of ImageNet-C-bar.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        level = at_severity(LEVEL[self.table], severity)
        rng = rng.child("board", severity)
        u = rng.child("turn").uniform((2,)).to(x.device)
        side = ((0.1 + 0.15 * u[:, 1]) * min(x.shape[2:])).clamp_min(1)
        row, column = positions(x)
        c, s = (2 * torch.pi * u[:, 0]).cos()[:, None, None], (2 * torch.pi * u[:, 0]).sin()[:, None, None]
        p, q = (c * row + s * column) / side[:, None, None], (c * column - s * row) / side[:, None, None]
        squares = 2 * REACH + 1
        i, j = (v.trunc().clamp(-REACH, REACH).long() + REACH for v in (p, q))
        drawn = rng.child("squares").uniform((squares * squares,)).to(x.device).gather(1, (i * squares + j).flatten(1)).view_as(p)
        hidden = (p.remainder(2).floor() == q.remainder(2).floor()) & (drawn < level / 10)
        return quantize(x.masked_fill(hidden[:, None], 128 / 255))
