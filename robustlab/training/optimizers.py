"""Optimizers: torch's own, under the names that configurations use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from robustlab.registry import register
from robustlab.types import NonNegative, OpenFraction, Optimizer, Positive


def groups(params: Iterable[nn.Parameter], weight_decay: float, decay_vectors: bool) -> list[dict[str, Any]]:
    """Parameter groups: weights decay; biases and normalisation layers (one dimension) only if asked."""
    params = [p for p in params if p.requires_grad]
    if decay_vectors:
        return [{"params": params, "weight_decay": weight_decay}]
    split = {True: [p for p in params if p.ndim > 1], False: [p for p in params if p.ndim <= 1]}
    return [{"params": p, "weight_decay": weight_decay if is_weight else 0.0} for is_weight, p in split.items() if p]


@register("sgd")
class Sgd(Optimizer):
    """Stochastic gradient descent with momentum.

    Attributes:
        lr: the learning rate that the schedule multiplies.
        momentum: of the velocity.
        nesterov: look-ahead momentum.
        weight_decay: added to the gradient as weight_decay * w.
        decay_vectors: whether biases and normalisation layers decay too, as in most papers' code.
    """

    lr: Positive = 0.1
    momentum: OpenFraction = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 5e-4
    decay_vectors: bool = True

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        parts = groups(params, self.weight_decay, self.decay_vectors)
        return torch.optim.SGD(parts, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


@register("adamw", cite="Loshchilov and Hutter, ICLR 2019, arXiv:1711.05101")
class AdamW(Optimizer):
    """Adam with decoupled weight decay.

    Attributes:
        lr: the learning rate that the schedule multiplies.
        beta1, beta2: decay rates of the moments.
        adam_eps: added to the denominator.
        weight_decay: decoupled.
        decay_vectors: whether biases and normalisation layers decay too.
    """

    lr: Positive = 1e-3
    beta1: OpenFraction = 0.9
    beta2: OpenFraction = 0.999
    adam_eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    decay_vectors: bool = False

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        parts = groups(params, self.weight_decay, self.decay_vectors)
        return torch.optim.AdamW(parts, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.adam_eps)
