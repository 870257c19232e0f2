"""Momentum iterative method, MI-FGSM (Dong et al., CVPR 2018, algorithm 1), with what later papers added for transfer.

    x_0 = x, m_0 = 0
    g_k     = grad_x L(f(T(x_k)), y)
    m_{k+1} = mu m_k + g_k / mean|g_k|
    x_{k+1} = P(x_k + alpha u(m_{k+1}))             u: sign for linf, m / ||m||_2 for l2;  alpha = eps / K

    nesterov     NI (Lin et al., ICLR 2020): the gradient is taken at x_k + alpha mu m_k
    diversity    DI (Xie et al., CVPR 2019): T shrinks the image and pads it with zeros with this probability, else does nothing
    translation  TI (Dong et al., CVPR 2019): g_k is smoothed by a Gaussian kernel before it is normalised

Differences from the authors' code: the papers divide by the sum of |g_k|, the code of MI and NI by the mean, as here. Directions
are the same; the look-ahead of NI would be D times shorter with the sum (D: number of values). The images of DI keep their size
(its code enlarges 299 px to sizes up to 330 px), so that every classifier takes them. As in the code of NI, the point that
looks ahead may leave ball and box.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from annotated_types import Gt, Le
from torch import Tensor
from torch.nn.functional import conv2d

from robustlab import geometry
from robustlab.attacks.steps import LossName, input_gradient, objective, passes, threat_of
from robustlab.image_ops import gaussian_kernel
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, Fraction, NonNegative, Norm, Positive


@register("mi-fgsm", cite="Dong et al., CVPR 2018, arXiv:1710.06081")
class MIFGSM(Attack):
    """BIM with momentum; switches make it NI-FGSM, DI-FGSM, TI-FGSM or any mixture. Known for transfer to other models.

    ``steps`` forward and backward passes. Random only with ``diversity``.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        steps: K.
        step: alpha, absolute; None is eps / steps.
        decay: mu; 0 is BIM.
        nesterov: look ahead by the momentum (NI).
        diversity: probability of a random resize and padding of each image at each step (DI; the paper's is 0.5 with momentum).
        resize: the least side of a resized image, as a fraction of the image's.
        translation: side of the Gaussian kernel, odd; its sigma is (side - 1) / 6. 1 does not smooth; TI has 15 at 299 px.
        loss: ``ce``, ``kl`` (to the probabilities y), ``dlr`` (three classes or more), ``margin``.
        targeted: y is the class to reach, and its loss goes down.
    """

    norm: Norm | None = None
    eps: NonNegative | None = None
    steps: Count = 10
    step: Positive | None = None
    decay: NonNegative = 1.0
    nesterov: bool = False
    diversity: Fraction = 0.0
    resize: Annotated[float, Gt(0), Le(1)] = 0.9
    translation: Count = 1
    loss: LossName = "ce"
    targeted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.translation % 2 == 0:
            raise ValueError(
                f"{self.name}: translation is the side of a kernel with a centre, an odd number; got {self.translation}"
            )

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        norm, eps = threat_of(self)
        alpha = eps / self.steps if self.step is None else self.step
        loss, x_k, m = objective(self.loss, self.targeted), x, torch.zeros_like(x)
        for k in range(self.steps):
            ahead = x_k + alpha * self.decay * m if self.nesterov else x_k
            g = input_gradient(self._diverse(f, rng.child("diversity", k)), ahead, y, loss).g
            m = self.decay * m + _over_mean(smooth(g, self.translation))
            x_k = geometry.project(x_k + alpha * geometry.steepest(m, norm), x, norm, eps)
        return x_k, {"grad": g, "passes": passes(x, self.steps, self.steps)}

    def _diverse(self, f: Classifier, rng: Rng) -> Classifier:
        return f if self.diversity == 0 else lambda z: f(resize_and_pad(z, self.diversity, self.resize, rng))


def _over_mean(g: Tensor) -> Tensor:
    """The gradient over its mean magnitude; zero stays zero."""
    mean = g.abs().mean((1, 2, 3), keepdim=True)
    return g / mean.clamp_min(torch.finfo(g.dtype).tiny)


def smooth(g: Tensor, side: int) -> Tensor:
    """Every channel convolved with a Gaussian kernel (side, side) that ends at three sigma; zeros around the image."""
    if side == 1:
        return g
    kernel = gaussian_kernel(side, (side - 1) / 6).to(g).expand(g.shape[1], 1, side, side)
    return conv2d(g, kernel, padding=side // 2, groups=g.shape[1])


def resize_and_pad(x: Tensor, probability: float, least: float, rng: Rng) -> Tensor:
    """Shrink images to random sizes (nearest neighbour) and put them at random places on black, each with the given probability.

    Args:
        x: images (N, C, H, W).
        probability: of a change, for each image.
        least: the smallest side that is drawn, as a fraction of the image's; all from there to the image's are as likely.
    """
    height, width = x.shape[-2:]
    smallest = math.ceil(least * min(height, width))
    side = smallest + rng.child("side").integers((), min(height, width) - smallest + 1)
    sides = [side * n // min(height, width) for n in (height, width)]  # the aspect stays
    changed = (rng.child("changed").uniform(()) < probability)[:, None]
    rows, columns = (
        torch.where(changed, _source(n, s, rng.child(name)), torch.arange(n, device=x.device))
        for n, s, name in zip((height, width), sides, ("top", "left"), strict=True)
    )
    batch, channel = torch.arange(len(x), device=x.device), torch.arange(x.shape[1], device=x.device)
    at = (
        batch[:, None, None, None],
        channel[:, None, None],
        rows.clamp_min(0)[:, None, :, None],
        columns.clamp_min(0)[:, None, None],
    )
    inside = (rows >= 0)[:, None, :, None] & (columns >= 0)[:, None, None]
    return torch.where(inside, x[at], torch.zeros_like(x))


def _source(n: int, side: Tensor, rng: Rng) -> Tensor:
    """For each of n places, the pixel shown there when n pixels shrink to ``side`` (N,) at a random offset; -1 outside: (N, n)."""
    offset = rng.integers((), n - side + 1)[:, None]
    place, side = torch.arange(n, device=side.device) - offset, side[:, None]
    return torch.where((place >= 0) & (place < side), place * n // side, -1)
