"""Wide residual networks.

Zagoruyko and Komodakis, BMVC 2016, arXiv:1605.07146, table 1: WRN-d-k has three groups of n = (d - 4) / 6 pre-activation blocks
with 16k, 32k and 64k channels. With SiLU it is the network of Gowal et al. 2020, arXiv:2010.03593, section 3.
Layers carry the names of the checkpoints in circulation, so that those load.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from robustlab.models.layers import ImageModel, activation
from robustlab.registry import register
from robustlab.types import Count, OpenFraction


class WideBlock(nn.Module):
    """Two 3 x 3 convolutions after batch normalisation and activation, dropout between them."""

    def __init__(self, c_in: int, c: int, stride: int, act: str, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.act = activation(act)
        self.dropout = nn.Dropout(dropout)
        self.convShortcut = nn.Conv2d(c_in, c, 1, stride=stride, bias=False) if c_in != c else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.bn1(x))
        skip = x if self.convShortcut is None else self.convShortcut(a)
        return skip + self.conv2(self.dropout(self.act(self.bn2(self.conv1(a)))))


@register("wide_resnet", cite="Zagoruyko and Komodakis, BMVC 2016, arXiv:1605.07146")
class WideResNet(ImageModel):
    """Wide ResNet, by default WRN-28-10; for images of 8 to 64 px.

    Attributes:
        depth: 6n + 4, such as 16, 28, 34, 70.
        width: k, the factor on the channels.
        activation: relu or silu.
        dropout: probability between the two convolutions of a block.
    """

    depth: Count = 28
    width: Count = 10
    activation: Literal["relu", "silu"] = "relu"
    dropout: OpenFraction = 0.0

    def __post_init__(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 with n >= 1, such as 16, 28, 34 or 70, got {self.depth}")

    def network(self) -> nn.Module:
        classes, n = self.classes(), (self.depth - 4) // 6
        layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=self.normalize())
        layers["conv1"] = nn.Conv2d(self.channels(), 16, 3, padding=1, bias=False)
        c_in = 16
        for i in range(3):
            c = 16 * self.width * 2**i
            strides = [2 if i > 0 else 1] + [1] * (n - 1)
            blocks = [WideBlock(c_in if j == 0 else c, c, s, self.activation, self.dropout) for j, s in enumerate(strides)]
            layers[f"block{i + 1}"] = nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks)))
            c_in = c
        layers.update(bn1=nn.BatchNorm2d(c_in), act=activation(self.activation), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
        layers["fc"] = nn.Linear(c_in, classes)
        return initialized(nn.Sequential(layers))


def initialized(f: nn.Module) -> nn.Module:
    """He initialisation over the outputs of each convolution (He et al., ICCV 2015), biases zero."""
    for m in f.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.Linear):
            nn.init.zeros_(m.bias)
    return f
