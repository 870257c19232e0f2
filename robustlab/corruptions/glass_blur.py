"""Glass blur (Hendrycks and Dietterich, ICLR 2019).

    x0 = 8 bits of (k * x)        k: a Gaussian of sigma pixels, cut off at 4 sigma
    p = last pixel .. first:      x0[p] <- x0[p + d],  d uniform in {-r .. r-1}^2        all of it ``passes`` times
    x~ = k * x0

Pixels closer than r to the upper or left border, or r - 1 to the lower or right one, stay. The paper speaks of exchanging
neighbours, but in the authors' code the second half of the exchange reads the value that the first half has just written,
so one pixel is copied and the other kept; the published data sets are made so, and so it is here.

In order, p + d may have been rewritten before p reads it: then p gets what that pixel got, and so on. The chain ends at a
pixel that is still old, so every source is the root of a tree of links p -> p + d, found by doubling the links; a chain of
more than 2^6 links has a probability under 1e-19.

Differences from the authors' code: draws are seeded for each image; results are not saved as JPEG.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, gaussian_blur, in_chunks, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

SIGMA_REACH_PASSES = {
    "cifar": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "imagenet": ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
}


def sources(height: int, width: int, reach: int, rng: Rng, device: torch.device) -> Tensor:
    """The flat position that each pixel's value comes from after one pass: (N, height * width), int64."""
    bits = rng.bits((height * width,)).to(device)
    dx = ((bits & 0xFFFF) * (2 * reach) >> 16) - reach
    dy = (((bits >> 16) & 0xFFFF) * (2 * reach) >> 16) - reach
    h, w = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    moves = ((h > reach) & (h <= height - reach) & (w > reach) & (w <= width - reach)).flatten()
    d = (dy * width + dx) * moves.int()
    p = torch.arange(height * width, device=device, dtype=torch.int32)
    to = (p + d).long()
    if reach == 1:  # all neighbours lie above or to the left, and are still old
        return to
    linked = (d > 0) & moves.index_select(0, to.flatten()).view_as(to)
    link = (p + d * linked).long()
    for _ in range(6):
        link = link.gather(1, link)
    return to.gather(1, link)


@register("glass_blur", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class GlassBlur(Corruption):
    """Scatters pixels over their neighbours, between two blurs: frosted glass.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        sigma, reach, passes = at_severity(SIGMA_REACH_PASSES[self.table], severity)
        n, channels, height, width = x.shape
        source = sources(height, width, reach, rng.child("shuffle", severity, 0), x.device)
        for i in range(1, passes):
            source = source.gather(1, sources(height, width, reach, rng.child("shuffle", severity, i), x.device))
        x = quantize(gaussian_blur(x, sigma)).flatten(2)
        x = x.gather(2, source[:, None].expand(-1, channels, -1)).view(n, channels, height, width)
        return quantize(gaussian_blur(x, sigma))
