"""A targeted attack towards one class after the other.

Order of the classes t != c = argmax y, the most promising first:

    logits   z_t falling
    malt     (z_c - z_t) / ||grad_x (z_c - z_t)||_q rising, q dual to the threat's norm: to first order the distance at which t
             overtakes c (the idea of Melamed, Yehudai, Shamir, NeurIPS 2024, arXiv:2407.02240: the nearest class is not the one
             of largest logit); only the hundred classes of largest logits are ranked
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from robustlab import geometry
from robustlab.attacks.inner import Combinator, Turn, in_turn
from robustlab.attacks.pgd import PGD
from robustlab.attacks.steps import passes, threat_of
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, NonNegative, Norm, one_hot

RANKED = 100  # classes that get a gradient
DUAL = {"linf": "l1", "l2": "l2", "l1": "linf", "l0": "linf"}


@register("targeted-all", cite="Melamed, Yehudai, Shamir, NeurIPS 2024, arXiv:2407.02240")
class TargetedAll(Combinator):
    """Runs a targeted attack towards each of several classes, the most promising first, until the sample is misclassified.

    Any wrong class counts. Of an unfooled sample the point of largest cross-entropy is kept. Costs the attack and one forward pass
    per target, and one forward pass for the order, with ``malt`` one backward pass per class as well (at most 100).

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        attack: an attack with a field ``targeted``; its open norm and eps are these.
        num_targets: how many classes, at most; every other class where there are fewer.
        order: ``logits`` or ``malt``.
    """

    norms = ("linf", "l2", "l1")

    norm: Norm | None = None
    eps: NonNegative | None = None
    attack: Attack = PGD()
    num_targets: Count = 9
    order: Literal["logits", "malt"] = "malt"

    def __post_init__(self) -> None:
        if not any(f.name == "targeted" for f in fields(self.attack)):  # type: ignore[arg-type]
            raise ValueError(f"attack: '{self.attack.name}' has no targeted mode (no field 'targeted')")
        super().__post_init__()

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        norm, _ = threat_of(self)
        attack = replace(self.attack, targeted=True)  # type: ignore[call-arg]
        order, spent = ranked_targets(f, x.detach(), y, norm, self.order, self.num_targets)
        turns = (Turn(attack, ("target", i), one_hot(t, y.shape[-1], y.dtype)) for i, t in enumerate(order.unbind(1)))
        x_adv, info = in_turn(turns, f, x, y, rng)
        if "passes" in info:
            info["passes"] += spent
        return x_adv, info


def ranked_targets(f: Classifier, x: Tensor, y: Tensor, norm: str, order: str, most: int) -> tuple[Tensor, Tensor]:
    """At most ``most`` wrong classes of each sample, the most promising first (N, T), and the passes that it took (N, 2)."""
    c = y.argmax(-1, keepdim=True)
    with torch.set_grad_enabled(order == "malt"):
        x = x.detach().requires_grad_(order == "malt")
        z = f(x).to(x.dtype)
    others = z.detach().scatter(1, c, -torch.inf).argsort(stable=True, dim=1, descending=True)[:, : z.shape[1] - 1]
    if order == "logits":
        return others[:, :most], passes(x, 1, 0)
    others = others[:, :RANKED]
    distance = []
    for t in others.unbind(1):
        gap = (z.gather(1, c) - z.gather(1, t[:, None])).squeeze(1)
        (g,) = torch.autograd.grad(gap.sum(), x, retain_graph=True)
        size = geometry.norm_of(g.nan_to_num(), DUAL[norm])
        distance.append(gap.detach() / size.clamp_min(torch.finfo(x.dtype).tiny))
    rank = torch.stack(distance, 1).argsort(stable=True, dim=1)
    return others.gather(1, rank)[:, :most], passes(x, 1, others.shape[1])
