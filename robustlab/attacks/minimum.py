"""What attacks share that look for the smallest perturbation: minimise ||d||_p over x + d that fool the classifier, in [0, 1].

A search offers the points that it visits to a ``Nearest``, which keeps, per sample, the nearest one that fools. Samples that are
misclassified from the start (targeted: that are in the class to reach) have distance 0, come back as they are and are not searched.

A last step, ``refine``, is shared: the methods leave the boundary at the distance of their last step, not at the boundary.

    linf, l2, l1   first a look at the classifier linearised at x + d, for each of the likeliest classes: where the boundary of one
        is nearer to the image than the point found, by the exact distance inside the box, its nearest point is tried;
        then bisection over s in (0, ||d||): does x + (the point of the ball of radius s that is nearest to d) still fool?
    l0             while it can be done with a pixel less: try the best pixels of the classifier linearised at x + d, for each of
        the likeliest classes, and then the found point without the pixel that matters least

Every point tried lies in the box. The look is what makes linear classifiers with many classes exact: a search that climbs the
cross-entropy ends where d is parallel to a mixture of the classes' gradients (DDN: a quarter too far where logits are small), one
that climbs the margin may end at the boundary of a class that is farther but was ahead on the way (FMN in linf: up to 24 %).
``refine=0`` is the paper's method by itself. ``scripts/distances_linear.py`` prints how near each comes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustlab import geometry
from robustlab.attacks.steps import SampleLoss, fooled, objective, passes
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier

CANDIDATES = 9  # classes whose boundaries are looked at in the last step
LESS = 1e-3  # share of the norm that another boundary has to save


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


class MinimumNorm(Attack):
    """Base of the attacks that look for the smallest perturbation. Subclasses define :meth:`search`.

    Attributes:
        refine: linf, l2, l1: bisections at the end, one forward pass each, after two forward and up to nine backward passes. l0:
            pixels that are taken back at most; each try costs up to 11 forward and 9 backward passes.
    """

    minimal = True
    targeted = False
    refine: int = 0

    def search(self, f: Classifier, near: Nearest, rng: Rng) -> Tensor:
        """Offer points to ``near``; returns the passes spent on each sample (N, 2)."""
        raise NotImplementedError

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        """As every attack. ``info``: ``distance`` (N,), the smallest norm found, infinite where nothing was; ``passes`` (N, 2).

        The nearest fooling points come back, and the last point visited where none was found. With eps, what is farther than that
        is projected on the ball, where it may no longer fool.
        """
        if self.norm is None:
            raise ValueError(f"{self.name}: no norm; give norm and eps, for example norm='{self.norms[0]}' (eps may stay open)")
        x = x.detach()
        with torch.no_grad():
            z = f(x).to(x.dtype)
        hit = fooled(z, y, self.targeted)
        found, cost, rows = x.clone(), passes(x, 1, 0), (~hit).nonzero().squeeze(1)
        distance = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        if len(rows):
            near = Nearest.around(x[rows], z[rows], y[rows], self.norm, self.targeted)
            cost[rows] += self.search(f, near, rng.select(rows))
            cost[rows] += (prune if self.norm == "l0" else shrink)(f, near, self.refine)
            found[rows], distance[rows] = near.x, near.distance
        info = {"distance": distance, "passes": cost}
        if self.eps is None:
            return found, info
        return torch.where(wide(distance <= self.eps), found, geometry.project(found, x, self.norm, self.eps)), info


def shrink(f: Classifier, near: Nearest, times: int) -> Tensor:
    """Turns to the nearest linearised boundary, then bisects the radius; returns the passes (N, 2)."""
    cost, rows = passes(near.x0, 0, 0), near.distance.isfinite().nonzero().squeeze(1)
    if times == 0 or len(rows) == 0:
        return cost
    x0, d, high = near.x0[rows], near.x[rows] - near.x0[rows], near.distance[rows]
    w, turned = _turn(f, near, rows, cost)
    low = torch.zeros_like(high)
    for _ in range(times):
        mid = (low + high) / 2
        back = (x0 + geometry.project_ball(d, near.norm, mid)).clamp(0, 1)
        x = torch.where(wide(turned), geometry.linear_max(w, x0, near.norm, mid), back)
        with torch.no_grad():
            hit = near.offer(x, f(x).to(x.dtype), rows)
        low, high = torch.where(hit, low, mid), torch.where(hit, mid, high)
        cost[rows] += torch.tensor([1, 0], device=x.device)
    return cost


def _turn(f: Classifier, near: Nearest, rows: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Tries the points found against the classifier linearised there: is another boundary nearer, or this one elsewhere?

    Of the boundaries of the likeliest classes the nearest to the image is taken, by the distance inside the box. Where it is nearer
    than the point found, by more than ``LESS``, the best point of the linearised classifier at a little less than the found radius
    is asked about. Returns the gradient of that class (n, C, H, W) and where that point fools.
    """
    x, x0, found = near.x[rows], near.x0[rows], near.distance[rows]
    nearest, best = torch.full_like(found, torch.inf), torch.zeros_like(x)
    values, gradients = _climbs(f, near, x, rows, CANDIDATES)
    for value, w in zip(values, gradients, strict=True):
        at_image = value + ((x0 - x) * w).flatten(1).sum(1)
        d = geometry.to_hyperplane(x0, w, at_image, near.norm)
        short = at_image + (d * w).flatten(1).sum(1) < -1e-6 * at_image.abs()  # no point of the box lies on it
        size = geometry.norm_of(d, near.norm).masked_fill(short | (at_image >= 0), torch.inf)
        best = torch.where(wide(size < nearest), w, best)
        nearest = nearest.minimum(size)
    x = geometry.linear_max(best, x0, near.norm, (1 - LESS) * found)
    turned = nearest < (1 - LESS) * found
    ask = turned.nonzero().squeeze(1)
    with torch.no_grad():
        turned[ask] = near.offer(x[ask], f(x[ask]).to(x.dtype), rows[ask])
    cost[rows] += torch.tensor([1, len(values)], device=x.device)
    cost[rows[ask]] += torch.tensor([1, 0], device=x.device)
    return best, turned


