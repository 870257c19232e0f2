"""What data sets share: images in memory, images from a stream, stratified splits, statistics, fingerprints, folders."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustlab.image_ops import over_255
from robustlab.rng import Rng
from robustlab.types import ImageSet, Splits, UserError

RESIDENT_BYTES = 2**31  # sets up to this size are kept on the device that asks for them
_CHUNK = 4096  # images looked at together in statistics and hashes


class MemoryImages:
    """Labelled images in one tensor; a copy stays on the device that first asks for batches.

    Args:
        images: (N, C, H, W), uint8, or floating point in [0, 1]; may be memory-mapped and of any strides.
        labels: (N,), whole numbers.
        num_classes: labels must lie in 0 .. num_classes - 1.
        rows: (n,) rows of ``images`` and ``labels`` that belong to this set, without copying them; None means all.
        source: the name that error lines start with.

    Raises:
        UserError: no images, a wrong shape or dtype, counts that differ, a label out of range.
    """

    def __init__(self, images: Tensor, labels: Tensor, num_classes: int, rows: Tensor | None = None, source: str = "images"):
        check_labelled(images.shape, images.dtype, labels, num_classes, source)
        if rows is not None and len(rows) == 0:
            raise UserError(f"{source}: no images")
        self.images, self.rows = images, rows
        self.labels = labels.long() if rows is None else labels.long()[rows]
        self._resident: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> MemoryImages:
        """Keep a copy of images and labels on the device, if they are at most 2 GiB; returns the set itself."""
        device = torch.empty(0, device=device).device  # "cuda" -> "cuda:0"
        held = self._resident[0].device if self._resident else None
        if device != self.images.device and device != held:
            count = len(self) * self.images[0].numel() * self.images.element_size()
            if count <= RESIDENT_BYTES:
                chosen = self.images if self.rows is None else self.images[self.rows]
                self._resident = chosen.contiguous().to(device), self.labels.to(device)
        return self

    def at(self, positions: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Images (n, C, H, W) float32 in [0, 1], labels (n,) and the positions (n,), on the device."""
        self.to(device)
        target = torch.empty(0, device=device).device
        if self._resident is not None and self._resident[0].device == target:
            positions = positions.to(target)
            x, y = self._resident[0][positions], self._resident[1][positions]
        else:
            positions = positions.to(self.images.device)
            y = self.labels[positions]
            x = self.images[positions if self.rows is None else self.rows[positions]]
        return as_float(x.to(target)), y.to(target), positions.to(target)

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each vector of positions: images float32 in [0, 1], labels, positions; see ``types.ImageSet``."""
        self.to(device)
        if self._resident is not None and self._resident[0].device.type == "cuda":  # one transfer: each one waits for the device
            parts = list(index_batches)
            index_batches = torch.cat(parts).to(device).split([len(p) for p in parts]) if parts else ()
        for positions in index_batches:
            yield self.at(positions, device)


class StreamImages:
    """Labelled images read one by one, by worker processes, ahead of their use.

    Args:
        dataset: a map-style data set of (image (C, H, W) uint8, label).
        labels: (N,), the labels of the whole data set.
        num_classes: labels must lie in 0 .. num_classes - 1.
        num_workers: reading processes; 0 reads in this one.
        source: the name that error lines start with.

    Raises:
        UserError: no images, counts that differ, a label out of range.
    """

    def __init__(self, dataset: Any, labels: Tensor, num_classes: int, num_workers: int = 0, source: str = "images"):
        check_labels(len(dataset), labels, num_classes, source)
        self.dataset, self.labels, self.num_workers = dataset, labels.long(), num_workers

    @property
    def names(self) -> list[str] | None:
        """The names of the image files, without folder and suffix; None where they do not come from files."""
        files = getattr(self.dataset, "files", None)
        return None if files is None else [path.stem for path, _ in files]

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each vector of positions: images float32 in [0, 1], labels, positions; see ``types.ImageSet``."""
        on_cuda = torch.device(device).type == "cuda"
        ahead: deque[Tensor] = deque()  # the loader asks for batches before it hands the first one out

        def requests() -> Iterator[list[int]]:
            for positions in index_batches:
                ahead.append(positions)
                yield positions.tolist()

        sampler = _Requests(requests())
        loader = torch.utils.data.DataLoader(
            self.dataset, batch_sampler=sampler, num_workers=self.num_workers, pin_memory=on_cuda, generator=torch.Generator()
        )
        batches, failure = iter(loader), None
        while True:
            try:
                x, y = next(batches)
            except StopIteration:
                return
            except UserError as error:  # from a worker it comes with a traceback in its text
                failure = str(error).strip().splitlines()[-1].partition("UserError: ")[2] or str(error)
            if failure is not None:
                del batches  # ends the workers now, not when the error is forgotten
                raise UserError(failure)
            positions = ahead.popleft()
            yield (
                as_float(x.to(device, non_blocking=on_cuda)),
                y.long().to(device, non_blocking=on_cuda),
                positions.to(device),
            )


