"""Adversarial weight perturbation (Wu, Xia, Wang, NeurIPS 2020, arXiv:2004.05884), equations 7 to 10.

    min_w max_{v in V}  L(f_{w+v}(x'), y),      V = { v : ||v_l|| <= gamma ||w_l||  for every layer l }
    v_l = gamma * ||w_l|| * g_l / ||g_l||,      g = dL/dw at w, on the fixed adversarial batch x'

    gamma   relative radius, without unit        l   runs over weights with more than one dimension (no BatchNorm, no biases)

The adversarial examples are crafted once, at w. The ascent pass normalises by batch statistics and does not touch the running
ones; the descent pass at w + v updates them. The optimizer's step, with its weight decay, acts on the restored w.
Differences from the authors' code: weights are restored by copy, where theirs subtracts v and drifts; no proxy network; weight
decay acts at w, where theirs acts at w + v inside the optimizer (the decay's gradient differs by wd * v); the mean over
processes is taken before v is formed, so that v does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustlab.modes import perturbed
from robustlab.outer import backward, gradient_at
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import GradientRule, NonNegative, Shard


@register("awp", cite="Wu, Xia, Wang, NeurIPS 2020, arXiv:2004.05884")
class Awp(GradientRule):
    """The gradient at the worst weights within a relative radius around each layer.

    Attributes:
        gamma: the radius as a share of each layer's norm.
    """

    gamma: NonNegative = 0.01

    def __call__(self, f: nn.Module, loss: Any, shards: Sequence[Shard], rng: Rng) -> dict[str, Tensor]:
        leaves = list(matrices(f).values())
        with perturbed(leaves, worst(leaves, gradient_at(loss, shards, leaves), self.gamma)):
            return backward(loss, shards)


def matrices(f: nn.Module) -> dict[str, Tensor]:
    """The trained weights with more than one dimension, by name, in the model's order."""
    return {name: p for name, p in f.named_parameters() if p.ndim > 1 and p.requires_grad}


@torch.no_grad()
def worst(leaves: Sequence[Tensor], grads: Sequence[Tensor], gamma: float) -> list[Tensor]:
    """v_l = gamma ||w_l|| g_l / ||g_l||; zero where the gradient is."""
    tiny = [torch.finfo(w.dtype).tiny for w in leaves]
    return [gamma * w.norm() / g.norm().clamp_min(t) * g for w, g, t in zip(leaves, grads, tiny, strict=True)]
