"""Ripple (C-bar: Mintun, Kirillov, Xie, NeurIPS 2021).

    x~(row, column) = x(row + a sin(2 pi row / u + s), column + a sin(2 pi column / v + t))        a = 0.0025 level S

bilinear, black outside; wavelengths uniform in (0.1, 0.3) S, phases uniform.

The severities are those of ``cifar10_c_bar.csv`` in github.com/facebookresearch/augmentation-corruption.

Differences from the authors' code: draws are seeded for each image; images need not be square, S is the smaller side.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, positions, quantize, sample
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

LEVEL = {"cifar": (5.5, 6.0, 6.5, 7.5, 8.0)}


@register("ripple", cite="Mintun, Kirillov, Xie, NeurIPS 2021, arXiv:2102.11273")
class Ripple(Corruption):
    """Shifts rows and columns along waves.

    Attributes:
        table: CIFAR-10-C-bar's severities; ImageNet-C-bar does not have it.
    """

    table: Literal["cifar"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        level = at_severity(LEVEL[self.table], severity)
        side = min(x.shape[2:])
        u = rng.child("waves", severity).uniform((4,)).to(x.device)[..., None, None]
        row, column = positions(x)
        wave = [(2 * torch.pi * (p / ((0.1 + 0.2 * u[:, k]) * side) + u[:, 2 + k])).sin() for k, p in enumerate((row, column))]
        a, shape = 0.0025 * level * side, (len(x), *x.shape[2:])
        return quantize(sample(x, (row + a * wave[0]).expand(shape), (column + a * wave[1]).expand(shape), "zero"))
