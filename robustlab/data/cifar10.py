"""CIFAR-10: 32 x 32 colour photographs of 10 classes, 50,000 for training and 10,000 for testing.

The published files are pickles; torchvision compares their MD5 with the published one before it reads them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from robustlab.data.torchvision_sets import TorchvisionDataset
from robustlab.registry import register
from robustlab.types import Count


@register("cifar10", cite="Krizhevsky, Learning multiple layers of features from tiny images, 2009")
class CIFAR10(TorchvisionDataset):
    """60,000 photographs of 32 px in 10 classes; 1,000 of the 50,000 training images are held out for validation."""

    files = "data_batch_1 to data_batch_5, test_batch, batches.meta (or the archive cifar-10-python.tar.gz beside it)"
    folder = "cifar-10-batches-py"

    validation: Count = 1000

    def read(self, root: Path, train: bool) -> tuple[Tensor, Tensor, list[str]]:
        from torchvision import datasets

        data = datasets.CIFAR10(root, train=train, download=self.download)
        return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets), data.classes
