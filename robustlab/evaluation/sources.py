"""Labelled images from wherever the caller has them, one batch at a time, in a fixed order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from robustlab.modes import ambient
from robustlab.types import Splits, UserError, check_images

Batch = tuple[Tensor, Tensor]  # images float32 in [0, 1] (n, C, H, W), labels int64 (n,), on the CPU


@dataclass(frozen=True)
class Source:
    """Images to evaluate on.

    Attributes:
        data: tensors ``(x, y)``, a ``types.ImageSet``, a torch Dataset of (image, label), or a DataLoader.
        size: how many, None if the data cannot say.
        num_classes: K, None if the data cannot say.
        fingerprint: of the whole data set, if its loader computed one.
    """

    data: Any
    size: int | None
    num_classes: int | None = None
    fingerprint: str | None = None

    def batches(self, batch_size: int, limit: int | None) -> Iterator[Batch]:
        """The first ``limit`` images, cut at multiples of ``batch_size`` whatever the data's own batches are.

        Raises:
            UserError: images that are not (C, H, W), not in [0, 1], or labels that are not whole numbers.
        """
        size = self.size if limit is None else limit if self.size is None else min(limit, self.size)
        for x, y in self._raw(batch_size, size):
            yield _checked(x, y)

    def _raw(self, batch_size: int, size: int | None) -> Iterator[tuple[Any, Any]]:
        data = self.data
        if isinstance(data, tuple | list):
            x, y = data
            for i in range(0, size or 0, batch_size):
                yield x[i : min(i + batch_size, size or 0)], y[i : min(i + batch_size, size or 0)]
        elif hasattr(data, "batches"):
            positions = torch.arange(size or 0).split(batch_size)
            yield from ((x, y) for x, y, _ in data.batches(positions if size else ()))
        elif isinstance(data, DataLoader):
            with ambient(0):  # its workers' seed comes from the global generator
                loaded = iter(data)
            yield from _recut((_pair(b) for b in loaded), batch_size, size)
        else:
            items = iter(data) if isinstance(data, IterableDataset) else (data[i] for i in range(size or 0))
            yield from _recut(((_image(x)[None], torch.as_tensor(y).reshape(1)) for x, y in map(_pair, items)), batch_size, size)


def open_source(data: Any) -> Source:
    """Find out what the caller has given.

    Raises:
        UserError: nothing that holds labelled images, an empty set, or as many images as labels it is not.
    """
    if isinstance(data, Splits):
        return Source(data.test, _some(len(data.test)), data.num_classes, data.fingerprint)
    fingerprint = getattr(data, "fingerprint", None)
    if isinstance(data, tuple | list):
        if len(data) != 2 or not all(isinstance(t, Tensor) for t in data):
            raise UserError(f"data: expected two tensors (images, labels), got {_describe(data)}")
        x, y = data
        if len(x) != len(y):
            raise UserError(f"data: {len(x)} images but {len(y)} labels")
        return Source(data, _some(len(x)))
    if isinstance(data, DataLoader):
        if isinstance(data.sampler, RandomSampler):
            raise UserError("data: the DataLoader shuffles, so nothing could be repeated or resumed; give it shuffle=False")
        try:
            size = None if isinstance(data.dataset, IterableDataset) else len(data.sampler)  # type: ignore[arg-type]
        except TypeError:
            size = None
        return Source(data, size if size is None else _some(size), fingerprint=fingerprint)
    if isinstance(data, IterableDataset):
        return Source(data, None, fingerprint=fingerprint)
    if hasattr(data, "__len__") and (hasattr(data, "batches") or hasattr(data, "__getitem__")):
        return Source(data, _some(len(data)), fingerprint=fingerprint if isinstance(fingerprint, str) else None)
    raise UserError(f"data: expected tensors (images, labels), a Dataset or a DataLoader, got {_describe(data)}")


class Fingerprint:
    """A hash of images and labels in their order; how they were cut into batches does not matter."""

    def __init__(self) -> None:
        self._images, self._labels = hashlib.sha256(), hashlib.sha256()

    def add(self, x: Tensor, y: Tensor) -> str:
        """Take a batch in; returns the hash of this batch alone."""
        images, labels = np.ascontiguousarray(x.numpy()).data, np.ascontiguousarray(y.numpy()).data
        self._images.update(images)
        self._labels.update(labels)
        return hashlib.sha256(hashlib.sha256(images).digest() + labels).hexdigest()

    def value(self) -> str:
        return hashlib.sha256(self._images.digest() + self._labels.digest()).hexdigest()


def gathered(index: Tensor, batches: Iterable[Batch], hashes: Sequence[str]) -> Batch:
    """Images at some positions, ascending, from another pass over the data.

    Args:
        index: the positions.
        batches: all of the data, from the first.
        hashes: of the same batches in the pass before (:meth:`Fingerprint.add`).

    Raises:
        UserError: they are not the same, or do not come again.
    """
    found, first = list[Batch](), 0
    for (x, y), known in zip(batches, hashes, strict=False):
        rows = index[(index >= first) & (index < first + len(x))] - first
        if len(rows) and Fingerprint().add(x, y) != known:
            raise UserError("data: the images or labels changed between two passes over them, so survivors cannot be audited")
        found.append((x[rows], y[rows]))
        first += len(x)
        if first > int(index[-1]):
            break
    if sum(len(y) for _, y in found) < len(index) or not found:
        raise UserError("data: cannot be read twice, which an audit of survivors needs; give --audit 0")
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


def _some(size: int) -> int:
    if size == 0:
        raise UserError("data: no images")
    return size


def _describe(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(v).__name__ for v in value) or 'nothing'}"
    return f"a {type(value).__name__}"


def _pair(item: Any) -> tuple[Any, Any]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise UserError(f"data: expected items (image, label), got {_describe(item)}")
    return item[0], item[1]


def _image(x: Any) -> Tensor:
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(x)
    if not isinstance(x, Tensor) or x.ndim != 3:
        shape = f" of shape {tuple(x.shape)}" if isinstance(x, Tensor) else ""
        raise UserError(
            f"data: expected an image tensor (C, H, W), got {_describe(x)}{shape}; convert it in the data set's transform"
        )
    return x


def _recut(pieces: Iterable[tuple[Any, Any]], batch_size: int, size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of exactly ``batch_size`` (the last may be smaller), ``size`` samples in all; holds one batch at a time."""
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    held = sent = 0
    for x, y in pieces:
        x, y = torch.as_tensor(x), torch.as_tensor(y)
        if xs and x.shape[1:] != xs[0].shape[1:]:
            raise UserError(f"data: images of different shapes, {tuple(xs[0].shape[1:])} and {tuple(x.shape[1:])}")
        room = None if size is None else size - sent - held
        x, y = x[:room], y[:room]
        xs.append(x)
        ys.append(y)
        held += len(x)
        while held >= batch_size:
            whole_x, whole_y = torch.cat(xs), torch.cat(ys)
            yield whole_x[:batch_size], whole_y[:batch_size]
            sent, held = sent + batch_size, held - batch_size
            xs, ys = ([whole_x[batch_size:]], [whole_y[batch_size:]]) if held else ([], [])
        if size is not None and sent + held >= size:
            break
    if held:
        yield torch.cat(xs), torch.cat(ys)


def _checked(x: Tensor, y: Tensor) -> Batch:
    x, y = x.detach().cpu(), y.detach().cpu()
    if x.dtype == torch.uint8:
        x = x.float() / 255
    try:
        check_images(x)
    except ValueError as error:
        raise UserError(f"data: {error}") from error
    if y.is_floating_point() or y.ndim != 1 or y.dtype == torch.bool:
        raise UserError(f"data: labels must be a vector of whole numbers, got shape {tuple(y.shape)} of {y.dtype}")
    return x.float(), y.long()
