"""What an attack spends: every row that goes forward through the classifier, and every row that comes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robustlab.modes import unwrap
from robustlab.types import Classifier


class Counter:
    """A classifier that counts.

    A forward of n rows adds n to ``forwards``. Each time a gradient arrives at those logits, n is added to ``backwards``: an
    attack that goes back K times through one forward has spent K backwards per row. Rows, not calls, are counted, so
    an attack that drops finished samples from its batch is billed for what it ran.

    Args:
        f: the classifier.
        module: the module behind it, where ``modes.frozen`` and ``modes.bn_mode`` find it; None looks for it in ``f``.

    Attributes:
        forwards, backwards: rows so far.
    """

    def __init__(self, f: Classifier, module: Any = None):
        self.f = f
        self.module = unwrap(f) if module is None else module
        self.forwards = 0
        self.backwards = 0

    def __call__(self, x: Tensor) -> Tensor:
        rows = len(x)
        self.forwards += rows
        z = self.f(x)
        if z.requires_grad:
            z.register_hook(lambda _: self._back(rows))
        return z

    def _back(self, rows: int) -> None:
        self.backwards += rows


def per_sample(info: Mapping[str, Any], n: int, counter: Counter) -> list[list[int]] | None:
    """Forward and backward passes spent on each of n samples, as an attack tells them: n pairs.

    None where it tells none, or they do not add up to what was counted.
    """
    told = info.get("passes")
    if not isinstance(told, Tensor) or told.shape != (n, 2) or told.dtype != torch.int64 or bool((told < 0).any()):
        return None
    return told.tolist() if told.sum(0).tolist() == [counter.forwards, counter.backwards] else None
