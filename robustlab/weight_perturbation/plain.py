"""The gradient at the weights themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from robustlab.outer import backward
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import GradientRule, Shard


@register("plain")
class Plain(GradientRule):
    """The gradient of the loss at the present weights: ordinary training."""

    def __call__(self, f: nn.Module, loss: Any, shards: Sequence[Shard], rng: Rng) -> dict[str, Tensor]:
        return backward(loss, shards)
