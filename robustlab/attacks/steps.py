"""What gradient attacks share: the losses they climb, the input gradient, and the bookkeeping of the best point.

Every function acts per sample. Gradients are taken with respect to the images alone: no parameter ever gets a ``.grad``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from robustlab import losses
from robustlab.types import Attack, Classifier

LossName = Literal["ce", "kl", "dlr", "margin"]
SampleLoss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, SampleLoss] = {
    "ce": losses.cross_entropy,
    "kl": lambda z, y: losses.kl(y, z),
    "dlr": losses.dlr,
    "margin": losses.margin,
}


def objective(name: str, targeted: bool = False) -> SampleLoss:
    """The function of (logits, y) that an attack ascends: a loss of the true class, or minus the loss of the target class."""
    loss = LOSSES[name]
    return (lambda z, y: -loss(z, y)) if targeted else loss


def threat_of(attack: Attack) -> tuple[str, float]:
    """The norm and radius of an attack.

    Raises:
        ValueError: one of them is still open.
    """
    if attack.norm is None or attack.eps is None:
        raise ValueError(f"{attack.name}: no threat model; give norm and eps, for example norm='linf', eps=8/255")
    return attack.norm, attack.eps


class Gradient(NamedTuple):
    """The objective at a point: input gradient (N, C, H, W), values (N,), logits (N, K)."""

    g: Tensor
    value: Tensor
    z: Tensor


def input_gradient(f: Classifier, x: Tensor, y: Tensor, loss: SampleLoss) -> Gradient:
    """One forward and one backward pass. Where the gradient is not a number it is zero: it says nothing about a direction."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        z = f(x).to(x.dtype)
        value = loss(z, y)
        (g,) = torch.autograd.grad(value.sum(), x)
    return Gradient(g.nan_to_num(), value.detach(), z.detach())


class Point(NamedTuple):
    """Images (N, C, H, W), the objective there (N,), and whether the classifier is fooled there (N,)."""

    x: Tensor
    value: Tensor
    fooled: Tensor


def fooled(z: Tensor, y: Tensor, targeted: bool = False) -> Tensor:
    """Whether logits (N, K) miss the class of y, or, targeted, hit it: (N,)."""
    hit = z.argmax(-1) == y.argmax(-1)
    return hit if targeted else ~hit


def better(new: Point, old: Point) -> Tensor:
    """Where ``new`` fools the classifier and ``old`` does not, or both agree in that and ``new`` has the larger objective."""
    return (new.fooled & ~old.fooled) | ((new.fooled == old.fooled) & (new.value > old.value))


def keep_better(old: Point | None, new: Point) -> Point:
    """Per sample the better of two points."""
    if old is None:
        return new
    take = better(new, old)
    return Point(
        torch.where(take.view(-1, *[1] * (new.x.ndim - 1)), new.x, old.x),
        torch.where(take, new.value, old.value),
        torch.where(take, new.fooled, old.fooled),
    )


def put_better(points: Point, rows: Tensor, new: Point) -> None:
    """Write ``new`` into the rows of ``points``, in place, where it is better."""
    kept = keep_better(Point(*(v[rows] for v in points)), new)
    for old, value in zip(points, kept, strict=True):
        old[rows] = value


def passes(x: Tensor, forwards: int, backwards: int) -> Tensor:
    """The cost of each sample, the same for all: (N, 2), forward and backward passes."""
    cost = torch.full((len(x), 2), forwards, dtype=torch.long, device=x.device)  # filled there: a transfer would wait for a GPU
    cost[:, 1] = backwards
    return cost
