"""Is a board what its ledgers say? Every number is computed again, every hash compared, the tables rendered once more.

For each entry of our own, against its ledger: the ledger's hash; model, suite with all parameters, threat models, seed,
precision, batch size and number of images; every accuracy, count, interval and cost. Against the files that can be found: the
checkpoint's and the configuration's hashes. Then the tables: the same bytes. Claimed and external entries have nothing to derive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustlab.files import sha256
from robustlab.results import leaderboard
from robustlab.results.claim import Claim
from robustlab.results.record import Record
from robustlab.types import UserError

TOLERANCE = 1e-9
LATER = ("curve", "spent", "corruption_scores")  # older records do not have them


@dataclass(frozen=True)
class Finding:
    """One line about a board.

    Attributes:
        entry: the file that it is about.
        text: what is wrong, or what could not be looked at.
        wrong: whether the board fails for it.
    """

    entry: str
    text: str
    wrong: bool


def verify(board_dir: str | Path, rederive: Callable[[Path], Mapping[str, Any]]) -> tuple[int, list[Finding]]:
    """Check a board.

    Args:
        board_dir: the board.
        rederive: from a ledger's path to the result that it tells, as ``evaluation.Result.to_dict`` gives it.

    Returns:
        How many entries were derived again, and the findings.

    Raises:
        UserError: no such folder, a bad ``board.yaml``, a bad record.
    """
    folder = Path(board_dir)
    found: list[Finding] = []
    derived = 0
    for path, record in leaderboard.entries(folder):
        name = path.relative_to(folder).as_posix()
        if isinstance(record, Claim):
            found.append(Finding(name, f"{record.kind}: {record.link}; nothing to derive", False))
            continue
        try:
            wrong, open_ = _check(folder, path, record, rederive)
        except UserError as error:
            wrong, open_ = list(error.lines), []
        derived += not wrong
        found += [Finding(name, text, True) for text in wrong] + [Finding(name, text, False) for text in open_]
    for table, text in leaderboard.tables(folder).items():
        path = folder / table
        if not path.exists():
            found.append(Finding(table, "not there; run `robustlab leaderboard build`", True))
        elif path.read_bytes() != text.encode():
            found.append(Finding(table, "is not what the entries give; run `robustlab leaderboard build`", True))
    return derived, found


def _check(folder: Path, path: Path, record: Record, rederive: Callable[[Path], Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """What is wrong with an entry, and what could not be looked at."""
    name = leaderboard.entry_name(record)
    wrong = [f"the file name says something else than the record, {name}"] if path.stem != name else []
    files, open_ = _files(folder, record)
    wrong += files
    ledger = folder / leaderboard.LEDGERS / f"{path.stem}.jsonl"
    if record.provenance.kind != "ours":
        return wrong, [*open_, f"{record.provenance.kind}: {record.provenance.link}; nothing to derive"]
    if record.provenance.ledger is None or not ledger.exists():
        return [*wrong, f"no ledger {leaderboard.LEDGERS}/{ledger.name}: its numbers cannot be derived"], open_
    if sha256(ledger) != record.provenance.ledger:
        wrong.append(f"{leaderboard.LEDGERS}/{ledger.name}: not the ledger that the record was made from (SHA-256)")
    told = rederive(ledger)
    return wrong + differences(record, told), open_


def differences(record: Record, told: Mapping[str, Any]) -> list[str]:
    """Where a record differs from the result that its ledger tells."""
    raw = record.model_dump(mode="json")
    pairs = {
        "model.hash": (record.model.hash, told["model_hash"]),
        "data.n": (record.data.n, told["n"]),
        "suite": (raw["suite"], told["suite"]),
        "threat": (raw["threat"], told["threat"]),
        "seed": (record.seed, told["seed"]),
        "precision": (record.precision, told["precision"]),
        "batch_size": (record.batch_size, told["batch_size"]),
        "metrics": (raw["metrics"], {key: told[key] for key in raw["metrics"] if key in told}),
        "cost": (raw["cost"], told["cost"]),
    }
    lines = (_first_difference(mine, theirs, key) for key, (mine, theirs) in pairs.items())
    return [line for line in lines if line]


def _first_difference(mine: Any, theirs: Any, where: str) -> str | None:
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for key in [*mine, *(k for k in theirs if k not in mine)]:
            if key in LATER and mine.get(key) is None:
                continue
            if line := _first_difference(mine.get(key), theirs.get(key), f"{where}.{key}"):
                return line
        return None
    if isinstance(mine, list | tuple) and isinstance(theirs, list | tuple) and len(mine) == len(theirs):
        lines = (_first_difference(a, b, f"{where}.{i}") for i, (a, b) in enumerate(zip(mine, theirs, strict=True)))
        return next((line for line in lines if line), None)
    numbers = isinstance(mine, int | float) and isinstance(theirs, int | float)
    same = math.isclose(mine, theirs, rel_tol=TOLERANCE, abs_tol=TOLERANCE) if numbers else mine == theirs
    return None if same else f"{where}: the record says {_short(mine)}, its ledger {_short(theirs)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _files(folder: Path, record: Record) -> tuple[list[str], list[str]]:
    """The checkpoint and the configuration, where a folder above the board holds them."""
    wrong, open_ = [], []
    known = (
        ("checkpoint", record.model.name, record.model.checkpoint),
        ("configuration", record.provenance.config, record.provenance.config_hash),
    )
    for what, name, digest in known:
        if name is None or digest is None:
            continue
        path = leaderboard.find_above(folder, name)
        if path is None:
            open_.append(f"the {what} {name} is not here: its hash was not compared")
        elif sha256(path) != digest:
            wrong.append(f"the {what} {name} is another one (SHA-256)")
    return wrong, open_
