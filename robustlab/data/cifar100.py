"""CIFAR-100: 32 x 32 colour photographs of 100 classes, 50,000 for training and 10,000 for testing.

The published files are pickles; torchvision compares their MD5 with the published one before it reads them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from robustlab.data.torchvision_sets import TorchvisionDataset
from robustlab.registry import register
from robustlab.types import Count


@register("cifar100", cite="Krizhevsky, Learning multiple layers of features from tiny images, 2009")
class CIFAR100(TorchvisionDataset):
    """60,000 photographs of 32 px in 100 classes; 1,000 of the 50,000 training images are held out for validation."""

    files = "train, test, meta (or the archive cifar-100-python.tar.gz beside it)"
    folder = "cifar-100-python"

    validation: Count = 1000

    def read(self, root: Path, train: bool) -> tuple[Tensor, Tensor, list[str]]:
        from torchvision import datasets

        data = datasets.CIFAR100(root, train=train, download=self.download)
        return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets), data.classes
