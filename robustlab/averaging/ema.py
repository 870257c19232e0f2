"""Exponential moving average of the weights (Polyak averaging with exponential forgetting).

    a_{t+1} = d_t a_t + (1 - d_t) w_{t+1}        a_0 = w_0,  t = 0, 1, 2, ... counts the optimizer steps
    d_t     = min(decay, (1 + t) / (10 + t))     with the ramp: early averages forget the initial weights fast
    d_t     = decay                              without

Buffers (BatchNorm's running statistics) are copied from the live model. decay = 0 is the live model. Averaged weights are
flatter and resist robust overfitting: Gowal et al., arXiv:2010.03593; Rebuffi et al., arXiv:2103.01946 (with this ramp).
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from robustlab.registry import register
from robustlab.types import Averaging, Context, Fraction


class Shadow(nn.Module):
    """The averaged model and its clock; always in eval mode, without gradients, whatever its parent is put into."""

    def __init__(self, f: nn.Module):
        super().__init__()
        self.module = copy.deepcopy(f).requires_grad_(False).eval()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=next(f.parameters()).device))
        self.training = False

    def train(self, mode: bool = True) -> Shadow:
        return self


@register("ema", cite="Gowal, Qin, Uesato, Mann, Kohli, 2020, arXiv:2010.03593")
class Ema(Averaging):
    """Evaluates an exponential moving average of the weights.

    Attributes:
        decay: the share of the old average that stays at each step; 0 evaluates the live weights.
        ramp: start with a short memory, ``min(decay, (1 + t) / (10 + t))`` after t steps.
    """

    decay: Fraction = 0.999
    ramp: bool = True

    def init_state(self, ctx: Context) -> nn.Module:
        return Shadow(ctx.f)

    @torch.no_grad()
    def update(self, state: nn.Module, f: nn.Module) -> None:
        t = state.steps.double()
        d = torch.full_like(t, self.decay)
        if self.ramp:
            d = torch.minimum(d, (1 + t) / (10 + t))
        average, live = list(state.module.parameters()), list(f.parameters())
        torch._foreach_mul_(average, d)
        torch._foreach_add_(average, torch._foreach_mul(live, 1 - d))
        for a, b in zip(state.module.buffers(), f.buffers(), strict=True):
            a.copy_(b)
        state.steps.add_(1)

    def averaged(self, state: nn.Module, f: nn.Module) -> nn.Module:
        return state.module
