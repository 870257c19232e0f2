"""A graph whose convolutions are packed, with the additions and ReLUs behind them inside (see ``packed``)."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from robustlab.evaluation.copies.low import First, inputs
from robustlab.evaluation.copies.packed import Packed

_RELU = {torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, "relu", "relu_"}
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}


def pack(g: fx.GraphModule, x: Tensor) -> fx.GraphModule:
    """A second graph over the modules of ``g``, its convolutions packed."""
    shapes = dict(inputs(g, x, (nn.Conv2d,)))
    h = fx.GraphModule(g, copy.deepcopy(g.graph))
    for node in [n for n in h.graph.nodes if n.op == "call_module"]:
        outer = h.get_submodule(node.target)
        first = isinstance(outer, First)
        layer = outer.layer if isinstance(outer, First) else outer
        shape = shapes.get(f"{node.target}.layer" if first else node.target)
        if type(layer) is nn.Conv2d and shape is not None and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            h.set_submodule(node.target, Packed(layer, shape, torch.bfloat16 if first else layer.weight.dtype))
    _take_in(h)
    h.delete_all_unused_submodules()
    h.recompile()
    return h.eval()


def _take_in(h: fx.GraphModule) -> None:
    """Additions and ReLUs become part of the convolutions whose output nothing else takes."""
    called = Counter(n.target for n in h.graph.nodes if n.op == "call_module")
    place = {n: i for i, n in enumerate(h.graph.nodes)}

    def layer_of(node: Any) -> Packed | None:
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1 or called[node.target] != 1:
            return None
        layer = h.get_submodule(str(node.target))
        return layer if isinstance(layer, Packed) and not layer.relu else None

    for node in list(h.graph.nodes):
        into = None
        if _calls(node, _ADD) and len(node.args) == 2 and not node.kwargs and all(isinstance(v, fx.Node) for v in node.args):
            for v, other in (node.args, reversed(node.args)):
                layer = layer_of(v)
                if layer is not None and len(v.args) == 1 and layer.out == layer.dtype and place[other] < place[v]:
                    into = v
                    into.args = (*v.args, other)
                    break
        elif _calls(node, _RELU) or (node.op == "call_module" and type(h.get_submodule(str(node.target))) is nn.ReLU):
            layer = layer_of(node.args[0])
            if layer is not None:
                into, layer.relu = node.args[0], True
        if into is not None:
            node.replace_all_uses_with(into)
            h.graph.erase_node(node)


def _calls(node: fx.Node, functions: set[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in functions
