"""A visible patch: every pixel of one square may take any value (Brown et al., 2017; located and optimised per image by PGD).

    M        the 0-1 mask of a square of s x s pixels
    x_{k+1}  = clamp(x_k + alpha M sign(g_k), 0, 1),     g_k = grad_x L(f(x_k), y),     x_0 = x outside, noise inside
    place    of the squares on a grid, those that hold the most of sum |grad_x L(f(x), y)|; each is tried in turn, the best is kept

The threat model is l0, which counts pixels over all channels: a patch of side s needs eps >= s^2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from robustlab.attacks.steps import LossName, Point, fooled, input_gradient, keep_better, objective, passes, put_better, threat_of
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, NonNegative, Norm, Positive


@register("patch", cite="Brown, Mane, Roy, Abadi, Gilmer, 2017, arXiv:1712.09665")
class Patch(Attack):
    """PGD on a square patch, at the places of largest gradient; the pixels of the patch may take any value in [0, 1].

    Costs at most 1 + ``positions`` (``steps`` + 1) forward and 1 + ``positions`` * ``steps`` backward passes per sample; a sample
    that is fooled is tried at no further place. ``info``: ``corner`` (N, 2), row and column of the patch returned.

    Attributes:
        norm, eps: l0; the number of pixels that may change. None takes the surrounding one.
        size: side of the patch in pixels; None: the largest that eps allows.
        steps: per place.
        step: alpha, in pixel units.
        positions: places tried.
        stride: of the grid of places, in pixels; None: half the side.
        loss: ``ce``, ``dlr`` (three classes or more), ``margin``, ``kl``.
        targeted: y is the class to reach.
    """

    norms = ("l0",)

    norm: Norm | None = None
    eps: NonNegative | None = None
    size: Count | None = None
    steps: Count = 40
    step: Positive = 0.1
    positions: Count = 4
    stride: Count | None = None
    loss: LossName = "ce"
    targeted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None and isinstance(self.eps, int | float) and 0 < self.eps < self.size**2:
            raise ValueError(
                f"size: a patch of {self.size} x {self.size} changes {self.size**2} pixels, more than eps = {self.eps:g}"
            )

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        _, eps = threat_of(self)
        x = x.detach()
        side = min(self.size or math.isqrt(int(eps)), *x.shape[2:]) if eps >= 1 else 0
        if side == 0:
            return x.clone(), {"passes": passes(x, 0, 0), "corner": x.new_zeros(len(x), 2, dtype=torch.long)}
        g, value, z = input_gradient(f, x, y, objective(self.loss, self.targeted))
        corners = self._places(g, side)
        found, corner, cost = Point(x.clone(), value, fooled(z, y, self.targeted)), corners[:, 0].clone(), passes(x, 1, 1)
        for i in range(corners.shape[1]):
            rows = (~found.fooled).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            before, start = found.x[rows], rng.select(rows).child("place", i)
            put_better(found, rows, self._climb(f, x[rows], y[rows], _mask(x[rows], corners[rows, i], side), start))
            changed = (found.x[rows] != before).flatten(1).any(1, keepdim=True)
            corner[rows] = torch.where(changed, corners[rows, i], corner[rows])
            cost[rows] += torch.tensor([self.steps + 1, self.steps], device=x.device)
        return found.x, {"grad": g, "passes": cost, "corner": corner}

    def _places(self, g: Tensor, side: int) -> Tensor:
        """Upper left corners (N, P, 2) of the squares that hold the most gradient, the most first."""
        stride = self.stride or max(1, side // 2)
        mass = avg_pool2d(g.abs().sum(1, keepdim=True), side, stride).squeeze(1)
        order = mass.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, : self.positions]
        return torch.stack([order // mass.shape[2], order % mass.shape[2]], 2) * stride

    def _climb(self, f: Classifier, x: Tensor, y: Tensor, mask: Tensor, rng: Rng) -> Point:
        """PGD inside the mask; the best of all its points."""
        loss, best = objective(self.loss, self.targeted), None
        x_k = torch.where(mask, rng.uniform(x.shape[1:], dtype=x.dtype), x)
        for _ in range(self.steps):
            g, value, z = input_gradient(f, x_k, y, loss)
            best = keep_better(best, Point(x_k, value, fooled(z, y, self.targeted)))
            x_k = torch.where(mask, (x_k + self.step * g.sign()).clamp(0, 1), x)
        with torch.no_grad():
            z = f(x_k).to(x.dtype)
        return keep_better(best, Point(x_k, loss(z, y), fooled(z, y, self.targeted)))


def _mask(x: Tensor, corner: Tensor, side: int) -> Tensor:
    """(N, 1, H, W), True inside the squares."""
    row, column = (torch.arange(n, device=x.device) for n in x.shape[2:])
    inside = [
        (line >= first[:, None]) & (line < first[:, None] + side) for line, first in zip((row, column), corner.T, strict=True)
    ]
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
