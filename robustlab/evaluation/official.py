"""The published files of corruption benchmarks, looked up by the position of the clean image.

    CIFAR-10-C, CIFAR-100-C, CIFAR-10-C-bar     <corruption>.npy   uint8 (5 n, H, W, C): n images at severity 1, then at 2, ...
                                                labels.npy         (5 n,): the n labels, five times
    ImageNet-C, ImageNet-C-bar, 3DCC,           <corruption>/<severity>/<wnid>/<image>.JPEG, perhaps below noise/, blur/, ...
    Tiny-ImageNet-C

They belong to the n clean test images of a data set, which are scored too. What can be told before the first pass is: a corruption
that is not there, dtype, shape, count, labels. That images are in the order of the clean ones shows in their correlation,
that severities are in order in their distance. Arrays are mapped into memory; image files are read when they are asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from robustlab.registry import nearest
from robustlab.types import UserError

SEVERITIES = 5
PROBES, FEW = 256, 32  # images whose order is looked at, for each corruption and severity; of image files fewer, which are slow
LIKENESS = 0.1  # by how much an image correlates more with its own clean one than with another's
SMALLER_LATER = ("saturate", "spatter", "elastic_transform")  # the published severities are not in order of the distance
SUFFIXES = (".jpeg", ".jpg", ".png")
READERS = 8  # threads that decode image files


@dataclass(frozen=True)
class Clean:
    """The clean images that the files belong to.

    Attributes:
        labels: (n,).
        probes: positions of some of them (m,).
        images: these (m, C, H, W), float in [0, 1].
        names: of all n files, without folder and suffix; None where they have none.
    """

    labels: Tensor
    probes: Tensor
    images: Tensor
    names: Sequence[str] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])


class Official(Protocol):
    """Published files, checked. ``fingerprint``: which files they are, wherever they lie."""

    fingerprint: str
    few: bool  # reading is slow

    def at(self, name: str, severity: int, index: Tensor) -> Tensor:
        """The corrupted versions (m, C, H, W) of the clean images at positions ``index`` (m,); float32 in [0, 1], on the CPU."""
        ...


def open_official(folder: str | Path, names: Sequence[str], severities: Sequence[int], clean: Clean) -> Official:
    """Find and check the files of some corruptions.

    Raises:
        UserError: one line: no such folder, a corruption or severity that is missing; a wrong dtype, shape, count or order; labels
            that are not those of the clean images.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of published files")
    arrays = any(root.glob("*.npy"))
    known = sorted(p.stem for p in root.glob("*.npy") if p.stem != "labels") if arrays else sorted(_folders(root))
    if missing := [name for name in names if name not in known]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        what = f"{missing[0]}.npy" if arrays else f"a folder {missing[0]}"
        raise UserError(f"{root}: {what}{more} is missing{nearest(missing[0], known)}; here are: {', '.join(known) or 'none'}")
    files: Official = Arrays(root, names, clean) if arrays else Folders(root, names, severities, clean)
    for name in names:
        _check_order(root, files, name, severities, clean)
    return files


