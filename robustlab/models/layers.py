"""What architectures share: the fields every model has, and normalisation as a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from robustlab.models.checkpoint import load_weights
from robustlab.types import Count, Model


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel: the first layer of every classifier. Mean and std are buffers, so a checkpoint has them.

    Args:
        mean, std: per channel, in [0, 1] units.

    Raises:
        ValueError: different lengths, or a std that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"mean and std need one number per channel, std positive; got mean {mean} and std {std}")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Fit(nn.Module):
    """Images of another size are resized (shorter side to ``resize``, antialiased) and their centre is cut out; others pass.

    Args:
        size: height and width that come out.
        resize: the shorter side before the cut, at least ``size``.
        mode: ``bilinear`` or ``bicubic``.
    """

    def __init__(self, size: int, resize: int, mode: str):
        super().__init__()
        self.size, self.resize, self.mode = size, resize, mode

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if (h, w) == (self.size, self.size):
            return x
        short = min(h, w)
        shape = (self.resize * h // short, self.resize * w // short)
        x = interpolate(x, size=shape, mode=self.mode, align_corners=False, antialias=True)
        top, left = round((shape[0] - self.size) / 2), round((shape[1] - self.size) / 2)
        return x[..., top : top + self.size, left : left + self.size]


@dataclass(frozen=True, kw_only=True)
class ImageModel(Model):
    """Fields that every architecture has; what is None is filled from the data set.

    Attributes:
        num_classes: K.
        in_channels: 1 or 3; None takes the length of ``mean``, else 3.
        mean, std: per channel, of the training images in [0, 1]; None normalises with 0 and 1.
    """

    offers_pretrained: ClassVar[bool] = False

    num_classes: Count | None = None
    in_channels: Literal[1, 3] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def network(self) -> nn.Module:
        """The classifier with random weights, or with the source's own where ``init`` is ``pretrained``."""
        raise NotImplementedError

    def build(self) -> nn.Module:
        """The classifier, with the weights that ``init`` names.

        Raises:
            ValueError: ``num_classes`` is missing; ``mean`` or ``std`` does not have one number per channel.
            UserError: the weights cannot be read or do not fit.
        """
        if self.init == "pretrained" and not self.offers_pretrained:
            raise ValueError(
                f"{self.name}: init 'pretrained': there are no such weights; give a file, or take a timm: or torchvision: model"
            )
        f = self.network()
        if self.init not in (None, "pretrained"):
            load_weights(f, self.init)
        return f

    def classes(self) -> int:
        """K; raises ``ValueError`` if it is not given."""
        if self.num_classes is None:
            raise ValueError(f"{self.name}: give num_classes, for example num_classes=10")
        return self.num_classes

    def channels(self) -> int:
        """How many channels the images have."""
        return self.in_channels or len(self.mean or self.std or (0, 0, 0))

    def normalize(self, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None) -> Normalize:
        """The first layer. Arguments are the architecture's own statistics, used where no field says otherwise.

        Raises:
            ValueError: ``mean`` or ``std`` does not have one number per channel.
        """
        c = self.channels()
        mean, std = self.mean or mean or (0.0,) * c, self.std or std or (1.0,) * c
        if not len(mean) == len(std) == c:
            raise ValueError(f"{self.name}: mean and std need {c} numbers each for {c} channels, got {len(mean)} and {len(std)}")
        return Normalize(mean, std)


def activation(name: str) -> nn.Module:
    """``relu`` or ``silu``; never in place, since taps and second derivatives need what came in."""
    return {"relu": nn.ReLU, "silu": nn.SiLU}[name]()
