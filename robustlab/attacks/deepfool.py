"""DeepFool (Moosavi-Dezfooli, Fawzi, Frossard, CVPR 2016, algorithm 2).

    f'_k = z_k(x_i) - z_c(x_i),   w_k = grad f'_k,   r_k = argmin { ||r||_p : <w_k, r> >= -(1 + eta) f'_k, x_i + r in [0, 1] }
    x_{i+1} = x_i + r_l  with the class l of the smallest ||r_l||_p, until the class is no longer c

    c      the class of the image
    eta    overshoot: how far behind the linearised boundary a step ends, as a share of the distance to it

Without bounds r_k is the closed form of the paper, -(1 + eta) f'_k / ||w_k||_2^2 w_k in l2 and its like in linf.

Differences from the authors' code:

- The box is part of the step: the linearised problem is solved inside [0, 1], exactly. Theirs ignores bounds.
- Batched; a sample leaves the search when it is fooled.
- The norm is that of the boundary on the way back to the image, found by bisection (``refine=0``: that of the step's end, which
  lies behind the boundary by eta and so is 2 % too far on a linear classifier).
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustlab.attacks.minimum import MinimumNorm
from robustlab.attacks.nearest import Nearest
from robustlab.geometry import norm_of, to_hyperplane
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Classifier, Count, NonNegative, Norm, Whole


@register("deepfool", cite="Moosavi-Dezfooli, Fawzi, Frossard, CVPR 2016, arXiv:1511.04599")
class DeepFool(MinimumNorm):
    """Steps to the nearest class boundary of the linearised classifier until the class changes.

    Deterministic, untargeted. A step costs two forward and ``candidates`` backward passes (or as many as there are other classes);
    a few steps are usual; ``refine`` adds forward passes. The norm found is a quick upper bound of the smallest one, as a rule
    above those of DDN and FMN.

    Attributes:
        norm: of the perturbation.
        eps: None, or the radius of the ball in which what comes back has to lie.
        steps: at most.
        candidates: the other classes that are tried: those with the largest logits at the image.
        overshoot: eta. It decides where a step ends; the norm found is that of the boundary behind it, by ``refine``.
        refine: bisections at the end (see ``refine.py``), one forward pass each.
    """

    norm: Norm | None = None
    eps: NonNegative | None = None
    steps: Count = 50
    candidates: Count = 9
    overshoot: NonNegative = 0.02
    refine: Whole = 10

    def search(self, f: Classifier, near: Nearest, rng: Rng) -> Tensor:
        x, rows = near.x0, torch.arange(len(near.x0), device=near.x0.device)
        label = near.y.argmax(1, keepdim=True)
        others = near.z0.scatter(1, label, -torch.inf).topk(min(self.candidates, near.z0.shape[1] - 1), dim=1).indices
        cost = torch.zeros(len(x), 2, dtype=torch.long, device=x.device)
        for _ in range(self.steps):
            x = (x + self._step(f, x, label[rows], others[rows], near.norm)).clamp(0, 1)
            cost[rows] += torch.tensor([2, others.shape[1]], device=x.device)
            with torch.no_grad():
                left = ~near.offer(x, f(x).to(x.dtype), rows)
            x, rows = x[left], rows[left]
            if len(rows) == 0:
                break
        return cost

    def _step(self, f: Classifier, x: Tensor, label: Tensor, others: Tensor, norm: str) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            z = f(x).to(x.dtype)
            ahead = z.gather(1, label) - z.gather(1, others)  # -f'
            w = [-torch.autograd.grad(a.sum(), x, retain_graph=True)[0] for a in ahead.unbind(1)]
        n, k = others.shape
        w = torch.stack(w, 1).nan_to_num().flatten(0, 1)
        least = 10 * torch.finfo(x.dtype).eps * z.detach().abs().amax(1, keepdim=True)  # a tie is to be broken as well
        goal = ((1 + self.overshoot) * ahead.detach()).maximum(least).flatten()
        r = to_hyperplane(x.detach().repeat_interleave(k, 0), w, -goal, norm)
        short = (w * r).flatten(1).sum(1) < goal * (1 - 1e-3)  # no point of the box lies behind this boundary
        size = torch.where(short, torch.inf, norm_of(r, norm)).view(n, k)
        return r.view(n, k, *x.shape[1:])[torch.arange(n, device=x.device), size.argmin(1)]
