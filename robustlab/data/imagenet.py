"""ImageNet (ILSVRC 2012): 1,281,167 training images and 50,000 validation images of 1,000 classes, read from folders."""

from __future__ import annotations

from robustlab.data.folders import IMAGENET_MEAN, IMAGENET_STD, FolderDataset, class_folders, first_with, list_images
from robustlab.data.images import data_root
from robustlab.registry import register
from robustlab.types import Count, ImageSet, Splits


@register("imagenet", cite="Russakovsky et al., IJCV 2015, arXiv:1409.0575")
class ImageNet(FolderDataset):
    """ImageNet from ``imagenet/val/<wnid>/*`` and, for training, ``imagenet/train/<wnid>/*`` under the root.

    The official validation images are the test set; validation images are held out from train. Without ``train``
    models can be scored only.
    """

    validation: Count = 10000

    def load(self) -> Splits:
        root = data_root(self.root)
        base = first_with([root / "imagenet", root], ["val"], self.name)
        wnids = class_folders(base / "val")
        test = list_images(base / "val", wnids, self.name)
        train = list_images(base / "train", wnids, self.name)
        return self.splits(base, category_names(wnids), train, None, test)

    def statistics(self, train: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.grey(IMAGENET_MEAN), self.grey(IMAGENET_STD)


def category_names(wnids: list[str]) -> list[str]:
    """Words for the 1,000 classes in the order of their sorted ids; for a part of them, the ids themselves."""
    if len(wnids) != 1000:
        return wnids
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.DEFAULT.meta["categories"])
