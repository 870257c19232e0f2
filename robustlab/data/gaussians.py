"""Two Gaussian classes, for which Bayes-robust accuracy is known.

    x = 1/2 + y mu + sigma n,   n ~ N(0, I_D),   y = -1 (class 0) or +1 (class 1), equally likely,   mu = (m, ..., m)

The Bayes classifier is sign<mu, x - 1/2>: y <mu, x - 1/2> is normal with mean D m^2 and standard deviation sigma m sqrt(D).
An adversary with budget eps lowers it by eps times the dual norm of mu: by eps D m (linf), eps sqrt(D) m (l2), eps m (l1).
With the separation s = sqrt(D) m / sigma, in standard deviations,

    accuracy(eps) = Phi(s - eps sqrt(D) / sigma)  linf,   Phi(s - eps / sigma)  l2,   Phi(s - eps / (sigma sqrt(D)))  l1

All pixels of mu are equal, so no classifier is more robust in any of these norms, as long as eps leaves the classes apart: the
most robust one is linear along mu - z, with z the point of the ball nearest to mu (Bhagoji, Cullina, Mittal, NeurIPS 2019,
arXiv:1909.12272), and that is a multiple of mu.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from typing import Literal

import torch
from torch import Tensor, nn

from robustlab.data.images import MemoryImages, mean_std
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Count, Dataset, NonNegative, Positive, Splits, Whole


@register("gaussians")
class Gaussians(Dataset):
    """Synthetic images of two Gaussian classes; clean and robust accuracy of the Bayes classifier are known in closed form.

    Attributes:
        size: height and width in pixels.
        channels: 1 or 3.
        separation: distance of a class mean from the boundary, in standard deviations.
        sigma: standard deviation of each pixel, in [0, 1] units.
        n_train, n_val, n_test: images per split.
        seed: another seed, other images.

    Raises:
        ValueError: more than 1e-6 of the images would have a pixel outside [0, 1].
    """

    size: Count = 8
    channels: Literal[1, 3] = 1
    separation: NonNegative = 4.0
    sigma: Positive = 0.07
    n_train: Count = 4000
    n_val: Count = 1000
    n_test: Count = 10000
    seed: Whole = 0

    def __post_init__(self) -> None:
        outside = self.pixels * (_phi((self.shift - 0.5) / self.sigma) + _phi((-self.shift - 0.5) / self.sigma))
        if outside > 1e-6:
            raise ValueError(
                f"sigma {self.sigma:g} lets {outside:.1e} of the images leave [0, 1]; at most 1e-6 may: take a smaller one"
            )

    @property
    def pixels(self) -> int:
        """D."""
        return self.channels * self.size**2

    @property
    def shift(self) -> float:
        """m, the value of each pixel of mu."""
        return self.separation * self.sigma / math.sqrt(self.pixels)

    def load(self) -> Splits:
        train, validation, test = (
            MemoryImages(*self._draw(name, n), 2, source="gaussians")
            for name, n in [("train", self.n_train), ("validation", self.n_val), ("test", self.n_test)]
        )
        mean, std = mean_std(train)
        fields = {k: v for k, v in asdict(self).items() if k not in ("root", "augment")}
        digest = hashlib.sha256(
            json.dumps(fields, sort_keys=True).encode()
        ).hexdigest()  # the recipe: normals agree only to rounding
        shape = (self.channels, self.size, self.size)
        return Splits(train, validation, test, ("minus", "plus"), shape, mean, std, digest)

    def _draw(self, split: str, n: int) -> tuple[Tensor, Tensor]:
        rng = Rng(self.seed).child("gaussians", split).at(torch.arange(n))
        labels = (rng.child("label").bits(()) & 1).long()
        noise = rng.child("noise").normal((self.channels, self.size, self.size))
        sign = (2 * labels - 1).view(-1, 1, 1, 1)
        return (0.5 + sign * self.shift + self.sigma * noise).clamp(0, 1), labels

    def bayes_classifier(self) -> nn.Module:
        """The classifier with the highest clean accuracy: (N, C, H, W) -> (N, 2); its softmax is the true posterior."""
        linear = nn.Linear(self.pixels, 2)
        slope = self.shift / self.sigma**2
        with torch.no_grad():
            linear.weight.copy_(torch.tensor([[-slope], [slope]]).expand(2, self.pixels))
            linear.bias.copy_(linear.weight.sum(1) * -0.5)
        return nn.Sequential(nn.Flatten(), linear).eval()

    def bayes_robust_accuracy(self, norm: str, eps: float) -> float:
        """The Bayes classifier's accuracy, in expectation, against the strongest adversary; the box [0, 1] is not in its way.

        Args:
            norm: ``linf``, ``l2`` or ``l1``.
            eps: radius in [0, 1] pixel units; 0 gives the clean accuracy.

        Raises:
            ValueError: another norm.
        """
        loss = {"linf": math.sqrt(self.pixels), "l2": 1.0, "l1": 1 / math.sqrt(self.pixels)}
        if norm not in loss:
            raise ValueError(f"no closed form for the norm '{norm}'; expected one of {', '.join(loss)}")
        return _phi(self.separation - eps * loss[norm] / self.sigma)


def _phi(t: float) -> float:
    """The standard normal distribution function."""
    return math.erfc(-t / math.sqrt(2)) / 2
