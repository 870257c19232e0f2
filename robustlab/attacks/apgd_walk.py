"""The search of Auto-PGD (see ``apgd``): all samples in step, each with its own step size, checkpoints and best point.

A sample leaves as soon as it is fooled. Several rows may be one sample's (siblings, one for each target): they leave together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from robustlab import geometry
from robustlab.attacks.apgd_state import State, begin, check, check_sparsity, checkpoints, record, sparse_step, step
from robustlab.attacks.steps import Gradient, Point, fooled, input_gradient, keep_better, put_better
from robustlab.rng import Rng
from robustlab.types import Classifier

ALPHA = 0.75  # weight of the new step; the rest is momentum


class TargetLoss(Protocol):
    """A loss (n,) of logits (n, K), targets y (n, K) and the classes to reach (n,), which untargeted losses ignore."""

    def __call__(self, z: Tensor, y: Tensor, target: Tensor) -> Tensor: ...


Leaving = tuple[State, Point, int]  # rows that leave a search: their state, the points to return, the passes spent on each


@dataclass(frozen=True)
class Settings:
    """What a search does: the threat model, K, rho, and over how many passes each gradient is averaged."""

    norm: str
    eps: float
    steps: int
    rho: float = 0.75
    eot: int = 1


def nothing_found(x: Tensor) -> Point:
    """The clean images, with a loss that every point exceeds."""
    least = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    return Point(x.clone(), least, torch.zeros_like(least, dtype=torch.bool))


def take_in(found: Point, info: dict[str, Any], rows: Tensor, leaving: Iterator[Leaving], siblings: int = 1) -> None:
    """Write what a search of the samples ``rows`` returns into the points and by-products of the whole batch."""
    for s, point, spent in leaving:
        done, best = rows[s.row[::siblings] // siblings], foremost(point, siblings)
        put_better(found, done, Point(*(v[best] for v in point)))
        info["grad"][done] = s.g[best]
        info["passes"][done] += spent * siblings


def foremost(point: Point, siblings: int) -> Tensor:
    """Of each sample's ``siblings`` points in a row, the one that fools it, else the one of largest loss: positions (n,)."""
    fooled, value = point.fooled.view(-1, siblings), point.value.view(-1, siblings)
    value = value.masked_fill(~fooled & fooled.any(1, keepdim=True), -torch.inf)
    return value.argmax(1) + torch.arange(len(value), device=value.device) * siblings


def begin_at(x: Tensor, norm: str, eps: float, rng: Rng) -> Tensor:
    """Random starts: on the sphere of radius eps around ``x``; l1: a Gaussian away, wherever that is."""
    if norm == "l1":
        return x + rng.normal(x.shape[1:], dtype=x.dtype)
    d = geometry.sample_ball(x, norm, eps, rng)
    size = geometry.norm_of(d, norm).clamp_min(torch.finfo(x.dtype).tiny)
    return geometry.project(x + d * (eps / size).view(-1, 1, 1, 1), x, norm, eps)


def climb(
    f: Classifier, x: Tensor, y: Tensor, target: Tensor, loss: TargetLoss, settings: Settings, start: Tensor, siblings: int = 1
) -> Iterator[Leaving]:
    """One run from a start. Yields rows as they leave: their state, the points to return and the passes spent on each.

    ``siblings``: so many rows in succession are one sample's, which leaves as soon as one of them is fooled.
    """
    norm, eps, steps = settings.norm, settings.eps, settings.steps
    spent = 0
    if norm == "l1":
        part = min(-(-3 * steps // 10), (steps - 1) // 2)
        for factor in (3, 2) if part else ():
            start = geometry.project(start, x, norm, factor * eps)
            wide = Settings(norm, factor * eps, part, settings.rho, settings.eot)
            ((s, _, cost),) = _search(f, x, y, target, loss, wide, start)
            start, spent = s.x_best, spent + cost
            steps -= part
        start = geometry.project(start, x, norm, eps)
    last = Settings(norm, eps, steps, settings.rho, settings.eot)
    for s, point, cost in _search(f, x, y, target, loss, last, start, leave=siblings if settings.eot == 1 else 0):
        yield s, point, spent + cost


def _search(
    f: Classifier, x: Tensor, y: Tensor, target: Tensor, loss: TargetLoss, settings: Settings, start: Tensor, leave: int = 0
) -> Iterator[Leaving]:
    """The search in one ball. So many rows in succession (``leave``) go as soon as one is fooled; 0: all stay to the end."""
    norm, eps, steps = settings.norm, settings.eps, settings.steps
    marks = checkpoints(steps) if norm != "l1" else {k: 0 for k in range(0, steps + 1, max(int(0.04 * steps), 1)) if k}
    s, seen = begin(x, y, target, start, eps if norm == "l1" else 2 * eps), None
    for k in range(steps + 1):
        if k:
            s.x, s.x_old = sparse_step(s, eps) if norm == "l1" else step(s, norm, eps, ALPHA if k > 1 else 1.0), s.x
        g, value, z = _mean_gradient(f, s.x, s.y, functools.partial(loss, target=s.target), settings.eot)
        record(s, g, value, first=k == 0)
        miss = fooled(z, s.y)
        if settings.eot > 1:
            seen = keep_better(seen, Point(s.x, value, miss))
        if leave and bool(miss.any()):
            over = miss.view(-1, leave).any(1).repeat_interleave(leave)
            gone, left = over.nonzero().squeeze(1), (~over).nonzero().squeeze(1)
            out, s = s.keep(gone), s.keep(left)
            yield out, Point(out.x, out.value, miss[gone]), k + 1
            if len(left) == 0:
                return
        if k in marks:
            check_sparsity(s, eps) if norm == "l1" else check(s, settings.rho * marks[k])
    cost = (steps + 1) * settings.eot
    yield s, seen or Point(s.x_best, s.best, torch.zeros_like(s.halved)), cost


def _mean_gradient(f: Classifier, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor], eot: int) -> Gradient:
    """Gradient, loss and logits, averaged over ``eot`` passes."""
    g, value, z = input_gradient(f, x, y, loss)
    for _ in range(1, eot):
        more = input_gradient(f, x, y, loss)
        g, value, z = g + more.g, value + more.value, z + more.z
    return Gradient(g / eot, value / eot, z / eot) if eot > 1 else Gradient(g, value, z)
