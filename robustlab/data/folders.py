"""What data sets of image files have in common: listing folders, reading, resizing and cropping files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from robustlab.data.images import NoImages, StreamImages, fingerprint_files, mean_std, stratified_split
from robustlab.types import Count, Dataset, ImageSet, Splits, UserError, Whole

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
Files = list[tuple[Path, int]]  # path, label
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFiles:
    """A map-style data set of (image (C, size, size) uint8, label): the shorter side is resized, the centre is cut out."""

    def __init__(self, files: Files, resize: int, size: int, interpolation: str, channels: int, source: str):
        self.files, self.resize, self.size, self.source = files, resize, size, source
        self.interpolation, self.channels = interpolation, channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        from PIL import Image

        path, label = self.files[position]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB" if self.channels == 3 else "L")
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{self.source}: cannot read the image {path}: {error}") from None
        w, h = image.size
        if min(w, h) != self.resize:
            short = min(w, h)
            resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[self.interpolation]
            w, h = self.resize * w // short, self.resize * h // short  # rounds as torchvision does, so that scores agree
            image = image.resize((w, h), resample)
        left, top = round((w - self.size) / 2), round((h - self.size) / 2)
        pixels = np.array(image.crop((left, top, left + self.size, top + self.size)))
        return torch.from_numpy(pixels).view(self.size, self.size, self.channels).permute(2, 0, 1).contiguous(), label


@dataclass(frozen=True, kw_only=True)
class FolderDataset(Dataset):
    """Fields of every data set that reads image files.

    Attributes:
        resize: the shorter side is brought to this many pixels.
        size: height and width of the centre that is cut out.
        interpolation: of the resizing, antialiased.
        channels: 3, or 1 for grey.
        validation: images held out from train where there is no validation folder.
        num_workers: processes that read files.
    """

    resize: Count = 256
    size: Count = 224
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    channels: Literal[1, 3] = 3
    validation: Count = 1000
    num_workers: Whole = 4

    def __post_init__(self) -> None:
        if self.size > self.resize:
            raise ValueError(f"size must be at most resize ({self.resize}), got {self.size}")

    def stream(self, files: Files, num_classes: int) -> ImageSet:
        images = ImageFiles(files, self.resize, self.size, self.interpolation, self.channels, self.name)
        return StreamImages(images, torch.tensor([y for _, y in files]), num_classes, self.num_workers, self.name)

    def splits(self, base: Path, names: Sequence[str], train: Files, validation: Files | None, test: Files) -> Splits:
        """Splits from lists of files; without validation files some are held out from train; without train both are absent."""
        if not test:
            raise UserError(f"{self.name}: no test images under {base}")
        absent = NoImages(f"{self.name}: no training images under {base}")
        if train and not validation:
            held, rest = stratified_split(torch.tensor([y for _, y in train]), [min(self.validation, len(train) // 2)])
            train, validation = [train[i] for i in rest.tolist()], [train[i] for i in held.tolist()]
        k = len(names)
        train_set = self.stream(train, k) if train else absent
        mean, std = self.statistics(train_set) if train else (self.grey(IMAGENET_MEAN), self.grey(IMAGENET_STD))
        return Splits(
            train_set,
            self.stream(validation, k) if validation else absent,
            self.stream(test, k),
            tuple(names),
            (self.channels, self.size, self.size),
            mean,
            std,
            fingerprint_files(test, base),
        )

    def statistics(self, train: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, estimated on up to 1,024 training images."""
        return mean_std(train)

    def grey(self, values: tuple[float, ...]) -> tuple[float, ...]:
        return values if self.channels == 3 else (round(sum(values) / 3, 6),)


def class_folders(folder: Path) -> list[str]:
    """The names of the folders inside, sorted; hidden ones do not count."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")) if folder.is_dir() else []


def list_images(folder: Path, names: Sequence[str], source: str) -> Files:
    """The image files below each class folder, in a fixed order: by class, then by path.

    Raises:
        UserError: a folder that is no class.
    """
    unknown = sorted(set(class_folders(folder)) - set(names))
    if unknown:
        raise UserError(f"{source}: {folder / unknown[0]} is not one of the {len(names)} classes")
    out: Files = []
    for label, name in enumerate(names):
        found: list[Any] = [p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
        out += [(p, label) for p in sorted(found, key=lambda p: p.relative_to(folder).as_posix())]
    return out


def first_with(candidates: Sequence[Path], inside: Sequence[str], source: str) -> Path:
    """The first folder that holds all of ``inside``.

    Raises:
        UserError: none does; the line names the folders looked in.
    """
    for base in candidates:
        if all((base / name).exists() for name in inside):
            return base
    raise UserError(f"{source}: expected {' and '.join(inside)} in {' or '.join(map(str, candidates))}")
