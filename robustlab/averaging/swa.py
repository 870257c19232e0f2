"""Stochastic weight averaging (Izmailov et al., UAI 2018, arXiv:1803.05407), algorithm 1.

    a <- (n a + w) / (n + 1),   n <- n + 1        at the steps T, T - c, T - 2c, ... after the first ``start`` T

    T   optimizer steps of the whole run       c   steps between two snapshots       n   snapshots so far

BatchNorm's running statistics of the live model do not belong to the average. They are therefore recomputed before it is looked at:
the mean over ``refresh`` training batches, of the views that update the live model's statistics too. Before the first snapshot
the live model is evaluated. One snapshot is the live model of that step.
Averaging late weights delays robust overfitting: Chen et al., ICLR 2021.

Differences from the authors' code: theirs refreshes on the clean training set; here the trainer's ``bn_updates`` say which views
count (for most kinds of adversarial training the adversarial ones), so that the statistics fit the weights. The attack that makes
them runs on the average, normalised by batch statistics, since the running ones are being rebuilt.
"""

from __future__ import annotations

import torch
from torch import nn

from robustlab.averaging.ema import Shadow
from robustlab.registry import register
from robustlab.types import Averaging, Context, OpenFraction, Positive, Whole


class Snapshots(Shadow):
    """The mean of the snapshots, their number, and when they are taken."""

    def __init__(self, f: nn.Module, steps: int, begin: int, every: int):
        super().__init__(f)
        self.register_buffer("count", torch.zeros_like(self.steps))
        self.end, self.begin, self.every = steps, begin, every


@register("swa", cite="Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, UAI 2018, arXiv:1803.05407")
class Swa(Averaging):
    """Evaluates the mean of the weights at regular times of the last part of the run, with BatchNorm statistics of its own.

    Attributes:
        start: the share of the run after which snapshots are taken.
        every: epochs between two snapshots; fractions are rounded to steps. The last step of the run is always one.
        refresh: training batches over which BatchNorm's statistics are recomputed before each look; 0 copies the live model's.
    """

    start: OpenFraction = 0.5
    every: Positive = 1.0
    refresh: Whole = 50

    def init_state(self, ctx: Context) -> nn.Module:
        """Where the length of the run is not known, every step is a snapshot."""
        if ctx.steps is None or ctx.epochs is None:
            return Snapshots(ctx.f, 0, 0, 1)
        return Snapshots(ctx.f, ctx.steps, round(self.start * ctx.steps), max(1, round(self.every * ctx.steps / ctx.epochs)))

    @torch.no_grad()
    def update(self, state: nn.Module, f: nn.Module) -> None:
        state.steps.add_(1)
        due = (state.steps > state.begin) & ((state.end - state.steps) % state.every == 0)
        share = due.double() / (state.count + 1)  # as tensors: no step waits for the device
        average, live = list(state.module.parameters()), list(f.parameters())
        torch._foreach_mul_(average, 1 - share)
        torch._foreach_add_(average, torch._foreach_mul(live, share))
        for a, b in zip(state.module.buffers(), f.buffers(), strict=True):
            a.copy_(b)
        state.count.add_(due)

    def averaged(self, state: nn.Module, f: nn.Module) -> nn.Module:
        return state.module if int(state.count) else f
