"""The inner maximisation as a stage: an attack turns one view into another."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Stage, Views


@register("craft")
class Craft(Stage):
    """Attacks the view ``on`` and stores the adversarial images, detached, as the view ``to``.

    The new view keeps the labels, tickets, weights and taps of the old one; its ``info`` is the attack's.

    Attributes:
        attack: the attack; its open norm and eps are those of the surrounding threat model.
        on, to: names of views.
        toward: what the attack's loss compares with: ``label``, the view's y; ``clean``, the probabilities softmax f(x),
            computed once. Their KL divergence has no gradient at x itself, so the attack has to start elsewhere.
    """

    crafts = True

    attack: Attack
    on: str = "clean"
    to: str = "adv"
    toward: Literal["label", "clean"] = "label"

    def __call__(self, f: Classifier, views: Views, rng: Rng) -> Views:
        view = views[self.on]
        y = view.y
        if self.toward == "clean":
            with torch.no_grad():
                y = f(view.x).to(view.x.dtype).softmax(-1)
        x_adv, info = self.attack.run(f, view.x, y, rng.at(view.key))
        return {**views, self.to: replace(view, x=x_adv.detach(), info=info)}
