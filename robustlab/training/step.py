"""The training step: crafting once, the loss as often as the gradient rule wants, one update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustlab.modes import ambient, bn_mode, frozen
from robustlab.outer import Outer
from robustlab.rng import Rng
from robustlab.types import Trainer, UserError, Views, walk


def check_shards(trainer: Trainer, shards: int) -> None:
    """Refuse micro-batches and several processes where a part couples the batch: each shard would be coupled by itself.

    Raises:
        UserError: names the parts.
    """
    if shards == 1 or trainer.allow_shards:
        return
    coupled = sorted({p.name for p in walk(trainer) if getattr(p, "coupled", False)})
    if coupled:
        raise UserError(
            f"trainer: {', '.join(coupled)} couples the samples of a batch, so {shards} shards compute something else than "
            f"one; set trainer.allow_shards=true to accept that"
        )


def train_step(
    outer: Outer,
    batches: Sequence[Views],
    trainer: Trainer,
    optimizer: torch.optim.Optimizer,
    rng: Rng,
    *,
    first: int = 0,
    stride: int = 1,
    clip_grad: float | None = None,
) -> dict[str, Tensor]:
    """One update of the weights.

    Args:
        outer: classifier, loss and memory.
        batches: micro-batches, usually one; each is the views that the loader made.
        trainer: the composition, its schedules resolved.
        optimizer: of the outer parameters; its gradients are empty.
        rng: of this run; draws are keyed by tickets and by the micro-batches' global numbers.
        first, stride: the micro-batches' global numbers are first, first + stride, ...
        clip_grad: largest total norm of the gradient.

    Returns:
        The named terms and ``"loss"``, detached.
    """
    outer.trainer, shards = trainer, []
    for views, r in zip(batches, rng.split(len(batches), first, stride), strict=True):
        with frozen(outer.f), bn_mode(outer.f, trainer.attack_bn), ambient(r.child("inner").batch_seed()):
            for i, stage in enumerate(trainer.inner):  # x~ = mix(x);  x' = argmax_d L(f(x~ + d), y~)
                views = outer.call(stage, outer.callee, views, r.child("inner", i))
        shards.append((views, r))
    outer.train()
    terms = outer.call(trainer.gradient, outer.f, outer.loss, shards, rng)  # g = dL/dw at w, or at w + v
    if clip_grad is not None:
        torch.nn.utils.clip_grad_norm_(outer.parameters(), clip_grad)
    optimizer.step()  # w <- w - lr g
    outer.commit()
    optimizer.zero_grad()
    outer.average()
    return terms
