"""HopSkipJump (Chen, Jordan, Wainwright, IEEE S&P 2020, algorithm 2): the smallest perturbation from decisions alone.

    start     uniform noise that is misclassified, then bisection towards x
    t = 1, 2, ...
      v       = mean_b (phi_b - mean phi) u_b,     b = 1 .. B sqrt(t);     phi_b = 1 if x_t + delta u_b is misclassified, else -1
      x'      = x_t + xi u(v),                     xi = d_t / sqrt(t), halved until x', in the box, is misclassified
      x_{t+1} = bisection between x and x'         l2: along the ray, in the box;  linf: x' clamped to cubes around x, in the box
      leap    the nearest point of ball and box to a plane with normal v, where it is misclassified and nearer than x_{t+1}

    d_t    distance of x_t from x                  u(v)   v / ||v|| for l2, sign(v) for linf
    u_b    random directions of l2 length one: normal (l2), uniform in the cube (linf)
    delta  d_t / D, and 0.1 at t = 1: the width of the differences; D is the number of pixels and channels
    theta  tolerance of the bisection, relative: D^-1.5 (l2), D^-2 (linf), at most 1e-3

The classifier is asked which class it decides for, and nothing else: logits are not looked at. Every question is counted, and a
sample that has used up its budget is asked about no more.

Differences from the authors' code (``scripts/distances_linear.py`` measures them together, not one by one):

- x' enters the bisection as it is, and the points of the ray are clamped. Theirs clamps x' first: shrinking then takes pixels off
  their bounds that belong there, and the nearest point is no fixed point.
- The leap. A point of the walk averages all steps so far, and in linf a pixel whose sign was estimated wrongly once has to come
  back. v is the running estimate, then the sum of all of this walk. One question each when it fails.
- Most of the last iteration's estimate is kept (``memory``). An estimate from B directions in D dimensions is off by an angle of
  about sqrt(D / B), and where the boundary is flat the older ones are still about its normal. ``memory=0`` is the paper's.
- ``starts`` walks set out from boundary points of different classes, and the nearest after half of the queries goes on (theirs: one
  walk). A walk ends at the nearest point of the facet where it began, which may belong to a farther class. The search for starts
  may cost a twentieth of the queries; where half of them do not pay for an iteration of each the nearest start is taken. A
  farther facet can still be the end (seen with ten classes in linf at the bounds, 16 pixels: one of three images, 4.5 % too far).
- theta is at most 1e-3: with 16 pixels theirs is 1.6 %. The smallest point found is returned (theirs: the last).
- After 20 uniform noise images black, white and 20 images of black and white pixels are tried (theirs: a thousand noise images).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from robustlab import geometry
from robustlab.attacks.decisions import Oracle, bisect, boundary_points, tolerance, way
from robustlab.attacks.nearest import wide
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, Fraction, NonNegative, Norm

FIRST_DELTA = 0.1
HALVINGS = 20  # of a step
MOST_PROBES = 10_000  # per gradient estimate
ROWS = 2048  # images in one forward pass, at most (or one per sample)


@register("hop-skip-jump", cite="Chen, Jordan, Wainwright, IEEE S&P 2020, arXiv:1904.02144")
class HopSkipJump(Attack):
    """Black box: walks along the decision boundary towards the image, from class decisions alone.

    Looks for the smallest perturbation; with eps set it returns a point of that ball. Costs at most ``queries`` forward passes per
    sample and no backward pass. ``info``: ``distance`` (N,), ``queries`` (N,), ``passes``.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one; eps is not needed.
        queries: forward passes per sample, at most.
        probes: B, questions of the first gradient estimate.
        starts: walks at most, one for each class that noise images are taken for; half of the queries decide which goes on.
        memory: share of the last iteration's estimate that is kept.
    """

    minimal = True

    norm: Norm | None = None
    eps: NonNegative | None = None
    queries: Count = 10_000
    probes: Count = 100
    starts: Count = 5
    memory: Fraction = 0.8

    @torch.no_grad()
    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        x, ask = x.detach(), Oracle(f, y, self.queries)
        clean = ask(torch.arange(len(x), device=x.device), x)
        at, distance = boundary_points(ask, x, clean, self._norm, self.starts, rng.child("start"))
        normal = torch.zeros_like(at)
        race = self._race()
        for i in range(self.starts if race else 0):
            walks = range(1, race + 1)
            at[i], distance[i], normal[i] = self._walk(ask, x, at[i], distance[i], normal[i], walks, rng.child("race", i))
        first = distance.argmin(0), torch.arange(len(x), device=x.device)
        best, distance, _ = self._walk(ask, x, at[first], distance[first], normal[first], range(race + 1, self.queries), rng)
        best, distance = torch.where(wide(clean), x, best), distance.masked_fill(clean, 0.0)
        cost = torch.stack([ask.spent, torch.zeros_like(ask.spent)], 1)
        if self.eps is not None:
            best = geometry.project(best, x, self._norm, self.eps)
        return best, {"distance": distance, "queries": ask.spent, "passes": cost}

    @property
    def _norm(self) -> str:
        if self.norm is None:
            raise ValueError(f"{self.name}: no threat model; give norm and eps, for example norm='linf', eps=8/255")
        return self.norm

    def _race(self) -> int:
        """Iterations of each of the walks that half of the queries are for: the sum of B sqrt(t) is 2 / 3 B T^1.5."""
        if self.starts == 1:
            return 0
        return int((0.75 * self.queries / self.starts / self.probes) ** (2 / 3))

    def _walk(
        self, ask: Oracle, x: Tensor, x_t: Tensor, distance: Tensor, normal: Tensor, steps: range, rng: Rng
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Iterations ``steps`` from boundary points: the nearest points, their norms, the normals. No walk where a norm is inf."""
        x_t, best, distance, normal, whole = x_t.clone(), x_t.clone(), distance.clone(), normal.clone(), normal.clone()
        rows = distance.isfinite().nonzero().squeeze(1)
        for t in steps:
            probes = min(int(self.probes * math.sqrt(t)), MOST_PROBES)
            rows = rows[ask.spent[rows] + probes < self.queries]
            if len(rows) == 0:
                break
            d = geometry.norm_of(x_t[rows] - x[rows], self._norm)
            delta = d / x[0].numel() if t > 1 else torch.full_like(d, FIRST_DELTA)
            seen = self._normal(ask, rows, x_t[rows], wide(delta), probes, rng.select(rows).child("step", t))
            normal[rows], whole[rows] = self.memory * normal[rows] + seen, whole[rows] + seen
            hopped = self._hop(ask, rows, x[rows], x_t[rows], geometry.steepest(normal[rows], self._norm), d / math.sqrt(t))
            leapt = self._leap(ask, rows, x[rows], hopped, normal[rows])
            x_t[rows] = self._leap(ask, rows, x[rows], leapt, whole[rows])
            now = geometry.norm_of(x_t[rows] - x[rows], self._norm)
            nearer = now < distance[rows]
            best[rows[nearer]], distance[rows[nearer]] = x_t[rows[nearer]], now[nearer]
        return best, distance, normal

    def _hop(self, ask: Oracle, rows: Tensor, x: Tensor, x_t: Tensor, v: Tensor, xi: Tensor) -> Tensor:
        """A step along v that is halved until it stays misclassified, then the bisection."""
        moved, waits = x_t, torch.ones_like(xi, dtype=torch.bool)
        for _ in range(HALVINGS):
            trial = x_t + wide(xi) * v
            hit = waits.clone()
            hit[waits] = ask(rows[waits], trial[waits].clamp(0, 1))
            moved, waits = torch.where(wide(hit), trial, moved), waits & ~hit
            xi = torch.where(waits, xi / 2, xi)
            if not bool(waits.any()):
                break
        return bisect(ask, rows, way(x, moved, self._norm), tolerance(x, self._norm))

    def _leap(self, ask: Oracle, rows: Tensor, x: Tensor, x_t: Tensor, normal: Tensor) -> Tensor:
        """The nearest point of the plane with this normal, if it is misclassified and nearer than ``x_t``; else ``x_t``."""
        d = (1 - tolerance(x, self._norm)) * geometry.norm_of(x_t - x, self._norm)
        at = lambda i: lambda s: geometry.linear_max(normal[i], x[i], self._norm, s * d[i])  # noqa: E731
        hit, out = ask(rows, at(slice(None))(torch.ones_like(d))), x_t.clone()
        out[hit] = bisect(ask, rows[hit], at(hit), tolerance(x, self._norm))
        return out

    def _normal(self, ask: Oracle, rows: Tensor, x_t: Tensor, delta: Tensor, probes: int, rng: Rng) -> Tensor:
        """An estimate of the boundary's normal at ``x_t``: where the probes are misclassified, less where they are not."""
        yes, no, hits = torch.zeros_like(x_t), torch.zeros_like(x_t), torch.zeros_like(delta)
        at_once = max(1, ROWS // len(x_t))
        for first in range(0, probes, at_once):
            several = range(first, min(first + at_once, probes))
            u = torch.stack([self._direction(x_t, rng.child("probe", i)) for i in several])
            asked = (x_t + delta * u).clamp(0, 1)
            u = (asked - x_t) / delta.clamp_min(torch.finfo(x_t.dtype).tiny)
            hit = ask.many(rows, asked).to(x_t.dtype).view(*u.shape[:2], 1, 1, 1)
            yes, no, hits = yes + (hit * u).sum(0), no + ((1 - hit) * u).sum(0), hits + hit.sum(0)
        mean = 2 * hits / probes - 1
        v = (1 - mean) * yes - (1 + mean) * no
        return torch.where(hits == probes, yes, torch.where(hits == 0, -no, v))

    def _direction(self, x: Tensor, rng: Rng) -> Tensor:
        """A random direction of length one."""
        if self._norm == "l2":
            return geometry.steepest(rng.normal(x.shape[1:], dtype=x.dtype), "l2")
        return geometry.steepest(rng.uniform(x.shape[1:], -1.0, 1.0, dtype=x.dtype), "l2")
