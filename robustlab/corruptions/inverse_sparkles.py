"""Inverse sparkles (C-bar: Mintun, Kirillov, Xie, NeurIPS 2021).

    x~ = 1 - w (1 - x),        w = clip((1 - (f - 1/2)^2) (l^2 / (r^2 + 1e-4))^(0.13 level), 0, 1)

as in ``sparkles``, about one centre in the middle half of the image, R = S / 4.

The severities are those of ``cifar10_c_bar.csv`` and ``imagenet_c_bar.csv`` in github.com/facebookresearch/augmentation-corruption.

Differences from the authors' code: draws are seeded for each image; images need not be square, S is the smaller side.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustlab.corruptions.sparkles import RAYS, glow
from robustlab.image_ops import at_severity, in_chunks, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

LEVEL = {"cifar": (1.0, 1.5, 2.5, 4.5, 5.0), "imagenet": (1.0, 2.0, 4.0, 9.0, 10.0)}


@register("inverse_sparkles", cite="Mintun, Kirillov, Xie, NeurIPS 2021, arXiv:2102.11273")
class InverseSparkles(Corruption):
    """Hides everything in white rays, except around one spot.

    Attributes:
        table: the severities of CIFAR-10-C-bar (small images) or of ImageNet-C-bar.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        level = at_severity(LEVEL[self.table], severity)
        rng, radius = rng.child("sparkle", severity), min(x.shape[2:]) / 4
        u = rng.child("where").uniform((3,)).to(x.device)
        lengths = radius * (1 + rng.child("rays").normal((RAYS,)).to(x.device) / 4)
        centre = (0.25 + 0.5 * u[:, :2]) * torch.tensor(x.shape[2:], device=x.device)
        w = glow(x, centre, lengths, 50 + (150 * u[:, 2]).floor(), 0.13 * level)
        return quantize(1 - w * (1 - x))
