"""Gaussian blur (Hendrycks and Dietterich, ICLR 2019; one of the four for validation).

    x~ = k * x        k: a Gaussian of sigma pixels, cut off at 4 sigma; the edge pixels continue beyond the border

Differences from the authors' code: results are not saved as JPEG.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from robustlab.image_ops import at_severity, gaussian_blur, in_chunks, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

SIGMA = {"cifar": (0.4, 0.6, 0.7, 0.8, 1.0), "imagenet": (1.0, 2.0, 3.0, 4.0, 6.0)}


@register("gaussian_blur", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class GaussianBlur(Corruption):
    """Averages with the weights of a Gaussian.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        return quantize(gaussian_blur(x, at_severity(SIGMA[self.table], severity)))