class NoImages:
    """A split that is absent: it has length 0, and visiting it says why.

    Args:
        reason: the line of the error.
    """

    def __init__(self, reason: str):
        self.reason, self.labels = reason, torch.zeros(0, dtype=torch.int64)

    def __len__(self) -> int:
        return 0

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Raises ``UserError`` with the reason."""
        raise UserError(self.reason)


class _Requests(torch.utils.data.Sampler):
    """Index lists for a DataLoader, to be gone through once."""

    def __init__(self, lists: Iterator[list[int]]):
        self.lists = lists

    def __iter__(self) -> Iterator[list[int]]:
        return self.lists


def as_float(x: Tensor) -> Tensor:
    """Images as float32 in [0, 1]; uint8 is divided by 255."""
    if x.dtype == torch.uint8:
        return over_255(x.to(torch.float32, memory_format=torch.contiguous_format))
    return x.to(torch.float32, memory_format=torch.contiguous_format)


# ------------------------------------------------------------------------------------------------------------- checks


def check_labels(count: int, labels: Tensor, num_classes: int, source: str) -> None:
    """Raise ``UserError`` unless there are images, a label for each, all in 0 .. num_classes - 1."""
    if count == 0:
        raise UserError(f"{source}: no images")
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UserError(f"{source}: labels must be a vector of whole numbers, got shape {tuple(labels.shape)} of {labels.dtype}")
    if len(labels) != count:
        raise UserError(f"{source}: {count} images but {len(labels)} labels")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(f"{source}: labels must lie in 0..{num_classes - 1}, got {low}..{high}")


def check_labelled(shape: Sequence[int], dtype: torch.dtype, labels: Tensor, num_classes: int, source: str) -> None:
    """Raise ``UserError`` unless images of this shape and dtype can be classified with these labels."""
    if len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape[2:]:
        raise UserError(f"{source}: images must have shape (N, C, H, W) with 1 or 3 channels, got {tuple(shape)}")
    if dtype != torch.uint8 and not dtype.is_floating_point:
        raise UserError(f"{source}: images must be uint8, or floating point in [0, 1], got {dtype}")
    check_labels(shape[0], labels, num_classes, source)


# ------------------------------------------------------------------------------------------------------------- splits


def stratified_split(labels: Tensor, sizes: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Disjoint subsets of the given sizes with the class proportions of the whole, then the rest.

    Depends on labels, sizes and seed only, on every machine and with every library version. A class's share of
    a subset is its exact proportion, rounded down or up (largest remainders).

    Args:
        labels: (N,) int64.
        sizes: how many samples each subset gets.
        seed: another seed, another split.

    Returns:
        One vector of positions per size, in random order (so that the first n are a fair sample), and the remaining
        positions in ascending order.

    Raises:
        UserError: the sizes leave nothing for the rest.
    """
    if sum(sizes) >= len(labels):
        raise UserError(f"cannot take {sum(sizes)} of {len(labels)} images for other splits and keep some for training")
    rank = Rng(seed).child("split").at(torch.arange(len(labels))).bits(()).long()
    shuffled = rank.argsort(stable=True)
    left, parts = shuffled, []
    for size in sizes:
        y = labels[left]
        counts = y.bincount(minlength=int(labels.max()) + 1)
        quota = counts * size  # of len(left)
        take = quota // len(left)
        short = size - int(take.sum())
        take[(quota % len(left)).argsort(descending=True, stable=True)[:short]] += 1
        chosen = torch.zeros(len(left), dtype=torch.bool)
        for c, n in enumerate(take.tolist()):
            chosen[(y == c).nonzero().flatten()[:n]] = True
        parts.append(left[chosen])
        left = left[~chosen]
    return [*parts, left.sort().values]


