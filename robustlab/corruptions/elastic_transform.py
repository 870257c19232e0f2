"""Elastic transform (Hendrycks and Dietterich, ICLR 2019; after Simard et al., ICDAR 2003).

    x~(p) = x(A p + alpha (k * u)(p))        u uniform in (-m, m)^2 for every pixel;  k: a Gaussian of sigma pixels

bilinear, the image mirrored beyond its border. CIFAR table: A is the affine map of three points, a third of the side S around
the middle, that move by up to j in either direction; A and the displacement sample one after the other. ImageNet table: A = 1.

The CIFAR table is that of ``make_cifar_c.py`` in github.com/hendrycks/robustness, with S = 32 there and the smaller side here.
The ImageNet table is that of ``imagecorruptions`` (github.com/bethgelab/imagecorruptions and its successor
imagecorruptions-imaug), which scales with the image; the authors' ``make_imagenet_c.py`` has fixed lengths for 244 pixels and
an affine map at all severities, and is another corruption at severities 1 and 2.

Differences from the authors' code: OpenCV rounds positions of the affine map to 1/32 pixel, here they are exact; draws are
seeded for each image; results are not saved as JPEG.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, gaussian_blur, in_chunks, quantize, sample
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

# alpha, sigma and j in units of S
ALPHA_SIGMA_JITTER = (
    (0.0, 0.0, 0.08),
    (0.05, 0.2, 0.07),
    (0.08, 0.06, 0.06),
    (0.1, 0.04, 0.05),
    (0.1, 0.03, 0.03),
)
ALPHA = (12.5, 16.25, 21.25, 25.0, 30.0)  # sigma = 0.01 of either side, m = 0.005 of the height


def affine(x: Tensor, jitter: float, rng: Rng) -> Tensor:
    """Move three points around the middle by up to ``jitter`` pixels in x and y, and the image with them."""
    height, width = x.shape[2:]
    s = min(height, width) // 3
    corners = torch.tensor([[s, s], [s, -s], [-s, -s]], dtype=torch.float64) + torch.tensor([width // 2, height // 2])
    corners = corners.to(x.device)
    moved = corners + rng.uniform((3, 2), -jitter, jitter).double().to(x.device)
    a, b = moved[:, 1] - moved[:, 0], moved[:, 2] - moved[:, 0]  # the inverse map takes a, b back to the edges of the triangle
    area = a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
    rows, columns = pixels(x)
    dx, dy = columns - moved[:, 0, 0, None, None], rows - moved[:, 0, 1, None, None]
    p = (dx * b[:, 1, None, None] - dy * b[:, 0, None, None]) / area[:, None, None]
    q = (dy * a[:, 0, None, None] - dx * a[:, 1, None, None]) / area[:, None, None]
    (ax, ay), (bx, by) = corners[1] - corners[0], corners[2] - corners[0]
    return sample(x, (corners[0, 1] + p * ay + q * by).float(), (corners[0, 0] + p * ax + q * bx).float(), "mirror")


def displaced(x: Tensor, alpha: float, sigma: tuple[float, float], m: float, rng: Rng) -> Tensor:
    """Let every pixel see a place ``alpha (k * u)`` away."""
    u = rng.uniform((2, *x.shape[2:]), -m, m).to(x.device)
    d = gaussian_blur(u, sigma, truncate=3.0, border="symmetric") * alpha
    rows, columns = pixels(x)
    return sample(x, rows + d[:, 0], columns + d[:, 1], "symmetric")


def pixels(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(x.shape[2], device=x.device)[:, None], torch.arange(x.shape[3], device=x.device)


@register("elastic_transform", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class ElasticTransform(Corruption):
    """Stretches and squeezes small regions.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        height, width = x.shape[2:]
        if self.table == "imagenet":
            alpha = at_severity(ALPHA, severity)
            field = rng.child("field", severity)
            return quantize(displaced(x, alpha, (0.01 * height, 0.01 * width), 0.005 * height, field))
        side = min(height, width)
        alpha, sigma, jitter = (side * c for c in at_severity(ALPHA_SIGMA_JITTER, severity))
        if side >= 3:
            x = affine(x, jitter, rng.child("affine", severity))
        return quantize(displaced(x, alpha, (sigma, sigma), 1.0, rng.child("field", severity)) if alpha else x)
