"""Example-normalised gradients, ENGM (Dabouei, Taherkhani, Soleymani, Nasrabadi, ECCV 2022): no sample moves the weights by itself.

    u   = (1/N) sum_i w_i g_i,      g_i = the gradient of sample i's loss,      w_i = min(1, beta / ||g_i||)

    beta   bound: the longest gradient that a single sample contributes, in units of the loss per unit of weight

u is the gradient of (1/N) sum_i w_i l_i with the w_i held fixed, so the weights of the samples are all there is to it, and every
objective can be had. Adversarial training has longer and more unequal gradients than ordinary training, which slows momentum SGD
down; the bound takes that away. An infinite beta is the plain gradient.

||g_i|| is exact, by a vectorised map over the samples. They are taken alone, since BatchNorm in train mode couples them: by its
running statistics and without dropout. Where layers are perturbed or mixed (``slat``, ``manifold-mixup``) they cannot be taken
alone, and each sample costs a backward pass through the whole batch. Terms that couple the batch keep the weight 1.

Differences from the paper: only its abstract could be read, and there is no public code. This form of w_i is a reconstruction, and
so is the default of beta.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustlab.outer import backward, sample_gradient_norms
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Count, GradientRule, NonNegative, Shard


@register("engm", cite="Dabouei et al., ECCV 2022, arXiv:2209.01199")
class Engm(GradientRule):
    """The mean of the samples' gradients, each shortened to a bound; their lengths are exact.

    Attributes:
        bound: beta, the longest gradient that a sample contributes; None is the plain gradient.
        chunk: how many samples' gradients are held in memory at once; each has the size of the model.
    """

    bound: NonNegative | None = 1.0
    chunk: Count = 32

    def __call__(self, f: nn.Module, loss: Any, shards: Sequence[Shard], rng: Rng) -> dict[str, Tensor]:
        shares = [clipping(sample_gradient_norms(loss, shard, self.chunk), self.bound) for shard in shards]
        return backward(loss, shards, shares=shares)


def clipping(norms: Tensor, bound: float | None) -> Tensor:
    """min(1, bound / norm), (N,)."""
    if bound is None:
        return torch.ones_like(norms)
    return (bound / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)
