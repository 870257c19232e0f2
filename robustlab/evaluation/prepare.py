"""The model that attacks search on: a copy of the classifier that computes the same faster. The classifier itself scores.

    folded      BatchNorm behind a convolution or linear layer goes into its weights: w' = w g / s, b' = (b - m) g / s + h
    layout      channels last, also of gradients that come through a flattening: without it kernels would walk the layout before
                it against its grain, an average pooling's backward at a seventh of the speed
    packed      CPU: weights in oneDNN's own layout, addition and ReLU inside the convolution, also where gradients are taken
    entry       CPU: the input gradient of a strided first layer as a convolution
    bf16        inner weights converted once, activations in bfloat16; the first and the last layer stay in float32: one step of
                bfloat16 between 1/2 and 1 is 1/256, so a bfloat16 input would swallow perturbations of 1/255

What cannot be traced is copied as it is. The copy must prove itself on a few images, with and without gradients; the classifier
itself is used where it does not, and where a copy cannot be trusted: anything but a module, float64 (whose results are promised to
be exact), hooks, compiled or scripted modules, parametrizations, outputs that differ between two calls.

Memory: one more copy of the weights, and on a CPU two more, packed, one for each direction; in bfloat16 half of that.
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

from robustlab import geometry
from robustlab.evaluation.copies.graph import fold
from robustlab.evaluation.copies.low import lower
from robustlab.evaluation.copies.packing import pack
from robustlab.modes import ambient, bn_mode, full_precision
from robustlab.types import Classifier

PROBES = 4  # images on which a copy proves itself
# Largest difference of logits, over the largest logit; and of input gradients, over their l2 norm. Float32: another order of sums
# leaves 1e-6 to 1e-5 after twenty to a hundred layers. A rounding that moves one unit across its kink can change a gradient by 4 %
# (measured); so most of the probes' gradients must agree, not all.
# Bfloat16 carries 8 bits: a few per cent after so many layers. Wrong code is off by far more than either.
NEAR = {"fp32": (1e-4, 1e-2), "bf16": (0.1, 1.0)}

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
            for made in _copies(f, x, precision):
                g = Prepared(f, made, precision)
                with contextlib.suppress(Exception):  # oneDNN's operators are not public
                    with torch.no_grad():
                        same = _within(z, g(x), NEAR[precision][0], "linf")
                    if same and _same_gradient(f, g, x, *NEAR[precision]):
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
        fast: the copy.
    """

    def __init__(self, f: nn.Module, fast: nn.Module, precision: str):
        self.module, self.fast, self.precision = f, fast, precision
        self._modules = list(f.modules())

    def __call__(self, x: Tensor) -> Tensor:
        if self.module.training or any(m._forward_hooks or m._forward_pre_hooks for m in self._modules):
            return self.module(x)
        low = self.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False) if low else contextlib.nullcontext():
            return self.fast(x)


def _trusted(f: Any) -> bool:
    """Whether a copy of ``f`` can be expected to do what ``f`` does."""
    if not isinstance(f, nn.Module) or isinstance(f, torch.jit.ScriptModule | torch._dynamo.OptimizedModule | nn.DataParallel):
        return False
    if any(getattr(m, hooks) for m in f.modules() for hooks in _HOOKS) or any(map(parametrize.is_parametrized, f.modules())):
        return False
    return all(v.dtype == torch.float32 for v in (*f.parameters(), *f.buffers()) if v.is_floating_point())


def _copies(f: nn.Module, x: Tensor, precision: str) -> Iterator[nn.Module]:
    """What may take the place of ``f``, the fastest first."""
    g: nn.Module = copy.deepcopy(f).eval().requires_grad_(False)
    if precision == "fp32" and sum(type(m) is nn.Conv2d for m in g.modules()) < 2:
        return  # nothing to fold or to lay out
    with contextlib.suppress(Exception):
        g = fold(g)
    g.to(memory_format=torch.channels_last)
    if precision == "bf16" and not lower(g, x):
        return
    if x.device.type == "cpu" and isinstance(g, fx.GraphModule) and torch.backends.mkldnn.is_available():
        with contextlib.suppress(Exception):
            yield pack(g, x)
    yield g


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
