"""Snow (Hendrycks and Dietterich, ICLR 2019).

    s = 8 bits of zoom(mu + sigma n, z), zero below t;  s~ = k * s;  g: grey values
    x~ = clip(c x + (1 - c) max(x, 1.5 g + 0.5) + s~ + rotate(s~, 180 degrees), 0, 1)

n ~ N(0, 1) for every flake; zoom makes flakes of z pixels; k: the path of a fall of 2 r + 1 steps, at an angle uniform in
(-135, -45) degrees, step i weighted by exp(-i^2 / 2 w^2). The second term lightens the scene.

The tables are those of ``make_cifar_c.py`` and ``make_imagenet_c.py`` in github.com/hendrycks/robustness.

Differences from the authors' code: draws are seeded for each image; images need not be square; results are not saved as JPEG.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, enlarged, filter2d, in_chunks, luminance, middle, motion_kernel, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

# mu, sigma, z, t, r, w, c
PARAMETERS = {
    "cifar": (
        (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
        (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
    ),
    "imagenet": (
        (0.1, 0.3, 3.0, 0.5, 10, 4.0, 0.8),
        (0.2, 0.3, 2.0, 0.5, 12, 4.0, 0.7),
        (0.55, 0.3, 4.0, 0.9, 12, 8.0, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8.0, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12.0, 0.55),
    ),
}


@register("snow", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class Snow(Corruption):
    """Falling flakes, blurred by their motion, on a lightened image.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        mu, sigma, z, t, r, w, c = at_severity(PARAMETERS[self.table], severity)
        size = (x.shape[2], x.shape[3])
        flakes = mu + sigma * rng.child("flakes", severity).normal((1, *middle(size, z))).to(x.device)
        layer = enlarged(flakes, z, size)
        layer = quantize(layer.where(layer >= t, 0))
        angle = rng.child("angle", severity).uniform((), -0.75 * torch.pi, -0.25 * torch.pi).to(x.device)
        layer = filter2d(layer, motion_kernel(angle, r, w, size), "edge").mul_(255).round_().clamp_(0, 255).div_(255)
        light = torch.maximum(x, luminance(x) * 1.5 + 0.5)
        return quantize(c * x + (1 - c) * light + layer + layer.flip(2, 3))
