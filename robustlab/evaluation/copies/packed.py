"""A convolution for a CPU, its weights in oneDNN's layout, an addition and a ReLU inside; the weights get no gradient.

    y      = relu(C x + b + z)                 one kernel; b, z and relu where there are any
    dL/dx  = C^T (dL/dy [y > 0]),  dL/dz = dL/dy [y > 0]

C^T has weights of its own in that layout: PyTorch would bring those of C into it at each call, both ways, which for 512 channels on
4 x 4 pixels takes longer than the convolution. C and C^T are each other's adjoint, so gradients of gradients are had too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustlab.evaluation.copies.entry import Phases


class Packed(nn.Module):
    """A convolution for images (N, C, H, W), channels last.

    Args:
        layer: whose weights it takes.
        shape: of its images; of other shapes they may be too, only slower.
        out: the dtype that it hands on.

    Attributes:
        relu: whether a ReLU follows.
    """

    def __init__(self, layer: nn.Conv2d, shape: torch.Size, out: torch.dtype):
        super().__init__()
        weight = layer.weight.detach()
        self.how: Any = (layer.padding, layer.stride, layer.dilation, layer.groups)
        self.reach = tuple(d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        self.dtype, self.out, self.relu = weight.dtype, out, False
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.how, list(shape))
        self.phases = Phases(layer) if Phases.suit(layer) else None
        if self.phases is None:
            rows: Any = zip(shape[-2:], *self.how[:2], self.reach, strict=True)
            sizes = [(n + 2 * p - r) // s + 1 for n, p, s, r in rows]
            given = (shape[0], layer.out_channels, *sizes)
            self.back = torch.ops.mkldnn._reorder_convolution_transpose_weight(weight, *self._back(shape, given), given)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        x = x.to(self.dtype)
        return (_Fused.apply(x, z, self) if torch.is_grad_enabled() else self.fused(x, z)).to(self.out)

    def fused(self, x: Tensor, z: Tensor | None) -> Tensor:
        """relu(C x + b + z)."""
        how, relu = (self.weight, self.bias, *self.how), "relu" if self.relu else None
        if z is None:
            return torch.ops.mkldnn._convolution_pointwise(x, *how, relu or "none", [], "")
        return torch.ops.mkldnn._convolution_pointwise(x, z, *how, "add", None, relu, [], "")

    def linear(self, x: Tensor) -> Tensor:
        """C x."""
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, None, *self.how, "none", [], "")

    def adjoint(self, g: Tensor, shape: torch.Size) -> Tensor:
        """C^T g, of this shape."""
        if self.phases is not None:
            return self.phases(g, shape)
        g, how = g.contiguous(memory_format=torch.channels_last), self._back(shape, g.shape)
        return torch.ops.mkldnn._convolution_transpose_pointwise(g, self.back, None, *how, "none", [], "")

    def _back(self, shape: Sequence[int], given: Sequence[int]) -> Any:
        """How C^T is computed. Rows and columns of the images that the last window does not reach are zero in its result."""
        padding, stride, dilation, groups = self.how
        rows = zip(shape[-2:], given[-2:], padding, self.reach, stride, strict=True)
        return padding, [n - ((m - 1) * s - 2 * p + r) for n, m, p, r, s in rows], stride, dilation, groups


class _Fused(torch.autograd.Function):
    """relu(C x + b + z)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, layer: Packed) -> Tensor:
        y = layer.fused(x, z)
        ctx.layer, ctx.shape, ctx.added = layer, x.shape, z is not None
        if layer.relu:
            ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if ctx.layer.relu:
            g = torch.ops.aten.threshold_backward(g, *ctx.saved_tensors, 0)
        x = _Linear.apply(g, ctx.layer, ctx.shape) if ctx.needs_input_grad[0] else None
        return x, g if ctx.added else None, None


class _Linear(torch.autograd.Function):
    """C^T g of images of the given shape; C x where that is None."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, layer: Packed, shape: torch.Size | None) -> Tensor:
        ctx.layer, ctx.back = layer, v.shape if shape is None else None
        return layer.linear(v) if shape is None else layer.adjoint(v, shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _Linear.apply(g, ctx.layer, ctx.back), None, None
