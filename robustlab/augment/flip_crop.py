"""Random crop after zero padding, then a horizontal flip: the usual augmentation of small images.

    x'[c, i, j] = x[c, i + a - p, j' + b - p],   j' = j or W - 1 - j,   0 outside the image

a, b: uniform in 0 .. 2p; the flip has probability 1/2; drawn for each sample by its ticket.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Classifier, Stage, Views, Whole


@register("flip-crop")
class FlipCrop(Stage):
    """Random crop after zero padding, and a random horizontal flip, for each sample.

    Attributes:
        on: the view that is read.
        to: the view that is written.
        padding: pixels added on each side before the crop; 0 does not crop.
        flip: whether half of the samples are mirrored.
    """

    on: str = "clean"
    to: str = "clean"
    padding: Whole = 4
    flip: bool = True

    def __call__(self, f: Classifier, views: Views, rng: Rng) -> Views:
        view = views[self.on]
        (n, channels, h, w), x = view.x.shape, view.x
        rng = rng.at(view.key)
        shift = rng.child("crop").integers((2,), 2 * self.padding + 1).to(x.device) - self.padding
        mirror = (rng.child("flip").bits(()) & 1).bool().to(x.device) & self.flip
        j = torch.arange(w, device=x.device).expand(n, w)
        rows = torch.arange(h, device=x.device) + shift[:, :1]
        cols = torch.where(mirror[:, None], w - 1 - j, j) + shift[:, 1:]
        inside = ((rows >= 0) & (rows < h))[:, None, :, None] & ((cols >= 0) & (cols < w))[:, None, None, :]
        sample = torch.arange(n, device=x.device)[:, None, None, None]
        channel = torch.arange(channels, device=x.device)[None, :, None, None]
        moved = x[sample, channel, rows.clamp(0, h - 1)[:, None, :, None], cols.clamp(0, w - 1)[:, None, None, :]]
        return {**views, self.to: replace(view, x=torch.where(inside, moved, torch.zeros_like(moved)))}
