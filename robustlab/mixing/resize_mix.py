"""ResizeMix: another image, made small, is pasted into each image; targets are mixed by area (Qin et al., 2020).

    x~_i = (1 - M) x_i + M resized(x_j)      M = 1 inside a box of sides floor(tau H), floor(tau W), anywhere within the image
    y~_i = lam y_i + (1 - lam) y_j           lam = 1 - (area of the box) / (H W),  tau ~ U(low, high)

The whole of the partner stays visible, where CutMix may cut its object away. high = 0 mixes nothing.
Differences from the authors' code: the small image is filtered before it is sampled.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Classifier, Fraction, Stage, Views


@register("resize-mix", cite="Qin et al. 2020, arXiv:2012.11101")
class ResizeMix(Stage):
    """Pastes a small version of another image into each image; targets are mixed by area.

    One size, one place and one permutation for the batch. The mixed view keeps its tickets and mixes the loss weights alike; it
    has no ``index``. ``info`` holds ``lam`` (N,) and ``partner`` (N,).

    Attributes:
        low, high: of the side of the pasted image, as a share of the image's.
        on: the view that is mixed.
        to: the name of the result.
    """

    coupled = True
    mixes = True

    low: Fraction = 0.1
    high: Fraction = 0.8
    on: str = "clean"
    to: str = "clean"

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low must not be above high, got {self.low} and {self.high}")

    def __call__(self, f: Classifier, views: Views, rng: Rng) -> Views:
        view = views[self.on]
        h, w = view.x.shape[2:]
        batch = rng.at(torch.tensor([rng.number]))
        tau = float(batch.child("tau").uniform((), self.low, self.high))
        tall, wide = int(tau * h), int(tau * w)
        if tall * wide == 0:
            return {**views, self.to: view}
        top, left = (int(batch.child(axis).integers((), free + 1)) for axis, free in (("top", h - tall), ("left", w - wide)))
        partner = rng.child("partner").permutation(len(view)).to(view.x.device)
        x = view.x.clone()
        small = F.interpolate(view.x[partner], (tall, wide), mode="bilinear", antialias=True)
        x[:, :, top : top + tall, left : left + wide] = small.clamp(0, 1)
        lam = 1 - tall * wide / (h * w)

        def mix(a: Tensor) -> Tensor:
            return lam * a + (1 - lam) * a[partner]

        weight = None if view.weight is None else mix(view.weight)
        info = {"lam": torch.full((len(view),), lam, device=x.device), "partner": partner}
        return {**views, self.to: replace(view, x=x, y=mix(view.y), weight=weight, index=None, info=info)}
