"""One evaluation cut into shards that run anywhere, and their ledgers put together again.

Shard i of n takes the batches i-1, i-1+n, i-1+2n, ... of the evaluation. Batches are cut as they would be without shards, and draws
are keyed by the images' positions and the batches' numbers; so the merged ledger is the one that a single run writes, but for the
seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustlab.evaluation.audit import PREFIX, recount
from robustlab.evaluation.judge import dtype_of
from robustlab.evaluation.ledger import encoded, first_difference, read, threat_name
from robustlab.evaluation.reliability.report import IMAGES, SHARE, examine
from robustlab.evaluation.result import Result, Tally, assemble
from robustlab.evaluation.sources import open_source
from robustlab.files import atomic_write, exclusive
from robustlab.types import Classifier, Threat, UserError

LEDGER = "ledger.jsonl"
Shard = tuple[int, int]
Entries = list[dict[str, Any]]


def check_shard(shard: Shard, size: int | None, batch_size: int) -> None:
    """Raise ``UserError`` unless the shard exists and has something to do."""
    i, n = shard
    name = f"--shard {i}/{n}"
    if not 1 <= i <= n:
        raise UserError(f"{name}: expected i/n with 1 <= i <= n, such as 2/5")
    if size is None:
        raise UserError(f"{name}: these data do not say how many images they hold; give --num-examples")
    batches = -(-size // batch_size)
    if i > batches:
        plural = "es" if batches > 1 else ""
        raise UserError(
            f"{name}: {size} images are only {batches} batch{plural} of {batch_size}; give fewer shards or a smaller --batch-size"
        )


def mine(batch: int, shard: Shard | None) -> bool:
    """Whether a batch is the shard's."""
    return shard is None or batch % shard[1] == shard[0] - 1


def share(shard: Shard | None, size: int | None, batch_size: int) -> int | None:
    """How many of the images are a shard's; None if it is not known how many there are."""
    if shard is None or size is None:
        return size
    return sum(min(batch_size, size - first) for b, first in enumerate(range(0, size, batch_size)) if mine(b, shard))


def merge(paths: Sequence[Path]) -> tuple[dict[str, Any], Entries]:
    """Header and entries of the single run that these shards' ledgers are the pieces of.

    Raises:
        UserError: one line: a ledger that is no shard, one given twice, one missing, one of another evaluation, an unfinished one.
    """
    if not paths:
        raise UserError("merge: give the ledgers of all shards")
    known: dict[int, Path] = {}
    parts: list[Entries] = []
    header: dict[str, Any] = {}
    for path in paths:
        own, entries = read(path)
        if "shard" not in own:
            raise UserError(f"{path}: not the ledger of a shard; it is a whole evaluation")
        i, n = own.pop("shard")
        own["of"] = n
        if header and (difference := first_difference(header, own)):
            where, there, here = difference
            what = f"a shard of {here}, the others of {there}" if where == "of" else f"{where} is {here}, in {paths[0]} {there}"
            raise UserError(f"{path}: a shard of another evaluation: {what}")
        if i in known:
            raise UserError(f"{path}: shard {i}/{n} overlaps with {known[i]}, the same shard")
        header, known[i] = own, path
        parts.append(entries)
    n = header.pop("of")
    if missing := [f"{i}/{n}" for i in range(1, n + 1) if i not in known and i <= _batches(header)]:
        raise UserError(f"merge: shard{'s' if len(missing) > 1 else ''} {', '.join(missing)} missing")
    for (i, path), entries in zip(known.items(), parts, strict=True):
        _check_finished(path, header, (i, n), entries)
    order = sorted((e["batch"], i) for i, part in enumerate(parts) for e in part)
    queues = [iter(part) for part in parts]
    return header, [next(queues[i]) for _, i in order]


