"""Spatter (Hendrycks and Dietterich, ICLR 2019; one of the four for validation).

    l = k * (mu + sigma n), zero below t        n ~ N(0, 1) for every pixel;  k: a Gaussian of s pixels
    mud:    m = k' * [l > 0], zero below 0.8;   x~ = (1 - m) x + m brown        k': a Gaussian of a pixels
    water:  m = a l d / max(l d);               x~ = clip(x + m turquoise, 0, 1)

d is light and shade of the drops: the distance to their edges (Canny), at most 20, averaged over 3 x 3, its histogram
equalised, embossed and averaged again, in 8 bits as in the authors' code.

The tables are those of ``make_cifar_c.py`` and ``make_imagenet_c.py`` in github.com/hendrycks/robustness.

Differences from the authors' code: an image without a drop stays as it is, theirs is undefined; draws are seeded for each
image; results are not saved as JPEG.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.image_ops import at_severity, extend, gaussian_blur, in_chunks, luminance, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

# mu, sigma, s, t, a, what
PARAMETERS = {
    "cifar": (
        (0.62, 0.1, 0.7, 0.7, 0.5, "water"),
        (0.65, 0.1, 0.8, 0.7, 0.5, "water"),
        (0.65, 0.3, 1.0, 0.69, 0.5, "water"),
        (0.65, 0.1, 0.7, 0.69, 0.6, "mud"),
        (0.65, 0.1, 0.5, 0.68, 0.6, "mud"),
    ),
    "imagenet": (
        (0.65, 0.3, 4.0, 0.69, 0.6, "water"),
        (0.65, 0.3, 3.0, 0.68, 0.6, "water"),
        (0.65, 0.3, 2.0, 0.68, 0.5, "water"),
        (0.65, 0.3, 1.0, 0.65, 1.5, "mud"),
        (0.67, 0.4, 1.0, 0.65, 1.5, "mud"),
    ),
}
TURQUOISE, BROWN = (175, 238, 238), (63, 42, 20)
LOW, HIGH, FAR = 50, 150, 20
EMBOSS = ((-2, -1, 0), (-1, 1, 1), (0, 1, 2))


def neighbours(x: Tensor, border: Literal["edge", "mirror"]) -> dict[tuple[int, int], Tensor]:
    """The images (N, H, W) moved by -1, 0, 1 rows and columns: [i, j] is the value i rows below and j columns to the right."""
    h, w = x.shape[1:]
    wide = extend(extend(x, -2, 1, border), -1, 1, border)
    return {(i, j): wide[:, 1 + i : 1 + i + h, 1 + j : 1 + j + w] for i in (-1, 0, 1) for j in (-1, 0, 1)}


def average(x: Tensor) -> Tensor:
    return sum(neighbours(x, "mirror").values()) / 9  # type: ignore[return-value]


def canny(levels: Tensor) -> Tensor:
    """Edges (N, H, W), bool, of levels 0 .. 255: ridges of |gx| + |gy| above LOW that touch, through others, one above HIGH."""
    p = neighbours(levels, "edge")
    gx = sum(c * (p[i, 1] - p[i, -1]) for i, c in ((-1, 1), (0, 2), (1, 1)))
    gy = sum(c * (p[1, j] - p[-1, j]) for j, c in ((-1, 1), (0, 2), (1, 1)))
    size = gx.abs() + gy.abs()  # type: ignore[union-attr]
    h, w = levels.shape[1:]
    wide = F.pad(size, (1, 1, 1, 1))
    m = {(i, j): wide[:, 1 + i : 1 + i + h, 1 + j : 1 + j + w] for i in (-1, 0, 1) for j in (-1, 0, 1)}
    flat, steep = gy.abs() < 0.41421356 * gx.abs(), gy.abs() > 2.41421356 * gx.abs()  # type: ignore[union-attr]
    along_x = (size > m[0, -1]) & (size >= m[0, 1])
    along_y = (size > m[-1, 0]) & (size >= m[1, 0])
    falling = (size > m[-1, -1]) & (size > m[1, 1])
    rising = (size > m[-1, 1]) & (size > m[1, -1])
    diagonal = torch.where((gx < 0) == (gy < 0), falling, rising)
    ridge = (size > LOW) & torch.where(flat, along_x, torch.where(steep, along_y, diagonal))
    edges = ridge & (size > HIGH)
    while True:
        p = F.pad(edges, (1, 1, 1, 1))
        p = p[:, :-2] | p[:, 1:-1] | p[:, 2:]
        grown = (p[..., :-2] | p[..., 1:-1] | p[..., 2:]) & ridge
        if torch.equal(grown, edges):
            return edges
        edges = grown


def length(square: int) -> float:
    """What OpenCV takes for the square root of a whole number: steps of 1, 1.4 (diagonal) and 2.1969 (knight's move)."""
    found = []
    for x in range(FAR + 1):
        y = math.isqrt(max(square - x * x, 0))
        if x * x + y * y == square and y <= x:
            found.append(2.1969 * y + x - 2 * y if x >= 2 * y else 1.4 * (2 * y - x) + 2.1969 * (x - y))
    return min(found, default=math.sqrt(square))


LENGTHS = torch.tensor([min(length(k), FAR) for k in range(FAR**2 + 1)])


def distance(edges: Tensor) -> Tensor:
    """From every pixel to the nearest edge (N, H, W), in pixels, at most FAR."""
    h, w = edges.shape[1:]
    at = torch.arange(h, device=edges.device, dtype=torch.float32)[:, None]
    above = torch.where(edges, at, -torch.inf).cummax(1).values
    below = torch.where(edges, at, torch.inf).flip(1).cummin(1).values.flip(1)
    down = torch.minimum(at - above, below - at).clamp_max_(FAR).square_().short()
    wide = F.pad(down, (FAR, FAR), value=FAR**2)
    best = down
    for k in range(1, FAR):
        nearer = torch.minimum(wide[..., FAR - k : FAR - k + w], wide[..., FAR + k : FAR + k + w])
        best = torch.minimum(best, nearer.add_(k * k))
    return LENGTHS.to(best.device).index_select(0, best.int().flatten().clamp_max_(FAR**2)).view(edges.shape)


def equalized(levels: Tensor) -> Tensor:
    """Levels 0 .. 255 (N, H, W) through the running sum of their histogram, without its first bin; a flat image stays."""
    n, bins = len(levels), levels.flatten(1).long()
    counts = torch.zeros(n, 256, device=levels.device).scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.float32))
    total = counts.cumsum(1)
    first = counts.gather(1, bins.amin(1, keepdim=True))
    rest = total[:, -1:] - first
    table = torch.where(rest > 0, ((total - first).clamp_min(0) * (255 / rest)).round(), torch.arange(256, device=levels.device))
    return table.gather(1, bins).view_as(levels)


