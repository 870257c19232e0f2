"""Contrast (Hendrycks and Dietterich, ICLR 2019).

    x~ = clip(c (x - m) + m, 0, 1)        m: the mean of each image's channel

Differences from the authors' code: results are not saved as JPEG.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

C = {"cifar": (0.75, 0.50, 0.40, 0.30, 0.15), "imagenet": (0.4, 0.3, 0.2, 0.1, 0.05)}


@register("contrast", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class Contrast(Corruption):
    """Shrinks every channel towards its mean: flat light.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        m = x.mean((2, 3), keepdim=True)
        return quantize((x - m) * at_severity(C[self.table], severity) + m)
