"""Pre-activation ResNets for small images.

He et al., ECCV 2016, arXiv:1603.05027: each block is ``x + conv(relu(bn(conv(relu(bn(x))))))``; where the shape changes, the
shortcut is a 1 x 1 convolution of ``relu(bn(x))``. The stem is one 3 x 3 convolution of stride 1 without pooling, as is
usual for CIFAR. Layers carry the names of the checkpoints in circulation, so that those load.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from robustlab.models.layers import ImageModel
from robustlab.registry import register

CITE = "He, Zhang, Ren, Sun, ECCV 2016, arXiv:1603.05027"


class PreActBlock(nn.Module):
    """Two 3 x 3 convolutions."""

    expansion = 1

    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        self.shortcut = shortcut(c_in, c, stride)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(a)
        return skip + self.conv2(self.relu(self.bn2(self.conv1(a))))


class PreActBottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions; the last has four times the channels."""

    expansion = 4

    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(c)
        self.conv3 = nn.Conv2d(c, 4 * c, 1, bias=False)
        self.relu = nn.ReLU()
        self.shortcut = shortcut(c_in, 4 * c, stride)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(a)
        out = self.conv2(self.relu(self.bn2(self.conv1(a))))
        return skip + self.conv3(self.relu(self.bn3(out)))


def shortcut(c_in: int, c_out: int, stride: int) -> nn.Module | None:
    """The 1 x 1 convolution beside a block that changes the shape."""
    if stride == 1 and c_in == c_out:
        return None
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False))


def preact_resnet(part: ImageModel, block: type[PreActBlock | PreActBottleneck], depths: tuple[int, ...]) -> nn.Module:
    """Stem, four stages of 64, 128, 256 and 512 channels, batch normalisation, mean over the pixels, linear layer."""
    classes = part.classes()
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=part.normalize())
    layers["conv1"] = nn.Conv2d(part.channels(), 64, 3, padding=1, bias=False)
    c_in = 64
    for i, depth in enumerate(depths):
        blocks = []
        for j in range(depth):
            blocks.append(block(c_in, 64 * 2**i, 2 if i > 0 and j == 0 else 1))
            c_in = 64 * 2**i * block.expansion
        layers[f"layer{i + 1}"] = nn.Sequential(*blocks)
    layers.update(bn=nn.BatchNorm2d(c_in), relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    layers["linear"] = nn.Linear(c_in, classes)
    return nn.Sequential(layers)


@register("preact_resnet18", cite=CITE)
class PreActResNet18(ImageModel):
    """Pre-activation ResNet-18 with a CIFAR stem, for images of 8 to 64 px; 11.2 million parameters."""

    def network(self) -> nn.Module:
        return preact_resnet(self, PreActBlock, (2, 2, 2, 2))


@register("preact_resnet34", cite=CITE)
class PreActResNet34(ImageModel):
    """Pre-activation ResNet-34 with a CIFAR stem, for images of 8 to 64 px; 21.3 million parameters."""

    def network(self) -> nn.Module:
        return preact_resnet(self, PreActBlock, (3, 4, 6, 3))


@register("preact_resnet50", cite=CITE)
class PreActResNet50(ImageModel):
    """Pre-activation ResNet-50 (bottlenecks) with a CIFAR stem, for images of 8 to 64 px; 23.5 million parameters."""

    def network(self) -> nn.Module:
        return preact_resnet(self, PreActBottleneck, (3, 4, 6, 3))
