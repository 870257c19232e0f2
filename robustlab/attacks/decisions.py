"""Questions to a classifier that only tells which class it decides for, and the points of its boundary that they lead to.

theta  tolerance of a bisection, relative: D^-1.5 (l2), D^-2 (linf), at most 1e-3; D is the number of pixels and channels
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from robustlab import geometry
from robustlab.attacks.nearest import wide
from robustlab.rng import Rng
from robustlab.types import Classifier

TRIALS = 20  # noise images tried, of each kind
COARSEST = 1e-3

Path = Callable[[Tensor], Tensor]  # s (N,) in [0, 1] -> images; s = 0 is the image itself


class Oracle:
    """Answers whether images are misclassified, within each sample's budget. No budget, no question: the answer is no.

    ``said`` is the last wrong class of each sample: after a bisection that of the point it ends at.
    """

    def __init__(self, f: Classifier, y: Tensor, queries: int):
        self.f, self.label, self.queries, self.dtype = f, y.argmax(-1), queries, y.dtype
        self.spent, self.said = torch.zeros_like(self.label), torch.zeros_like(self.label)

    def __call__(self, rows: Tensor, x: Tensor) -> Tensor:
        """``x`` holds one image for each of ``rows``."""
        asked = self.spent[rows] < self.queries
        answer = torch.zeros_like(asked)
        if bool(asked.any()):
            rows, x = rows[asked], x[asked]
            said = self.f(x).argmax(-1)
            answer[asked] = said != self.label[rows]
            self.said[rows] = torch.where(answer[asked], said, self.said[rows])
            self.spent[rows] += 1
        return answer

    def many(self, rows: Tensor, x: Tensor) -> Tensor:
        """``x`` (B, n, ...) holds B images for each of ``rows``, all of which can afford them."""
        z = self.f(x.flatten(0, 1)).view(*x.shape[:2], -1)
        self.spent[rows] += len(x)
        return z.argmax(-1) != self.label[rows]


def boundary_points(ask: Oracle, x: Tensor, wrong: Tensor, norm: str, starts: int, rng: Rng) -> tuple[Tensor, Tensor]:
    """Boundary points of different classes (starts, N, ...), and their norms (starts, N).

    Of each class the nearest that was found, and of the classes the nearest ``starts``, as long as the search for them has not
    cost a twentieth of the queries. The norm is inf where there are fewer, and where the image itself is ``wrong``.
    """
    at = x.expand(starts, *x.shape).clone()
    distance = torch.full_like(x[:, 0, 0, 0], torch.inf).repeat(starts, 1)
    kind = torch.full_like(distance, -1, dtype=torch.long)
    for trial in range(2 * TRIALS + 2):
        few = distance[0].isinf() | (20 * ask.spent < ask.queries)
        rows = (~wrong & few).nonzero().squeeze(1)
        noise = _noise(x[rows], trial, rng.select(rows).child(trial))
        hit = ask(rows, noise)
        rows = rows[hit]
        if len(rows) == 0:
            continue
        near, found = bisect(ask, rows, way(x[rows], noise[hit], norm), tolerance(x, norm)), ask.said[rows]
        size = geometry.norm_of(near - x[rows], norm)
        known = kind[:, rows] == found
        slot = torch.where(known.any(0), known.long().argmax(0), distance[:, rows].argmax(0))
        take = size < distance[slot, rows]
        place = slot[take], rows[take]
        at[place], distance[place], kind[place] = near[take], size[take], found[take]
    return at, distance


def _noise(x: Tensor, trial: int, rng: Rng) -> Tensor:
    """Uniform noise, then black, white, then pixels that are black or white at random, which lie farther out."""
    if trial in (TRIALS, TRIALS + 1):
        return torch.full_like(x, float(trial - TRIALS))
    noise = rng.uniform(x.shape[1:], dtype=x.dtype)
    return noise if trial < TRIALS else noise.round()


def bisect(ask: Oracle, rows: Tensor, at: Path, theta: float) -> Tensor:
    """The misclassified point next to the boundary on the way from each of ``rows`` to a misclassified point, s = 1."""
    low = torch.zeros(len(rows), dtype=ask.dtype, device=rows.device)
    high = torch.ones_like(low)
    for _ in range(math.ceil(-math.log2(theta)) if len(rows) else 0):
        mid = (low + high) / 2
        hit = ask(rows, at(mid))
        low, high = torch.where(hit, low, mid), torch.where(hit, mid, high)
    return at(high)


def way(x: Tensor, far: Tensor, norm: str) -> Path:
    """From ``x`` to ``far``, which may lie outside of the box: along the ray or through cubes, then into the box."""
    if norm == "l2":
        return lambda s: (x + wide(s) * (far - x)).clamp(0, 1)
    reach = geometry.norm_of(far - x, "linf")
    return lambda s: (x + (far - x).clamp(-wide(s * reach), wide(s * reach))).clamp(0, 1)


def tolerance(x: Tensor, norm: str) -> float:
    """theta."""
    return min(x[0].numel() ** (-1.5 if norm == "l2" else -2.0), COARSEST)
