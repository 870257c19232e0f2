"""The state of an Auto-PGD search (see ``apgd``) and what happens to it: steps, the best point, checkpoints. One row a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustlab import geometry


@dataclass
class State:
    """The samples still searched; every field has one row for each."""

    row: Tensor  # position in the batch
    x0: Tensor
    y: Tensor
    target: Tensor  # the class to reach, for losses that have one
    x: Tensor
    x_old: Tensor
    g: Tensor
    value: Tensor
    x_best: Tensor
    g_best: Tensor
    best: Tensor  # the largest loss so far
    best_checked: Tensor  # that loss at the last checkpoint
    halved: Tensor  # whether eta was halved there
    rises: Tensor  # steps since then in which the loss rose
    changed: Tensor  # l1: coordinates that the best point had changed at the last checkpoint
    eta: Tensor  # (n, 1, 1, 1)

    def keep(self, rows: Tensor) -> State:
        return State(**{name: value[rows] for name, value in vars(self).items()})


def checkpoints(steps: int) -> dict[int, int]:
    """{w_j: w_j - w_{j-1}}, in steps."""
    window, shrink, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    found, w = {}, window
    while w <= steps:
        found[w] = window
        window = max(window - shrink, least)
        w += window
    return found


def begin(x: Tensor, y: Tensor, target: Tensor, start: Tensor, eta: float) -> State:
    low = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    return State(
        row=torch.arange(len(x), device=x.device),
        x0=x,
        y=y,
        target=target,
        x=start,
        x_old=start,
        g=torch.zeros_like(x),
        value=low,
        x_best=start,
        g_best=torch.zeros_like(x),
        best=low,
        best_checked=low,
        halved=torch.ones_like(low, dtype=torch.bool),  # so that condition 2 waits for the second checkpoint
        rises=torch.zeros_like(low, dtype=torch.long),
        changed=_changed(start, x, eta),
        eta=torch.full_like(x[:, :1, :1, :1], eta),
    )


def _changed(x: Tensor, x0: Tensor, eps: float) -> Tensor:
    """How many coordinates differ by more than rounding: (n,)."""
    return ((x - x0).abs() > 1e-6 * eps).flatten(1).sum(1)


def step(s: State, norm: str, eps: float, alpha: float) -> Tensor:
    z = geometry.project(s.x + s.eta * geometry.steepest(s.g, norm), s.x0, norm, eps)
    return geometry.project(s.x + alpha * (z - s.x) + (1 - alpha) * (s.x - s.x_old), s.x0, norm, eps)


def sparse_step(s: State, eps: float) -> Tensor:
    """l1: a step along the signs of the largest gradient entries, two for three coordinates that the best point has changed."""
    size = s.g.abs().flatten(1)
    count = ((2 * s.changed + 2) // 3).clamp(1, size.shape[1])
    least = size.sort(dim=1, descending=True).values.gather(1, count[:, None] - 1)
    sign = s.g.sign() * (size >= least).view_as(s.g)
    moved = sign.ne(0).flatten(1).sum(1).clamp_min(1).view(-1, 1, 1, 1)
    return geometry.project(s.x + s.eta / moved * sign, s.x0, "l1", eps)


def record(s: State, g: Tensor, value: Tensor, first: bool) -> None:
    """Take in the loss and gradient at the new point."""
    grown = value > s.best
    wide = grown.view(-1, 1, 1, 1)
    s.x_best, s.g_best = torch.where(wide, s.x, s.x_best), torch.where(wide, g, s.g_best)
    s.best = torch.where(grown, value, s.best)
    if first:
        s.best_checked = s.best
    else:
        s.rises = s.rises + (value > s.value)
    s.g, s.value = g, value


def check(s: State, enough: float) -> None:
    """A checkpoint: halve the step size where progress has stopped, and go back to the best point there."""
    stuck = ~s.halved & (s.best_checked >= s.best)
    s.halved = (s.rises <= enough) | stuck
    wide = s.halved.view(-1, 1, 1, 1)
    s.eta = torch.where(wide, s.eta / 2, s.eta)
    s.x, s.g = torch.where(wide, s.x_best, s.x), torch.where(wide, s.g_best, s.g)
    s.best_checked, s.rises = s.best, torch.zeros_like(s.rises)


def check_sparsity(s: State, eps: float) -> None:
    """A checkpoint in l1: where the best point has become sparser go back to it with a full step, else shorten the step."""
    changed = _changed(s.x_best, s.x0, eps)
    wide = (changed < 0.95 * s.changed).view(-1, 1, 1, 1)
    s.eta = torch.where(wide, torch.full_like(s.eta, eps), (s.eta / 1.5).clamp_min(eps / 10))
    s.x, s.g = torch.where(wide, s.x_best, s.x), torch.where(wide, s.g_best, s.g)
    s.changed = changed
