"""Fog (Hendrycks and Dietterich, ICLR 2019).

    x~ = clip((x + a h) m / (m + a), 0, 1)        m = max x;  h: a fractal cloud in [0, 1], the same for all channels

The cloud is a diamond-square height map on a torus (Fournier, Fussell, Carpenter, CACM 25, 1982): squares of side s halve until
s = 1, and every new point is the mean of its four neighbours plus d^(-2 l) u, with u uniform in (-1, 1), the round l = 0, 1, ...
and the decay d. The map has the next power of 2 pixels that holds the image, and its range is stretched to [0, 1].

Differences from the authors' code: their ImageNet map always has 256 pixels; draws are seeded for each image; results are not
saved as JPEG.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

AMOUNT_DECAY = {
    "cifar": ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)),
    "imagenet": ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)),
}


def clouds(side: int, decay: float, rng: Rng, device: torch.device) -> Tensor:
    """Height maps (N, side, side) in [0, 1]; ``side`` is a power of 2."""
    noise = rng.uniform((side * side,), -1.0, 1.0).to(device)
    h = noise.new_zeros(len(noise), side, side)
    step, amplitude, used = side, 1.0, 1

    def draws(like: Tensor) -> Tensor:
        nonlocal used
        used += like[0].numel()
        return noise[:, used - like[0].numel() : used].view(like.shape) * amplitude

    while step > 1:
        half = step // 2
        corner = h[:, ::step, ::step]
        below = corner + corner.roll(-1, 1)
        centre = (below + below.roll(-1, 2)) / 4 + draws(corner)
        h[:, half::step, half::step] = centre
        h[:, ::step, half::step] = (centre + centre.roll(1, 1) + corner + corner.roll(-1, 2)) / 4 + draws(corner)
        h[:, half::step, ::step] = (centre + centre.roll(1, 2) + below) / 4 + draws(corner)
        step, amplitude = half, amplitude / decay**2
    h -= h.amin((1, 2), keepdim=True)
    return h / h.amax((1, 2), keepdim=True).clamp_min(1e-30)


@register("fog", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class Fog(Corruption):
    """Lays a fractal cloud over the image.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        amount, decay = at_severity(AMOUNT_DECAY[self.table], severity)
        height, width = x.shape[2:]
        h = clouds(1 << (max(height, width) - 1).bit_length(), decay, rng.child("cloud", severity), x.device)
        m = x.amax((1, 2, 3), keepdim=True)
        return quantize((x + amount * h[:, None, :height, :width]) * (m / (m + amount)))
