"""Pixelate (Hendrycks and Dietterich, ICLR 2019).

    x~ = enlarge(shrink(x, int(c size)), size)

shrink: the mean of the pixels whose centres lie in the large pixel, columns first, then rows, each rounded to 8 bits;
enlarge: repeats the nearest. Pillow's box filter does the same.

Differences from the authors' code: images need not be square; results are not saved as JPEG.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, over_255
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

C = {"cifar": (0.95, 0.90, 0.85, 0.75, 0.65), "imagenet": (0.6, 0.5, 0.4, 0.3, 0.25)}


@cache
def windows(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For m large pixels over n small ones: first small pixel (m,), how many (m,), and the large pixel of each small one (n,)."""
    edges = [math.floor(j * n / m + 0.5) for j in range(m + 1)]
    first = torch.tensor(edges, device=device)
    large = torch.tensor([math.floor((i + 0.5) * m / n) for i in range(n)], device=device)
    return first[:-1], first.diff(), large


def shrink(levels: Tensor, first: Tensor, count: Tensor) -> Tensor:
    """Means over windows of rows, rounded; the levels 0 .. 255 are floats."""
    total = levels.index_select(-2, first)
    for k in range(1, int(count.max())):
        more = levels.index_select(-2, (first + k).clamp_max(levels.shape[-2] - 1))
        total.addcmul_(more, (count[:, None] > k).to(more))
    return total.div_(count[:, None]).add_(0.5).floor_()


@register("pixelate", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class Pixelate(Corruption):
    """Shrinks the image and enlarges it again: too few pixels.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        c = at_severity(C[self.table], severity)
        rows, columns = (windows(n, max(int(n * c), 1), x.device) for n in x.shape[2:])
        levels = (x.mT.contiguous() * 255).round_()  # rows are faster to pick than columns
        levels = shrink(levels, *columns[:2]).mT.contiguous()
        levels = over_255(shrink(levels, *rows[:2]))
        return levels.index_select(-1, columns[2]).index_select(-2, rows[2])
