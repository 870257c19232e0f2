"""SVHN: 32 x 32 colour photographs of house numbers, 73,257 for training and 26,032 for testing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from robustlab.data.torchvision_sets import TorchvisionDataset
from robustlab.registry import register


@register("svhn", cite="Netzer, Wang, Coates, Bissacco, Wu, Ng, NIPS workshop 2011")
class SVHN(TorchvisionDataset):
    """99,289 house-number digits of 32 px; 5,000 of the 73,257 training images are held out for validation."""

    files = "train_32x32.mat, test_32x32.mat"

    def read(self, root: Path, train: bool) -> tuple[Tensor, Tensor, list[str]]:
        from torchvision import datasets

        data = datasets.SVHN(root, split="train" if train else "test", download=self.download)
        return torch.from_numpy(data.data), torch.from_numpy(data.labels).long(), [str(d) for d in range(10)]
