"""Per-sample losses: logits (N, K) and targets (N, K) in, (N,) out. Nothing here reduces over the batch."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """-sum_k y_k log softmax(z)_k."""
    return -(y * z.log_softmax(-1)).sum(-1)


def kl(p: Tensor, z: Tensor) -> Tensor:
    """KL(p || softmax(z)) for probabilities p (N, K), with 0 log 0 = 0; gradients flow through both arguments.

    The gradient is finite at p = 0 too, where softmax underflows: a derivative of -inf there would turn into NaN behind it.
    """
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
    return (p * (log_p - z.log_softmax(-1))).sum(-1)


def kl_logits(z_p: Tensor, z_q: Tensor) -> Tensor:
    """KL(softmax(z_p) || softmax(z_q)); gradients flow through both arguments."""
    log_p = z_p.log_softmax(-1)
    return (log_p.exp() * (log_p - z_q.log_softmax(-1))).sum(-1)


def margin(z: Tensor, y: Tensor) -> Tensor:
    """max_{k != c} z_k - z_c with c = argmax y: positive where the sample is misclassified."""
    c = y.argmax(-1, keepdim=True)
    other = z.scatter(-1, c, -torch.inf).amax(-1)
    return other - z.gather(-1, c).squeeze(-1)


def dlr(z: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein, ICML 2020, equation 6): -(z_c - max_{k != c} z_k) / (z_(1) - z_(3)).

    z_(1) >= z_(2) >= z_(3) are the sorted logits.

    Raises:
        ValueError: fewer than three classes.
    """
    if z.shape[-1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, got {z.shape[-1]}")
    top = z.topk(3, dim=-1).values
    return margin(z, y) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(z: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted DLR (equation 7): -(z_c - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), t = ``target`` (N,).

    Raises:
        ValueError: fewer than four classes.
    """
    if z.shape[-1] < 4:
        raise ValueError(f"the targeted DLR loss needs at least 4 classes, got {z.shape[-1]}")
    top = z.topk(4, dim=-1).values
    z_c = z.gather(-1, y.argmax(-1, keepdim=True)).squeeze(-1)
    z_t = z.gather(-1, target[:, None]).squeeze(-1)
    return (z_t - z_c) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)
