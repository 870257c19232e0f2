"""What combinators share: attacks that hold attacks, and the loop that runs attacks in turn on what is left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustlab.attacks.steps import Point, fooled, objective, passes, put_better
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, rebuild


class Combinator(Attack):
    """An attack with attacks in its fields.

    Their open norm and eps are its own. It works in the norms that all of them know, and is coupled when one of them is.
    """

    def __post_init__(self) -> None:
        held = self.held()
        if not held:
            raise ValueError("attacks: give at least one attack")
        own = [n for n in ("linf", "l2", "l1", "l0") if all(n in a.norms for a in held.values())]
        object.__setattr__(self, "norms", tuple(own))
        object.__setattr__(self, "coupled", any(a.coupled for a in held.values()))
        super().__post_init__()
        known = {"norm": self.norm, "eps": self.eps if isinstance(self.eps, int | float) else None}
        for where, attack in held.items():
            for name, value in known.items():
                inner = getattr(attack, name)
                if None not in (inner, value) and inner != value:
                    raise ValueError(f"{where}: the attack '{attack.name}' has its own {name}, {inner}; around it stands {value}")
        for field in fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, rebuild(value, lambda name, v: known[name] if v is None and name in known else v))

    def held(self) -> dict[str, Attack]:
        """The attacks, by the paths of their fields."""
        found: dict[str, Attack] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            for i, attack in enumerate(value if isinstance(value, tuple) else (value,)):
                if isinstance(attack, Attack):
                    found[f"{field.name}.{i}" if isinstance(value, tuple) else field.name] = attack
        return found


class Turn(NamedTuple):
    """One run of an attack: the purpose of its draws, and the class probabilities (N, K) it is given (None: y)."""

    attack: Attack
    purpose: tuple[str | int, ...]
    toward: Tensor | None = None


def in_turn(turns: Iterable[Turn], f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
    """Run attacks one after the other, each on the samples that none has fooled.

    A sample gets the point that fools the classifier, else the one of largest cross-entropy. Each point costs one more forward
    pass, to compare it; ``passes`` is left out where one of the attacks does not count its own.
    """
    x, cost = x.detach(), passes(x, 0, 0)
    least = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    found, counted = Point(x.clone(), least, torch.zeros_like(least, dtype=torch.bool)), True
    for attack, purpose, toward in turns:
        rows = (~found.fooled).nonzero().squeeze(1)
        if len(rows) == 0:
            break
        goal = y if toward is None else toward
        x_adv, info = attack.run(f, x[rows], goal[rows], rng.select(rows).child(*purpose))
        targeted = toward is None and getattr(attack, "targeted", False)
        with torch.no_grad():
            z = f(x_adv).to(x.dtype)
        put_better(found, rows, Point(x_adv, objective("ce", targeted)(z, y[rows]), fooled(z, y[rows], targeted)))
        counted &= "passes" in info
        cost[rows] += info.get("passes", 0) + torch.tensor([1, 0], device=x.device)
    return found.x, {"passes": cost} if counted else {}
