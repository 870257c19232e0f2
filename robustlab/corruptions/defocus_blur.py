"""Defocus blur (Hendrycks and Dietterich, ICLR 2019).

    x~ = k * x        k: the disk of radius r pixels, smoothed by a Gaussian of width b pixels against aliasing

Below a radius of 1 the disk is a single pixel, so that the mild CIFAR severities are narrow Gaussians of 3 x 3 pixels.

Differences from the authors' code: results are not saved as JPEG.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

from torch import Tensor

from robustlab.image_ops import at_severity, disk_kernel, filter2d, in_chunks, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

RADIUS_BLUR = {
    "cifar": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "imagenet": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
}
kernel = cache(disk_kernel)


@register("defocus_blur", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class DefocusBlur(Corruption):
    """Averages over a disk: a lens out of focus.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        return quantize(filter2d(x, kernel(*at_severity(RADIUS_BLUR[self.table], severity))))
