"""CutMix: a box of each image is replaced by that of another, targets are mixed by area (Yun et al., ICCV 2019, section 3).

    x~_i = (1 - M) x_i + M x_j          M = 1 inside the box                         j = perm(i), a permutation of the batch
    y~_i = lam y_i + (1 - lam) y_j      lam = 1 - (area of the box) / (H W)

    the box   sides floor(sqrt(1 - l) H) and floor(sqrt(1 - l) W), rounded down to even, l ~ Beta(alpha, alpha); its centre is a
              uniform pixel; what reaches over the border is cut off, and lam is the share that really stays

alpha = 0 is the limit of Beta(alpha, alpha) that leaves every sample as it is (l = 1): no mixing. Before the attack (``on: clean``)
the adversary attacks the composed image, away from its mixed target (Rebuffi et al., arXiv:2103.01946).

Differences from the authors' code: none for ``scope="batch"``; ``scope="sample"`` draws one box for each sample. Theirs is applied
with probability 1/2 on CIFAR; adversarial training uses it on every batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Classifier, NonNegative, Stage, UserError, View, Views


@register("cutmix", cite="Yun, Han, Oh, Chun, Choe, Yoo, ICCV 2019, arXiv:1905.04899")
class CutMix(Stage):
    """Replaces a box of each image by the same box of another one; targets are mixed by area.

    The mixed view keeps its tickets, mixes the loss weights alike, and has no ``index``: a mixed row is no single sample of the
    data set. ``info`` holds ``lam`` (N,), ``partner`` (N,) and ``box`` (N, 4): top, bottom, left, right.

    Attributes:
        alpha: of l ~ Beta(alpha, alpha); 0 mixes nothing.
        scope: one box for the whole batch, or one for each sample.
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
        partner = rng.child("partner").permutation(len(view)).to(view.x.device)
        return {**views, self.to: pasted(view, self._box(view, rng), partner)}

    def _box(self, view: View, rng: Rng) -> Tensor:
        """Top, bottom, left, right (N, 4), int64; a batch-level draw is keyed by the micro-batch number."""
        tickets = view.key if self.scope == "sample" else torch.tensor([rng.number], device=view.key.device)
        size = torch.tensor(view.x.shape[2:], device=view.key.device)
        rng = rng.at(tickets)
        cut = (1 - rng.child("lam").beta((), self.alpha, self.alpha).double()).sqrt()
        half = (size * cut[:, None]).floor().long() // 2
        centre = rng.child("centre").integers((2,), size)
        first, end = (centre - half).clamp_min(0), torch.minimum(centre + half, size)
        return torch.stack([first, end], 2).flatten(1).expand(len(view), 4).to(view.x.device)


def pasted(view: View, box: Tensor, partner: Tensor) -> View:
    """Paste the partners' boxes (N, 4) into the images; targets and loss weights are mixed by area.

    Raises:
        UserError: the view carries taps, which belong to its own rows.
    """
    if view.taps:
        raise UserError(
            "a view with perturbed or mixed layers (slat, manifold-mixup) cannot be mixed: they belong to its rows; mix before"
        )
    h, w = view.x.shape[2:]
    rows, columns = torch.arange(h, device=box.device), torch.arange(w, device=box.device)
    tall = (rows >= box[:, :1]) & (rows < box[:, 1:2])
    wide = (columns >= box[:, 2:3]) & (columns < box[:, 3:])
    inside = tall[:, None, :, None] & wide[:, None, None, :]
    lam = 1 - (tall.sum(1) * wide.sum(1)).to(view.y.dtype) / (h * w)

    def mix(a: Tensor) -> Tensor:
        share = lam.view(-1, *[1] * (a.ndim - 1))
        return share * a + (1 - share) * a[partner]

    x = torch.where(inside, view.x[partner], view.x)
    weight = None if view.weight is None else mix(view.weight)
    return replace(view, x=x, y=mix(view.y), weight=weight, index=None, info={"lam": lam, "partner": partner, "box": box})
