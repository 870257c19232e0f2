"""Cross-entropy on one or several views: (1/V) sum_v CE(f(x_v), y_v)."""

from __future__ import annotations

from robustlab.losses import cross_entropy
from robustlab.registry import register
from robustlab.types import Forward, Objective, Term, Terms, Views


@register("cross-entropy")
class CrossEntropy(Objective):
    """Cross-entropy between softmax(f(x)) and the target probabilities, averaged over the views.

    Attributes:
        on: the views.
    """

    on: tuple[str, ...] = ("clean",)

    def __post_init__(self) -> None:
        if not self.on:
            raise ValueError("on: name at least one view")

    def __call__(self, forward: Forward, views: Views) -> Terms:
        share = 1 / len(self.on)
        return {name: Term(cross_entropy(forward(name), views[name].y), coef=share, weight=views[name].weight) for name in self.on}
