"""BatchNorm statistics for averaged weights: the mean over training batches, of the views that update the live model's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from robustlab.modes import ambient, bn_mode, frozen
from robustlab.outer import Forward, Outer, Precise
from robustlab.rng import Rng
from robustlab.types import Trainer, Views


def refresh_statistics(outer: Outer, batches: Iterable[Views], trainer: Trainer, rng: Rng, first: int = 0, stride: int = 1) -> None:
    """Recompute the running statistics of ``outer.averaged()``; all weights and the live model stay as they are.

    A model without BatchNorm, a trainer whose views update no statistics, and the live model itself are left as they are.

    Args:
        outer: whose average it is.
        batches: micro-batches as the loader makes them.
        trainer: its inner stages make the views, its ``bn_updates`` say which count.
        rng: draws are keyed by tickets and by the micro-batches' global numbers first, first + stride, ...
    """
    outer.trainer = trainer
    f = outer.averaged()
    layers = [m for m in f.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    if f is outer.f or not layers or not trainer.bn_updates:
        return
    callee, momenta = Precise(f, outer.callee.precision), [m.momentum for m in layers]
    try:
        for m in layers:
            m.reset_running_stats()
            m.momentum = None  # the plain mean over the batches
        for i, views in enumerate(batches):
            (r,) = rng.split(1, first + i * stride)
            with frozen(f), bn_mode(f, "train-noupdate"), ambient(r.child("inner").batch_seed()):
                for j, stage in enumerate(trainer.inner):
                    views = outer.call(stage, callee, views, r.child("inner", j))
            with torch.no_grad(), ambient(r.batch_seed()):
                forward = Forward(callee, views, r.child("loss"), trainer, stats=True)
                for name in trainer.bn_updates:
                    forward(name)
    finally:
        for m, momentum in zip(layers, momenta, strict=True):
            m.momentum = momentum
