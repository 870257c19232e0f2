"""What a set of figures says about a model, in words. The order matters: a success of an attack needs no reliable gradients.

chance       the clean accuracy's interval reaches down to 1/K: there is nothing to attack
not robust   the robust accuracy is 1/K or less: no better than guessing, and an upper bound at that
unreliable   a check of the reliability report failed: the robust accuracy may be far too high
robust       on a share of the images, with its interval; an upper bound like every such figure
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["chance", "not robust", "unreliable", "robust"]


@dataclass(frozen=True)
class Verdict:
    """A level, the sentence for people, and what supports or weakens it."""

    level: Level
    text: str
    reasons: tuple[str, ...] = ()


def verdict(record: Any, num_classes: int, notes: Sequence[str] = ()) -> Verdict:
    """The verdict on a model.

    Args:
        record: of a suite with attacks.
        num_classes: K.
        notes: sentences of other measurements that weaken the verdict, such as a cross-check that disagrees.
    """
    clean, robust, chance = record.metrics.clean, record.metrics.robust, 1 / num_classes
    where = f"{record.threat.norm} {record.threat.eps:.4g}"
    r = record.reliability
    bad = [c for c in (r.checks if r else ()) if c.verdict == "fail"]
    doubts = [f"{c.name}: {c.advice}" for c in (r.checks if r else ()) if c.verdict == "warn"]
    if clean.interval[0] <= chance:
        return Verdict(
            "chance",
            f"Chance level: {_share(clean)} of the clean images are classified correctly, guessing gives {100 * chance:.1f} %. "
            "Robustness of such a model means nothing.",
        )
    if robust.accuracy <= chance:
        return Verdict(
            "not robust",
            f"Not robust at {where}: the attacks leave {_share(robust)} of the images correct, guessing "
            f"would leave {100 * chance:.1f} %.",
        )
    if bad:
        return Verdict(
            "unreliable",
            f"Unreliable: the attacks leave {_share(robust)} at {where}, but this figure cannot be believed.",
            (*(f"{c.name}: {c.advice}" for c in bad), *doubts, *notes),
        )
    return Verdict(
        "robust",
        f"Robust on {_share(robust)} of the images at {where} (clean: {_share(clean)}). A stronger attack can only lower this.",
        (*doubts, *notes),
    )


def _share(p: Any) -> str:
    return f"{100 * p.accuracy:.1f} % (95 %: {100 * p.interval[0]:.1f} to {100 * p.interval[1]:.1f})"
