"""The ledger: what every attack did to every sample, append-only on disk, one JSON object per line.

The first line (header) holds everything that determines the verdicts. Each further line is one (threat, attack, batch): the
samples' positions, their verdicts (1: classified correctly on what the attack returned), the passes spent (in all, and where the
attack tells them, [forwards, backwards] of each sample), the seed, the seconds. A line goes out in one write, followed by fsync;
whatever a kill leaves behind it is dropped when the ledger is opened again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from robustlab.types import Threat, UserError

TIME_FIELDS = ("seconds",)
Key = tuple[str, str, int]
_ABSENT = object()


def threat_name(threat: Threat | Mapping[str, Any] | None) -> str:
    """``linf 0.1``; nothing for what has no threat model."""
    if threat is None:
        return ""
    norm, eps = (threat.norm, threat.eps) if isinstance(threat, Threat) else (threat["norm"], threat["eps"])
    return f"{norm} {eps!r}"


def key_of(entry: Mapping[str, Any]) -> Key:
    return threat_name(entry["threat"]), entry["attack"], entry["batch"]


def read(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the entries of a ledger; a torn last line is left out.

    Raises:
        UserError: no such file, no header, or a damaged line before the last.
    """
    header, entries, _ = _parse(Path(path))
    if header is None:
        raise UserError(f"{path}: no header line; this is not a ledger")
    return header, entries


def by_sample(entries: Iterable[Mapping[str, Any]]) -> dict[Key, tuple[Any, ...]]:
    """What a ledger says of each sample, whatever the batches: (threat, attack, position) to (verdict, seed, passes or None)."""
    found = {}
    for e in entries:
        each = e.get("passes", [None] * len(e["index"]))
        for i, verdict, passes in zip(e["index"], e["verdict"], each, strict=True):
            found[threat_name(e["threat"]), e["attack"], i] = verdict, e["seed"], None if passes is None else tuple(passes)
    return found


class Ledger:
    """An open ledger.

    Args:
        path: the file; None keeps nothing.
        header: everything that determines the verdicts, JSON-able.
        resume: continue the ledger at ``path`` if there is one.

    Raises:
        UserError: ``path`` holds a ledger and ``resume`` is False; its header differs from this one; it is damaged; it cannot
            be written.
    """

    def __init__(self, path: str | Path | None, header: Mapping[str, Any], *, resume: bool = False):
        self.path = None if path is None else Path(path)
        self.done: dict[Key, dict[str, Any]] = {}
        self._file: Any = None
        if self.path is None:
            return
        header = json.loads(json.dumps(header, allow_nan=False))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            found = self._open_existing(header, resume) if self.path.exists() and self.path.stat().st_size else False
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open as long as the ledger
        except OSError as error:
            raise UserError(f"{self.path}: cannot write the ledger: {error.strerror or error}") from error
        if not found:
            self._write(header)
            _sync_folder(self.path.parent)

    def _open_existing(self, header: Mapping[str, Any], resume: bool) -> bool:
        assert self.path is not None
        if not resume:
            raise UserError(f"{self.path}: there is an evaluation here already; continue it with --resume or choose another --out")
        old, entries, whole = _parse(self.path)
        if old is None and not encoded(header).startswith(self.path.read_bytes()):
            raise UserError(f"{self.path}: no header line; this is not a ledger")
        if old is not None and (difference := first_difference(old, header)):
            where, there, here = difference
            raise UserError(
                f"{self.path}: made by another evaluation: {where} is {there} there and {here} here; choose another --out"
            )
        if whole < self.path.stat().st_size:
            os.truncate(self.path, whole)
        self.done = {key_of(e): e for e in entries}
        return old is not None

    def get(self, threat: Threat | None, attack: str, batch: int) -> dict[str, Any] | None:
        """The entry of an earlier run, or None."""
        return self.done.get((threat_name(threat), attack, batch))

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one line; when this returns it is on the disk.

        Raises:
            UserError: the disk is full or the file cannot be written; the ledger ends with its last whole line.
        """
        if self._file is not None:
            self._write(entry)

    def _write(self, value: Mapping[str, Any]) -> None:
        line = encoded(value)
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(28, "No space left on device")
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), before)
            raise UserError(f"{self.path}: cannot write the ledger: {error.strerror or error}") from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def first_difference(a: Any, b: Any, where: str = "") -> tuple[str, str, str] | None:
    """The first key, in the order of ``a``, at which two JSON values differ: (dotted key, value in a, value in b)."""
    if isinstance(a, dict) and isinstance(b, dict):
        for k in [*a, *(k for k in b if k not in a)]:
            if found := first_difference(a.get(k, _ABSENT), b.get(k, _ABSENT), f"{where}.{k}" if where else str(k)):
                return found
        return None
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (p, q) in enumerate(zip(a, b, strict=True)):
            if found := first_difference(p, q, f"{where}[{i}]"):
                return found
        return None
    return None if a == b and type(a) is type(b) else (where or "the header", _show(a), _show(b))


def encoded(value: Mapping[str, Any]) -> bytes:
    """One line of a ledger."""
    return (json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n").encode()


def _show(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parse(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]], int]:
    """Header (None if torn), entries, and the number of bytes that whole lines take."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the ledger: {error.strerror or error}") from error
    lines = raw.split(b"\n")[:-1]  # what follows the last newline is torn, or empty
    values: list[dict[str, Any]] = []
    whole = 0
    for i, line in enumerate(lines):
        value = _line(line, header=i == 0)
        if value is None:
            if i == len(lines) - 1 and i > 0:
                break
            raise UserError(f"{path}: line {i + 1} is damaged; this is not a ledger that can be continued")
        values.append(value)
        whole += len(line) + 1
    return (values[0] if values else None), values[1:], whole


def _line(line: bytes, header: bool) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            return None
        if not header:
            key_of(value)
        return value if header or len(value["index"]) == len(value["verdict"]) else None
    except (ValueError, KeyError, TypeError):
        return None


def _sync_folder(folder: Path) -> None:
    """Make a new file's name survive a power cut, where the platform can."""
    with contextlib.suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
