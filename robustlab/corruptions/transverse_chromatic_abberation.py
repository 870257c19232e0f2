"""Transverse chromatic abberation (C-bar: Mintun, Kirillov, Xie, NeurIPS 2021).

    x~ = the middle of zoom(x, z), z = 1, 1 + s / 2 and 1 + s for the channels in random order        s = 0.05 level

The zoom is scipy's with cubic B-splines and without prefilter: it smooths, also where z = 1. The name is the authors'. An image
of one channel gets one of the three zooms.

The severities are those of ``cifar10_c_bar.csv`` in github.com/facebookresearch/augmentation-corruption.

Differences from the authors' code: draws are seeded for each image; images need not be square.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, mirrored, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

LEVEL = {"cifar": (1.0, 2.0, 5.0, 9.0, 10.0)}


@cache
def zoom_matrix(n: int, factor: float) -> Tensor:
    """Weights (n, n), float64: from n pixels to the middle n of round(n * factor)."""
    larger = max(round(n * factor), n)
    at = (torch.arange(n, dtype=torch.float64) + (larger - n) // 2) * ((n - 1) / max(larger - 1, 1))
    first, t = at.floor(), at - at.floor()
    weights = torch.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, 3 * (1 - t) ** 3 - 6 * (1 - t) ** 2 + 4, t**3], 1) / 6
    source = mirrored(n, 3, torch.device("cpu"))[first.long()[:, None] + torch.arange(2, 6)]
    return torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, source, weights)


@register("transverse_chromatic_abberation", cite="Mintun, Kirillov, Xie, NeurIPS 2021, arXiv:2102.11273")
class TransverseChromaticAbberation(Corruption):
    """Enlarges the channels by different factors: a lens with coloured fringes.

    Attributes:
        table: CIFAR-10-C-bar's severities; ImageNet-C-bar does not have it.
    """

    table: Literal["cifar"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        level = at_severity(LEVEL[self.table], severity)
        factors = [1.0, 1 + 0.025 * level, 1 + 0.05 * level]
        rows, columns = (torch.stack([zoom_matrix(n, z) for z in factors]).to(x.device) for n in x.shape[2:])
        draw = rng.child("order", severity).uniform((3,)).to(x.device)
        order = draw.argsort(1)[:, : x.shape[1]]
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.stack([rows[k] @ x.double() @ columns[k].mT for k in range(3)], 1)  # (N, 3, C, H, W)
        chosen = wide.gather(1, order[:, None, :, None, None].expand(-1, 1, -1, *x.shape[2:]))[:, 0]
        return quantize((chosen * 255).add(0.5).floor().float() / 255)
