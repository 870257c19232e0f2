"""JPEG compression (Hendrycks and Dietterich, ICLR 2019).

    x~ = decode(encode(x, quality))

The codec is libjpeg-turbo, called once for each image on the CPU. What it rounds is part of the benchmark, and its colour
planes have half the resolution (4:2:0). torchvision's binding takes and gives planes, which is faster than Pillow's; it is going to
be removed there, and Pillow's gives the same levels. Images on another device make the journey and come back.

Differences from the authors' code: none.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from robustlab.image_ops import at_severity
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption

QUALITY = {"cifar": (80, 65, 58, 50, 40), "imagenet": (25, 18, 15, 10, 7)}


@register("jpeg_compression", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class JpegCompression(Corruption):
    """Saves the image as a JPEG file of low quality.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        quality, compress = at_severity(QUALITY[self.table], severity), codec()
        out = torch.empty_like(x, device="cpu", memory_format=torch.contiguous_format)
        for image, place in zip(x.cpu(), out, strict=True):  # one at a time, in the cache
            place.copy_(compress(image.mul(255).round_().to(torch.uint8), quality)).div_(255)
        return out.to(x.device)


def codec() -> Callable[[Tensor, int], Tensor]:
    """A function of levels (C, H, W), uint8, and a quality: the levels after compression."""
    try:
        from torchvision.io import decode_jpeg, encode_jpeg
    except ImportError:
        return by_pillow

    def by_torchvision(levels: Tensor, quality: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return decode_jpeg(encode_jpeg(levels, quality))

    return by_torchvision


def by_pillow(levels: Tensor, quality: int) -> Tensor:
    from PIL import Image

    file, grey = io.BytesIO(), len(levels) == 1
    Image.fromarray(levels[0].numpy() if grey else levels.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=quality)
    with Image.open(file) as small:
        decoded = torch.from_numpy(np.array(small))
    return decoded[None] if grey else decoded.permute(2, 0, 1)
