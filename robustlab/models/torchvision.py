"""Any image classifier of torchvision, with the mean, std, resize and crop that belong to its weights inside."""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn

from robustlab.models.checkpoint import first_line
from robustlab.models.layers import Fit, ImageModel, Normalize
from robustlab.registry import nearest, register
from robustlab.types import UserError

_SEVERAL_OUTPUTS = ("googlenet", "inception_v3")  # in training mode


class Repeat(nn.Module):
    """Grey images (N, 1, H, W) as (N, 3, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)


@register("torchvision", cite="TorchVision maintainers and contributors, 2016")
class Torchvision(ImageModel):
    """A classifier of torchvision, written ``torchvision:resnet18``; ``init: pretrained`` takes its published weights.

    Mean and std (three numbers each; grey images are repeated) are the published ones unless given. With pretrained weights and
    no ``num_classes`` the published head stays; with another number of classes the last linear layer is new.

    Attributes:
        arch: torchvision's name of the model, such as ``resnet18`` or ``convnext_tiny``.
        fit: resize and crop images of another size to the model's own; without it they enter at their size.
    """

    offers_pretrained: ClassVar[bool] = True

    arch: str
    fit: bool = True

    def network(self) -> nn.Module:
        from torchvision import models

        known = [name for name in models.list_models(module=models) if name not in _SEVERAL_OUTPUTS]
        if self.arch not in known:
            raise UserError(f"torchvision: unknown arch '{self.arch}'{nearest(self.arch, known)}")
        weights = models.get_model_weights(self.arch).DEFAULT
        if self.init == "pretrained":
            net = self._pretrained(weights)
        else:
            net = models.get_model(self.arch, weights=None, num_classes=self.classes())
        own = weights.transforms()
        mean, std = self.mean or tuple(own.mean), self.std or tuple(own.std)
        if not len(mean) == len(std) == 3:
            raise ValueError(f"torchvision: mean and std need 3 numbers each, got {len(mean)} and {len(std)}")
        layers: OrderedDict[str, nn.Module] = OrderedDict(repeat=Repeat()) if self.channels() == 1 else OrderedDict()
        layers["normalize"] = Normalize(mean, std)
        if self.fit:
            layers["fit"] = Fit(own.crop_size[0], own.resize_size[0], own.interpolation.value)
        layers["net"] = net
        return nn.Sequential(layers)

    def channels(self) -> int:
        return self.in_channels or 3

    def _pretrained(self, weights: object) -> nn.Module:
        from torchvision import models

        try:
            net = models.get_model(self.arch, weights=weights)
        except Exception as error:  # no network, a damaged download: several types
            raise UserError(f"torchvision:{self.arch}: its pretrained weights cannot be had: {first_line(error)}") from None
        name, last = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
        if self.num_classes is not None and self.num_classes != getattr(last, "out_features", None):
            if not isinstance(last, nn.Linear):
                raise UserError(f"torchvision:{self.arch}: its head is no linear layer, so num_classes cannot be changed")
            net.set_submodule(name, nn.Linear(last.in_features, self.num_classes))
        return net
