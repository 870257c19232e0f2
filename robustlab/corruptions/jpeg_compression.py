"""JPEG compression (Hendrycks and Dietterich, ICLR 2019).

    x~ = decode(encode(x, quality))

The codec is Pillow's libjpeg-turbo, called once for each image on the CPU, in as many threads as torch has. What it rounds is part
of the benchmark, and its colour planes have half the resolution (4:2:0). Images on another device make the journey and come back.

Differences from the authors' code: none.
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
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

        quality = at_severity(QUALITY[self.table], severity)
        if len(x) == 0:
            return x.clone()
        levels = x.to("cpu", copy=True).movedim(1, -1).mul_(255).round_().to(torch.uint8)
        out = levels.contiguous().numpy()

        def compress(images: np.ndarray) -> None:
            for image in images:
                file, grey = io.BytesIO(), image.shape[-1] == 1
                Image.fromarray(image[..., 0] if grey else image).convert("RGB").save(file, "JPEG", quality=quality)
                with Image.open(file) as small:
                    image[:] = np.asarray(small.convert("L"))[..., None] if grey else np.asarray(small)

        parts = np.array_split(out, min(torch.get_num_threads(), len(out)))
        if len(parts) == 1:
            compress(out)
        else:
            with ThreadPoolExecutor(len(parts)) as pool:
                list(pool.map(compress, parts))
        return torch.from_numpy(out).movedim(-1, 1).contiguous().to(x.device).to(x.dtype).div_(255)
