"""Brightness (Hendrycks and Dietterich, ICLR 2019).

    v = max over the channels,  v~ = clip(v + c, 0, 1),  x~ = x v~ / v,  and x~ = v~ for black

This is "add c to the value of HSV": hue and saturation fix the ratios of the channels, so a colour is proportional to its
value. A grey image is its own value, x~ = clip(x + c, 0, 1).

Differences from the authors' code: results are not saved as JPEG.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

C = {"cifar": (0.05, 0.10, 0.15, 0.20, 0.30), "imagenet": (0.1, 0.2, 0.3, 0.4, 0.5)}


@register("brightness", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class Brightness(Corruption):
    """Raises the value channel of HSV: more daylight.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        v = x.amax(1, keepdim=True)
        brighter = (v + at_severity(C[self.table], severity)).clamp_max(1.0)
        share = torch.where(v > 0, x / v, torch.ones_like(x))
        return quantize(share * brighter)
