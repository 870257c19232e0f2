"""Square attack (Andriushchenko, Croce, Flammarion, Hein, ECCV 2020; l1: Croce and Hein, ICML 2021): random search, no gradients.

    x_0 = a striped (linf) or tiled (l2, l1) perturbation of radius eps
    each query proposes a change in a random square window of side s; it is kept where the margin z_c - max_{k != c} z_k falls
    s       = sqrt(p H W) rounded; p = p_init, halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 queries
    linf    the window becomes x + eps r, r = -1 or 1 for each channel
    l2, l1  the perturbation in a second window moves into the first one, where it is added to a peaked pattern of random sign and
            orientation; what the box has taken from the radius goes there too; then the radius is restored (l1: projected)

A query costs one forward pass. It is a comparison of numbers: the classifier may be anything that takes a tensor.

Differences from the authors' code:

- Windows, signs and orientations are drawn for every sample; theirs are shared by the batch.
- Windows reach the last row and column; theirs stop one short of both.
- A proposal that changes nothing, because the window has that value already, is not evaluated. It could not be kept.
- A margin that falls by rounding alone (64 units in the last place) has not fallen. Many proposals change nothing that the
  classifier sees; whether they are kept would otherwise depend on how the batch was cut.
- Images that are not square, of any size and number of channels: the tiles of the start are min(H, W) // 5 wide, at least 1,
  as many as fit, centred. Theirs fails for some sizes, such as 12 x 12.
- No clean pass, and none at the end.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from robustlab import geometry, losses
from robustlab.attacks.steps import fooled, passes, threat_of
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, Fraction, NonNegative, Norm

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
BLOCK = 100  # queries whose draws are made at once
ROUNDING = 64  # units in the last place: a margin that falls by less has not fallen


@register("square", cite="Andriushchenko, Croce, Flammarion, Hein, ECCV 2020, arXiv:1912.00049")
class Square(Attack):
    """Square attack: random search with square patches; sees nothing but the logits.

    Costs at most ``queries + 1`` forward passes; a sample stops costing once it is fooled.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        queries: proposals for each sample.
        p_init: the share of the image that the first windows cover.
    """

    norms = ("linf", "l2", "l1")

    norm: Norm | None = None
    eps: NonNegative | None = None
    queries: Count = 5000
    p_init: Fraction = 0.8

    @torch.no_grad()
    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        norm, eps = threat_of(self)
        propose = _propose_linf if norm == "linf" else functools.partial(_propose, norm)
        x, cost, tie = x.detach(), passes(x, 1, 0), ROUNDING * torch.finfo(x.dtype).eps
        out = _stripes(x, eps, rng.child("start")) if norm == "linf" else _tiles(x, norm, eps, rng.child("start"))
        value, miss = _judge(f, out, y)
        row = (~miss).nonzero().squeeze(1)  # the samples still searched; what follows has one row for each
        x0, best, value = x[row], out[row], value[row]
        for q in range(self.queries):
            if len(row) == 0:
                break
            if q % BLOCK == 0:
                source = rng.select(row).child("queries", q // BLOCK)
                draws = source.uniform((min(BLOCK, self.queries - q), 5 + x.shape[1]), dtype=torch.float64)
            new = propose(x0, best, eps, _side(self.p_init, q, x.shape, norm), draws[:, q % BLOCK])
            moved = (new != best).flatten(1).any(1).nonzero().squeeze(1)
            if len(moved) == 0:
                continue
            margin, miss = _judge(f, new[moved], y[row[moved]])
            cost[row[moved], 0] += 1
            kept = miss | (margin < value[moved] - tie * (1 + value[moved].abs()))
            took = moved[kept]
            best[took], value[took] = new[took], margin[kept]
            if bool(miss.any()):
                done = moved[miss]
                out[row[done]] = best[done]
                left = torch.ones_like(row, dtype=torch.bool).index_fill_(0, done, False)
                row, x0, best, value, draws = row[left], x0[left], best[left], value[left], draws[left]
        out[row] = best
        return out, {"passes": cost}


def _judge(f: Classifier, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The margin of the true class (N,), and whether the sample is misclassified."""
    z = torch.as_tensor(f(x)).to(x)
    return -losses.margin(z, y), fooled(z, y)


def _side(p_init: float, query: int, shape: torch.Size, norm: str) -> int:
    """The side of the window in pixels; odd and at least 3 in l2 and l1, where the image has room."""
    h, w = shape[-2:]
    p = p_init / 2 ** sum(query > last for last in HALVINGS)
    s = max(round(math.sqrt(p * h * w)), 1 if norm == "linf" else 3)
    return min(s if norm == "linf" else s + 1 - s % 2, h, w)


def _window(shape: torch.Size, s: int, u: Tensor, v: Tensor) -> Tensor:
    """Positions in the flattened image of windows of side s, placed by the draws u, v (N,): (N, C, s * s)."""
    c, h, w = shape[1:]
    top, left = ((u * (h - s + 1)).long(), (v * (w - s + 1)).long())
    side = torch.arange(s, device=u.device)
    inside = (side[:, None] * w + side).flatten()
    channel = torch.arange(c, device=u.device) * (h * w)
    return (top * w + left)[:, None, None] + channel[:, None] + inside


