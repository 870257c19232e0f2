"""Zoom blur (Hendrycks and Dietterich, ICLR 2019).

    x~ = (x + sum_z zoom(x, z)) / (m + 1)        z = 1, 1 + d, ..., 1 + (m - 1) d: m factors, the first one among them

The tables are those of ``make_cifar_c.py`` and ``make_imagenet_c.py`` in github.com/hendrycks/robustness, whose ranges
``np.arange(1, end, d)`` sometimes include their end.

Differences from the authors' code: images need not be square; results are not saved as JPEG.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, quantize, zoomed
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

FACTORS_STEP = {
    "cifar": ((7, 0.01), (12, 0.01), (16, 0.01), (21, 0.01), (26, 0.01)),
    "imagenet": ((12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03)),
}


@register("zoom_blur", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class ZoomBlur(Corruption):
    """Averages over enlargements of the middle: a camera that moves forward.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        m, d = at_severity(FACTORS_STEP[self.table], severity)
        x = x.contiguous(memory_format=torch.channels_last) if x.shape[1] > 1 else x  # interpolates faster
        total = 2 * x  # the image itself, and its zoom by 1
        for i in range(1, m):
            total += zoomed(x, 1 + i * d)
        return quantize(total / (m + 1)).contiguous()
