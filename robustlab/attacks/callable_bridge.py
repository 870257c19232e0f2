"""Anybody's attack: a function of (model, images, labels) that returns images.

    def attack(model, x, y): ...                   model: a module, images (N, C, H, W) in [0, 1] -> logits; y: labels (N,)
    def attack(model, x, y, *, norm, eps, seed)    those of these three words that the function takes are handed over

The function sees a module without weights, a copy of the images and forked generators (torch, NumPy, Python); what it returns is
projected on ball and box.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from robustlab.attacks.shield import Shielded, lawful, quarantine
from robustlab.attacks.steps import threat_of
from robustlab.geometry import linear_max
from robustlab.registry import import_callable, nearest, register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, NonNegative, Norm


def example(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, norm: str, eps: float) -> Tensor:
    """A function to start from: one step along the gradient of the cross-entropy, as far as ball and box allow."""
    x = x.requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
    return linear_max(torch.autograd.grad(loss, x)[0], x.detach(), norm, eps)


@register("call")
class Call(Attack):
    """A function of your own, written ``call:package.module:function``: ``(model, x, y) -> x_adv``.

    It may also take ``norm``, ``eps`` (a float) and ``seed`` (an int), by these names. Modules in the current folder are found.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        arch: ``package.module:function``; the default is a single gradient step, to copy from.
        options: further keyword arguments of the function.
    """

    coupled = True
    norms = ("linf", "l2", "l1", "l0")

    norm: Norm | None = None
    eps: NonNegative | None = None
    arch: str = "robustlab.attacks.callable_bridge:example"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        attack = self._function()
        known = inspect.signature(attack).parameters
        if any(p.kind is p.VAR_KEYWORD for p in known.values()):
            return
        for name in self.options:
            if name not in known:
                raise ValueError(f"options: {self.arch} takes no '{name}'{nearest(name, known)}")

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        """As every attack; of y only the most probable class counts. ``info``: ``flags``, what it did that it should not."""
        norm, eps = threat_of(self)
        if eps == 0 or len(x) == 0:
            return x.detach().clone(), {"flags": []}
        attack, seed = self._function(), rng.child("call").key % 2**31
        given = {"norm": norm, "eps": eps, "seed": seed}
        known = inspect.signature(attack).parameters
        arguments = {name: value for name, value in given.items() if name in known} | dict(self.options)
        model = Shielded(f, x.dtype, x.dtype, x.device)
        with quarantine(seed), torch.enable_grad():
            x_adv = attack(model, x.detach().clone(), y.argmax(-1), **arguments)
        x_adv, flags = lawful(x_adv, x.detach(), norm, eps, f"call:{self.arch}")
        return x_adv, {"flags": flags}

    def _function(self) -> Callable[..., Any]:
        module, colon, name = self.arch.partition(":")
        if not colon or not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
            raise ValueError(f"arch: '{self.arch}' names no function; write package.module:function")
        attack = import_callable(self.arch)
        if not callable(attack):
            raise ValueError(f"arch: {self.arch} is {type(attack).__name__}, not a function (model, x, y) -> x_adv")
        return attack
