"""Blue noise sample (C-bar: Mintun, Kirillov, Xie, NeurIPS 2021).

    x~ = x [n > 0.3 level - 2.5]        n: noise of standard deviation one with a spectrum proportional to the frequency

The mask is the same for all channels.

The severities are those of ``cifar10_c_bar.csv`` and ``imagenet_c_bar.csv`` in github.com/facebookresearch/augmentation-corruption.

Differences from the authors' code: draws are seeded for each image; images need not be square, S is the smaller side.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, positions, quantize, spectral_noise
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

LEVEL = {"cifar": (0.7, 1.4, 2.1, 3.5, 4.2), "imagenet": (0.8, 1.6, 2.4, 4.0, 5.6)}


@register("blue_noise_sample", cite="Mintun, Kirillov, Xie, NeurIPS 2021, arXiv:2102.11273")
class BlueNoiseSample(Corruption):
    """Sets scattered pixels to black, evenly spread.

    Attributes:
        table: the severities of CIFAR-10-C-bar (small images) or of ImageNet-C-bar.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        level = at_severity(LEVEL[self.table], severity)
        row, column = positions(x)
        height, width = x.shape[2:]
        power = torch.hypot(row - height / 2, (column - width / 2) * (height / width))
        noise = spectral_noise(power, rng.child("mask", severity), 1)
        return quantize(x * (noise > 0.3 * level - 2.5))