def _signs(u: Tensor, like: Tensor) -> Tensor:
    return torch.where(u < 0.5, -1.0, 1.0).to(like.dtype)


# ------------------------------------------------------------------------------------------------------------------- linf


def _stripes(x: Tensor, eps: float, rng: Rng) -> Tensor:
    """Each column of each channel moves by eps up or down."""
    sign = _signs(rng.uniform((x.shape[1], 1, x.shape[3])), x)
    return geometry.project(x + eps * sign, x, "linf", eps)


def _propose_linf(x0: Tensor, best: Tensor, eps: float, s: int, u: Tensor) -> Tensor:
    at = _window(x0.shape, s, u[:, 0], u[:, 1]).flatten(1)
    sign = _signs(u[:, 5:], x0).repeat_interleave(s * s, 1)
    old = x0.flatten(1).gather(1, at)
    patch = geometry.project(old + eps * sign, old, "linf", eps)
    return best.flatten(1).scatter(1, at, patch).view_as(x0)


# ----------------------------------------------------------------------------------------------------------------- l2, l1


@functools.cache
def _peak(height: int, width: int, power: int) -> Tensor:
    """A peak in the middle of a rectangle: at Chebyshev distance r from it, sum_{m >= r} (m + 1)^-power."""
    last = max(height, width) // 2
    r = torch.maximum((torch.arange(height) - height // 2).abs()[:, None], (torch.arange(width) - width // 2).abs())
    terms = torch.arange(1, last + 2, dtype=torch.float64) ** -power
    return terms.flip(0).cumsum(0).flip(0)[r]


@functools.cache
def _pattern(s: int, norm: str) -> Tensor:
    """A peak above its negative, of unit norm, and its transpose: (2, s, s)."""
    power, half = (2 if norm == "l2" else 4), s // 2
    parts = [_unit(_peak(a, s, power)[None], norm)[0] * sign for a, sign in ((half, 1), (s - half, -1)) if a]
    both = torch.cat(parts)
    return _unit(torch.stack([both, both.T]), norm)


def _unit(d: Tensor, norm: str) -> Tensor:
    return d / geometry.norm_of(d, norm).view(-1, *[1] * (d.ndim - 1)).clamp_min(1e-12)


def _tiles(x: Tensor, norm: str, eps: float, rng: Rng) -> Tensor:
    """A grid of patterns, each with its own orientation and, per channel, sign; scaled or projected to the radius."""
    n, c, h, w = x.shape
    s = max(min(h, w) // 5, 1)
    rows, columns = h // s, w // s
    turned = rng.child("turn").integers((rows, columns), 2)
    sign = _signs(rng.child("sign").uniform((c, rows, columns)), x)
    pattern = _pattern(s, norm).to(x)[turned]  # (n, rows, columns, s, s)
    grid = pattern[:, None] * sign[..., None, None]
    grid = grid.permute(0, 1, 2, 4, 3, 5).reshape(n, c, rows * s, columns * s)
    d = torch.zeros_like(x)
    top, left = (h - rows * s) // 2, (w - columns * s) // 2
    d[:, :, top : top + rows * s, left : left + columns * s] = grid
    return _place(x, d, norm, eps)


def _place(x0: Tensor, d: Tensor, norm: str, eps: float) -> Tensor:
    """l2: the perturbation at the radius, clamped. l1: projected on ball and box."""
    if norm == "l1":
        return geometry.project(x0 + d, x0, "l1", eps)
    return (x0 + eps * _unit(d, "l2")).clamp(0.0, 1.0)


def _propose(norm: str, x0: Tensor, best: Tensor, eps: float, s: int, u: Tensor) -> Tensor:
    n, c = x0.shape[:2]
    power = 2 if norm == "l2" else 1
    to, away = _window(x0.shape, s, u[:, 0], u[:, 1]), _window(x0.shape, s, u[:, 2], u[:, 3])
    d = (best - x0).flatten(1)
    mass = d.abs() ** power
    old = d.gather(1, to.flatten(1)).view(n, c, s * s)
    either = torch.zeros_like(d).scatter_(1, to.flatten(1), 1.0).scatter_(1, away.flatten(1), 1.0)
    of_windows = (mass * either).view(n, c, -1).sum(2)  # (n, c)
    unspent = (eps**power - mass.sum(1, keepdim=True)).clamp_min(0)
    of_old = geometry.norm_of(old.reshape(n * c, -1), norm).view(n, c, 1)
    pattern = _pattern(s, norm).to(x0)[(u[:, 4] < 0.5).long()].view(n, 1, s * s)
    new = pattern * _signs(u[:, 5:], x0)[..., None] + old / (1e-12 + of_old)
    size = unspent / c + of_windows
    size = size.sqrt() if norm == "l2" else size * c
    new = _unit(new.reshape(n * c, -1), norm).view(n, c, -1) * size[..., None]
    d = d.scatter(1, away.flatten(1), 0.0).scatter(1, to.flatten(1), new.flatten(1))
    return _place(x0, d.view_as(x0), norm, eps)