def prune(f: Classifier, near: Nearest, rounds: int) -> Tensor:
    """Takes pixels back, one a round, where the rest or other pixels suffice; returns the passes (N, 2)."""
    cost, rows = passes(near.x0, 0, 0), near.distance.isfinite().nonzero().squeeze(1)
    for _ in range(rounds):
        if len(rows) == 0:
            break
        x, x0, before = near.x[rows], near.x0[rows], near.distance[rows]
        _, gradients = _climbs(f, near, x, rows, CANDIDATES)
        trials = [geometry.linear_max(g, x0, "l0", before - 1) for g in gradients]
        use = ((x - x0) * gradients[0]).sum(1, keepdim=True).masked_fill((x == x0).all(1, keepdim=True), torch.inf)
        least = use.flatten(1).argmin(1, keepdim=True)
        kept = torch.ones_like(use.flatten(1)).scatter_(1, least, 0.0).view_as(use) > 0
        for trial in (*trials, torch.where(kept, x, x0)):
            with torch.no_grad():
                near.offer(trial, f(trial).to(x.dtype), rows)
        cost[rows] += torch.tensor([len(trials) + 2, len(trials)], device=x.device)
        rows = rows[near.distance[rows] < before]
    return cost


def _climbs(f: Classifier, near: Nearest, x: Tensor, rows: Tensor, most: int) -> tuple[list[Tensor], list[Tensor]]:
    """What is to become positive, and its gradients at ``x``: the likeliest other classes over the true one; the class to reach."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        z = f(x).to(x.dtype)
        if near.targeted:
            values = [-near.gap(z, near.y[rows])]
        else:
            label = near.y[rows].argmax(1, keepdim=True)
            others = z.detach().scatter(1, label, -torch.inf).topk(min(most, z.shape[1] - 1), dim=1).indices
            values = list((z.gather(1, others) - z.gather(1, label)).unbind(1))
        gradients = [torch.autograd.grad(v.sum(), x, retain_graph=True)[0].nan_to_num() for v in values]
    return [v.detach() for v in values], gradients


class Adam:
    """Running moments of a gradient (Kingma and Ba, ICLR 2015, algorithm 1), element by element."""

    def __init__(self, like: Tensor):
        self.m, self.v, self.k = torch.zeros_like(like), torch.zeros_like(like), 0

    def keep(self, rows: Tensor) -> None:
        self.m, self.v = self.m[rows], self.v[rows]

    def moments(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a gradient; returns the first moment and the root of the second, without bias. A step is rate * m / s."""
        self.k += 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g.square()
        return self.m / (1 - 0.9**self.k), (self.v / (1 - 0.999**self.k)).sqrt() + 1e-8


class Weight:
    """The weight c of the loss against the norm, per sample: tenfold until a run fools, then bisection (Carlini, Wagner, 2017)."""

    def __init__(self, start: float, like: Tensor):
        self.c, self.low, self.high = torch.full_like(like, start), torch.zeros_like(like), torch.full_like(like, torch.inf)

    def update(self, hit: Tensor) -> None:
        """Take in which samples the last run fooled."""
        self.low, self.high = torch.where(hit, self.low, self.c), torch.where(hit, self.c, self.high)
        self.c = torch.where(self.high.isfinite(), (self.low + self.high) / 2, 10 * self.c)


def cosine(k: int, steps: int, first: float, last: float) -> float:
    """A number that falls from ``first`` at k = 0 to ``last`` at k = steps along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * k / steps)) / 2


def wide(values: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)
