"""Cutout: one square of each image is erased.

DeVries and Taylor 2017, arXiv:1708.04552, section 3.2: the centre is uniform over the pixels, so the square may reach over the
border. The authors erase after normalisation, that is, with the data's mean; images are in [0, 1] here, so ``fill`` is a field.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Classifier, Count, Fraction, Stage, Views


@register("cutout", cite="DeVries and Taylor 2017, arXiv:1708.04552")
class Cutout(Stage):
    """One square per image is erased, its centre uniform over the pixels.

    Attributes:
        on: the view that is read.
        to: the view that is written.
        size: side of the square in pixels; an odd one is centred on a pixel, an even one reaches one pixel further up and left.
        fill: the value that the erased pixels get, in [0, 1].
    """

    on: str = "clean"
    to: str = "clean"
    size: Count = 16
    fill: Fraction = 0.5

    def __call__(self, f: Classifier, views: Views, rng: Rng) -> Views:
        view = views[self.on]
        x, (h, w) = view.x, view.x.shape[2:]
        limits = torch.tensor([h, w], device=view.key.device)
        first = (rng.at(view.key).child("cutout").integers((2,), limits) - self.size // 2).to(x.device)
        i, j = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
        rows = (i >= first[:, :1]) & (i < first[:, :1] + self.size)
        cols = (j >= first[:, 1:]) & (j < first[:, 1:] + self.size)
        erased = (rows[:, :, None] & cols[:, None, :])[:, None]
        return {**views, self.to: replace(view, x=x.masked_fill(erased, self.fill))}
