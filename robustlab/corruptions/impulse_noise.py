"""Impulse noise, also called salt and pepper (Hendrycks and Dietterich, ICLR 2019).

    x~ = 0 with probability p/2, 1 with probability p/2, else x        for every pixel and channel by itself

Differences from the authors' code: draws are seeded for each image; results are not saved as JPEG.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

P = {"cifar": (0.01, 0.02, 0.03, 0.05, 0.07), "imagenet": (0.03, 0.06, 0.09, 0.17, 0.27)}


@register("impulse_noise", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class ImpulseNoise(Corruption):
    """Sets a share of all values to black or white: bit errors.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        p = at_severity(P[self.table], severity)
        u = rng.child("noise", severity).uniform(x.shape[1:])
        return quantize(torch.where(u < p, (u < p / 2).to(x.dtype), x))
