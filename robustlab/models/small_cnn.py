"""A small convolutional net: 3 x 3 convolutions of strides 2, 1, 2, then one linear layer on a 4 x 4 map.

With stride 2 first, almost no work is done at full resolution: an attack step on a CPU costs milliseconds.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import nn

from robustlab.models.layers import ImageModel, activation
from robustlab.registry import register
from robustlab.types import Count


@register("small_cnn")
class SmallCNN(ImageModel):
    """A three-convolution net for quick work on a CPU; images of 8 to 64 px.

    Attributes:
        width: channels of the first convolution; the others have 2 and 4 times as many. Divisible by 8 for group normalisation.
        norm: batch, group (8 groups) or no normalisation after each convolution.
        activation: relu or silu.
    """

    width: Count = 16
    norm: Literal["batch", "group", "none"] = "batch"
    activation: Literal["relu", "silu"] = "relu"

    def __post_init__(self) -> None:
        if self.norm == "group" and self.width % 8:
            raise ValueError(f"width must be divisible by 8 for norm 'group', got {self.width}")

    def network(self) -> nn.Module:
        k, w = self.classes(), self.width
        layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=self.normalize())
        for i, (c_in, c_out, stride) in enumerate([(self.channels(), w, 2), (w, 2 * w, 1), (2 * w, 4 * w, 2)], start=1):
            layers[f"conv{i}"] = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=self.norm == "none")
            if self.norm != "none":
                layers[f"norm{i}"] = nn.BatchNorm2d(c_out) if self.norm == "batch" else nn.GroupNorm(8, c_out)
            layers[f"act{i}"] = activation(self.activation)
        layers["pool"] = nn.AdaptiveAvgPool2d(4)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(4 * w * 16, k)
        return nn.Sequential(layers)
