"""Shot noise (Hendrycks and Dietterich, ICLR 2019).

    x~ = clip(k / c, 0, 1)        k ~ Poisson(c x) for every pixel and channel; c: photons that make white

Each draw takes 32 bits through Walker's alias table of its grey level (ACM TOMS 3, 1977): a column by the upper bits, and the
column's value or its alias by the lower ones. So the rate of a value is that of the nearest of the 256 levels.

Differences from the authors' code: draws are seeded for each image; results are not saved as JPEG.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

PHOTONS = {"cifar": (500, 250, 100, 75, 50), "imagenet": (60, 25, 12, 5, 3)}


@cache
def alias_table(photons: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of the 256 levels: its first number (256,); for 2^b numbers from there, flat: the share kept, and the alias.

    The numbers reach further than 6 standard deviations to either side of the rate.
    """
    rate = torch.arange(256, dtype=torch.float64) * photons / 255
    columns = 2 ** int(12 * photons**0.5 + 16).bit_length()
    first = (rate - 6 * rate.sqrt() - 8).floor().clamp_min(0)
    k = first[:, None] + torch.arange(columns)
    excess = (torch.special.xlogy(k, rate[:, None]) - rate[:, None] - torch.lgamma(k + 1)).exp() * columns
    keep, alias, level = torch.ones_like(excess), k.clone(), torch.arange(256)
    closed = torch.zeros_like(excess)
    for _ in range(columns):  # the poorest open column takes from the richest one, and is closed
        poor, rich = (excess + closed).argmin(1), (excess - closed).argmax(1)
        keep[level, poor], alias[level, poor] = excess[level, poor], k[level, rich]
        excess[level, rich] -= (1 - excess[level, poor]).where(poor != rich, 0)
        closed[level, poor] = torch.inf
    return first.int().to(device), keep.float().flatten().to(device), alias.int().flatten().to(device)


@register("shot_noise", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class ShotNoise(Corruption):
    """Counts photons, a Poisson number for every pixel and channel: the grain of light itself.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        c = at_severity(PHOTONS[self.table], severity)
        first, keep, alias = alias_table(c, x.device)
        columns = len(keep) // 256
        b = columns.bit_length() - 1
        bits = rng.child("noise", severity).bits(x.shape[1:])
        column = ((bits >> (32 - b)) & (columns - 1)).flatten()
        level = (x * 255).round_().int().flatten()
        at = level * columns + column
        fraction = (bits & (2 ** (32 - b) - 1)).flatten().float().mul_(2.0 ** (b - 32))
        column += first.index_select(0, level)
        k = torch.where(fraction < keep.index_select(0, at), column, alias.index_select(0, at))
        return quantize(k.view_as(x) / c)
