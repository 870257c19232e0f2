"""Schedules: numbers that depend on time. The learning rate is the optimizer's times one; any other number can be one itself.

Times are epochs, fractions allowed; ``epochs`` is the length of the run; ``warmup`` the length of a linear rise before the curve.
"""

from __future__ import annotations

import bisect
import math

from robustlab.registry import register
from robustlab.types import Fraction, NonNegative, Positive, Schedule


@register("constant")
class Constant(Schedule):
    """The same value throughout, after an optional linear warm-up from zero.

    Attributes:
        value: the value.
        warmup: epochs of linear rise from 0.
    """

    value: float = 1.0
    warmup: NonNegative = 0.0

    def at(self, epoch: float, epochs: float) -> float:
        return self.value * min(1.0, epoch / self.warmup if self.warmup else 1.0)


@register("linear")
class Linear(Schedule):
    """A straight line from ``start`` to ``end``.

    Attributes:
        start, end: the values at both ends.
        epochs: length of the line; null means the whole run. Afterwards the value stays.
    """

    start: float = 0.0
    end: float = 1.0
    epochs: Positive | None = None

    def at(self, epoch: float, epochs: float) -> float:
        share = min(1.0, epoch / (self.epochs or epochs))
        return self.start + (self.end - self.start) * share


@register("cosine", cite="Loshchilov and Hutter, ICLR 2017, arXiv:1608.03983")
class Cosine(Schedule):
    """Half a cosine from ``start`` to ``end``, after an optional linear warm-up from zero.

    Attributes:
        start, end: the values at both ends.
        warmup: epochs of linear rise from 0 to ``start``.
    """

    start: float = 1.0
    end: float = 0.0
    warmup: NonNegative = 0.0

    def at(self, epoch: float, epochs: float) -> float:
        if epoch < self.warmup:
            return self.start * epoch / self.warmup
        share = min(1.0, (epoch - self.warmup) / max(epochs - self.warmup, 1e-9))
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * share)) / 2


@register("piecewise")
class Piecewise(Schedule):
    """Constant pieces: ``values[0]`` until the first milestone, and so on, after an optional linear warm-up from zero.

    Attributes:
        milestones: shares of the run at which the value changes, rising (Rice et al. 2020: half and three quarters).
        values: one more than milestones.
        warmup: epochs of linear rise from 0.
    """

    milestones: tuple[Fraction, ...] = (0.5, 0.75)
    values: tuple[float, ...] = (1.0, 0.1, 0.01)
    warmup: NonNegative = 0.0

    def __post_init__(self) -> None:
        if len(self.values) != len(self.milestones) + 1:
            raise ValueError(f"values: expected one more than milestones ({len(self.milestones) + 1}), got {len(self.values)}")
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError("milestones must rise")

    def at(self, epoch: float, epochs: float) -> float:
        if epoch < self.warmup:
            return self.values[0] * epoch / self.warmup
        return self.values[bisect.bisect_right(self.milestones, epoch / epochs + 1e-12)]


@register("one-cycle", cite="Smith and Topin, arXiv:1708.07120")
class OneCycle(Schedule):
    """A linear rise to ``peak`` and a linear fall to ``end``. Momentum is not cycled.

    Attributes:
        start, peak, end: the values at the beginning, the top and the end.
        top: where the top is, as a share of the run.
    """

    start: float = 0.0
    peak: float = 1.0
    end: float = 0.0
    top: Fraction = 0.4

    def at(self, epoch: float, epochs: float) -> float:
        share = min(1.0, epoch / epochs)
        if share < self.top:
            return self.start + (self.peak - self.start) * share / self.top
        return self.peak + (self.end - self.peak) * (share - self.top) / max(1 - self.top, 1e-9)
