"""Adversarial images on disk: written batch by batch while an evaluation runs, read a few at a time.

A file (``.npz`` or ``.safetensors``) holds ``x_adv`` (n, C, H, W) float32 in [0, 1], ``y`` (n,) int64, ``verdict`` (n,) bool (True:
robust), ``index`` (n,) int64, ascending positions in the data set, and ``meta``, JSON: norm, eps and what they were made with.

Until the evaluation is done the images lie in FILE.part: 32 bytes that say which evaluation they belong to, then the rows. A row
is on the disk before the ledger says so: what the ledger says is there after a kill. No more than one batch is held in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlab.types import Threat, UserError

FORMATS = (".npz", ".safetensors")
HEAD = 32  # bytes before the rows of a .part file
CHUNK = 1 << 24
DTYPES = {"x_adv": ("F32", "<f4"), "y": ("I64", "<i8"), "verdict": ("BOOL", "|b1"), "index": ("I64", "<i8")}


def check_name(path: str | Path) -> Path:
    """The path, if its name says one of the formats.

    Raises:
        UserError: it does not.
    """
    if Path(path).suffix not in FORMATS:
        raise UserError(f"{path}: adversarial images are saved as .npz or .safetensors")
    return Path(path)


class Keeper:
    """Keeps the adversarial images of one evaluation.

    Args:
        path: the file to make.
        header: of the evaluation's ledger.
        threats: its threat models; there has to be exactly one.
        resume: the file, or a part of it, may be there already.

    Raises:
        UserError: not one threat model, a name of another format, or a file that is there already.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any], threats: list[Threat], *, resume: bool):
        self.path, self.header, self.finished = check_name(path), dict(header), False
        if len(threats) != 1:
            raise UserError(
                f"{path}: adversarial images are saved for one threat model, and this suite has {len(threats) or 'none'}"
            )
        self.threat = threats[0]
        self.key = hashlib.sha256(json.dumps(self.header, sort_keys=True).encode()).digest()
        self.part = self.path.with_name(f"{self.path.name}.part")
        if self.path.exists() and not (resume and meta_of(self.path).get("key") == self.key.hex()):
            raise UserError(f"{path}: exists already; choose another file")

    def open(self, begun: bool) -> None:
        """Start; ``begun``: the ledger holds verdicts of an earlier run, whose images have to be there.

        Raises:
            UserError: they are not.
        """
        self.finished = begun and self.path.exists()
        if begun and not self.finished and not self._belongs():
            raise UserError(f"{self.path}: the earlier run kept no adversarial images here; start again in another --out")
        if self.finished or not begun:
            self.part.unlink(missing_ok=True)

    def _belongs(self) -> bool:
        try:
            with open(self.part, "rb") as file:
                return file.read(HEAD) == self.key
        except OSError:
            return False

    def put(self, rows: Tensor, x: Tensor) -> None:
        """Write images (m, C, H, W) as the rows (m,) of the file, through to the disk.

        Raises:
            UserError: the disk is full or the file cannot be written.
        """
        if self.finished or len(rows) == 0:
            return
        raw = x.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False)
        size = raw[0].nbytes
        try:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            with open(self.part, "r+b" if self.part.exists() else "x+b") as file:
                file.write(self.key)
                for row, image in zip(rows.tolist(), raw, strict=True):
                    file.seek(HEAD + row * size)
                    file.write(image.tobytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.part}: cannot write: {error.strerror or error}") from error

    def finish(self, index: list[int], y: Tensor, verdict: Tensor, shape: tuple[int, ...]) -> None:
        """Make the file, whole or not at all, and remove what it was made from."""
        if self.finished:
            return
        known = {k: self.header.get(k) for k in ("model", "data", "seed", "precision")}
        meta = {
            "norm": self.threat.norm,
            "eps": self.threat.eps,
            "suite": self.header["suite"]["name"],
            **known,
            "key": self.key.hex(),
        }
        rest = {"y": y.numpy(), "verdict": verdict.numpy(), "index": np.asarray(index, dtype=np.int64)}
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with open(self.part, "rb") as images, open(scratch, "wb") as out:
                images.seek(HEAD)
                (_write_npz if self.path.suffix == ".npz" else _write_safetensors)(out, images, (len(index), *shape), rest, meta)
                out.flush()
                os.fsync(out.fileno())
            os.replace(scratch, self.path)
            self.part.unlink()
        except OSError as error:
            raise UserError(f"{self.path}: cannot write: {error.strerror or error}") from error
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink()


