"""A strided convolution whose input gradient is a convolution too: several times faster on a CPU where it has few input channels.

With y[i] = sum_j W[j] x[s i + j - p] and u = s a + r, 0 <= r < s (in each of the two dimensions):

    dL/dx[s a + r] = sum_d g[a - d] W[s d + r + p]        g = dL/dy,  d such that 0 <= s d + r + p < k

so the gradients at the s x s phases r are the channels of one convolution of g with stride 1, and interleaving them (pixel shuffle)
gives the image. Libraries compute the left side as a transposed convolution, which for 1 or 3 input channels wastes most of its
vectors. The identity: Shi et al., CVPR 2016, arXiv:1609.05158, section 3 and its appendix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Phases:
    """The input gradient of a convolution that it ``suit``s, for outputs (N, O, H, W).

    Args:
        layer: the convolution.
    """

    def __init__(self, layer: nn.Conv2d):
        self.stride = layer.stride[0]
        self.weight, self.before = _phases(layer.weight.detach(), self.stride, layer.padding)  # type: ignore[arg-type]

    @staticmethod
    def suit(layer: nn.Conv2d) -> bool:
        """Whether the gradient can be had, and is better had, in this way."""
        plain = (
            layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        )
        return plain and layer.stride[0] == layer.stride[1] > 1 and layer.in_channels <= 4

    def __call__(self, g: Tensor, shape: torch.Size) -> Tensor:
        """dL/dx, of the given shape, for dL/dy."""
        s, pads = self.stride, []
        for size, given, before, kernel in zip(shape[-2:], g.shape[-2:], self.before, self.weight.shape[-2:], strict=True):
            pads.append((before, -(-size // s) - given - before + kernel - 1))
        phases = F.conv2d(F.pad(g, (*pads[1], *pads[0])), self.weight)
        return F.pixel_shuffle(phases, s)[..., : shape[-2], : shape[-1]]


def _phases(weight: Tensor, s: int, padding: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The weights (C s s, O, K, K') of the convolution of the gradient, and the zeros that g needs before it in each dimension."""
    taps, before = [], []
    for k, p in zip(weight.shape[-2:], padding, strict=True):
        low, high = -((s - 1 + p) // s), (k - 1 - p) // s  # of d
        d = torch.arange(high, low - 1, -1, device=weight.device)
        taps.append(s * d + torch.arange(s, device=weight.device)[:, None] + p)  # (s, K): j for each phase and tap
        before.append(high)
    rows, columns = taps
    inside = ((rows >= 0) & (rows < weight.shape[-2]))[:, None, :, None] & ((columns >= 0) & (columns < weight.shape[-1]))[:, None]
    chosen = weight[..., rows.clamp(0, weight.shape[-2] - 1)[:, None, :, None], columns.clamp(0, weight.shape[-1] - 1)[:, None]]
    chosen = chosen * inside  # (O, C, s, s, K, K')
    back = chosen.permute(1, 2, 3, 0, 4, 5).flatten(0, 2)
    return back.contiguous(memory_format=torch.channels_last), (before[0], before[1])
