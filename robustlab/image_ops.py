"""Image operations on batches (N, C, H, W) with values in [0, 1], on the device of the images.

Conventions are those of the public corruption benchmarks (Hendrycks and Dietterich, ICLR 2019), so that results can be compared:

- borders mirror the image without repeating the edge pixel (OpenCV's reflect-101) unless a function says otherwise, however
  small the image is;
- filters correlate, they do not flip the kernel;
- results return to 8 bits by truncation, as their ``np.uint8(255 x)`` does, not by rounding. That darkens every corrupted
  image by half a level on average, and is part of the benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.rng import Rng

T = TypeVar("T")
Border = Literal["edge", "mirror", "symmetric"]  # aa|abc|cc, cb|abc|ba, ba|abc|cb

# Single precision cannot tell 128 from 127.99999; a value that is closer than this to the next level counts as that level.
LEVEL_SLACK = 2.0**-12
CHUNK = {"cpu": 2**19}  # values that a corruption works on at a time; more on other devices


def at_severity(values: Sequence[T], severity: int) -> T:
    """The value that belongs to a severity of 1 to 5.

    Raises:
        ValueError: any other severity.
    """
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity}")
    return values[int(severity) - 1]


def in_chunks(call: Callable[[Any, Tensor, int, Rng], Tensor]) -> Callable[[Any, Tensor, int, Rng], Tensor]:
    """For a corruption's ``__call__``: work on a few images at a time, for the cache of a CPU and the memory of a device.

    Nothing else changes: an image's result does not depend on its batch.
    """

    @wraps(call)
    def chunked(self: Any, x: Tensor, severity: int, rng: Rng) -> Tensor:
        values = max(math.prod(x.shape[1:]), 1)
        step = max(1, CHUNK.get(x.device.type, 2**26) // values)
        if len(x) <= step:
            return call(self, x, severity, rng) if len(x) else x.clone()
        parts = [slice(i, i + step) for i in range(0, len(x), step)]
        out = torch.empty_like(x)
        for rows in parts:
            out[rows] = call(self, x[rows], severity, rng.select(rows))  # type: ignore[arg-type]
        return out

    return chunked


def over_255(levels: Tensor) -> Tensor:
    """Levels 0 .. 255, floating point, as values in [0, 1]; in place. On a GPU too: for a plain number it multiplies by 1 / 255."""
    return levels.div_(torch.full((), 255, dtype=levels.dtype, device=levels.device))


def quantize(x: Tensor) -> Tensor:
    """Clip to [0, 1] and truncate to the levels 0/255 .. 255/255."""
    return over_255(x.clamp(0.0, 1.0).mul_(255).add_(LEVEL_SLACK).floor_())


def mirrored(n: int, by: int, device: torch.device) -> Tensor:
    """Positions that extend 0 .. n-1 by ``by`` on both sides, mirrored at the edge pixels as often as needed."""
    period = max(2 * (n - 1), 1)
    i = torch.arange(-by, n + by, device=device).remainder(period)
    return torch.minimum(i, period - i) if n > 1 else torch.zeros_like(i)


def extend(x: Tensor, dim: int, by: int, border: Border) -> Tensor:
    """The images, longer by ``by`` pixels on both ends of one dimension (-2: rows, -1: columns)."""
    n = x.shape[dim]
    i = mirrored(n, by, x.device) if border == "mirror" else torch.arange(-by, n + by, device=x.device)
    if border == "symmetric":
        i = i.remainder(2 * n)
        i = torch.minimum(i, 2 * n - 1 - i)
    i = i.clamp(0, n - 1)
    return torch.cat([x.index_select(dim, i[:by]), x, x.index_select(dim, i[by + n :])], dim)


def gaussian_blur(x: Tensor, sigma: float | tuple[float, float], truncate: float = 4.0, border: Border = "edge") -> Tensor:
    """Smooth with a Gaussian of ``sigma`` pixels (or one for the rows and one for the columns), cut off at ``truncate`` sigmas.

    A sum over the taps: exact in any batch, and no autocast or TF32 mode lowers the precision.
    """
    for dim, s in zip((-2, -1), sigma if isinstance(sigma, tuple) else (sigma, sigma), strict=True):
        n, radius = x.shape[dim], int(truncate * s + 0.5)
        if radius == 0:
            continue
        w = [math.exp(-0.5 * (k / s) ** 2) for k in range(-radius, radius + 1)]
        longer, total = extend(x, dim, radius, border), sum(w)
        x = longer.narrow(dim, 0, n) * (w[0] / total)
        for k in range(1, 2 * radius + 1):
            x.add_(longer.narrow(dim, k, n), alpha=w[k] / total)
    return x


def motion_kernel(angle: Tensor, radius: int, sigma: float, size: tuple[int, int]) -> Tensor:
    """The path of a camera that moves for an exposure, for each image: (N, 1, 4 radius + 1, 4 radius + 1), its start in the middle.

    ImageMagick's: 2 radius + 1 steps of one pixel in the direction ``angle``, rounded to pixels, step i weighted by
    exp(-i^2 / 2 sigma^2), the weights' sum one. Steps that leave an image of ``size`` are lost, with their weight.

    Args:
        angle: (N,), radians; at 0 each pixel gathers from its right, at pi/2 from below.
        radius: pixels.
        sigma: pixels.
        size: height and width of the image.
    """
    side = 4 * radius + 1
    i = torch.arange(2 * radius + 1, device=angle.device, dtype=torch.float64)
    weight = (-0.5 * (i / sigma).square()).exp()
    a = angle.double()[:, None]
    dy, dx = (torch.ceil(i * a.sin() - 0.5).long(), torch.ceil(i * a.cos() - 0.5).long())
    inside = (dy.abs() < size[0]) & (dx.abs() < size[1])
    kernel = torch.zeros(len(angle), side * side, device=angle.device, dtype=torch.float64)
    kernel.scatter_add_(1, (dy + 2 * radius) * side + dx + 2 * radius, weight / weight.sum() * inside.cumprod(1))
    return kernel.view(-1, 1, side, side)


def middle(size: Sequence[int], factor: float) -> list[int]:
    """Height and width of the middle that ``enlarged`` by ``factor`` fills an image of ``size``: ceil(size / factor)."""
    return [math.ceil(n / factor) for n in size]


def enlarged(x: Tensor, factor: float, size: Sequence[int]) -> Tensor:
    """Enlarge bilinearly to round(``factor`` times the size), corners on corners (``scipy.ndimage.zoom``), and cut to ``size``."""
    larger = [max(round(m * factor), n) for m, n in zip(x.shape[-2:], size, strict=True)]
    x = F.interpolate(x, size=larger, mode="bilinear", align_corners=True)
    top, left = ((m - n) // 2 for n, m in zip(size, larger, strict=True))
    return x[..., top : top + size[0], left : left + size[1]]


def zoomed(x: Tensor, factor: float) -> Tensor:
    """Enlarge the middle of the images by ``factor`` >= 1; the size stays."""
    size = x.shape[-2:]
    inner = middle(size, factor)
    top, left = ((n - m) // 2 for n, m in zip(size, inner, strict=True))
    return enlarged(x[..., top : top + inner[0], left : left + inner[1]], factor, size)


def sample(x: Tensor, rows: Tensor, columns: Tensor, border: Literal["mirror", "symmetric", "zero"]) -> Tensor:
    """Bilinear values at positions (N, h, w) in pixels, where 0 is the centre of the first row or column."""
    corners, grid = border == "mirror", []
    for at, n in ((columns, x.shape[-1]), (rows, x.shape[-2])):
        grid.append(at * (2 / max(n - 1, 1)) - 1 if corners else (2 * at + 1) / n - 1)
    mode = "zeros" if border == "zero" else "reflection"
    return F.grid_sample(x, torch.stack(grid, -1), mode="bilinear", padding_mode=mode, align_corners=corners)


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (H, 1) and columns (W) of the pixels, float32."""
    return (
        torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None],
        torch.arange(x.shape[-1], device=x.device, dtype=torch.float32),
    )


