"""The perturbation that training carries along (Free: Shafahi et al., NeurIPS 2019, arXiv:1904.12843), algorithm 1.

    x' = P(x + d_i),     d_i <- P(x' + eps u(g)) - x,     g = the loss's own gradient at x'

    d_i   one perturbation for each place in the batch, kept from batch to batch, zero at first
    u     the steepest unit step: the sign in linf          P   projection on ball and pixel range

The images are leaves of the loss: the backward pass that updates the weights gives g too, and ``commit`` takes the step. So the
attack is free, and each batch has to be trained on several times (the trainer's ``replays``).
Differences from the authors' code: theirs clips x + d for the forward pass alone, and the step never leaves the linf ball; the
widespread port by Wong et al. lets the first pass on a batch leave the pixel range. Other norms are ours.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from robustlab import geometry
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Classifier, Context, NonNegative, Norm, Stage, Views, World

PER_EPOCH = 2**40  # tickets of an epoch: the position in the epoch is the ticket modulo this


class Carried(nn.Module):
    """A perturbation for each place in the batch; ``pending`` holds clean images, leaves and places of this step."""

    delta: Tensor

    def __init__(self, delta: Tensor):
        super().__init__()
        self.register_buffer("delta", delta)
        self.pending: list[tuple[Tensor, Tensor, Tensor]] = []


@register("free", cite="Shafahi et al., NeurIPS 2019, arXiv:1904.12843")
class FreePerturbation(Stage):
    """Adds the carried perturbation and lets it climb by the gradient of the training loss. Costs no pass of its own.

    Attributes:
        on, to: names of views.
        norm, eps: the threat model; None takes the surrounding one. The step is eps.
    """

    crafts = True

    on: str = "clean"
    to: str = "adv"
    norm: Norm | None = None
    eps: NonNegative | None = None

    def init_state(self, ctx: Context) -> Carried:
        w = next(ctx.f.parameters())
        places = ctx.batch_size or ctx.num_samples
        return Carried(torch.zeros(places, *ctx.image_shape, dtype=w.dtype))

    def __call__(self, f: Classifier, views: Views, rng: Rng, state: Carried) -> Views:
        if self.norm is None or self.eps is None:
            raise ValueError("free: no threat model; give norm and eps, for example norm='linf', eps=8/255")
        view = views[self.on]
        place = view.key % PER_EPOCH % len(state.delta)
        x = geometry.project(view.x + state.delta[place].to(view.x.dtype), view.x, self.norm, self.eps).requires_grad_()
        state.pending.append((view.x, x, place))
        return {**views, self.to: replace(view, x=x, info={})}

    def commit(self, state: Carried, world: World) -> None:
        """The step of the perturbations, by the gradient that the backward pass left at the images."""
        assert self.norm is not None
        assert self.eps is not None
        for clean, leaf, place in state.pending:
            if leaf.grad is None:  # no loss looked at the view
                continue
            g, x = leaf.grad.nan_to_num(), leaf.detach()
            if self.norm == "l1":
                x = geometry.linear_max(g, x, self.norm, self.eps)
            else:
                x = x + self.eps * geometry.steepest(g, self.norm)
            delta = geometry.project(x, clean, self.norm, self.eps) - clean
            state.delta[world.gather(place)] = world.gather(delta).to(state.delta.dtype)
        state.pending.clear()
