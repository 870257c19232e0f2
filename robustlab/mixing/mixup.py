"""mixup: convex combinations of pairs of samples and of their targets (Zhang et al., ICLR 2018, equation 1).

    x~_i = lam x_i + (1 - lam) x_j        lam ~ Beta(alpha, alpha)
    y~_i = lam y_i + (1 - lam) y_j        j = perm(i), a uniform permutation of the batch

alpha = 0 is the limit of Beta(alpha, alpha) that leaves every sample as it is (lam = 1): no mixing.
Used before the attack (``on: clean``) the adversary attacks the mixed sample under its mixed target; used after it
(``on: adv, to: adv``) adversarial samples are mixed, as in interpolated adversarial training (Lamb et al., AISec 2019).

Differences from the authors' code: none for ``scope="batch"``; ``scope="sample"`` draws one lam for each sample.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Classifier, NonNegative, Stage, View, Views


@register("mixup", cite="Zhang, Cisse, Dauphin, Lopez-Paz, ICLR 2018, arXiv:1710.09412")
class Mixup(Stage):
    """Trains on convex combinations of pairs of images and of their targets.

    The mixed view keeps its tickets (draws go on being keyed by the first partner), mixes the loss weights alike, and has no
    ``index``: a mixed row is no single sample of the data set. ``info`` holds ``lam`` (N,) and ``partner`` (N,).

    Attributes:
        alpha: of lam ~ Beta(alpha, alpha); 0 mixes nothing.
        scope: one lam for the whole batch, or one for each sample.
        on: the view that is mixed.
        to: the name of the result.
    """

    coupled = True
    mixes = True

    alpha: NonNegative = 1.0
    scope: Literal["batch", "sample"] = "batch"
    on: str = "clean"
    to: str = "clean"

    def __call__(self, f: Classifier, views: Views, rng: Rng) -> Views:
        view = views[self.on]
        if self.alpha == 0:
            return {**views, self.to: view}
        lam = self._lam(view, rng)
        partner = rng.child("partner").permutation(len(view)).to(view.x.device)
        return {**views, self.to: mixed(view, lam, partner)}

    def _lam(self, view: View, rng: Rng) -> Tensor:
        """The share of the first partner, (N,) in [0, 1]; a batch-level draw is keyed by the micro-batch number."""
        tickets = view.key if self.scope == "sample" else torch.tensor([rng.number], device=view.key.device)
        return rng.child("lam").at(tickets).beta((), self.alpha, self.alpha).expand(len(view))


def mixed(view: View, lam: Tensor, partner: Tensor) -> View:
    """Mix every sample with its partner: images, targets and loss weights; ``lam`` (N,) is the share of the first."""

    def mix(a: Tensor) -> Tensor:
        share = lam.to(a.dtype).view(-1, *[1] * (a.ndim - 1))
        return share * a + (1 - share) * a[partner]

    weight = None if view.weight is None else mix(view.weight)
    return replace(view, x=mix(view.x), y=mix(view.y), weight=weight, index=None, info={"lam": lam, "partner": partner})
