"""Label smoothing (Szegedy et al., CVPR 2016, section 7).

    y~ = (1 - s) y + s / K        s in [0, 1], K classes

Differences from the authors' code: none.
"""

from __future__ import annotations

from dataclasses import replace

from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Classifier, Fraction, Stage, Views


@register("label-smoothing", cite="Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, CVPR 2016, arXiv:1512.00567")
class LabelSmoothing(Stage):
    """Mixes the targets with the uniform distribution over the classes.

    Attributes:
        smoothing: s, the share of the uniform distribution; 0 changes nothing.
        on: the view whose targets are smoothed. An attack that runs later on this view sees the smoothed targets.
        to: the name of the result.
    """

    smoothing: Fraction = 0.1
    on: str = "clean"
    to: str = "clean"

    def __call__(self, f: Classifier, views: Views, rng: Rng) -> Views:
        view = views[self.on]
        s, num_classes = self.smoothing, view.y.shape[-1]
        return {**views, self.to: replace(view, y=(1 - s) * view.y + s / num_classes)}