def _check_order(root: Path, files: Official, name: str, severities: Sequence[int], clean: Clean) -> None:
    """Raise ``UserError`` where corrupted images are not like their own clean ones, or become more so with the severity."""
    probes, images = (t[:: len(t) // FEW + 1] if files.few else t for t in (clean.probes, clean.images))
    flat, far = images.flatten(1), []
    for severity in sorted(severities):
        x = files.at(name, severity, probes).flatten(1)
        far.append(float((x - flat).abs().mean()))
        if len(flat) > 1:
            own, other = _likeness(x, flat), _likeness(x, flat.roll(1, 0))
            if own - other <= LIKENESS:
                raise UserError(
                    f"{root}: {name}, severity {severity}: the images are not in the order of the clean ones "
                    f"(correlation {own:.2f} with their own, {other:.2f} with the next)"
                )
    if len(far) > 1 and far[-1] < far[0] and name not in SMALLER_LATER:
        raise UserError(
            f"{root}: {name}: the severities are not in order: severity {max(severities)} is nearer to the clean images "
            f"({far[-1]:.3f}) than severity {min(severities)} ({far[0]:.3f})"
        )


def _likeness(a: Tensor, b: Tensor) -> float:
    """The mean correlation of the rows of two matrices."""
    a, b = (t - t.mean(1, keepdim=True) for t in (a, b))
    return float(((a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt().clamp_min(1e-12)).mean())


class Arrays:
    """CIFAR-10-C and its kind: one memory-mapped array for each corruption."""

    few = False

    def __init__(self, root: Path, names: Sequence[str], clean: Clean):
        self.n = len(clean.labels)
        c, h, w = clean.shape
        labels = _load(root / "labels.npy")
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise UserError(
                f"{root / 'labels.npy'}: expected a vector of whole numbers, got shape {labels.shape} of {labels.dtype}"
            )
        _check_labels(root / "labels.npy", labels, clean.labels.numpy())
        digest = hashlib.sha256(np.ascontiguousarray(labels.astype(np.int64)).data)
        self.images = {}
        for name in names:
            path = root / f"{name}.npy"
            x = _load(path)
            if x.dtype != np.uint8:
                raise UserError(f"{path}: expected uint8, got {x.dtype}")
            if x.shape[1:] != (h, w, c):
                raise UserError(f"{path}: expected images of {h}x{w}x{c}, got shape {x.shape}")
            if len(x) != SEVERITIES * self.n:
                raise UserError(f"{path}: expected {SEVERITIES * self.n:,} images, {SEVERITIES} x {self.n:,}, got {len(x):,}")
            digest.update(name.encode() + np.ascontiguousarray(x[:: max(len(x) // PROBES, 1)]).data)
            self.images[name] = x
        self.fingerprint = digest.hexdigest()

    def at(self, name: str, severity: int, index: Tensor) -> Tensor:
        x = self.images[name][(severity - 1) * self.n + index.cpu().numpy()]
        return torch.from_numpy(x).permute(0, 3, 1, 2).float().div_(255)


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a .npy file, or one cut short: {error}") from None


def _check_labels(path: Path, found: np.ndarray, clean: np.ndarray) -> None:
    n = len(clean)
    if len(found) != SEVERITIES * n:
        raise UserError(f"{path}: expected {SEVERITIES * n:,} labels, those of {n:,} test images five times, got {len(found):,}")
    wrong = (found.reshape(SEVERITIES, n) != clean).nonzero()
    if len(wrong[0]):
        row, i = int(wrong[0][0]) * n + int(wrong[1][0]), int(wrong[1][0])
        raise UserError(
            f"{path}: another order or another data set: row {row} has label {int(found[row])}, test image {i} has {int(clean[i])}"
        )


class Folders:
    """ImageNet-C and its kind: one image file for each corruption, severity and clean image, found by its name."""

    few = True

    def __init__(self, root: Path, names: Sequence[str], severities: Sequence[int], clean: Clean):
        self.shape = clean.shape
        self.paths: dict[tuple[str, int], list[Path]] = {}
        digest = hashlib.sha256()
        for name, place in ((name, _folders(root)[name]) for name in names):
            for severity in severities:
                here = place / str(severity)
                paths = _matched(here, clean) if clean.names is not None else _listed(here, clean)
                digest.update("\n".join([f"{name}/{severity}", *(f"{p.parent.name}/{p.name}" for p in paths)]).encode())
                for path in paths[:: max(len(paths) // 4, 1)][:4]:
                    digest.update(path.read_bytes())
                self.paths[name, severity] = paths
        self.fingerprint = digest.hexdigest()

    def at(self, name: str, severity: int, index: Tensor) -> Tensor:
        paths = [self.paths[name, severity][i] for i in index.tolist()]
        with ThreadPoolExecutor(READERS) as pool:
            return torch.stack(list(pool.map(self._read, paths))).float().div_(255)

    def _read(self, path: Path) -> Tensor:
        from PIL import Image

        c, h, w = self.shape
        try:
            with Image.open(path) as file:
                pixels = np.array(file.convert("RGB" if c == 3 else "L"))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{path}: cannot read the image: {error}") from None
        if pixels.shape[:2] != (h, w):
            raise UserError(
                f"{path}: {pixels.shape[1]}x{pixels.shape[0]} px, but the data set's images have {w}x{h}; give it that size"
            )
        return torch.from_numpy(pixels.reshape(h, w, c)).permute(2, 0, 1)


def _folders(root: Path) -> dict[str, Path]:
    """The corruptions by name, in the folder itself or in folders such as ``noise`` and ``blur``."""
    inside = [p for p in sorted(root.iterdir()) if p.is_dir()]
    places = [*inside, *(q for p in inside for q in sorted(p.iterdir()) if q.is_dir())]
    return {p.name: p for p in reversed(places) if (p / "1").is_dir() or (p / "5").is_dir()}


def _classes(here: Path, clean: Clean) -> list[Path]:
    if not here.is_dir():
        raise UserError(f"{here}: no such folder; expected <corruption>/<severity>/<class>/<image>")
    found = sorted(p for p in here.iterdir() if p.is_dir() and not p.name.startswith("."))
    expected = int(clean.labels.max()) + 1
    if len(found) != expected:
        raise UserError(f"{here}: expected {expected:,} class folders, got {len(found):,}")
    return found


def _matched(here: Path, clean: Clean) -> list[Path]:
    """The files with the names of the clean images, in their order; further ones do not matter."""
    found = {(k, p.stem): p for k, folder in enumerate(_classes(here, clean)) for p in _images(folder)}
    wanted = list(zip(clean.labels.tolist(), clean.names or (), strict=True))
    if missing := [pair for pair in wanted if pair not in found]:
        label, name = missing[0]
        raise UserError(
            f"{here}: expected {len(wanted):,} images, those of the clean test set; {len(missing):,} are missing, "
            f"the first is {name} of class {label}"
        )
    return [found[pair] for pair in wanted]


def _listed(here: Path, clean: Clean) -> list[Path]:
    """All files, by class and name; for clean images that are in this order but have no names."""
    found = [(k, p) for k, folder in enumerate(_classes(here, clean)) for p in _images(folder)]
    if len(found) != len(clean.labels):
        raise UserError(f"{here}: expected {len(clean.labels):,} images, got {len(found):,}")
    if [k for k, _ in found] != clean.labels.tolist():
        raise UserError(f"{here}: another order: the clean images are not sorted by class, or other classes have other counts")
    return [p for _, p in found]


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def clean_of(data: Any, size: int | None) -> Clean:
    """The labels and some images of what is to be scored.

    Args:
        data: tensors ``(x, y)`` or a ``types.ImageSet``; its attribute ``names`` (n,), where there is one, names the files.
        size: how many of the images are scored; the probes are among them.

    Raises:
        UserError: data that do not tell their labels.
    """
    labels = data[1] if isinstance(data, tuple | list) else getattr(data, "labels", None)
    if not isinstance(labels, Tensor):
        raise UserError("files: published files belong to a data set whose labels are known: give a data set or two tensors")
    count = min(size or len(labels), len(labels))
    probes = torch.arange(count)[:: max(count // PROBES, 1)][:PROBES]
    x = data[0][probes] if isinstance(data, tuple | list) else next(iter(data.batches([probes])))[0]
    x = x.cpu().float() / (255 if x.dtype == torch.uint8 else 1)
    return Clean(labels.cpu().long(), probes, x, getattr(data, "names", None))
