"""RandomMix: each batch is mixed by a method that is drawn for it (Liu et al., 2022).

    x~, y~ = mix_k(x, y),      k uniform over the methods

The paper draws among mixup, CutMix, ResizeMix and FMix; the last is not here.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from robustlab.mixing.cutmix import CutMix
from robustlab.mixing.mixup import Mixup
from robustlab.mixing.resize_mix import ResizeMix
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Classifier, Stage, Views


@register("random-mix", cite="Liu et al. 2022, arXiv:2205.08728")
class RandomMix(Stage):
    """Mixes each batch by one of several methods.

    Attributes:
        stages: the methods; their own ``on`` and ``to`` do not count.
        on: the view that is mixed.
        to: the name of the result.
    """

    coupled = True
    mixes = True

    stages: tuple[Stage, ...] = (Mixup(), CutMix(), ResizeMix())
    on: str = "clean"
    to: str = "clean"

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages: name at least one way to mix, for example mixup")

    def __call__(self, f: Classifier, views: Views, rng: Rng) -> Views:
        batch = rng.child("which").at(torch.tensor([rng.number]))
        k = int(batch.integers((), len(self.stages)))
        return replace(self.stages[k], on=self.on, to=self.to)(f, views, rng.child("stage", k))  # type: ignore[call-arg]
