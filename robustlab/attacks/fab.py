"""Fast adaptive boundary attack (Croce and Hein, ICML 2020, arXiv:1907.02044, algorithm 1): the smallest perturbation that fools.

    h_k(u)  = z_k(x_i) - z_c(x_i) + <w_k, u - x_i>,  w_k = grad (z_k - z_c)(x_i)       logits linearised at x_i; c is the true class
    s       = argmin_k |h_k(x_i)| / ||w_k||_q                                          the nearest boundary; 1/p + 1/q = 1
    d_1, d_2  the smallest steps from x_i and from x to {h_s = 0} inside the box
    alpha   = min(||d_1||_p / (||d_1||_p + ||d_2||_p), alpha_max)                      biased towards the original point
    x_{i+1} = clamp((1 - alpha) (x_i + eta d_1) + alpha (x + eta d_2))                 eta > 1 overshoots
              if it fools, keep it where it is the nearest so far, and go on from (1 - beta) x + beta x_{i+1}

``targeted``: s is one wrong class for the whole run, and there is one run for each of the most likely ones. A sample's runs go side
by side, in fewer and larger passes; they all end when one is near enough.

Differences from the authors' code:

- Gradients are taken for the images alone (theirs calls ``backward``, which fills those of the weights); of the K differences of
  logits the one that is zero is not differentiated.
- With an eps a sample is finished as soon as it is fooled within it. Theirs goes on to the end of the run.
- Further restarts begin at half the radius eps, as theirs, or of the smallest norm found where there is no eps (there a constant).
- The projection on the hyperplane is exact to rounding, and where coordinates of w are tiny too.
- The authors' final search along the line to the original point is not in their AutoAttack. Here, without an eps, the last step of
  the other attacks for the smallest perturbation (``refine.py``) takes its place: s is chosen by the distance without the box, so
  that with images near their bounds another boundary may be nearer, by up to 20 % on linear classifiers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from robustlab import geometry
from robustlab.attacks.apgd_t import targets_of
from robustlab.attacks.nearest import Nearest
from robustlab.attacks.refine import shrink
from robustlab.attacks.steps import fooled, passes, threat_of
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, Fraction, NonNegative, Norm, Positive, Whole


@register("fab", cite="Croce, Hein, ICML 2020, arXiv:1907.02044")
class FAB(Attack):
    """Fast adaptive boundary attack: walks along the nearest linearised boundary and stays near the original point.

    Costs one forward pass, and per restart at most 2 ``steps`` forward and (K - 1) ``steps`` backward passes (K classes);
    targeted, 2 ``steps`` forward and ``steps`` backward passes per target. Without an eps the last step adds up to 2 + ``refine``
    forward and 9 backward passes. With an eps a sample stops costing once it is fooled
    within it; ``info["distance"]`` is then at most eps and no minimum.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one. Without eps the smallest perturbation found is returned.
        steps: iterations per run.
        targeted: one run for each of the most likely wrong classes.
        n_targets: how many of these, or all if there are fewer.
        refine: without an eps, bisections at the end; see ``refine.py``.
        rows: images in one pass, at most (but one sample's targets stay together); None: as many as there are samples.
        restarts: runs; the first starts at the image, the others at random points around it.
        alpha_max: the largest weight of the original point's projection.
        eta: how far steps go, in distances to the boundary.
        beta: where to go on from after a success, between the original point (0) and the one found (1).
    """

    minimal = True
    norms = ("linf", "l2", "l1")

    norm: Norm | None = None
    eps: NonNegative | None = None
    steps: Count = 100
    targeted: bool = False
    n_targets: Count = 9
    refine: Whole = 9
    rows: Count | None = dataclasses.field(default=None, compare=False)  # how, not what
    restarts: Count = 1
    alpha_max: Fraction = 0.1
    eta: Positive = 1.05
    beta: Fraction = 0.9

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        """As every attack; ``info["distance"]``: the norm found (N,), zero for what is misclassified as it is."""
        norm = self.norm or threat_of(self)[0]
        x, enough = x.detach(), -1.0 if self.eps is None else self.eps
        with torch.no_grad():
            z = f(x).to(x.dtype)
        targets = targets_of(z, y, self.n_targets) if self.targeted else None
        distance = torch.full_like(z[:, 0], torch.inf).masked_fill(fooled(z, y), 0.0)
        found, cost = x.clone(), passes(x, 1, 0)
        count = 1 if targets is None else targets.shape[1]
        most = max((self.rows or len(x)) // count, 1)
        for r in range(self.restarts):
            for rows in ((distance > enough) & (distance > 0)).nonzero().squeeze(1).split(most):
                each = rows.repeat_interleave(count)
                start = x[each]
                if r:
                    sources = [rng.select(rows).child("target", t, "restart", r) for t in range(count)]
                    start = torch.stack([self._around(x[rows], norm, distance[rows], s) for s in sources], 1).flatten(0, 1)
                target = None if targets is None else targets[rows].flatten()
                new, norms, spent = self._run(f, x[each], y[each], target, start, norm, enough, count)
                norms, best = norms.view(-1, count).min(1)
                new = new[best + torch.arange(len(rows), device=x.device) * count]
                nearer = norms < distance[rows]
                found[rows] = torch.where(nearer.view(-1, 1, 1, 1), new, found[rows])
                distance[rows] = torch.where(nearer, norms, distance[rows])
                cost[rows] += spent.view(-1, count, 2).sum(1)
        if self.eps is None:
            rows = ((distance > 0) & distance.isfinite()).nonzero().squeeze(1)
            near = Nearest(x[rows], z[rows], y[rows], norm, False, found[rows], distance[rows])
            cost[rows] += shrink(f, near, self.refine)
            found[rows], distance[rows] = near.x, near.distance
        out = found if self.eps is None else geometry.project(found, x, norm, self.eps)
        return out, {"distance": distance, "passes": cost}

    def _around(self, x: Tensor, norm: str, distance: Tensor, rng: Rng) -> Tensor:
        """Random points at half the radius eps, or of the smallest norm found so far, or of a tenth of the box."""
        tenth = geometry.norm_of(torch.full_like(x, 0.1), norm)
        radius = torch.where(distance.isinf(), tenth, distance) if self.eps is None else torch.full_like(distance, self.eps)
        d = rng.uniform(x.shape[1:], -1.0, 1.0, dtype=x.dtype) if norm == "linf" else rng.normal(x.shape[1:], dtype=x.dtype)
        size = geometry.norm_of(d, norm).clamp_min(torch.finfo(x.dtype).tiny)
        return (x + d * (radius / size / 2).view(-1, 1, 1, 1)).clamp(0.0, 1.0)

    def _run(
        self, f: Classifier, x0: Tensor, y: Tensor, target: Tensor | None, start: Tensor, norm: str, enough: float, siblings: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One run: the nearest points that fool, their norms, the passes spent; so many rows in succession end together."""
        near, best = x0.clone(), torch.full((len(x0),), torch.inf, dtype=x0.dtype, device=x0.device)
        spent, row, x = passes(x0, 0, 0), torch.arange(len(x0), device=x0.device), start
        for _ in range(self.steps):
            x_0, labels = x0[row], y[row]
            c, w, backwards = _boundary(f, x, labels, None if target is None else target[row], norm)
            c_0 = c + (w * (x_0 - x)).flatten(1).sum(1)
            both = geometry.to_hyperplane(torch.cat([x, x_0]), torch.cat([w, w]), torch.cat([c, c_0]), norm)
            d_1, d_2 = both.chunk(2)
            n_1, n_2 = geometry.norm_of(both, norm).clamp_min(1e-8).chunk(2)
            alpha = (n_1 / (n_1 + n_2)).clamp_max(self.alpha_max).view(-1, 1, 1, 1)
            x = ((1 - alpha) * (x + self.eta * d_1) + alpha * (x_0 + self.eta * d_2)).clamp(0.0, 1.0)
            with torch.no_grad():
                miss = fooled(f(x).to(x.dtype), labels)
            spent[row] += passes(x, 2, backwards)
            size = geometry.norm_of(x - x_0, norm)
            nearer = miss & (size < best[row])
            near[row] = torch.where(nearer.view(-1, 1, 1, 1), x, near[row])
            best[row] = torch.where(nearer, size, best[row])
            x = torch.where(miss.view(-1, 1, 1, 1), x_0 + self.beta * (x - x_0), x)
            over = (best[row] <= enough).view(-1, siblings).any(1)
            if enough >= 0 and bool(over.any()):
                left = (~over).repeat_interleave(siblings).nonzero().squeeze(1)
                x, row = x[left], row[left]
                if len(row) == 0:
                    break
        return near, best, spent


def _boundary(f: Classifier, x: Tensor, y: Tensor, target: Tensor | None, norm: str) -> tuple[Tensor, Tensor, int]:
    """The nearest linearised boundary, or the one of ``target``: z_k - z_c (N,), its gradient, the backward passes it took."""
    c = y.argmax(-1, keepdim=True)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        z = f(x).to(x.dtype)
        if target is not None:
            h = (z.gather(-1, target[:, None]) - z.gather(-1, c)).squeeze(-1)
            return h.detach(), torch.autograd.grad(h.sum(), x)[0].nan_to_num(), 1
        others = z.shape[-1] - 1
        nearest, value, w = torch.full_like(z[:, 0].detach(), torch.inf), torch.zeros_like(z[:, 0].detach()), torch.zeros_like(x)
        for j in range(others):
            k = j + (c <= j).long()  # the j-th of the wrong classes
            h = (z.gather(-1, k) - z.gather(-1, c)).squeeze(-1)
            (g,) = torch.autograd.grad(h.sum(), x, retain_graph=j < others - 1)
            far = h.detach().abs() / (1e-12 + geometry.norm_of(g, geometry.DUAL[norm]))
            take = far < nearest
            nearest, value = torch.where(take, far, nearest), torch.where(take, h.detach(), value)
            w = torch.where(take.view(-1, 1, 1, 1), g, w)
    return value, w.detach().nan_to_num(), others