def water(liquid: Tensor, amount: float) -> Tensor:
    """How much turquoise (N, H, W) is added."""
    levels = (liquid * 255).floor().clamp_max(255)
    d = equalized(average(distance(canny(levels))).add_(1e-4).floor())
    p = neighbours(d, "mirror")
    d = sum(EMBOSS[i + 1][j + 1] * p[i, j] for i, j in p if EMBOSS[i + 1][j + 1]).clamp(0, 255)  # type: ignore[union-attr]
    m = levels * average(d).round()
    return m * (amount / m.amax((1, 2), keepdim=True).clamp_min(1e-9))


@register("spatter", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class Spatter(Corruption):
    """Drops of water, or of mud, on the lens.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        mu, sigma, s, t, a, what = at_severity(PARAMETERS[self.table], severity)
        liquid = gaussian_blur(mu + sigma * rng.child("liquid", severity).normal(x.shape[2:]).to(x.device), s)
        colour = torch.tensor(TURQUOISE if what == "water" else BROWN, device=x.device).view(1, 3, 1, 1) / 255
        colour = colour if x.shape[1] == 3 else luminance(colour)
        if what == "water":
            return quantize(x + water(liquid.where(liquid >= t, 0), a)[:, None] * colour)
        m = gaussian_blur((liquid > t).float(), a)[:, None]
        m = m.where(m >= 0.8, 0)
        return quantize((1 - m) * x + m * colour)
