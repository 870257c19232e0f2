"""Auto conjugate gradient, ACG (Yamamura et al., ICML 2022, algorithm 1): APGD's step sizes along conjugate directions.

    s_0 = g_0,  s_k = g_k + beta_k s_{k-1}                        g_k = grad_x L(f(x_k), y)
    beta_k  = max(0, -<g_k, y_k> / <s_{k-1}, y_k>),  y_k = g_{k-1} - g_k      (Hestenes and Stiefel, ascent)
    x_{k+1} = P(x_k + eta sign(s_k))
    eta     = 2 eps, halved at APGD's checkpoints under APGD's conditions (``attacks/apgd.py``); the search then goes on from the
              best point so far, with the gradient there and with the gradient and direction that led to it

The start is the centre of ball and box. L is the margin (the paper's CW loss).

Differences from the authors' code: theirs has <g_k, y_k> / <s_{k-1}, y_k>, the other sign, with which directions on a quadratic
are not conjugate (``beta="authors-code"``; on digits the two come within 0.01 in mean margin). beta is 0 where <s_{k-1}, y_k> is 0
(theirs divides). The loss of the start counts in the first test of rising steps, as in ``apgd``; theirs compares with zero. All
samples run all steps; where one is fooled on the way, the fooling point of the largest loss is returned. Their restarts begin at
random points; here is the first run.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from robustlab import geometry
from robustlab.attacks.steps import LossName, Point, SampleLoss, fooled, input_gradient, keep_better, objective, passes, threat_of
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, Fraction, NonNegative, Norm


class State(NamedTuple):
    """A point of the search and how it was reached: images, loss (N,), gradient there, and the gradient and direction before."""

    x: Tensor
    value: Tensor
    g: Tensor
    g_old: Tensor
    s_old: Tensor


class Progress(NamedTuple):
    """What the checkpoints look at: (N,) each; ``halved`` and ``best`` are those of the last checkpoint."""

    rises: Tensor
    halved: Tensor
    best: Tensor


@register("acg", cite="Yamamura, Sato, Tanaka, Tsuchimoto, Ogura, Fujisawa, ICML 2022, arXiv:2206.09628")
class ACG(Attack):
    """Auto conjugate gradient: more diverse search directions than APGD's, no step size to choose.

    Deterministic: it starts in the middle of ball and box. ``steps + 1`` forward and backward passes.

    Attributes:
        norm, eps: the threat model, linf; None takes the surrounding one.
        steps: number of steps.
        rho: the share of rising steps below which the step size is halved.
        beta: the formula of Hestenes and Stiefel, or the one in the authors' code.
        loss: ``margin``, ``ce``, ``kl`` (to the probabilities y), ``dlr`` (three classes or more).
        targeted: y is the class to reach, and its loss goes down.
    """

    norms = ("linf",)

    norm: Norm | None = None
    eps: NonNegative | None = None
    steps: Count = 100
    rho: Fraction = 0.75
    beta: Literal["hestenes-stiefel", "authors-code"] = "hestenes-stiefel"
    loss: LossName = "margin"
    targeted: bool = False

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        norm, eps = threat_of(self)
        loss = objective(self.loss, self.targeted)
        start = ((x - eps).clamp_min(0) + (x + eps).clamp_max(1)) / 2
        now, found = self._look(f, geometry.project(start, x, norm, eps), y, loss, torch.zeros_like(x), torch.zeros_like(x))
        best, sign = now, 1 if self.beta == "hestenes-stiefel" else -1
        progress = Progress(torch.zeros_like(now.value), torch.ones_like(found.fooled), now.value)
        eta = torch.full_like(x[:, :1, :1, :1], 2 * eps)
        window, shrink, least = (max(int(share * self.steps), 1) for share in (0.22, 0.03, 0.06))
        check = window
        for k in range(1, self.steps + 1):
            s = now.g + _wide(conjugacy(now.g, now.g_old, now.s_old, sign)) * now.s_old
            moved = geometry.project(now.x + eta * geometry.steepest(s, norm), x, norm, eps)
            new, point = self._look(f, moved, y, loss, now.g, s)
            found, best = keep_better(found, point), _pick(new.value > best.value, new, best)
            progress = progress._replace(rises=progress.rises + (new.value > now.value))
            now = new
            if k == check:
                halve = (progress.rises <= self.rho * window) | (~progress.halved & (progress.best >= best.value))
                eta, now = torch.where(_wide(halve), eta / 2, eta), _pick(halve, best, now)
                progress = Progress(torch.zeros_like(progress.rises), halve, best.value)
                window = max(window - shrink, least)
                check += window
        return found.x, {"grad": now.g, "passes": passes(x, self.steps + 1, self.steps + 1)}

    def _look(self, f: Classifier, x: Tensor, y: Tensor, loss: SampleLoss, g_old: Tensor, s_old: Tensor) -> tuple[State, Point]:
        """One pass at a point."""
        seen = input_gradient(f, x, y, loss)
        return State(x, seen.value, seen.g, g_old, s_old), Point(x, seen.value, fooled(seen.z, y, self.targeted))


def conjugacy(g: Tensor, g_old: Tensor, s_old: Tensor, sign: int = 1) -> Tensor:
    """beta (N,) of Hestenes and Stiefel for ascent (``sign`` -1: its negative), at least 0; 0 where the formula has no value."""
    y = g_old - g
    above, below = ((v * y).flatten(1).sum(1) for v in (-sign * g, s_old))
    return torch.where(below == 0, torch.zeros_like(below), above / below).clamp_min(0).nan_to_num()


def _pick(take: Tensor, new: State, old: State) -> State:
    return State(*(torch.where(_wide(take) if a.ndim > 1 else take, a, b) for a, b in zip(new, old, strict=True)))


def _wide(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1, 1)
