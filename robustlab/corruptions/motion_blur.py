"""Motion blur (Hendrycks and Dietterich, ICLR 2019).

    x~ = k * x        k: 2 r + 1 steps of one pixel along a line at an angle uniform in (-45, 45) degrees,
                      step i weighted by exp(-i^2 / 2 sigma^2); the edge pixels continue beyond the border

Differences from the authors' code: ImageMagick rounds its result to 8 bits, here it is truncated as everywhere; draws are
seeded for each image; results are not saved as JPEG.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, filter2d, in_chunks, motion_kernel, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

RADIUS_SIGMA = {
    "cifar": ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5)),
    "imagenet": ((10, 3.0), (15, 5.0), (15, 8.0), (15, 12.0), (20, 15.0)),
}


@register("motion_blur", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class MotionBlur(Corruption):
    """Averages along a line, fading: a camera that moves, roughly sideways.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        radius, sigma = at_severity(RADIUS_SIGMA[self.table], severity)
        angle = rng.child("angle", severity).uniform((), -torch.pi / 4, torch.pi / 4).to(x.device)
        return quantize(filter2d(x, motion_kernel(angle, radius, sigma, (x.shape[2], x.shape[3])), "edge"))
