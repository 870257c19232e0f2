"""A second graph for forwards without gradients on a CPU: convolutions with their weights in oneDNN's layout and ReLU inside."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from robustlab.evaluation.copies.graph import pairs
from robustlab.evaluation.copies.low import First, inputs

_RELU = {torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, "relu", "relu_"}


class Packed(nn.Module):
    """A convolution with its weights in oneDNN's layout, and a ReLU where ``relu``; no gradient."""

    def __init__(self, layer: nn.Conv2d, shape: torch.Size, relu: bool, out: torch.dtype):
        super().__init__()
        self.how = (layer.padding, layer.stride, layer.dilation, layer.groups)
        self.dtype, self.out, self.attr = layer.weight.dtype, out, "relu" if relu else "none"
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(layer.weight.detach(), *self.how, list(shape))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.mkldnn._convolution_pointwise(x.to(self.dtype), self.weight, self.bias, *self.how, self.attr, [], "")
        return x.to(self.out)


def pack(g: fx.GraphModule, x: Tensor) -> fx.GraphModule:
    """A second graph over the modules of ``g``, its convolutions packed."""
    shapes = dict(inputs(g, x, (nn.Conv2d,)))
    h = fx.GraphModule(g, copy.deepcopy(g.graph))
    followed = {before: node for before, node in pairs(h) if _is_relu(h, node)}
    for node in list(h.graph.nodes):
        if node.op != "call_module":
            continue
        outer = h.get_submodule(node.target)
        inside = isinstance(outer, First)
        layer = outer.layer if isinstance(outer, First) else outer
        shape = shapes.get(f"{node.target}.layer" if inside else node.target)
        if type(layer) is not nn.Conv2d or shape is None or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            continue
        relu = followed.get(node)
        h.set_submodule(node.target, Packed(layer, shape, relu is not None, torch.bfloat16 if inside else layer.weight.dtype))
        if relu is not None:
            relu.replace_all_uses_with(node)
            h.graph.erase_node(relu)
    h.delete_all_unused_submodules()
    h.recompile()
    return h.eval()


def _is_relu(g: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(g.get_submodule(str(node.target))) is nn.ReLU
    return node.op in ("call_function", "call_method") and node.target in _RELU
