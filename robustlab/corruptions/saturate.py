"""Saturate (Hendrycks and Dietterich, ICLR 2019; one of the four for validation).

    v = max, u = min over the channels;  s = 1 - u / v;  s~ = clip(a s + b, 0, 1);  x~ = v - (v - x) s~ / s

This scales the saturation of HSV; hue and value stay. A grey colour has the hue of red, so that b > 0 tints it:
x~ = (v, v (1 - s~), v (1 - s~)). An image of one channel has no colour and stays as it is.

The tables are those of ``make_cifar_c.py`` and ``make_imagenet_c.py`` in github.com/hendrycks/robustness: severities 1 and 2
take colour away, 3 to 5 add it.

Differences from the authors' code: results are not saved as JPEG.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

A_B = {
    "cifar": ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2)),
    "imagenet": ((0.3, 0.0), (0.1, 0.0), (2.0, 0.0), (5.0, 0.1), (20.0, 0.2)),
}


@register("saturate", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class Saturate(Corruption):
    """Scales the saturation of HSV: washed out, or garish.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        a, b = at_severity(A_B[self.table], severity)
        if x.shape[1] == 1:
            return quantize(x)
        v = x.amax(1, keepdim=True)
        range_ = v - x.amin(1, keepdim=True)
        s = (range_ / v).where(v > 0, 0)
        wanted = (a * s + b).clamp_(0, 1)
        red = torch.tensor([0.0, 1.0, 1.0], device=x.device, dtype=x.dtype).view(3, 1, 1)
        share = torch.where(range_ > 0, (v - x) / range_, red)  # of the way from the value down to the smallest channel
        return quantize(v - share * (v * wanted))
