"""Guards look at a run and say what the loop should do; the loop alone acts."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


class Act(enum.Enum):
    """What the loop does next."""

    CONTINUE = "continue"
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


def finite_weights(outer: nn.Module, epoch: int) -> Verdict:
    """Stop when a weight, an average or a running statistic is not a number: the loss may not show it yet."""
    for name, value in outer.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return Verdict(
                Act.STOP,
                f"{name} is not finite after epoch {epoch + 1}: lower optimizer.lr or set training.clip_grad",
            )
    return FINE


def catastrophic_overfitting(
    now: float, best: float, drop: float, epoch: int, act: Literal["stop", "rollback"], rolled_back: bool
) -> Verdict:
    """Act when accuracy under PGD on training images has fallen by more than ``drop`` below the best of the run.

    A second time there is nothing left to change, so the run stops. Wong, Rice, Kolter, ICLR 2020, stop at a fall of 0.2.
    """
    if best - now <= drop:
        return FINE
    fell = f"catastrophic overfitting in epoch {epoch + 1}: accuracy under PGD on training images fell from {best:.1%} to {now:.1%}"
    if act == "rollback" and not rolled_back:
        return Verdict(Act.ROLLBACK, f"{fell}; back to epoch {epoch}, and on with another attack")
    again = " again, after a rollback" if rolled_back else ""
    return Verdict(Act.STOP, f"{fell}{again}; take more attack steps, more noise (n-fgsm) or gradalign, or lower optimizer.lr")


def above_chance(clean: float, num_classes: int, epoch: int, patience: int | None) -> Verdict:
    """Stop when, ``patience`` epochs in, clean validation accuracy is not 1.2 times better than guessing."""
    if patience is None or epoch + 1 < patience or clean > 1.2 / num_classes:
        return FINE
    return Verdict(
        Act.STOP,
        f"after {epoch + 1} epochs clean validation accuracy is {clean:.1%}, chance level: the training has collapsed; lower "
        "optimizer.lr or threat.eps, or raise training.guards.collapse",
    )
