"""The model that attacks search on: a copy of the classifier that computes the same faster. The classifier itself scores.

    folded      BatchNorm behind a convolution or linear layer goes into its weights: w' = w g / s, b' = (b - m) g / s + h
    layout      channels last, also of gradients that come through a flattening: without it kernels would walk the layout before
                it against its grain, an average pooling's backward at a seventh of the speed
    packed      CPU, forwards without gradient: weights in oneDNN's own layout, ReLU inside the convolution
    bf16        inner weights converted once, activations in bfloat16; the first and the last layer stay in float32: one step of
                bfloat16 between 1/2 and 1 is 1/256, so a bfloat16 input would swallow perturbations of 1/255

What cannot be traced is copied as it is. The copy must prove itself on a few images, with and without gradients; the classifier
itself is used where it does not, and where a copy cannot be trusted: anything but a module, float64 (whose results are promised to
be exact), hooks, compiled or scripted modules, parametrizations, outputs that differ between two calls.

Memory: one more copy of the weights, and on a CPU a second one, packed; in bfloat16 half of that.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from robustlab import geometry
from robustlab.modes import ambient, bn_mode, full_precision
from robustlab.types import Classifier

PROBES = 4  # images on which a copy proves itself
# Largest difference of logits, over the largest logit; and of input gradients, over their l2 norm. Float32: another order of sums
# leaves 1e-6 to 1e-5 after twenty to a hundred layers. A rounding that moves one unit across its kink can change a gradient by 4 %
# (measured); so most of the probes' gradients must agree, not all.
# Bfloat16 carries 8 bits: a few per cent after so many layers. Wrong code is off by far more than either.
NEAR = {"fp32": (1e-4, 1e-2), "bf16": (0.1, 1.0)}

_FOLD = {
    (nn.Conv1d, nn.BatchNorm1d): fuse_conv_bn_eval,
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Conv3d, nn.BatchNorm3d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_RELU = {torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, "relu", "relu_"}
_FLATTENS = {torch.flatten, torch.reshape, "flatten", "view", "reshape"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def prepare(f: Classifier, x: Tensor, precision: str = "fp32") -> Classifier:
    """A classifier for searching, or ``f`` itself where no faster one can be had or trusted; ``f`` is left as it was.

    Args:
        f: the classifier.
        x: some images (N, C, H, W) as it will get them; the first four are probes.
        precision: ``fp32``, or ``bf16`` for a search in bfloat16 (``f`` where that fails; ask for ``fp32`` then).
    """
    if not _trusted(f) or len(x) == 0:
        return f
    assert isinstance(f, nn.Module)
    x = x[:PROBES].detach()
    try:
        with (
            warnings.catch_warnings(),
            ambient(0),
            torch.autocast(x.device.type, enabled=False),
            full_precision(),
            bn_mode(f, "eval"),
        ):
            warnings.simplefilter("ignore")
            with torch.no_grad():
                z = f(x)
                if not torch.equal(z, f(x)):
                    return f
            made = _make(f, x, precision)
            if made is None or not _same_gradient(f, made, x, *NEAR[precision]):
                return f
            for g in (made, Prepared(f, made.full, None, precision)):  # without oneDNN's operators, which are not public
                with torch.no_grad():
                    if _within(z, g(x), NEAR[precision][0], "linf"):
                        return g
            return f
    except torch.OutOfMemoryError:
        return f
    except Exception:  # whatever a foreign forward raises when it is copied or traced: the original still works
        return f


class Prepared:
    """A prepared copy. While the original is hooked (taps) or in training mode, that is what runs.

    Attributes:
        module: the original, for those who look for layers.
        precision: in which the copy computes.
        full, packed: what runs with and without gradients.
    """

    def __init__(self, f: nn.Module, full: nn.Module, packed: nn.Module | None, precision: str):
        self.module, self.precision = f, precision
        self.full, self.packed = full, packed or full
        self._modules = list(f.modules())

    def __call__(self, x: Tensor) -> Tensor:
        if self.module.training or any(m._forward_hooks or m._forward_pre_hooks for m in self._modules):
            return self.module(x)
        differentiated = x.requires_grad and torch.is_grad_enabled()
        low = self.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False) if low else contextlib.nullcontext():
            return (self.full if differentiated else self.packed)(x)


def _trusted(f: Any) -> bool:
    """Whether a copy of ``f`` can be expected to do what ``f`` does."""
    if not isinstance(f, nn.Module) or isinstance(f, torch.jit.ScriptModule | torch._dynamo.OptimizedModule | nn.DataParallel):
        return False
    if any(getattr(m, hooks) for m in f.modules() for hooks in _HOOKS) or any(map(parametrize.is_parametrized, f.modules())):
        return False
    return all(v.dtype == torch.float32 for v in (*f.parameters(), *f.buffers()) if v.is_floating_point())


def _make(f: nn.Module, x: Tensor, precision: str) -> Prepared | None:
    full: nn.Module = copy.deepcopy(f).eval().requires_grad_(False)
    if precision == "fp32" and sum(type(m) is nn.Conv2d for m in full.modules()) < 2:
        return None  # nothing to fold or to lay out
    with contextlib.suppress(Exception):
        full = _folded(full)
    full.to(memory_format=torch.channels_last)
    if precision == "bf16" and not _lowered(full, x):
        return None
    packed = None
    if x.device.type == "cpu" and isinstance(full, fx.GraphModule) and torch.backends.mkldnn.is_available():
        with contextlib.suppress(Exception):
            packed = _packed(full, x)
    return Prepared(f, full, packed, precision)


def _same_gradient(f: Classifier, g: Classifier, x: Tensor, near: float, near_gradient: float) -> bool:
    """Whether two classifiers agree where gradients are taken: in the logits, and in the gradient of a random sum of them."""
    with torch.enable_grad():
        v, w = x.clone().requires_grad_(), x.clone().requires_grad_()
        a, b = f(v), g(w).to(x.dtype)
        if a.requires_grad != b.requires_grad or not _within(a.detach(), b.detach(), near, "linf"):
            return False
        if not a.requires_grad:
            return True
        weight = torch.randn(a.shape, generator=torch.Generator().manual_seed(0)).to(a)
        (p,), (q,) = (torch.autograd.grad((z * weight).sum(), u, allow_unused=True) for z, u in ((a, v), (b, w)))
    if p is None or q is None:
        return p is q
    most = sum(_within(*pair, near_gradient, "l2") for pair in zip(p, q, strict=True))
    return 2 * most > len(x)


def _within(a: Tensor, b: Tensor, near: float, norm: str) -> bool:
    if a.shape != b.shape:
        return False
    size, gap = (geometry.norm_of(v.double().flatten()[None], norm) for v in (a, a - b))
    return bool(torch.isfinite(size)) and bool(gap <= near * size)


# ----------------------------------------------------------------------------------------------------------------- tracing


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


def _folded(f: nn.Module) -> fx.GraphModule:
    """``f`` as a graph, every BatchNorm that follows one weighted layer and nothing else folded into it."""
    g = fx.GraphModule(f, _Tracer().trace(f))
    graph = g.graph
    for before, node in _pairs(g):
        if node.op != "call_module":
            continue
        layer, norm = g.get_submodule(str(before.target)), g.get_submodule(str(node.target))
        fold: Any = _FOLD.get((type(layer), type(norm)))  # type: ignore[arg-type]
        if fold is not None and getattr(norm, "running_mean", None) is not None:
            g.set_submodule(str(before.target), fold(layer, norm))
            node.replace_all_uses_with(before)
            graph.erase_node(node)
    for node in [n for n in graph.nodes if _flattens(g, n)]:
        with graph.inserting_before(node):
            node.replace_input_with(node.args[0], graph.call_function(_laid_out, (node.args[0],)))
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


def _laid_out(x: Any) -> Any:
    return _LaidOut.apply(x) if isinstance(x, Tensor) and x.ndim == 4 and x.requires_grad else x


def _pairs(g: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Layers that are called once, and what alone takes their output."""
    calls = [n.target for n in g.graph.nodes if n.op == "call_module"]
    for node in list(g.graph.nodes):
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        if calls.count(before.target) == 1 and (node.op != "call_module" or calls.count(node.target) == 1):
            yield before, node