def _batches(header: Mapping[str, Any]) -> int:
    return -(-header["n"] // header["batch_size"])


def _check_finished(path: Path, header: Mapping[str, Any], shard: Shard, entries: Entries) -> None:
    """Every batch of the shard is there, once, with all its images and everything that was done to the first."""
    size, name = header["batch_size"], f"{shard[0]}/{shard[1]}"
    expected = [b for b in range(_batches(header)) if mine(b, shard)]
    done: dict[int, list[tuple[str, str]]] = {}
    for e in entries:
        done.setdefault(e["batch"], []).append((threat_name(e["threat"]), e["attack"]))
        images = list(range(e["batch"] * size, min((e["batch"] + 1) * size, header["n"])))
        if e["batch"] not in expected or (e["attack"] == "clean" and e["index"] != images):
            raise UserError(f"{path}: batch {e['batch']} is not shard {name}'s, or not whole; this ledger cannot be merged")
    whole = done.get(expected[0], [])
    wanted = {threat_name(t) for t in header["threats"]}
    for batch in expected:
        if done.get(batch) != whole or not wanted <= {threat for threat, _ in whole}:
            raise UserError(f"{path}: shard {name} is not finished (batch {batch}); go on with it: --resume")


def write(folder: Path, header: Mapping[str, Any], entries: Entries, *, again: bool = False) -> Path:
    """Write a merged ledger. With ``again`` it may be there already, the same to the byte.

    Raises:
        UserError: there is a ledger already, or the place cannot be written.
    """
    path, lines = folder / LEDGER, b"".join(encoded(line) for line in (header, *entries))
    with exclusive(folder):
        if path.exists() and not (again and path.read_bytes() == lines):
            raise UserError(f"{path}: there is an evaluation here already; choose another --out")
        atomic_write(path, lines)
    return path


def folder_of(shard: Shard) -> str:
    """What the folder of a shard is called."""
    return f"shard-{shard[0]}-of-{shard[1]}"


def check_place(folder: Path, n: int, *, resume: bool) -> None:
    """Raise ``UserError`` unless n processes may put an evaluation, and its shards, into the folder."""
    found = sorted({int(p.name.rpartition("-")[2]) for p in folder.glob("shard-*-of-*") if (p / LEDGER).exists()})
    if (found or (folder / LEDGER).exists()) and not resume:
        raise UserError(f"{folder}: there is an evaluation here already; continue it with --resume or choose another --out")
    if found and found != [n]:
        begun = " and ".join(map(str, found))
        raise UserError(f"{folder}: begun by {begun} processes, these are {n}; start as many as then or choose another --out")
    if not found and (folder / LEDGER).exists():
        raise UserError(f"{folder}: holds an evaluation by one process, these are {n}; choose another --out")


def check_enough(n: int, size: int, batch_size: int) -> None:
    """Raise ``UserError`` unless there is a batch for each of n processes."""
    if n > (batches := -(-size // batch_size)):
        plural = "es" if batches > 1 else ""
        raise UserError(
            f"{n} processes: {size} images are only {batches} batch{plural} of {batch_size}; "
            "start fewer or give a smaller --batch-size"
        )


def reliability(f: Classifier, data: Any, result: Result, device: torch.device) -> dict[str, Any] | None:
    """The reliability report that a single run makes, for a merged result; None without attacks."""
    if not result.threats:
        return None
    dtype = dtype_of(f)
    images, labels, first = list[Tensor](), list[Tensor](), 0
    for x, y in open_source(data).batches(result.batch_size, result.n):
        rows = result.clean[first : first + len(x)].nonzero().squeeze(1)[: IMAGES - sum(map(len, labels))]
        images.append(x[rows].to(device, dtype))
        labels.append(y[rows].to(device))
        first += len(x)
        if sum(map(len, labels)) == IMAGES:
            break
    spent = sum(t["cost"]["forwards"] + t["cost"]["backwards"] for t in result.threats)
    threat = Threat(result.threats[0]["norm"], result.threats[0]["eps"])
    return examine(f, torch.cat(images), torch.cat(labels), threat, seed=result.seed, passes=SHARE * spent).to_dict()


def result_of(header: Mapping[str, Any], entries: Entries, **known: Any) -> Result:
    """The result that a whole ledger tells. ``known``: ``fingerprint environment provenance ledger`` of the result."""
    n, clean = header["n"], Tally()
    corrupted, corrupted_attacked = dict[tuple[str, int], Tally](), dict[tuple[str, int], Tally]()
    right = torch.zeros(n, dtype=torch.bool)
    names = [threat_name(t) for t in header["threats"]]
    attacked: dict[str, dict[str, Tally]] = {name: {} for name in names}
    for e in entries:
        index, verdict = torch.tensor(e["index"], dtype=torch.long), torch.tensor(e["verdict"], dtype=torch.bool)
        if e["attack"].startswith(PREFIX):
            continue
        if e["threat"] is not None:
            attacked[threat_name(e["threat"])].setdefault(e["attack"], Tally()).add(e)
        elif e["attack"] == "clean":
            clean.add(e)
            right[index] = verdict
        else:
            label, _, severity = e["attack"].rpartition("/")
            level, attack, _ = severity.partition("+")
            (corrupted_attacked if attack else corrupted).setdefault((label, int(level)), Tally()).add(e)
    verdicts = [right.clone() for _ in names]
    own, audited = ([e for e in entries if e["attack"].startswith(PREFIX) is late] for late in (False, True))
    _mark(verdicts, names, own)
    audits = [None if audit is None else audit.to_dict() for audit in recount(header, entries, verdicts)]
    _mark(verdicts, names, audited)
    threats, under = [(t["norm"], t["eps"]) for t in header["threats"]], header.get("corruption_threat")
    same = {k: header[k] for k in ("suite", "seed", "precision", "batch_size")} | {"model_hash": header["model"]}
    return assemble(
        n, clean, right, threats, list(attacked.values()), verdicts, corrupted, corrupted_attacked, under, audits, **same, **known
    )


def _mark(verdicts: list[torch.Tensor], names: list[str], entries: Entries) -> None:
    """Write what broke into the verdicts of each threat model."""
    for e in entries:
        if e["threat"] is not None:
            broken = torch.tensor(e["index"], dtype=torch.long)[~torch.tensor(e["verdict"], dtype=torch.bool)]
            verdicts[names.index(threat_name(e["threat"]))][broken] = False
