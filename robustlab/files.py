"""Files that are whole or absent: atomic replacement, hashes, locks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robustlab.types import UserError


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old content or the new, never a part.

    Raises:
        UserError: the disk is full or the place cannot be written; what stood there before is untouched.
    """
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(scratch, "wb") as out:
            out.write(raw)
            out.flush()
            os.fsync(out.fileno())
        os.replace(scratch, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def sweep(folder: str | Path) -> None:
    """Remove what a killed process left half-written in a folder that this process holds."""
    for scratch in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError):
            scratch.unlink()


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically; NaN and infinity are refused."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(path: str | Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Hold a folder for this process. The operating system drops the hold when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(folder / ".lock"), timeout=0)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{folder}: another process is working in this folder") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot use this folder: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()
