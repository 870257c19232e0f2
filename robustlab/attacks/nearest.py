"""The nearest points that fool, per sample: what searches for the smallest perturbation offer their points to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustlab import geometry
from robustlab.attacks.steps import SampleLoss, fooled, objective


@dataclass
class Nearest:
    """The nearest fooling points so far.

    Attributes:
        x0: the images (N, C, H, W).
        z0: their logits (N, K).
        y: their class probabilities (N, K), or those of the class to reach.
        norm, targeted: of the attack.
        x: the points (N, C, H, W); where none was found the last point offered.
        distance: the norm of ``x - x0`` (N,); infinite where none was found.
    """

    x0: Tensor
    z0: Tensor
    y: Tensor
    norm: str
    targeted: bool
    x: Tensor
    distance: Tensor

    @classmethod
    def around(cls, x0: Tensor, z0: Tensor, y: Tensor, norm: str, targeted: bool) -> Nearest:
        return cls(x0, z0, y, norm, targeted, x0, torch.full((len(x0),), torch.inf, dtype=x0.dtype, device=x0.device))

    def offer(self, x: Tensor, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """Take in points in [0, 1] and their logits, for all samples or for some; returns whether they fool."""
        rows = torch.arange(len(self.x0), device=x.device) if rows is None else rows
        hit = fooled(z, self.y[rows], self.targeted)
        size = geometry.norm_of(x - self.x0[rows], self.norm)
        take = hit & (size < self.distance[rows])
        show = take | self.distance[rows].isinf()
        self.x = self.x.index_put((rows,), torch.where(wide(show), x, self.x[rows]))
        self.distance = self.distance.index_put((rows,), torch.where(take, size, self.distance[rows]))
        return hit

    @property
    def gap(self) -> SampleLoss:
        """Positive until the sample fools, a function of (logits, y): z_c - max_{k != c} z_k, or max_{k != t} z_k - z_t."""
        return objective("margin", targeted=not self.targeted)


def wide(values: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)
