"""The last step of attacks that look for the smallest perturbation (see ``refine.py``), which the methods themselves do not take.

They leave the boundary at the distance of their last step, not at the boundary.

    linf, l2, l1   first a look at the classifier linearised at x + d, for each of the likeliest classes: where the boundary of one
        is nearer to the image than the point found, by the exact distance inside the box, its nearest point is tried;
        then bisection over s in (0, ||d||): does x + (the point of the ball of radius s that is nearest to d) still fool?
    l0             while it can be done with a pixel less: try the best pixels of the classifier linearised at x + d, for each of
        the likeliest classes, and then the found point without the pixel that matters least

Every point tried lies in the box. The look is what makes linear classifiers with many classes exact: a search that climbs the
cross-entropy ends where d is parallel to a mixture of the classes' gradients (DDN: a quarter too far where logits are small), one
that climbs the margin may end at the boundary of a class that is farther but was ahead on the way (FMN in linf: up to 24 %).
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustlab import geometry
from robustlab.attacks.nearest import Nearest, wide
from robustlab.attacks.steps import passes
from robustlab.types import Classifier

CANDIDATES = 9  # classes whose boundaries are looked at
LESS = 1e-3  # share of the norm that another boundary has to save


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