# ------------------------------------------------------------------------------------------------------------ low precision


class _First(nn.Module):
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


def _lowered(g: nn.Module, x: Tensor) -> bool:
    """Convert the inner layers of ``g`` to bfloat16, in place; False where there are none between a first and a last."""
    order = _calls(g, x)
    if len(set(order)) < 3 or order.count(order[0]) > 1 or order.count(order[-1]) > 1:
        return False
    for name in set(order[1:-1]):
        g.get_submodule(name).to(torch.bfloat16)
    g.set_submodule(order[0], _First(g.get_submodule(order[0])))
    g.set_submodule(order[-1], _Last(g.get_submodule(order[-1])))
    return True


def _calls(g: nn.Module, x: Tensor) -> list[str]:
    """The names of the weighted layers in the order in which they are called."""
    return [name for name, _ in _inputs(g, x, _WEIGHTED)]


def _inputs(g: nn.Module, x: Tensor, kinds: tuple[type[nn.Module], ...]) -> list[tuple[str, torch.Size]]:
    """The layers of these very types as they are called, with the shape of what they are given."""
    seen: list[tuple[str, torch.Size]] = []
    hooks = [
        m.register_forward_pre_hook(lambda m, args, name=name: seen.append((name, args[0].shape)))  # type: ignore[misc]
        for name, m in g.named_modules()
        if type(m) in kinds
    ]
    try:
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=_is_low(g), cache_enabled=False):
            g(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _is_low(g: nn.Module) -> bool:
    return any(isinstance(m, _First) for m in g.modules())


# ------------------------------------------------------------------------------------------------------------------ packing


class _Packed(nn.Module):
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


def _packed(g: fx.GraphModule, x: Tensor) -> fx.GraphModule:
    """A second graph over the modules of ``g``, its convolutions packed."""
    shapes = dict(_inputs(g, x, (nn.Conv2d,)))
    h = fx.GraphModule(g, copy.deepcopy(g.graph))
    followed = {before: node for before, node in _pairs(h) if _is_relu(h, node)}
    for node in list(h.graph.nodes):
        if node.op != "call_module":
            continue
        outer = h.get_submodule(node.target)
        inside = isinstance(outer, _First)
        layer = outer.layer if isinstance(outer, _First) else outer
        shape = shapes.get(f"{node.target}.layer" if inside else node.target)
        if type(layer) is not nn.Conv2d or shape is None or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            continue
        relu = followed.get(node)
        h.set_submodule(node.target, _Packed(layer, shape, relu is not None, torch.bfloat16 if inside else layer.weight.dtype))
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
