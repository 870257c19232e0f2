"""CIFAR-10: 32 x 32 colour photographs of 10 classes, 50,000 for training and 10,000 for testing.

The published files are pickles; torchvision compares their MD5 with the published one before it reads them.
The root may also be one ``.npz`` file with a copy: ``x_train y_train x_test y_test``, or the images as JPEG files (see ``npz``).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from robustlab.data.npz import PACKED, images_of, read_npz, unpacked
from robustlab.data.torchvision_sets import TorchvisionDataset
from robustlab.registry import register
from robustlab.types import Count, UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@register("cifar10", cite="Krizhevsky, Learning multiple layers of features from tiny images, 2009")
class CIFAR10(TorchvisionDataset):
    """60,000 photographs of 32 px in 10 classes; 1,000 of the 50,000 training images are held out for validation.

    The root is a folder, or a ``.npz`` file with a copy, which may lack some of the images.
    """

    files = "data_batch_1 to data_batch_5, test_batch, batches.meta (or the archive cifar-10-python.tar.gz beside it)"
    folder = "cifar-10-batches-py"

    validation: Count = 1000

    def read(self, root: Path, train: bool) -> tuple[Tensor, Tensor, list[str]]:
        if root.suffix == ".npz":
            return (*copy_in(root, "train" if train else "test"), list(CLASSES))
        from torchvision import datasets

        data = datasets.CIFAR10(root, train=train, download=self.download)
        return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets), data.classes


def copy_in(path: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) and labels of a split of a ``.npz`` file.

    Raises:
        UserError: no such file, a damaged one, or without the split.
    """
    keys = [key for key in (f"x_{split}", f"y_{split}", *PACKED) if split in key]
    arrays = unpacked(read_npz(path, keys), path)
    if not {f"x_{split}", f"y_{split}"} <= arrays.keys():
        raise UserError(f"cifar10: {path} has no images and labels called {split}")
    x, y = (torch.from_numpy(arrays[f"{name}_{split}"]) for name in "xy")
    return images_of(x, "auto", f"cifar10: {path}").contiguous(), y.long()
