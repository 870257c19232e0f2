"""Frost (Hendrycks and Dietterich, ICLR 2019).

    x~ = clip(a x + b f, 0, 1)        f: a random crop of one of a few textures

The authors' textures are photographs. Here they are procedural, five of them and always the same: patches of needles, that is
white noise smoothed along a direction which changes from patch to patch, in five colours. The benchmark's numbers for frost
therefore do not carry over; with ``folder`` the crops come from photographs of your own, the authors' for example.

The tables are those of ``make_cifar_c.py`` and ``make_imagenet_c.py`` in github.com/hendrycks/robustness. For the CIFAR table
textures shrink to a fifth.

Differences from the authors' code: the textures; draws are seeded for each image; results are not saved as JPEG.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.image_ops import at_severity, in_chunks, luminance, quantize
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Corruption, UserError

A_B = {
    "cifar": ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "imagenet": ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
}
SHRINK = {"cifar": 0.2, "imagenet": 1.0}
SIDE, ANGLES = 500, 6
LOOKS = (  # red, green, blue and contrast, in levels; needle length and patch size in pixels
    ((80, 150, 165), 18, 30.0, 90.0),
    ((200, 205, 215), 22, 14.0, 45.0),
    ((195, 205, 215), 22, 22.0, 60.0),
    ((140, 152, 165), 29, 8.0, 70.0),
    ((112, 124, 135), 43, 12.0, 35.0),
)


def smooth(noise: Tensor, along: float, across: float, angle: float = 0.0) -> Tensor:
    """Noise (SIDE, SIDE) on a torus, averaged by a Gaussian ellipse of these half-axes in pixels; its variance is one."""
    fy, fx = torch.fft.fftfreq(SIDE)[:, None], torch.fft.rfftfreq(SIDE)
    a = torch.tensor(angle)
    u, v = fx * a.cos() + fy * a.sin(), fy * a.cos() - fx * a.sin()
    response = (-2 * torch.pi**2 * ((u * along).square() + (v * across).square())).exp()
    out = torch.fft.irfft2(torch.fft.rfft2(noise) * response, s=(SIDE, SIDE))
    return (out - out.mean()) / out.std()


@cache
def procedural(shrink: float) -> tuple[Tensor, ...]:
    """Five textures (3, side, side) in [0, 1] that continue across their borders."""
    if shrink < 1:
        return tuple(F.interpolate(t[None], scale_factor=shrink, mode="bilinear")[0] for t in procedural(1.0))
    textures = []
    for i, (colour, contrast, needle, patch) in enumerate(LOOKS):
        noise = Rng(0).child("frost texture", i).at(torch.arange(2 * ANGLES + 1)).normal((SIDE, SIDE))
        needles = torch.stack([smooth(noise[k], needle, 0.8, torch.pi * k / ANGLES) for k in range(ANGLES)])
        share = torch.stack([smooth(noise[ANGLES + k], patch / 2, patch / 2) for k in range(ANGLES)]).mul(6).softmax(0)
        pattern = (share * needles).sum(0).abs().sqrt() + 0.4 * smooth(noise[-1], patch, patch)
        grey = contrast * (pattern - pattern.mean()) / pattern.std()
        textures.append((torch.tensor(colour, dtype=torch.float32)[:, None, None] + grey).clamp(0, 255) / 255)
    return tuple(textures)


@cache
def photographs(folder: str, shrink: float) -> tuple[Tensor, ...]:
    """The PNG and JPEG images of a folder, (3, h, w) in [0, 1]."""
    from torchvision.io import ImageReadMode, decode_image

    paths = [p for p in sorted(Path(folder).glob("*")) if p.suffix.lower() in (".png", ".jpg", ".jpeg")]
    if not paths:
        raise UserError(f"frost: no .png, .jpg or .jpeg files in the folder '{folder}'")
    images = [decode_image(str(p), ImageReadMode.RGB).float()[None] / 255 for p in paths]
    return tuple(F.interpolate(i, scale_factor=shrink, mode="bilinear")[0] if shrink < 1 else i[0] for i in images)


def crop(texture: Tensor, size: tuple[int, int], at: list[float], torus: bool) -> Tensor:
    """A part of ``size``, its corner at shares ``at`` of the way; a texture that has a border and is too small is enlarged."""
    if not torus and (texture.shape[1] < size[0] or texture.shape[2] < size[1]):
        factor = max(size[0] / texture.shape[1], size[1] / texture.shape[2])
        wanted = [max(round(n * factor), m) for n, m in zip(texture.shape[1:], size, strict=True)]
        texture = F.interpolate(texture[None], size=wanted, mode="bilinear")[0]
    for dim in (1, 2):
        n, m = texture.shape[dim], size[dim - 1]
        first = int(at[dim - 1] * (n if torus else n - m + 1))
        texture = texture.index_select(dim, (torch.arange(m, device=texture.device) + first) % n)
    return texture


@register("frost", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261; textures: procedural, or a folder's")
class Frost(Corruption):
    """Ice crystals on a window; the textures are made by code unless a folder of photographs is given.

    Attributes:
        table: the severities of CIFAR-10-C (small images) or of ImageNet-C.
        folder: of photographs to crop the frost from; None makes textures.
    """

    table: Literal["cifar", "imagenet"] = "cifar"
    folder: str | None = None

    @in_chunks
    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        a, b = at_severity(A_B[self.table], severity)
        shrink, size = SHRINK[self.table], (x.shape[2], x.shape[3])
        textures = procedural(shrink) if self.folder is None else photographs(self.folder, shrink)
        places = rng.child("crop", severity).uniform((3,)).tolist()
        crops = [crop(textures[int(t * len(textures))], size, at, self.folder is None) for t, *at in places]
        f = torch.stack(crops).to(x.device)
        return quantize(a * x + b * (f if x.shape[1] == 3 else luminance(f)))
