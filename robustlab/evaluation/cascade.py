"""Ordered attacks: each gets the samples that none before it has broken; a gate may spare some of these the dearer attacks.

    survivors = correct
    for each attack in order:  survivors = those of them that it does not break
        at the gate:           those whose nearness is at least the threshold are spared the rest

A verdict or a nearness is what the ledger says: one that is read again decides as it did when it was written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustlab.types import Attack, BoundSuite, Suite, UserError

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """One attack of a cascade: its name there, and the number that its draws are keyed by, counted anew behind a gate."""

    label: str
    attack: Attack
    position: int


@dataclass(frozen=True)
class Gate:
    """The step that decides who goes on: survivors whose nearness is below the threshold, or no finite number."""

    label: str
    near: float

    def spares(self, entry: Entry) -> list[bool]:
        """For each sample that the step was given whether the others are spared it.

        Raises:
            UserError: the step reported no nearness.
        """
        told = entry.get("nearness", [])
        if len(told) != len(entry["verdict"]):
            raise UserError(
                f"the attack '{self.label}' cannot lead a suite: it does not report how near each sample is ('nearness')"
            )
        return [value is not None and value >= self.near for value in told]


def steps_of(suite: Suite) -> list[Step]:
    """The attacks of a suite."""
    leading = suite.leading if isinstance(suite, BoundSuite) else 0
    labels = unique([a.name for a in suite.attacks])
    return [
        Step(label, attack, i - leading if i >= leading else i)
        for i, (label, attack) in enumerate(zip(labels, suite.attacks, strict=True))
    ]


def gate_of(suite: Suite) -> Gate | None:
    """Where samples are spared the rest of a suite."""
    if not isinstance(suite, BoundSuite) or len(suite.attacks) <= suite.leading:
        return None
    return Gate(steps_of(suite)[suite.leading - 1].label, suite.near)


def nearness_in(info: Mapping[str, Any]) -> dict[str, Any]:
    """What the ledger keeps of an attack's by-products: null where the nearness is not finite."""
    if "nearness" not in info:
        return {}
    return {"nearness": [value if math.isfinite(value) else None for value in info["nearness"].tolist()]}


def descend(
    alive: Tensor, steps: Sequence[Step], gate: Gate | None, attack: Callable[[Step, Tensor], Entry]
) -> tuple[Tensor, Tensor]:
    """Run a batch down a cascade.

    Args:
        alive: which samples enter (N,).
        steps, gate: the cascade.
        attack: runs a step on the samples at some rows and returns its entry in the ledger.

    Returns:
        Which samples survive (N,), and which of these were spared some of the steps (N,).
    """
    alive, spared = alive.clone(), torch.zeros_like(alive)
    for step in steps:
        rows = (alive & ~spared).nonzero().squeeze(1)
        entry = attack(step, rows)
        alive[rows] = torch.tensor(entry["verdict"], dtype=torch.bool)
        if gate is not None and step.label == gate.label:
            spared[rows] = alive[rows] & torch.tensor(gate.spares(entry), dtype=torch.bool)
    return alive, spared


def unique(names: list[str]) -> list[str]:
    """The names, with ``#2``, ``#3`` where one comes again."""
    return [name if (k := names[:i].count(name)) == 0 else f"{name}#{k + 1}" for i, name in enumerate(names)]
