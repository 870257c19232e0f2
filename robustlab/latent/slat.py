"""Single-step latent adversarial training, SLAT (Park and Lee, ICCV 2021): one backward pass perturbs the image and layers inside.

    g_0, g_k  = gradients of CE(f(x), y) with respect to the image and to the outputs h_k of the layers: one backward pass
    x'        = argmax { <g_0, x' - x> : ||x' - x||_p <= alpha_0 eps, x' in [0, 1] }         linf: a sign step
    h_k'      = clamp(h_k + clamp(alpha_k eta sign(g_k), -eta, eta), min h_k, max h_k)       over each sample's channel

All are applied together in the next forward of the view, where h_k is what the perturbed layers before it make of x'. The
gradient of the weights goes through h_k as if the perturbation were a constant.

    eps     radius of the image's perturbation, of the threat model
    eta     radius in the units of the layers; nothing normalises them, so it has to be tuned with the net
    alpha   steps as shares of the radii: 0.9 for the image and 1.8, which the clamp cuts to 1, for layers

Differences from the authors' code: theirs knows feature maps (N, C, H, W); here tokens (N, T, C) have their channels in the last
dimension, and a vector (N, D) is one channel. Theirs perturbs the outputs of the first convolution and of the first block of a
WideResNet, ``("conv1", "block1")``, with eta = eps = 8/255.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from robustlab import geometry, losses
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.taps import tapped
from robustlab.types import Classifier, NonNegative, Norm, Positive, Stage, Tap, UserError, View, Views


@register("slat", cite="Park, Lee, ICCV 2021, arXiv:2104.01575")
class SLAT(Stage):
    """Perturbs the image and the outputs of layers by one sign step each, from one forward and one backward pass.

    The new view carries the perturbed images and one tap for each layer; its ``info`` has ``grad``, the gradient at the image.
    Without layers it is FGSM with the share ``alpha`` of the radius.

    Attributes:
        on, to: names of views.
        sites: names of layers (a unique dotted suffix is enough), or ``features``. Each has to run once in a forward pass.
        eta: radius of the layers' perturbations, in their own units.
        alpha: step at the image, as a share of eps; more than 1 is 1.
        latent_alpha: step at the layers, as a share of eta; more than 1 is 1.
        norm, eps: the threat model for the image; None takes the surrounding one.
    """

    taps = True
    crafts = True

    on: str = "clean"
    to: str = "adv"
    sites: tuple[str, ...] = ()
    eta: NonNegative = 8 / 255
    alpha: Positive = 0.9
    latent_alpha: Positive = 1.8
    norm: Norm | None = None
    eps: NonNegative | None = None

    def __post_init__(self) -> None:
        if "input" in self.sites:
            raise ValueError("slat: the image is perturbed anyway, within eps; name only layers in sites")
        if len(set(self.sites)) < len(self.sites):
            raise ValueError(f"slat: a layer stands twice in sites: {', '.join(self.sites)}")

    def __call__(self, f: Classifier, views: Views, rng: Rng) -> Views:
        if self.norm is None or self.eps is None:
            raise ValueError("slat: no threat model; give norm and eps, for example norm='linf', eps=8/255")
        view = views[self.on]
        g, latent = gradients(f, view, self.sites)
        x_adv = geometry.linear_max(g, view.x, self.norm, min(self.alpha, 1.0) * self.eps)
        size = min(self.latent_alpha, 1.0) * self.eta
        taps = tuple(Tap(site, adding(size * latent[site].sign())) for site in self.sites)
        return {**views, self.to: replace(view, x=x_adv, taps=(*view.taps, *taps), info={"grad": g})}


def gradients(f: Classifier, view: View, sites: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradients of each sample's cross-entropy at its image (N, C, H, W) and at the outputs of layers, by one backward pass.

    Raises:
        UserError: no such layer (the line lists them all), or one that does not run exactly once or does not return a tensor.
    """
    seen: dict[str, list[Tensor]] = {site: [] for site in sites}

    def keep(site: str) -> Callable[[Tensor], Tensor]:
        def fn(h: Tensor) -> Tensor:
            if not isinstance(h, Tensor):
                raise UserError(f"slat: the layer '{site}' returns a {type(h).__name__}, not a tensor; name a layer inside")
            seen[site].append(h.clone())  # what follows may work in place
            return seen[site][-1].clone()

        return fn

    with torch.enable_grad(), tapped(f, (*view.taps, *(Tap(site, keep(site)) for site in sites))):
        x = view.x.detach().requires_grad_()
        value = losses.cross_entropy(f(x).to(x.dtype), view.y)
    for site, outputs in seen.items():
        if len(outputs) != 1:
            raise UserError(f"slat: the layer '{site}' runs {len(outputs)} times in a forward pass; name one that runs once")
    g, *latent = torch.autograd.grad(value.sum(), [x, *(outputs[0] for outputs in seen.values())], materialize_grads=True)
    return g.nan_to_num(), {site: h.nan_to_num() for site, h in zip(seen, latent, strict=True)}


def adding(delta: Tensor) -> Callable[[Tensor], Tensor]:
    """A tap function h -> h + delta that stays within the range of each sample's channel of h."""

    def fn(h: Tensor) -> Tensor:
        with torch.no_grad():
            dims = {2: (1,), 3: (1,)}.get(h.ndim, tuple(range(2, h.ndim)))
            change = (h + delta).clamp(h.amin(dims, keepdim=True), h.amax(dims, keepdim=True)) - h
        return h + change

    return fn
