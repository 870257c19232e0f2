"""Guards look at a run and say what the loop should do; the loop alone acts."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass


class Act(enum.Enum):
    """What the loop does next."""

    CONTINUE = "continue"
    SKIP = "skip"
    STOP = "stop"
    ROLLBACK = "rollback"


@dataclass(frozen=True)
class Verdict:
    """An act with its reason, which is shown to the user."""

    act: Act = Act.CONTINUE
    reason: str = ""


FINE = Verdict()


def finite_loss(loss: float, epoch: int, step: int) -> Verdict:
    """Stop at the first loss that is not a number."""
    if math.isfinite(loss):
        return FINE
    return Verdict(Act.STOP, f"the loss is {loss} in epoch {epoch + 1}, step {step}: lower optimizer.lr or set training.clip_grad")


def above_chance(clean: float, num_classes: int, epoch: int, patience: int | None) -> Verdict:
    """Stop when, ``patience`` epochs in, clean validation accuracy is not 1.2 times better than guessing."""
    if patience is None or epoch + 1 < patience or clean > 1.2 / num_classes:
        return FINE
    return Verdict(
        Act.STOP,
        f"after {epoch + 1} epochs clean validation accuracy is {clean:.1%}, chance level: the training has collapsed; lower "
        "optimizer.lr or threat.eps, or raise training.guards.collapse",
    )
