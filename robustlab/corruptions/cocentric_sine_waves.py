"""Cocentric sine waves (C-bar: Mintun, Kirillov, Xie, NeurIPS 2021).

    x~ = clip(x + a ((r + b sin(k phi)) mod w) / w - a / 2, 0, 1)        a = 12.8 level / 255

r, phi: polar coordinates about a random point of the image; k uniform in (0, 10), b and w in (0, S / 10). The name is the authors'.

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

LEVEL = {"imagenet": (3.0, 5.0, 8.0, 9.0, 10.0)}


@register("cocentric_sine_waves", cite="Mintun, Kirillov, Xie, NeurIPS 2021, arXiv:2102.11273")
class CocentricSineWaves(Corruption):
    """Adds rings of a saw tooth around a random point, with bulges.

    Attributes:
        table: ImageNet-C-bar's severities; CIFAR-10-C-bar does not have it.
    """

    table: Literal["imagenet"] = "imagenet"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        level = at_severity(LEVEL[self.table], severity)
        side = min(x.shape[2:])
        u = rng.child("rings", severity).uniform((5,)).to(x.device)
        row, column = positions(x)
        dy, dx = row - (u[:, 0] * x.shape[2])[:, None, None], column - (u[:, 1] * x.shape[3])[:, None, None]
        k, b, w = (t[:, None, None] for t in (10 * u[:, 2], side / 10 * u[:, 3], (side / 10 * u[:, 4]).clamp_min(1e-4)))
        r = torch.hypot(dy, dx) + (torch.atan2(dx, dy) * k).sin() * b
        return quantize(x + 12.8 * level / 255 * (r.remainder(w) / w - 0.5)[:, None])
