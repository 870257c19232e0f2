"""A copy in bfloat16, but for its first and last layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class First(nn.Module):
    """A layer in float32 that hands on bfloat16."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("something before the first layer is in low precision")
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(x).to(torch.bfloat16)


class _Last(nn.Module):
    """A layer in float32."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(x.float())


def lower(g: nn.Module, x: Tensor) -> bool:
    """Convert the inner layers of ``g`` to bfloat16, in place; False where there are none between a first and a last."""
    order = calls(g, x)
    if len(set(order)) < 3 or order.count(order[0]) > 1 or order.count(order[-1]) > 1:
        return False
    for name in set(order[1:-1]):
        g.get_submodule(name).to(torch.bfloat16)
    g.set_submodule(order[0], First(g.get_submodule(order[0])))
    g.set_submodule(order[-1], _Last(g.get_submodule(order[-1])))
    return True


def calls(g: nn.Module, x: Tensor) -> list[str]:
    """The names of the weighted layers in the order in which they are called."""
    return [name for name, _ in inputs(g, x, _WEIGHTED)]


def inputs(g: nn.Module, x: Tensor, kinds: tuple[type[nn.Module], ...]) -> list[tuple[str, torch.Size]]:
    """The layers of these very types as they are called, with the shape of what they are given."""
    seen: list[tuple[str, torch.Size]] = []
    hooks = [
        m.register_forward_pre_hook(lambda m, args, name=name: seen.append((name, args[0].shape)))  # type: ignore[misc]
        for name, m in g.named_modules()
        if type(m) in kinds
    ]
    try:
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=is_low(g), cache_enabled=False):
            g(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def is_low(g: nn.Module) -> bool:
    return any(isinstance(m, First) for m in g.modules())
