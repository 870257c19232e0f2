"""A classifier as a graph: BatchNorm folded into the weights before it, gradients channels last behind a flattening."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

_FOLD = {
    (nn.Conv1d, nn.BatchNorm1d): fuse_conv_bn_eval,
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Conv3d, nn.BatchNorm3d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}
_FLATTENS = {torch.flatten, torch.reshape, "flatten", "view", "reshape"}


class _Tracer(fx.Tracer):
    """Traces through modules; one that decides by what it is given becomes a single step."""

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        begun = len(self.graph.nodes)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            for node in reversed(list(self.graph.nodes)[begun:]):
                self.graph.erase_node(node)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def fold(f: nn.Module) -> fx.GraphModule:
    """``f`` as a graph, every BatchNorm that follows one weighted layer and nothing else folded into it."""
    g = fx.GraphModule(f, _Tracer().trace(f))
    graph = g.graph
    for before, node in pairs(g):
        if node.op != "call_module":
            continue
        layer, norm = g.get_submodule(str(before.target)), g.get_submodule(str(node.target))
        fuse: Any = _FOLD.get((type(layer), type(norm)))  # type: ignore[arg-type]
        if fuse is not None and getattr(norm, "running_mean", None) is not None:
            g.set_submodule(str(before.target), fuse(layer, norm))
            node.replace_all_uses_with(before)
            graph.erase_node(node)
    for node in [n for n in graph.nodes if _flattens(g, n)]:
        with graph.inserting_before(node):
            node.replace_input_with(node.args[0], graph.call_function(laid_out, (node.args[0],)))
        if node.target == "view":
            node.target = "reshape"  # of channels last there is no view
    g.delete_all_unused_submodules()
    g.recompile()
    return g.eval().requires_grad_(False)


def _flattens(g: fx.GraphModule, node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return type(g.get_submodule(str(node.target))) is nn.Flatten
    if any(isinstance(v, torch.dtype) for v in node.args):
        return False  # the other view
    return node.op in ("call_function", "call_method") and node.target in _FLATTENS


class _LaidOut(torch.autograd.Function):
    """The identity, whose gradients are channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.contiguous(memory_format=torch.channels_last)


def laid_out(x: Any) -> Any:
    return _LaidOut.apply(x) if isinstance(x, Tensor) and x.ndim == 4 and x.requires_grad else x


def pairs(g: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Layers that are called once, and what alone takes their output."""
    calls = [n.target for n in g.graph.nodes if n.op == "call_module"]
    for node in list(g.graph.nodes):
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        if calls.count(before.target) == 1 and (node.op != "call_module" or calls.count(node.target) == 1):
            yield before, node