def memory_splits(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    class_names: Sequence[str],
    *,
    validation: int | tuple[Tensor, Tensor],
    source: str,
    copy: bool = True,
) -> Splits:
    """Splits of images in memory.

    Args:
        train, test: images and labels.
        class_names: K names.
        validation: images and labels, or how many to carve from ``train``.
        source: the name that error lines start with.
        copy: give the carved parts their own memory; otherwise they refer to rows of ``train``.
    """
    k = len(class_names)
    x, y = train
    check_labelled(x.shape, x.dtype, y, k, f"{source}: train")
    if isinstance(validation, int):
        held, rest = stratified_split(y.long(), [validation])
        if copy:
            train_set, held_set = (MemoryImages(x[rows], y[rows], k, source=source) for rows in (rest, held))
        else:
            train_set, held_set = (MemoryImages(x, y, k, rows, source=source) for rows in (rest, held))
    else:
        train_set = MemoryImages(x, y, k, source=f"{source}: train")
        held_set = MemoryImages(*validation, k, source=f"{source}: validation")
    test_set = MemoryImages(*test, k, source=f"{source}: test")
    shapes = {tuple(s.images.shape[1:]) for s in (train_set, held_set, test_set)}
    if len(shapes) != 1:
        raise UserError(f"{source}: the splits' images differ in shape: {', '.join(map(str, sorted(shapes)))}")
    mean, std = mean_std(train_set)
    (shape,) = shapes
    return Splits(train_set, held_set, test_set, tuple(class_names), shape, mean, std, fingerprint(test_set))


# --------------------------------------------------------------------------------------------------------- statistics


def _chunks(images: MemoryImages) -> Iterator[Tensor]:
    for start in range(0, len(images), _CHUNK):
        rows = torch.arange(start, min(start + _CHUNK, len(images)))
        yield images.images[rows if images.rows is None else images.rows[rows]].cpu().contiguous()


def mean_std(images: ImageSet, most: int = 1024) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, in [0, 1] units.

    Images in memory count all, exactly; of a stream, at most ``most`` evenly spaced images are read. A constant channel
    has standard deviation 1.
    """
    if isinstance(images, MemoryImages):
        chunks: Iterable[Tensor] = _chunks(images)
    else:
        rows = torch.arange(0, len(images), max(1, len(images) // most))
        chunks = (x.cpu() for x, _, _ in images.batches(rows.split(64)))
    count, total, square = 0, torch.zeros(0), torch.zeros(0)
    for chunk in chunks:
        flat = chunk.transpose(0, 1).flatten(1)
        if flat.dtype == torch.uint8:
            histogram = torch.stack([c.to(torch.int64).bincount(minlength=256) for c in flat])
            level = torch.arange(256)
            sums = (histogram * level).sum(1).double() / 255, (histogram * level.square()).sum(1).double() / 255**2
        else:
            sums = flat.double().sum(1), flat.double().square().sum(1)
        if count == 0:
            total, square = sums
        else:
            total, square = total + sums[0], square + sums[1]
        count += flat.shape[1]
    mean = total / count
    std = (square / count - mean.square()).clamp_min(0).sqrt()
    std = torch.where(std > 1e-6, std, torch.ones_like(std))
    return tuple(round(v, 6) for v in mean.tolist()), tuple(round(v, 6) for v in std.tolist())


def fingerprint(images: MemoryImages) -> str:
    """SHA-256 over the images' bytes, in (N, C, H, W) order, and the labels' (int64)."""
    digest = hashlib.sha256()
    for chunk in _chunks(images):
        digest.update(chunk.numpy())
    digest.update(images.labels.cpu().contiguous().numpy())
    return digest.hexdigest()


def fingerprint_files(files: Iterable[tuple[str | Path, int]], base: Path) -> str:
    """SHA-256 over the files' relative paths, labels and sizes, for sets too large to read."""
    digest = hashlib.sha256()
    for path, label in files:
        path = Path(path)
        digest.update(f"{path.relative_to(base).as_posix()}\t{label}\t{path.stat().st_size}\n".encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ folders


def data_root(root: str | None) -> Path:
    """The folder of the data: the one given, else ``$ROBUSTLAB_DATA``, else ``~/.cache/robustlab``."""
    return Path(root or os.environ.get("ROBUSTLAB_DATA") or "~/.cache/robustlab").expanduser()