def spectral_noise(amplitude: Tensor, rng: Rng, channels: int) -> Tensor:
    """Noise (N, channels, H, W) of standard deviation one whose Fourier coefficients have given sizes and random phases.

    The real part of a complex field, whose phases repeat: the right half of the centred spectrum is the left one turned by 180
    degrees, about a point half a coefficient from the middle when a side is even. (So in C-bar.)

    Args:
        amplitude: (H, W), the zero frequency at [H // 2, W // 2].
        rng: with tickets.
        channels: of the noise.
    """
    height, width = amplitude.shape
    phase = rng.uniform((channels, height, (width + 1) // 2), 0.0, 2 * torch.pi).to(amplitude.device)
    phase = torch.cat([phase, phase[..., : width // 2].flip(-2, -1)], -1)
    noise = torch.fft.ifft2(torch.fft.ifftshift(torch.polar(amplitude.expand_as(phase), phase), (-2, -1))).real
    centred = noise - noise.mean((-2, -1), keepdim=True)
    return noise / centred.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-12)


def luminance(x: Tensor) -> Tensor:
    """Grey images (N, 1, H, W): 0.299 red + 0.587 green + 0.114 blue; of one channel, itself."""
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3] if x.shape[1] == 3 else x


def filter2d(x: Tensor, kernel: Tensor, border: Border = "mirror") -> Tensor:
    """Correlate every channel with one kernel (h, w), or each image with its own (N, 1, h, w), of odd sides; the size stays.

    It goes through the Fourier transform: the cost hardly depends on the kernel, and no autocast or TF32 mode lowers the precision.
    """
    height, width = x.shape[-2:]
    kernel = kernel.to(x)
    padded = extend(extend(x, -2, kernel.shape[-2] // 2, border), -1, kernel.shape[-1] // 2, border)
    size = [fast_length(n) for n in padded.shape[-2:]]
    response = torch.fft.rfft2(kernel, s=size).conj()
    return torch.fft.irfft2(torch.fft.rfft2(padded, s=size) * response, s=size)[..., :height, :width]


@cache
def fast_length(n: int) -> int:
    """The next length whose Fourier transform is fast: no prime factor above 5."""
    while (60**20 % n) != 0:  # n divides a power of 2, 3 and 5 (of lengths up to 2^20)
        n += 1
    return n


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
