"""Image operations on batches (N, C, H, W) with values in [0, 1], on the device of the images.

Conventions are those of the public corruption benchmarks (Hendrycks and Dietterich, ICLR 2019), so that results can be compared:

- borders mirror the image without repeating the edge pixel (OpenCV's reflect-101), however small the image is;
- filters correlate, they do not flip the kernel;
- results return to 8 bits by truncation, as their ``np.uint8(255 x)`` does, not by rounding. That darkens every corrupted
  image by half a level on average, and is part of the benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Single precision cannot tell 128 from 127.99999; a value that is closer than this to the next level counts as that level.
LEVEL_SLACK = 2.0**-12


def at_severity(values: Sequence[T], severity: int) -> T:
    """The value that belongs to a severity of 1 to 5.

    Raises:
        ValueError: any other severity.
    """
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity}")
    return values[int(severity) - 1]


def quantize(x: Tensor) -> Tensor:
    """Clip to [0, 1] and truncate to the levels 0/255 .. 255/255."""
    return (x.clamp(0.0, 1.0) * 255 + LEVEL_SLACK).floor().clamp_max(255) / 255


def mirrored(n: int, by: int, device: torch.device) -> Tensor:
    """Positions that extend 0 .. n-1 by ``by`` on both sides, mirrored at the edge pixels as often as needed."""
    period = max(2 * (n - 1), 1)
    i = torch.arange(-by, n + by, device=device).remainder(period)
    return torch.minimum(i, period - i) if n > 1 else torch.zeros_like(i)


def filter2d(x: Tensor, kernel: Tensor) -> Tensor:
    """Correlate every channel with one kernel (h, w) of odd sides, mirrored borders; the size stays.

    It goes through the Fourier transform: the cost hardly depends on the kernel, and no autocast or TF32 mode lowers the precision.
    """
    height, width = x.shape[-2:]
    rows = mirrored(height, kernel.shape[0] // 2, x.device)
    columns = mirrored(width, kernel.shape[1] // 2, x.device)
    padded = x[..., rows[:, None], columns]
    size = padded.shape[-2:]
    response = torch.fft.rfft2(kernel.to(padded), s=size).conj()
    return torch.fft.irfft2(torch.fft.rfft2(padded) * response, s=size)[..., :height, :width]


def gaussian_kernel(side: int, sigma: float) -> Tensor:
    """A sampled Gaussian (side, side) that sums to one, float64; ``sigma`` in pixels."""
    t = torch.arange(side, dtype=torch.float64) - side // 2
    window = (-0.5 * (t / sigma).square()).exp()
    window /= window.sum()
    return window[:, None] * window


def disk_kernel(radius: float, blur: float) -> Tensor:
    """A disk (h, w), float64, without its zero margin: the pixels within ``radius``, their sum one, smoothed by a Gaussian.

    As in the benchmark, the disk lives on a grid of half-width 8 (up to radius 8, Gaussian of 3 x 3) or ``radius`` (above, 5 x 5),
    and the Gaussian mirrors at the edge of that grid.
    """
    half, side = (8, 3) if radius <= 8 else (int(radius), 5)
    t = torch.arange(-half, half + 1, dtype=torch.float64)
    disk = (t.square()[:, None] + t.square() <= radius**2).double()
    smooth = filter2d(disk / disk.sum(), gaussian_kernel(side, blur))
    margin = int((smooth > 1e-9).any(1).int().argmax())
    return smooth[margin : 2 * half + 1 - margin, margin : 2 * half + 1 - margin]
