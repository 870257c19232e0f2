"""Images and labels in one ``.npz`` file, or in a folder of ``.npy`` files; mapped into memory rather than read where possible.

Images may also be JPEG files laid end to end: the bytes in ``train_jpeg``, uint8, and in ``train_offset`` where each file begins,
and at last where the last one ends.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from robustlab.data.images import MemoryImages, NoImages, data_root, fingerprint, mean_std, memory_splits
from robustlab.registry import register
from robustlab.types import Count, Dataset, Splits, UserError

KEYS = ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test", "class_names")
PACKED = tuple(f"{split}_{part}" for split in ("train", "val", "test") for part in ("jpeg", "offset"))  # instead of x_train, ...


@register("npz")
class Npz(Dataset):
    """Your own images: ``x_train y_train x_test y_test`` and if you like ``x_val y_val class_names``, as .npz or a folder of .npy.

    Images are uint8, (N, H, W, C), (N, C, H, W) or (N, H, W); labels are whole numbers. Files stored without compression
    (``numpy.savez``) and .npy files are mapped into memory, so they may be larger than it. Without ``x_train``
    models can be scored only. JPEG files laid end to end (``train_jpeg``, ``train_offset``) are decoded once.

    Attributes:
        path: the file or folder; a relative one is looked for here, then under the root.
        layout: of the images; auto finds it from the number of channels.
        num_classes: K; None takes the largest label.
        validation: images held out from train where there is no ``x_val``.
    """

    path: str | None = None
    layout: Literal["auto", "NHWC", "NCHW"] = "auto"
    num_classes: Count | None = None
    validation: Count = 1000

    def load(self) -> Splits:
        if self.path is None:
            raise UserError("npz: give path, the .npz file or the folder of .npy files")
        path = find(self.path, self.root, "npz")
        arrays = unpacked(read_arrays(path, (*KEYS, *PACKED)), path)
        pairs = {split: self._pair(arrays, split, path) for split in ("train", "val", "test")}
        if pairs["test"] is None:
            raise UserError(f"npz: {path} has no x_test; it has {', '.join(sorted(arrays)) or 'nothing'}")
        if "class_names" in arrays:
            names = [str(n) for n in arrays["class_names"].tolist()]
        else:
            given = [y for _, y in filter(None, pairs.values()) if len(y)]
            top = max((int(y.max()) for y in given), default=0)
            if self.num_classes is None and top >= sum(map(len, given)) + 1:
                raise UserError(
                    f"npz: {path}: the largest label is {top}, more than there are images; give num_classes if that is meant"
                )
            names = [str(k) for k in range(self.num_classes or top + 1)]
        if self.num_classes not in (None, len(names)):
            raise UserError(f"npz: {path} names {len(names)} classes, but num_classes is {self.num_classes}")
        if pairs["train"] is None:
            test = MemoryImages(*pairs["test"], len(names), source=f"npz: {path}: test")
            absent = NoImages(f"npz: {path} has no x_train")
            shape = tuple(test.images.shape[1:])
            return Splits(absent, absent, test, tuple(names), shape, *mean_std(test), fingerprint(test))
        validation = pairs["val"] or min(self.validation, len(pairs["train"][1]) // 2)
        return memory_splits(pairs["train"], pairs["test"], names, validation=validation, source=f"npz: {path}", copy=False)

    def _pair(self, arrays: dict[str, np.ndarray], split: str, path: Path) -> tuple[Tensor, Tensor] | None:
        x, y = arrays.get(f"x_{split}"), arrays.get(f"y_{split}")
        if x is None and y is None:
            return None
        if x is None or y is None:
            raise UserError(f"npz: {path} has {'y' if x is None else 'x'}_{split} but no {'x' if x is None else 'y'}_{split}")
        if x.dtype != np.uint8:
            raise UserError(f"npz: {path}: x_{split} must be uint8, got {x.dtype}")
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.dtype.kind not in "iu" or y.ndim != 1:
            raise UserError(f"npz: {path}: y_{split} must be a vector of whole numbers, got shape {y.shape} of {y.dtype}")
        return images_of(torch.from_numpy(x), self.layout, f"npz: {path}: x_{split}"), torch.from_numpy(y.astype(np.int64))


def images_of(x: Tensor, layout: str, source: str) -> Tensor:
    """Images as (N, C, H, W), a view: from (N, H, W, C), (N, C, H, W) or (N, H, W).

    Raises:
        UserError: another shape, or one that fits both layouts while ``layout`` is ``auto``.
    """
    if x.ndim == 3:
        return x[:, None]
    if x.ndim != 4:
        raise UserError(f"{source}: expected (N, H, W, C), (N, C, H, W) or (N, H, W), got {tuple(x.shape)}")
    last, first = x.shape[3] in (1, 3), x.shape[1] in (1, 3)
    if layout == "auto" and last == first:
        reason = "both ends could be the channels; give layout" if last else "neither end has 1 or 3 channels"
        raise UserError(f"{source}: {reason}, got shape {tuple(x.shape)}")
    nhwc = last if layout == "auto" else layout == "NHWC"
    return x.permute(0, 3, 1, 2) if nhwc else x


def find(name: str, root: str | None, source: str) -> Path:
    """The file or folder of this name, here or under the root.

    Raises:
        UserError: neither has it.
    """
    given = Path(name).expanduser()
    for path in (given, data_root(root) / given):
        if path.exists():
            return path
    raise UserError(f"{source}: no such file '{given}', neither here nor in {data_root(root)}")


def read_arrays(path: Path, keys: Sequence[str] = KEYS) -> dict[str, np.ndarray]:
    """The arrays of these names in a folder of .npy files or in an .npz file, mapped where possible.

    Raises:
        UserError: not such a file, damaged, or with pickled objects in it.
    """
    return read_folder(path, keys) if path.is_dir() else read_npz(path, keys)


def unpacked(arrays: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """The arrays, with ``x_train`` (N, H, W, C) in place of ``train_jpeg`` and ``train_offset``; the other splits alike.

    Raises:
        UserError: offsets that do not fit the bytes, damaged files, or images of different shapes.
    """
    arrays = dict(arrays)
    for split in ("train", "val", "test"):
        data, offset = arrays.pop(f"{split}_jpeg", None), arrays.pop(f"{split}_offset", None)
        if data is None or f"x_{split}" in arrays:
            continue
        source = f"npz: {path}: {split}_jpeg"
        if offset is None or data.dtype != np.uint8 or data.ndim != 1 or offset.ndim != 1 or offset.dtype.kind not in "iu":
            raise UserError(f"{source}: expected bytes (uint8), and in {split}_offset where each file begins and the last one ends")
        ends = offset.astype(np.int64)
        if len(ends) < 2 or ends[0] < 0 or ends[-1] > len(data) or bool((np.diff(ends) <= 0).any()):
            raise UserError(f"{source}: {split}_offset must rise and stay within the {len(data)} bytes")
        arrays[f"x_{split}"] = _decoded(data, ends, source)
    return arrays


def _decoded(data: np.ndarray, ends: np.ndarray, source: str) -> np.ndarray:
    from PIL import Image

    def shape_of(i: int) -> tuple[int, ...]:
        with Image.open(io.BytesIO(data[ends[i] : ends[i + 1]].tobytes())) as image:
            return (image.height, image.width, *((len(image.getbands()),) if len(image.getbands()) > 1 else ()))

    def decode(rows: range) -> None:
        for i in rows:
            with Image.open(io.BytesIO(data[ends[i] : ends[i + 1]].tobytes())) as image:
                pixels = np.asarray(image)
            if pixels.shape != out.shape[1:]:
                raise UserError(f"{source}: image {i} has shape {pixels.shape}, the first one {out.shape[1:]}")
            out[i] = pixels

    n = len(ends) - 1
    try:
        out = np.empty((n, *shape_of(0)), np.uint8)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            list(pool.map(decode, [range(i, min(i + 1000, n)) for i in range(0, n, 1000)]))
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: not JPEG files, or damaged ones: {error}") from None
    return out


def read_folder(folder: Path, keys: Sequence[str] = KEYS) -> dict[str, np.ndarray]:
    """The known arrays in a folder of .npy files, mapped."""
    return {key: _open_npy(folder / f"{key}.npy") for key in keys if (folder / f"{key}.npy").is_file()}


def _open_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"npz: {path}: not a .npy file, or a damaged one: {error}") from None


def read_npz(path: Path, keys: Sequence[str] = KEYS) -> dict[str, np.ndarray]:
    """The known arrays of a .npz file: mapped where they are stored as they are, read where they are compressed.

    Raises:
        UserError: not such a file, damaged, or with pickled objects in it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {m.filename.removesuffix(".npy"): m for m in archive.infolist() if m.filename.endswith(".npy")}
            return {key: _member(path, archive, members[key]) for key in keys if key in members}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, struct.error, NotImplementedError) as error:
        raise UserError(f"npz: {path}: not a .npz file, or a damaged one: {error}") from None


def _member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        if member.compress_type != zipfile.ZIP_STORED:
            return np.lib.format.read_array(file, allow_pickle=False)
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
        inside = file.tell()
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    if 0 in shape:
        return np.zeros(shape, dtype)
    if member.file_size != inside + dtype.itemsize * int(np.prod(shape)):
        raise ValueError(f"{member.filename} is cut short")
    with open(path, "rb") as raw:  # the local header's name and extra field have lengths of their own
        raw.seek(member.header_offset + 26)
        name, extra = struct.unpack("<HH", raw.read(4))
    start = member.header_offset + 30 + name + extra + inside
    return np.memmap(path, dtype, mode="c", offset=start, shape=shape, order="F" if fortran else "C")
