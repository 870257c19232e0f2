"""Gradient alignment (GradAlign: Andriushchenko and Flammarion, NeurIPS 2020, arXiv:2007.02617), equation 4.

    lam * (1 - mean cos(g(x), g(x + eta))),     g = grad_x CE(f(x), y),     eta uniform in the ball of radius eps

A network that is locally linear has aligned gradients; where they turn, single-step attacks stop working. g(x) is a constant; the
gradient of the weights flows through g(x + eta), which is differentiated twice. The paper takes lam = 0.02 * 10^(eps / (8/255)),
which is 0.2 at 8/255; x + eta is not clamped to the pixel range.

Differences from the authors' code: where a gradient is zero the sample counts as aligned (theirs leaves it out of the mean, which
couples the batch); the pass at x + eta does not update BatchNorm's running statistics.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from robustlab.geometry import sample_ball, steepest
from robustlab.losses import cross_entropy
from robustlab.registry import register
from robustlab.types import Forward, NonNegative, Norm, Regularizer, Term, Terms, UserError, View, Views


@register("gradient-alignment", cite="Andriushchenko and Flammarion, NeurIPS 2020, arXiv:2007.02617")
class GradientAlignment(Regularizer):
    """One minus the cosine between the input gradients at the image and at a random point of its ball.

    Attributes:
        lam: weight of the term.
        reuse: take g(x) from what the attack left in the view ``adv``; right for one step from x itself. Where nothing was left, or
            without it, g(x) costs one more pass.
        clean, adv: the two views.
        norm, eps: the threat model; None takes the surrounding one.
    """

    double_backward = True

    lam: NonNegative = 0.2
    reuse: bool = False
    clean: str = "clean"
    adv: str = "adv"
    norm: Norm | None = None
    eps: NonNegative | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", self.reuse)

    def __call__(self, forward: Forward, views: Views) -> Terms:
        if self.norm is None or self.eps is None:
            raise UserError("gradient-alignment: no threat model; give norm and eps, for example norm: linf, eps: 8/255")
        view = views[self.clean]
        eta = sample_ball(view.x, self.norm, self.eps, forward.rng.child("gradient-alignment").at(view.key))
        g = views[self.adv].info.get("grad") if self.reuse else None
        g = input_gradient(forward, view, view.x, graph=False) if g is None else g
        g_eta = input_gradient(forward, view, view.x + eta, graph=True)
        cosine = (steepest(g, "l2") * steepest(g_eta, "l2")).flatten(1).sum(1)
        known = g.ne(0).flatten(1).any(1) & g_eta.ne(0).flatten(1).any(1)
        value = torch.where(known, 1 - cosine, torch.zeros_like(cosine))
        return {"gradient_alignment": Term(value, coef=self.lam, weight=view.weight)}


def input_gradient(forward: Forward, view: View, x: Tensor, *, graph: bool) -> Tensor:
    """The gradient of each sample's cross-entropy at ``x`` (N, C, H, W); with ``graph`` it can be differentiated itself."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = cross_entropy(forward(replace(view, x=x)), view.y)
        return torch.autograd.grad(value.sum(), x, create_graph=graph)[0]
