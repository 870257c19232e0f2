"""Single-frequency greyscale (C-bar: Mintun, Kirillov, Xie, NeurIPS 2021).

    x~ = clip(x + a sin(u row + v column + phase), 0, 1)        a = 19.6 level / 255

One of u, v is uniform in (-pi, pi), the other one smaller, in random order; the phase is uniform.

The severities are those of ``imagenet_c_bar.csv`` in github.com/facebookresearch/augmentation-corruption.

Differences from the authors' code: draws are seeded for each image; images need not be square, S is the smaller side.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, positions, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

LEVEL = {"imagenet": (1.0, 1.5, 2.0, 4.5, 5.0)}


@register("single_frequency_greyscale", cite="Mintun, Kirillov, Xie, NeurIPS 2021, arXiv:2102.11273")
class SingleFrequencyGreyscale(Corruption):
    """Adds a grey plane wave of a random frequency.

    Attributes:
        table: ImageNet-C-bar's severities; CIFAR-10-C-bar does not have it.
    """

    table: Literal["imagenet"] = "imagenet"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        level = at_severity(LEVEL[self.table], severity)
        u = rng.child("wave", severity).uniform((4,)).to(x.device)
        larger = (2 * u[:, 0] - 1) * torch.pi
        smaller = (2 * u[:, 1] - 1) * larger.abs()
        first = u[:, 2] < 0.5
        row, column = positions(x)
        f, g, phase = (
            t[:, None, None] for t in (larger.where(first, smaller), smaller.where(first, larger), 2 * torch.pi * u[:, 3])
        )
        return quantize(x + 19.6 * level / 255 * (f * column + g * row + phase).sin()[:, None])
