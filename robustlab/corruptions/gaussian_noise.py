"""Gaussian noise (Hendrycks and Dietterich, ICLR 2019).

    x~ = clip(x + sigma n, 0, 1)        n ~ N(0, 1) for every pixel and channel; sigma in units of [0, 1] pixels

Differences from the authors' code: draws are seeded for each image; results are not saved as JPEG.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

SIGMA = {"cifar": (0.04, 0.06, 0.08, 0.09, 0.10), "imagenet": (0.08, 0.12, 0.18, 0.26, 0.38)}


@register("gaussian_noise", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class GaussianNoise(Corruption):
    """Adds independent normal noise to every pixel and channel: a camera in low light.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        sigma = at_severity(SIGMA[self.table], severity)
        return quantize(x + sigma * rng.child("noise", severity).normal(x.shape[1:]))
