"""What foreign code is given instead of the classifier, and the random state it may use up."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustlab.geometry import norm_of, project
from robustlab.modes import ambient
from robustlab.types import Classifier


class ImagesOnly(torch.autograd.Function):
    """The classifier as a function of the images alone: backward reaches them and nothing else, whoever calls it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Classifier) -> Tensor:
        ctx.needed = ctx.needs_input_grad[0]
        with torch.set_grad_enabled(ctx.needed):
            ctx.x = x.detach().requires_grad_(ctx.needed)
            ctx.z = f(ctx.x)
        return ctx.z.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.autograd.grad(ctx.z, ctx.x, grads[0], retain_graph=True)[0], None


class Shielded(nn.Module):
    """A module that shows the classifier's logits and passes gradients on to the images, and has no weights to reach.

    Args:
        f: the classifier.
        inside: the type that ``f`` is called with.
        outside: the type of the logits.
        device: where the module says it is.
    """

    def __init__(self, f: Classifier, inside: torch.dtype, outside: torch.dtype, device: torch.device):
        super().__init__()
        self._call = (lambda v: f(v.to(inside)).to(outside),)
        self.place = nn.Parameter(torch.zeros(0, device=device), requires_grad=False)  # by which callers find the device
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return ImagesOnly.apply(x, self._call[0])


@contextlib.contextmanager
def quarantine(seed: int) -> Iterator[None]:
    """The generators of torch, NumPy and Python start from ``seed`` inside; outside they go on as if nothing had happened."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        with ambient(seed):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


def lawful(x_adv: Any, x: Tensor, norm: str, eps: float, who: str) -> tuple[Tensor, list[str]]:
    """What foreign code returned, projected on ball and box; and a warning if some of it lay outside.

    Raises:
        ValueError: it is no tensor of the images' shape.
    """
    if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
        got = f"shape {tuple(x_adv.shape)}" if isinstance(x_adv, Tensor) else f"a {type(x_adv).__name__}"
        raise ValueError(f"{who} must return images of shape {tuple(x.shape)}, got {got}")
    x_adv = x_adv.detach().to(x.device, x.dtype)
    slack = 1e-5
    far = norm_of(x_adv - x, norm) > eps * (1 + slack) + slack
    off = (x_adv.flatten(1).amin(1) < -slack) | (x_adv.flatten(1).amax(1) > 1 + slack)
    outside = int((far | off).sum())
    flags = [f"{who} left ball or box for {outside} of {len(x)} images; they were projected"] if outside else []
    return project(x_adv, x, norm, eps), flags
