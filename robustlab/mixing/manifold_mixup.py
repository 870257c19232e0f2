"""Manifold mixup: convex combinations of pairs of samples at a layer that is drawn for each batch (Verma et al., ICML 2019).

    k ~ uniform over the sites        lam ~ Beta(alpha, alpha)        j = perm(i), a uniform permutation of the batch
    h_k(x_i) <- lam h_k(x_i) + (1 - lam) h_k(x_j)
    y~_i      = lam y_i + (1 - lam) y_j

At the site ``input`` this is mixup. Elsewhere the new view has the old images and a tap, which mixes whatever the layer gives in
any later forward of the view: one draw serves all evaluations of the loss. alpha = 0 mixes nothing.

Differences from the authors' code: theirs trains with the binary cross-entropy of the softmax against the mixed targets, a
trainer here with its own objective. Theirs mixes the images and what the first two blocks of a PreAct-ResNet give, which is
``("input", "layer1", "layer2")``, with alpha = 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from robustlab.mixing.mixup import mixed
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.taps import find_layer
from robustlab.types import Classifier, NonNegative, Stage, Tap, UserError, Views


@register("manifold-mixup", cite="Verma et al., ICML 2019, arXiv:1806.05236")
class ManifoldMixup(Stage):
    """Trains on convex combinations of pairs of samples, taken at the images or at a layer inside.

    The mixed view keeps its tickets and mixes the loss weights alike; it has no ``index``.

    Attributes:
        alpha: of lam ~ Beta(alpha, alpha); 0 mixes nothing.
        sites: where: ``input``, ``features`` (what the last linear layer is given), ``stem`` (the first convolution), or names of
            layers (a unique dotted suffix is enough). One is drawn for each batch.
        on: the view that is mixed.
        to: the name of the result.
    """

    coupled = True
    mixes = True
    taps = True

    alpha: NonNegative = 2.0
    sites: tuple[str, ...] = ("input", "features")
    on: str = "clean"
    to: str = "clean"

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError("sites: name at least one place to mix at, for example input")

    def __call__(self, f: Classifier, views: Views, rng: Rng) -> Views:
        view = views[self.on]
        if self.alpha == 0:
            return {**views, self.to: view}
        batch = torch.tensor([rng.number], device=view.key.device)
        site = self.sites[int(rng.child("site").at(batch).integers((), len(self.sites)))]
        lam = rng.child("lam").at(batch).beta((), self.alpha, self.alpha).expand(len(view))
        partner = rng.child("partner").permutation(len(view)).to(view.x.device)
        mix = mixed(view, lam, partner)
        if site != "input":
            check_site(f, site)
            mix = replace(mix, x=view.x, taps=(Tap(site, combining(lam, partner)),))
        return {**views, self.to: mix}


def check_site(f: Classifier, site: str) -> None:
    """Raise ``UserError`` here, where the stage can be named, rather than in the loss."""
    model = getattr(f, "module", f)
    if not isinstance(model, torch.nn.Module):
        raise UserError("manifold-mixup: needs a torch.nn.Module; this classifier is a plain callable")
    find_layer(model, site)


def combining(lam: Tensor, partner: Tensor) -> Callable[[Tensor], Tensor]:
    """A tap function h -> lam h + (1 - lam) h[partner], row by row."""

    def fn(h: Tensor) -> Tensor:
        share = lam.to(h.dtype).view(-1, *[1] * (h.ndim - 1))
        return share * h + (1 - share) * h[partner]

    return fn
