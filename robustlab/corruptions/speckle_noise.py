"""Speckle noise (Hendrycks and Dietterich, ICLR 2019; one of the four for validation).

    x~ = clip(x + sigma x n, 0, 1)        n ~ N(0, 1) for every pixel and channel

Differences from the authors' code: draws are seeded for each image; results are not saved as JPEG.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

SIGMA = {"cifar": (0.06, 0.10, 0.12, 0.16, 0.20), "imagenet": (0.15, 0.20, 0.35, 0.45, 0.60)}


@register("speckle_noise", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class SpeckleNoise(Corruption):
    """Adds normal noise in proportion to the brightness: interference, as in radar images.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        sigma = at_severity(SIGMA[self.table], severity)
        return quantize(x + x * rng.child("noise", severity).normal(x.shape[1:]).mul_(sigma))
