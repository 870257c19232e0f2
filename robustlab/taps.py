"""Taps: functions that act inside a forward pass, at a layer's output, input or keyword arguments.

One mechanism serves latent attacks, manifold mixing, feature noise and feature capture. Hooks on a compiled model are silently
ignored, so a tapped forward runs eager; functions of outputs and inputs see float32: bfloat16 would swallow a perturbation of 1e-5.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustlab.modes import unwrap
from robustlab.registry import nearest
from robustlab.types import Tap, UserError


def layer_names(f: nn.Module) -> list[str]:
    """The names of all layers, as taps use them."""
    return [name for name, _ in f.named_modules() if name]


def find_layer(f: nn.Module, site: str) -> nn.Module:
    """The layer of that name, or with that unique dotted suffix; ``features`` is the last linear layer (tap its input).

    ``stem``, in a model without a layer of that name, is the first convolution.

    Raises:
        UserError: no such layer, or several; the line lists the candidates.
    """
    modules = {name: m for name, m in f.named_modules() if name}
    if site == "features":
        linear = [m for m in modules.values() if isinstance(m, nn.Linear)]
        if not linear:
            raise UserError("this model has no linear layer, so 'features' names nothing; give a layer's name")
        return linear[-1]
    if site in modules:
        return modules[site]
    found = [name for name in modules if name.endswith(f".{site}")]
    if len(found) == 1:
        return modules[found[0]]
    convolutions = [m for m in modules.values() if isinstance(m, nn.modules.conv._ConvNd)]
    if site == "stem" and convolutions and not found:
        return convolutions[0]
    if found:
        raise UserError(f"the layer name '{site}' is ambiguous: {', '.join(found)}")
    raise UserError(f"no layer '{site}'{nearest(site, modules)}; layers: {', '.join(modules)}")


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


def _apply(tap: Tap, value: Any) -> Any:
    device = value.device.type if isinstance(value, Tensor) else "cpu"
    with torch.autocast(device, enabled=False):
        out = tap.fn(_float(value))
    return out.to(value.dtype) if isinstance(out, Tensor) and isinstance(value, Tensor) else out


def _hook(module: nn.Module, tap: Tap) -> Any:
    if tap.where == "output":
        return module.register_forward_hook(lambda m, args, out: _apply(tap, out))
    if tap.where == "input":
        return module.register_forward_pre_hook(lambda m, args: (_apply(tap, args[0]), *args[1:]))
    return module.register_forward_pre_hook(lambda m, args, kwargs: tap.fn(args, kwargs), with_kwargs=True)


@contextlib.contextmanager
def tapped(f: Any, taps: Sequence[Tap]) -> Iterator[None]:
    """Forwards of ``f`` inside run with these taps; they are gone afterwards, also when something raises.

    A site ``input`` acts on the images, ``features`` on what the last linear layer is given.
    """
    if not taps:
        yield
        return
    model = unwrap(f)
    if not isinstance(model, nn.Module):
        raise UserError("taps need a torch.nn.Module; this classifier is a plain callable")
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for tap in taps:
            where = "input" if tap.site in ("input", "features") else tap.where
            layer = model if tap.site == "input" else find_layer(model, tap.site)
            handle = _hook(layer, Tap(tap.site, tap.fn, where))
            stack.callback(handle.remove)
        yield
