"""JPEG compression (Hendrycks and Dietterich, ICLR 2019).

    x~ = decode(encode(x, quality))

The codec is Pillow's libjpeg-turbo, called once for each image on the CPU. What it rounds is part of the benchmark, and its colour
planes have half the resolution (4:2:0). Images on another device make the journey and come back. Two threads are slower than one.

Differences from the authors' code: none.
"""

from __future__ import annotations

import io
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
        from PIL import Image
        from PIL.JpegImagePlugin import JpegImageFile

        quality = at_severity(QUALITY[self.table], severity)
        if len(x) == 0:
            return x.clone()
        out, size = torch.empty_like(x, device="cpu", memory_format=torch.contiguous_format), (x.shape[3], x.shape[2])
        for image, place in zip(x.cpu(), out, strict=True):  # one at a time, in the cache
            lines = image.mul(255).round_().to(torch.uint8).transpose(0, 1).contiguous()  # (H, C, W): Pillow's mode RGB;L
            file, grey = io.BytesIO(), len(image) == 1
            layout = ("L", size, lines.numpy().data, "raw", "L") if grey else ("RGB", size, lines.numpy().data, "raw", "RGB;L")
            picture = Image.frombuffer(*layout, 0, 1)
            (picture.convert("RGB") if grey else picture).save(file, "JPEG", quality=quality)
            file.seek(0)
            with JpegImageFile(file) as small:
                decoded = np.array(small.convert("L"))[..., None] if grey else np.array(small)
            place.copy_(torch.from_numpy(decoded).permute(2, 0, 1)).div_(255)
        return out.to(x.device)
