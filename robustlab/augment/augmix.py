"""AugMix: a random mixture of chains of simple operations, mixed with the image itself (Hendrycks et al., ICLR 2020), algorithm 1.

    x_aug  = m x + (1 - m) sum_c d_c chain_c(x)        d ~ Dirichlet(1, .., 1),  m ~ Beta(1, 1)
    chain  = 1 to ``depth`` operations, each uniform among nine, of a strength l ~ U(0.1, severity)

    autocontrast, equalize                      per channel
    posterize, solarize                         to 4 - floor(0.4 l) bits; levels from 256 - floor(25.6 l) upwards are inverted
    rotate, shear x, shear y                    by 3 l degrees about the centre, 0.03 l, 0.03 l about the corner, either way
    translate x, translate y                    by floor(l / 30 of the side) pixels, either way

None of the nine is among the corruptions of the benchmark of Hendrycks and Dietterich. Pixels that come from outside are black.
The consistency loss of the paper is no part of this stage.

Differences from the authors' code: rotation interpolates, where theirs takes the nearest pixel; images are on the grid of 8 bits
before autocontrast, equalize, posterize and solarize only, where theirs rounds after every operation.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Annotated, Classifier, Count, Ge, Le, Stage, Views

GEOMETRIC = 5  # the last five operations are affine


@register("augmix", cite="Hendrycks et al., ICLR 2020, arXiv:1912.02781")
class AugMix(Stage):
    """Mixes each image with randomly distorted versions of itself; drawn for each sample.

    Attributes:
        on: the view that is read.
        to: the view that is written.
        severity: the largest strength, 0 to 10; 0 still has autocontrast and equalize.
        width: number of chains.
        depth: the most operations in a chain.
    """

    on: str = "clean"
    to: str = "clean"
    severity: Annotated[float, Ge(0), Le(10)] = 3.0
    width: Count = 3
    depth: Count = 3

    def __call__(self, f: Classifier, views: Views, rng: Rng) -> Views:
        view = views[self.on]
        rng = rng.at(view.key).child("augmix")
        share = rng.child("dirichlet").gamma((self.width,), 1.0).to(view.x)
        share = share / share.sum(1, keepdim=True)
        m = rng.child("beta").beta((), 1.0, 1.0).to(view.x)[:, None, None, None]
        chains = [self._chain(view.x, rng.child("chain", c)) for c in range(self.width)]
        mixture = sum(share[:, c, None, None, None] * chain for c, chain in enumerate(chains))
        return {**views, self.to: replace(view, x=(m * view.x + (1 - m) * mixture).clamp(0, 1))}

    def _chain(self, x: Tensor, rng: Rng) -> Tensor:
        length = 1 + rng.child("length").integers((), self.depth)
        which = rng.child("which").integers((self.depth,), len(COLOUR) + GEOMETRIC)
        least = min(0.1, self.severity)
        strength = rng.child("strength").uniform((self.depth,), least, self.severity, torch.float64)
        sign = 1 - 2 * (rng.child("sign").bits((self.depth,)) & 1).to(strength)
        for step in range(self.depth):
            now = torch.where(step < length, which[:, step], -1)
            x = operate(x, now.to(x.device), strength[:, step].to(x.device), sign[:, step].to(x.device))
        return x


def operate(x: Tensor, which: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """One operation for each image: ``which`` (N,), -1 for none; ``strength`` (N,) in 0 .. 10; ``sign`` (N,) +-1."""
    out = x.clone()
    for k, operation in enumerate(COLOUR):
        rows = (which == k).nonzero().squeeze(1)
        if len(rows):
            levels = (x[rows] * 255).round()
            out[rows] = (operation(levels, strength[rows]) / 255).to(x.dtype)
    rows = (which >= len(COLOUR)).nonzero().squeeze(1)
    if len(rows):
        out[rows] = affine(x[rows], which[rows] - len(COLOUR), strength[rows], sign[rows])
    return out


def autocontrast(levels: Tensor, strength: Tensor) -> Tensor:
    """Each channel is stretched over 0 .. 255; one of a single level stays."""
    low, high = levels.amin((2, 3), keepdim=True), levels.amax((2, 3), keepdim=True)
    return torch.where(high > low, ((levels - low) * 255 / (high - low).clamp_min(1)).floor(), levels)


def equalize(levels: Tensor, strength: Tensor) -> Tensor:
    """Each channel's histogram is made flat, as Pillow does it; one of a single level stays."""
    flat = levels.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.long, device=levels.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    last = counts.gather(2, flat.amax(2, keepdim=True))
    step = (counts.sum(2, keepdim=True) - last) // 255
    table = ((step // 2 + counts.cumsum(2) - counts) // step.clamp_min(1)).clamp(0, 255)
    out = torch.where(step > 0, table.gather(2, flat), flat)
    return out.view(levels.shape).to(levels.dtype)


def posterize(levels: Tensor, strength: Tensor) -> Tensor:
    """The highest 4 - floor(0.4 strength) bits of each level."""
    size = torch.exp2(4 + (0.4 * strength).floor()).to(levels.dtype)[:, None, None, None]
    return (levels / size).floor() * size


def solarize(levels: Tensor, strength: Tensor) -> Tensor:
    """Levels from 256 - floor(25.6 strength) upwards are inverted."""
    threshold = (256 - (25.6 * strength).floor()).to(levels.dtype)[:, None, None, None]
    return torch.where(levels < threshold, levels, 255 - levels)


COLOUR = (autocontrast, equalize, posterize, solarize)


def affine(x: Tensor, which: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Rotation (0), shear in x and y (1, 2), translation in x and y (3, 4); bilinear, black outside."""
    h, w = x.shape[2:]
    angle = torch.where(which == 0, sign * strength * 3 * math.pi / 180, 0.0)
    shear_x, shear_y = (torch.where(which == k, sign * strength * 0.03, 0.0) for k in (1, 2))
    by_x, by_y = (torch.where(which == k, sign * (strength * side / 30).floor(), 0.0) for k, side in ((3, w), (4, h)))
    i, j = (torch.arange(side, device=x.device, dtype=strength.dtype) + 0.5 for side in (h, w))
    y_c, x_c = i[:, None] - h / 2, j[None, :] - w / 2
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    x_in = cos * x_c - sin * y_c + w / 2 + shear_x[:, None, None] * i[:, None] + by_x[:, None, None]
    y_in = cos * y_c + sin * x_c + h / 2 + shear_y[:, None, None] * j[None, :] + by_y[:, None, None]
    grid = torch.stack([2 * x_in / w - 1, 2 * y_in / h - 1], -1).to(x.dtype)
    return F.grid_sample(x, grid, align_corners=False)
