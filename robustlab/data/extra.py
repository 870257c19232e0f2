"""Further training images at a fixed share of each batch: generated ones, or others with pseudo-labels.

The files that Rebuffi et al. and Wang et al. publish (``image``, ``label``; a million images and more) are read as they are, mapped
into memory. Pickles, such as the 500,000 images of Carmon et al., have to be converted first. Training images are visited in
random order, the extra ones are drawn with replacement; the length of an epoch is that of the training images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from robustlab.data.images import MemoryImages
from robustlab.data.npz import find, images_of, read_arrays
from robustlab.types import Dataset, Splits, UserError, one_hot

KEYS = ("image", "label", "x_train", "y_train")


class ExtraImages:
    """Images whose targets are smoothed class probabilities.

    Args:
        images: with the most probable class as label.
        num_classes: K.
        smoothing: share of the uniform distribution in the targets.
        probabilities: (M, K), or None: the labels are certain.
    """

    def __init__(self, images: MemoryImages, num_classes: int, smoothing: float, probabilities: Tensor | None = None):
        self.images, self.num_classes, self.smoothing, self.probabilities = images, num_classes, smoothing, probabilities
        self.labels = images.labels

    def __len__(self) -> int:
        return len(self.images)

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each vector of positions: images float32 in [0, 1], class probabilities (n, K), positions."""
        for x, label, index in self.images.batches(index_batches, device):
            if self.probabilities is None:
                y = one_hot(label, self.num_classes, x.dtype)
            else:
                y = self.probabilities[index.cpu()].to(x)
            yield x, (1 - self.smoothing) * y + self.smoothing / self.num_classes, index


def with_extra(data: Dataset, splits: Splits) -> Splits:
    """The splits with the extra images that the data set asks for.

    Raises:
        UserError: no such file; arrays missing; images or labels that do not fit the data set's.
    """
    if data.extra is None or data.extra.ratio == 0:
        return splits
    path = find(data.extra.path, data.root, "data.extra")
    arrays = read_arrays(path, KEYS)
    x, y = (arrays.get(a, arrays.get(b)) for a, b in (("image", "x_train"), ("label", "y_train")))
    if x is None or y is None:
        raise UserError(f"data.extra: {path} has no {'image' if x is None else 'label'}; it has {', '.join(arrays) or 'nothing'}")
    if x.dtype != np.uint8:
        raise UserError(f"data.extra: {path}: images must be uint8, got {x.dtype}")
    images, source = images_of(torch.from_numpy(x), data.extra.layout, f"data.extra: {path}"), f"data.extra: {path}"
    if tuple(images.shape[1:]) != splits.image_shape:
        raise UserError(f"{source}: images of {tuple(images.shape[1:])}, but '{data.name}' has {splits.image_shape}")
    labels, probabilities = _targets(y, splits.num_classes, source)
    held = MemoryImages(images, labels, splits.num_classes, source=source)
    return dataclasses.replace(splits, extra=ExtraImages(held, splits.num_classes, data.extra.smoothing, probabilities))


def _targets(y: np.ndarray, num_classes: int, source: str) -> tuple[Tensor, Tensor | None]:
    """Labels (M,), and the probabilities (M, K) where the file has these."""
    if y.dtype.kind in "iu" and y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind in "iu" and y.ndim == 1:
        return torch.from_numpy(y.astype(np.int64)), None
    if y.dtype.kind != "f" or y.ndim != 2 or y.shape[1] != num_classes:
        raise UserError(f"{source}: labels must be classes (M,) or probabilities (M, {num_classes}), got {y.shape} of {y.dtype}")
    p = torch.from_numpy(y)
    if not (float(p.amin()) >= 0 and float((p.sum(1) - 1).abs().amax()) < 1e-3):
        raise UserError(f"{source}: a label is no probability distribution: its entries must be >= 0 and sum to 1")
    return p.argmax(1), p
