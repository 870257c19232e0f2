"""Circular motion blur (C-bar: Mintun, Kirillov, Xie, NeurIPS 2021).

    x~ = sum_i w_i rotate(x, 1.5 level t_i degrees) / sum_i w_i        t_i = -1, -0.9, ..., 1;  w_i = exp(-2 t_i^2)

about the middle; what turns in from outside is black. Nothing is random.

The severities are those of ``cifar10_c_bar.csv`` in github.com/facebookresearch/augmentation-corruption.

Differences from the authors' code: cubic convolution instead of cubic splines; images need not be square.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, positions, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

LEVEL = {"cifar": (2.8, 3.6, 4.4, 5.2, 6.0)}


@register("circular_motion_blur", cite="Mintun, Kirillov, Xie, NeurIPS 2021, arXiv:2102.11273")
class CircularMotionBlur(Corruption):
    """Averages over small rotations about the middle.

    Attributes:
        table: CIFAR-10-C-bar's severities; ImageNet-C-bar does not have it.
    """

    table: Literal["cifar"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        level = at_severity(LEVEL[self.table], severity)
        row, column = positions(x)
        middle = [(n - 1) / 2 for n in x.shape[2:]]
        total, weights = torch.zeros_like(x), 0.0
        for i in range(-10, 11):
            t = i / 10
            angle, w = math.radians(1.5 * level * t), math.exp(-2 * t * t)
            dy, dx = row - middle[0], column - middle[1]
            p = math.cos(angle) * dy + math.sin(angle) * dx + middle[0]
            q = math.cos(angle) * dx - math.sin(angle) * dy + middle[1]
            inside = (p > -1e-4) & (p < x.shape[2] - 1 + 1e-4) & (q > -1e-4) & (q < x.shape[3] - 1 + 1e-4)
            grid = torch.stack([q / max(middle[1], 0.5) - 1, p / max(middle[0], 0.5) - 1], -1).expand(len(x), -1, -1, -1)
            total += w * inside * F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=True)
            weights += w
        return quantize(total / weights)
