"""The loss around an image and around the weights.

    input     L(clamp(x + a s + b r)),  s = sign of the input gradient, r a random sign pattern;  a, b in [-radius, radius]
    weights   L(w + a d) under attack,  d random, each filter scaled to its weights: d_j = d_j ||w_j|| / ||d_j||
              (Li, Xu, Taylor, Studer, Goldstein, NeurIPS 2018, section 4); parameters with one dimension (biases, normalisation)
              do not move; adversarial images are made again at every a, as Wu, Xia, Wang (NeurIPS 2020, figure 1) do

Both are means over the images. A flat landscape is no proof of anything; a jagged one around images is a sign of masked gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustlab import geometry, losses
from robustlab.modes import bn_mode, frozen, perturbed
from robustlab.rng import Rng
from robustlab.types import Attack, one_hot


def input_landscape(f: nn.Module, x: Tensor, labels: Tensor, radius: float, points: int, rng: Rng) -> Tensor:
    """Mean cross-entropy on a grid around images.

    Args:
        f: the classifier.
        x, labels: images (n, C, H, W) and classes (n,).
        radius: how far to go along each direction, in pixel units.
        points: of the grid, along each side.
        rng: draws the random direction of each image.

    Returns:
        (points, points): rows go along the gradient's sign, columns along the random one, both from -radius to radius.
    """
    with frozen(f), bn_mode(f, "eval"):
        z = f(x.requires_grad_())
        y = one_hot(labels, z.shape[1], x.dtype)
        (g,) = torch.autograd.grad(losses.cross_entropy(z, y).sum(), x)
        x = x.detach()
        r = torch.where(rng.at(torch.arange(len(x), device=x.device)).uniform(x.shape[1:]) < 0.5, -1.0, 1.0).to(x)
        steps = torch.linspace(-radius, radius, points)
        with torch.no_grad():
            rows = [[_mean(f, (x + a * g.sign() + b * r).clamp(0, 1), y) for b in steps.tolist()] for a in steps.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def weight_landscape(
    f: nn.Module, x: Tensor, labels: Tensor, num_classes: int, attack: Attack, alphas: Sequence[float], rng: Rng
) -> dict[str, list[float]]:
    """Mean cross-entropy, clean and under attack, along one filter-normalised random direction of the weights.

    Args:
        f: the classifier; its weights are as before afterwards, bit for bit.
        x, labels, num_classes: images (n, C, H, W), classes (n,), K.
        attack: made anew at every point; its norm and eps are set.
        alphas: the points, in units of the filters' norms.
        rng: draws the direction, and the attack's starts.
    """
    y = one_hot(labels, num_classes, x.dtype)
    leaves = [p for p in f.parameters() if p.ndim > 1]
    direction = filter_normalised(leaves, rng.child("direction"))
    found: dict[str, list[float]] = {"alpha": list(alphas), "clean": [], "adversarial": []}
    starts = rng.child("attack").at(torch.arange(len(x), device=x.device))
    with frozen(f), bn_mode(f, "eval"):
        for a in alphas:
            with perturbed(leaves, [a * d for d in direction]):
                with torch.enable_grad():
                    x_adv, _ = attack.run(f, x, y, starts)
                with torch.no_grad():
                    found["clean"].append(_mean(f, x, y))
                    found["adversarial"].append(_mean(f, x_adv.detach(), y))
    return found


def filter_normalised(weights: Sequence[Tensor], rng: Rng) -> list[Tensor]:
    """A normal draw for each weight tensor (m, ...), each of its m filters scaled to the norm of that filter."""
    out = []
    for i, w in enumerate(weights):
        d = torch.randn(w.shape, generator=rng.child("tensor", i).batch(), dtype=torch.float64).to(w)
        size = geometry.norm_of(w.detach().flatten(1), "l2") / geometry.norm_of(d.flatten(1), "l2").clamp_min(1e-12)
        out.append(d * size.view(-1, *[1] * (w.ndim - 1)))
    return out


def _mean(f: Any, x: Tensor, y: Tensor) -> float:
    return float(losses.cross_entropy(f(x), y).mean())
