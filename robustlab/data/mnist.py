"""MNIST: 28 x 28 grey handwritten digits, 60,000 for training and 10,000 for testing."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from robustlab.data.torchvision_sets import TorchvisionDataset
from robustlab.registry import register


@register("mnist", cite="LeCun, Bottou, Bengio, Haffner, Proceedings of the IEEE 1998")
class MNIST(TorchvisionDataset):
    """70,000 handwritten digits of 28 px, grey; 5,000 of the 60,000 training images are held out for validation."""

    files = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte (or .gz)"
    folder = "MNIST/raw"

    def read(self, root: Path, train: bool) -> tuple[Tensor, Tensor, list[str]]:
        from torchvision import datasets

        data = datasets.MNIST(root, train=train, download=self.download)
        return data.data[:, None], data.targets, [str(d) for d in range(10)]
