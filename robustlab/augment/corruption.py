"""A common corruption as augmentation: x~ = corrupt(x, s) with probability p, s fixed or one of five.

Chances, severities and the corruption's own draws belong to a sample's ticket.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from annotated_types import Ge, Le

from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Classifier, Corruption, Fraction, Stage, Views


@register("corruption")
class Corrupted(Stage):
    """Corrupts a share of the images. Accuracy under the same corruption then says nothing about unseen ones.

    Attributes:
        on: the view that is read.
        to: the view that is written.
        corruption: its name, or its name and fields; its ``table`` sets the strength of the severities.
        severity: 1 (mild) to 5; None draws one for each image.
        probability: of an image to be corrupted at all.
    """

    on: str = "clean"
    to: str = "clean"
    corruption: Corruption
    severity: Annotated[int, Ge(1), Le(5)] | None = None
    probability: Fraction = 1.0

    def __call__(self, f: Classifier, views: Views, rng: Rng) -> Views:
        view = views[self.on]
        rng = rng.at(view.key.to(view.x.device)).child("corruption", self.corruption.name)
        chance, which = rng.child("chance").uniform((2,)).unbind(1)
        severity = (5 * which).long() + 1 if self.severity is None else torch.full_like(which, self.severity)
        severity = severity.where(chance < self.probability, 0)
        x = view.x.clone()
        for s in range(1, 6) if self.severity is None else (self.severity,):
            rows = (severity == s).nonzero().squeeze(1)
            if len(rows):
                x[rows] = self.corruption(view.x[rows], s, rng.select(rows)).to(x)
        return {**views, self.to: replace(view, x=x)}
