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
def alias_table(photons: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For the 256 levels: the probability to keep a column, float32, and the column's alias, int32; both (256 * 2^b,)."""
    rate = torch.arange(256, dtype=torch.float64) * photons / 255
    columns = 2 ** (photons + 7 * int(photons**0.5) + 10).bit_length()
    k = torch.arange(columns, dtype=torch.float64)
    excess = (torch.special.xlogy(k, rate[:, None]) - rate[:, None] - torch.lgamma(k + 1)).exp() * columns
    keep, alias = torch.ones(256, columns, dtype=torch.float64), torch.arange(columns).repeat(256, 1)
    open_, level = torch.zeros_like(excess), torch.arange(256)  # the poorest open column takes from the richest, then is closed
    for _ in range(columns):
        poor, rich = (excess + open_).argmin(1), (excess - open_).argmax(1)
        keep[level, poor], alias[level, poor] = excess[level, poor], rich
        excess[level, rich] -= (1 - excess[level, poor]).where(poor != rich, 0)
        open_[level, poor] = torch.inf
    return keep.float().flatten().to(device), alias.int().flatten().to(device)


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
        keep, alias = alias_table(c, x.device)
        columns = len(keep) // 256
        b = columns.bit_length() - 1
        bits = rng.child("noise", severity).bits(x.shape[1:])
        column = (bits >> (32 - b)) & (columns - 1)
        at = ((x * 255).round_().int().mul_(columns) + column).flatten()
        fraction = (bits & (2 ** (32 - b) - 1)).float().mul_(2.0 ** (b - 32))
        kept = fraction < keep.index_select(0, at).view_as(x)
        return quantize(torch.where(kept, column, alias.index_select(0, at).view_as(x)) / c)
