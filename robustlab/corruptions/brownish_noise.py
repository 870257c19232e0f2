"""Brownish noise (C-bar: Mintun, Kirillov, Xie, NeurIPS 2021).

    x~ = clip(x + a n, 0, 1)        a = 6.4 level / 255;  n: noise of standard deviation one about its mean,
                                    with a spectrum 1 / (1 + f^2), f in cycles per image

Every channel has its own noise, and its mean is part of it.

The severities are those of ``cifar10_c_bar.csv`` and ``imagenet_c_bar.csv`` in github.com/facebookresearch/augmentation-corruption.

Differences from the authors' code: draws are seeded for each image; images need not be square, S is the smaller side.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, positions, quantize, spectral_noise
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

LEVEL = {"cifar": (2.5, 4.0, 5.5, 6.5, 7.0), "imagenet": (1.0, 2.0, 3.0, 4.0, 5.0)}


@register("brownish_noise", cite="Mintun, Kirillov, Xie, NeurIPS 2021, arXiv:2102.11273")
class BrownishNoise(Corruption):
    """Adds slowly varying noise.

    Attributes:
        table: the severities of CIFAR-10-C-bar (small images) or of ImageNet-C-bar.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        level = at_severity(LEVEL[self.table], severity)
        row, column = positions(x)
        power = 1 / (1 + (row - x.shape[2] / 2).square() + (column - x.shape[3] / 2).square())
        noise = spectral_noise(power, rng.child("noise", severity), x.shape[1])
        return quantize(x + 6.4 * level / 255 * noise)
