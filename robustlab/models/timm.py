"""Any classifier of timm, with the mean, std, resize and crop of the model's own data configuration inside."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

from torch import nn

from robustlab.models.checkpoint import first_line
from robustlab.models.layers import Fit, ImageModel
from robustlab.registry import nearest, register
from robustlab.types import UserError


@register("timm", cite="Wightman, PyTorch image models, 2019, doi:10.5281/zenodo.4414861")
class Timm(ImageModel):
    """A model of timm, written ``timm:resnet18``; ``init: pretrained`` takes its published weights.

    Mean and std are the model's own unless given. With pretrained weights and no ``num_classes`` the published head stays.

    Attributes:
        arch: timm's name of the model, such as ``resnet18`` or ``vit_tiny_patch16_224.augreg_in21k_ft_in1k``.
        fit: resize and crop images of another size to the model's own; without it they enter at their size.
    """

    offers_pretrained: ClassVar[bool] = True

    arch: str
    fit: bool = True

    def network(self) -> nn.Module:
        import timm

        if ":" not in self.arch and "/" not in self.arch and not timm.is_model(self.arch):
            raise UserError(f"timm: unknown arch '{self.arch}'{nearest(self.arch, timm.list_models())}")
        pretrained = self.init == "pretrained"
        head: dict[str, Any] = {} if pretrained and self.num_classes is None else {"num_classes": self.classes()}
        try:
            net = timm.create_model(self.arch, pretrained=pretrained, in_chans=self.channels(), **head)
        except Exception as error:  # no network, no such weights, an unusual model: timm and its hub raise many types
            what = "its pretrained weights cannot be had" if pretrained else "it cannot be made"
            raise UserError(f"timm:{self.arch}: {what}: {first_line(error)}") from None
        own = timm.data.resolve_model_data_config(net)
        mean, std = tuple(own["mean"]), tuple(own["std"])
        if self.channels() == 1 and len(mean) == 3:
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
        layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=self.normalize(mean, std))
        if self.fit:
            size = own["input_size"][-1]
            mode = own["interpolation"] if own["interpolation"] in ("bilinear", "bicubic") else "bicubic"
            layers["fit"] = Fit(size, int(size / own["crop_pct"]), mode)
        layers["net"] = net
        return nn.Sequential(layers)
