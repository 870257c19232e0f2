"""ENGM by input gradients (Dabouei, Taherkhani, Soleymani, Nasrabadi, ECCV 2022): the lengths of the gradients, estimated.

    u    = (1/N) sum_i w_i g_i,      w_i = min(1, beta / n_i),      n_i ~ a ||grad_x l_i|| + b

    beta   by default the mean of the n_i of the step, as in ``engm``
    a, b   fitted by least squares to the exact lengths of a batch, every ``refit`` steps; old fits count ``memory``

Samples whose loss is steep in the image are those whose loss is steep in the weights, and the gradient at the image is there
already: the attack's last. Where the attack left none, one more forward and input gradient are paid. On the steps of a fit, the
first among them, the exact lengths are used.

The line is the rule's memory: it is part of the checkpoint, and the processes fit it together.

Differences from the paper: see ``engm``; the two numbers that rule the fit are reconstructions as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustlab import geometry
from robustlab.outer import backward, sample_gradient_norms, sample_losses
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Context, Count, GradientRule, NonNegative, OpenFraction, Shard, World
from robustlab.weight_perturbation.engm import clipping, counts


class Line(nn.Module):
    """Slope and intercept, and how many steps there were. ``pending`` holds what a step found out, until it is committed."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.register_buffer("line", torch.zeros(2, dtype=torch.float64, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.pending: list[Tensor] = []


@register("engm-approx", cite="Dabouei et al., ECCV 2022, arXiv:2209.01199")
class EngmApprox(GradientRule):
    """The mean of the samples' gradients, each shortened to a bound; their lengths are estimated from gradients at the images.

    Attributes:
        bound: beta, the longest gradient that a sample contributes: ``mean``, the mean length of the step's samples; or a number;
            None is the plain gradient.
        refit: steps from one fit to the next.
        memory: share of the old line at a fit.
        on: the view whose images' gradients are looked at.
        chunk: how many samples' gradients are held in memory at once during a fit.
    """

    bound: NonNegative | Literal["mean"] | None = "mean"
    refit: Count = 50
    memory: OpenFraction = 0.5
    on: str = "adv"
    chunk: Count = 32

    def init_state(self, ctx: Context) -> nn.Module:
        return Line(next(ctx.f.parameters()).device)

    def __call__(self, f: nn.Module, loss: Any, shards: Sequence[Shard], rng: Rng, state: Line) -> dict[str, Tensor]:
        state.pending, fits, norms = [], int(state.steps) % self.refit == 0, []
        for shard in shards:
            g = geometry.norm_of(self.slopes(loss, shard), "l2").double()
            if fits:
                n = sample_gradient_norms(loss, shard, self.chunk)
                state.pending.append(torch.stack([g, n, g * g, g * n]).mean(1))
            else:
                n = (state.line[0] * g + state.line[1]).clamp_min(0).to(shard[0][self.on].x.dtype)
            norms.append(n)
        return backward(loss, shards, shares=clipping(norms, self.bound, loss.world, counts(shards, norms)))

    def slopes(self, loss: Any, shard: Shard) -> Tensor:
        """The gradient of each sample's loss at its image (N, C, H, W): the attack's last, else a new one."""
        views, rng = shard
        view = views[self.on]
        if isinstance(view.info.get("grad"), Tensor):
            return view.info["grad"]
        x = view.x.detach().requires_grad_()
        _, terms = loss(({**views, self.on: replace(view, x=x)}, rng), stats=False, sync=False)
        return torch.autograd.grad(sample_losses(list(terms.values())).sum(), x, materialize_grads=True)[0]

    def commit(self, state: Line, world: World) -> None:
        if state.pending:
            (means,) = world.mean_([torch.stack(state.pending).mean(0)])
            g, n, gg, gn = means.unbind()
            spread = gg - g * g
            slope = torch.where(spread > 0, (gn - g * n) / spread, torch.zeros_like(g))
            old = self.memory if int(state.steps) else 0.0
            state.line.copy_(old * state.line + (1 - old) * torch.stack([slope, n - slope * g]))
            state.pending = []
        state.steps.add_(1)