def _pieces(images: Any) -> Iterator[bytes]:
    while piece := images.read(CHUNK):
        yield piece


def _write_npz(out: Any, images: Any, shape: tuple[int, ...], rest: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("x_adv.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for piece in _pieces(images):
                member.write(piece)
        for name, value in {**rest, "meta": np.array(json.dumps(meta))}.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, value, allow_pickle=False)


def _write_safetensors(
    out: Any, images: Any, shape: tuple[int, ...], rest: Mapping[str, np.ndarray], meta: Mapping[str, Any]
) -> None:
    sizes = {"x_adv": 4 * math.prod(shape), **{name: value.nbytes for name, value in rest.items()}}
    shapes = {"x_adv": shape, **{name: value.shape for name, value in rest.items()}}
    header: dict[str, Any] = {"__metadata__": {"robustlab": json.dumps(meta)}}
    begin = 0
    for name, size in sizes.items():
        header[name] = {"dtype": DTYPES[name][0], "shape": list(shapes[name]), "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for piece in _pieces(images):
        out.write(piece)
    for name, value in rest.items():
        out.write(np.ascontiguousarray(value).astype(DTYPES[name][1], copy=False).tobytes())


# ------------------------------------------------------------------------------------------------------------ reading


class Images:
    """A file of adversarial images, of our making or another's: only ``x_adv`` has to be there.

    Attributes:
        index: positions in the data set (n,), ascending; 0 .. n-1 if the file does not say.
        y, verdict: (n,), or None.
        meta: what the file says about itself.

    Raises:
        UserError: no such file, another format, no images, or lengths that do not fit.
    """

    def __init__(self, path: str | Path):
        self.path = check_name(path)
        tensors, self.meta = (self._npz if self.path.suffix == ".npz" else self._safetensors)()
        n, got = len(self.x), tuple(self.shape)
        if len(got) != 4 or n == 0:
            raise UserError(f"{path}: x_adv has shape {got}; expected (n, C, H, W)")
        for name, value in tensors.items():
            if value.shape != (n,):
                raise UserError(f"{path}: {name} has shape {tuple(value.shape)}; expected ({n},)")
        self.y, self.verdict = tensors.get("y"), tensors.get("verdict")
        self.index = tensors.get("index", torch.arange(n)).long()
        if bool((self.index.diff() <= 0).any()) or int(self.index[0]) < 0:
            raise UserError(f"{path}: index must rise from 0 or more")

    def _npz(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                if "x_adv" not in file.files:
                    raise UserError(f"{self.path}: holds no x_adv; it has {', '.join(file.files) or 'nothing'}")
                self.x: Any = file["x_adv"]
                tensors = {k: torch.from_numpy(file[k]) for k in ("y", "verdict", "index") if k in file.files}
                meta = json.loads(str(file["meta"])) if "meta" in file.files else {}
        except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise _unreadable(self.path, error) from None
        self.shape = self.x.shape
        return tensors, meta

    def _safetensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(self.path, "pt")
            names = list(self._file.keys())
            if "x_adv" not in names:
                raise UserError(f"{self.path}: holds no x_adv; it has {', '.join(names) or 'nothing'}")
            slices = self._file.get_slice("x_adv")
            self.shape = tuple(slices.get_shape())
            self.x = _Sliced(slices, self.shape[0] if self.shape else 0)
            meta = json.loads((self._file.metadata() or {}).get("robustlab", "{}"))
            return {k: self._file.get_tensor(k) for k in ("y", "verdict", "index") if k in names}, meta
        except (OSError, ValueError, SafetensorError) as error:
            raise _unreadable(self.path, error) from None

    def between(self, first: int, last: int) -> tuple[slice, Tensor]:
        """The images whose positions lie in first .. last-1: their rows in the file, and they themselves, float32."""
        low, high = torch.searchsorted(self.index, torch.tensor([first, last])).tolist()
        return slice(low, high), torch.as_tensor(self.x[low:high]).float()

    def threat(self) -> Threat | None:
        """The threat model that the file names, if it does."""
        try:
            return Threat(self.meta["norm"], self.meta["eps"])
        except (KeyError, TypeError, ValueError):
            return None


class _Sliced:
    """Rows of a tensor that stays on the disk."""

    def __init__(self, slices: Any, length: int):
        self.slices, self.length = slices, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, rows: slice) -> Tensor:
        return self.slices[rows]


def meta_of(path: Path) -> dict[str, Any]:
    """What a file says about itself; nothing if it is no such file."""
    try:
        return Images(path).meta
    except UserError:
        return {}


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"{path}: cannot read adversarial images: {reason}")
