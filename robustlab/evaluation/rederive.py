"""Every number of an evaluation, computed again from its ledger alone.

A ledger that was changed by hand does not pass: every batch is there once; in it the clean line comes first and covers all images;
each attack of the suite, in order, was given exactly the images that all before it left and no gate spared; each corruption was
given all of them, and the attack on corrupted images those that were classified correctly there; an audit was given those that its
seed draws (audit.recount).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustlab.evaluation import shards
from robustlab.evaluation.audit import PREFIX
from robustlab.evaluation.cascade import Gate, gate_of, unique
from robustlab.evaluation.ledger import read, threat_name
from robustlab.evaluation.result import Result
from robustlab.types import UserError

Line = Mapping[str, Any]


def rederive(path: str | Path) -> Result:
    """The result that a finished ledger tells; its fingerprint, environment and provenance are not in there and stay empty.

    Raises:
        UserError: not a ledger, one of a shard, unfinished, or with lines that no evaluation writes.
    """
    header, entries = read(path)
    if "shard" in header:
        raise UserError(f"{path}: the ledger of a shard; merge it first")
    if not isinstance(header.get("n"), int) or header["n"] < 1:
        raise UserError(f"{path}: the header says nothing about the number of images")
    if wrong := first_mistake(header, entries):
        raise UserError(f"{path}: {wrong}")
    return shards.result_of(header, entries, fingerprint="", ledger=str(path))


def first_mistake(header: Line, entries: Sequence[Line]) -> str | None:
    """What no evaluation writes, in one line; None where all is well."""
    size, n = header["batch_size"], header["n"]
    batches: dict[int, list[Line]] = {b: [] for b in range(-(-n // size))}
    for e in entries:
        if e["attack"].startswith(PREFIX):
            continue
        if e["batch"] not in batches:
            return f"batch {e['batch']}: there are only {len(batches)}"
        if len(e["verdict"]) != len(e["index"]) or not set(e["verdict"]) <= {0, 1}:
            return f"batch {e['batch']}, {_label(e)}: {len(e['index'])} images but verdicts {str(e['verdict'])[:40]}"
        if e.get("seed", header["seed"]) != header["seed"]:
            return f"batch {e['batch']}, {_label(e)}: seed {e['seed']}, the header says {header['seed']}"
        batches[e["batch"]].append(e)
    plan, gate = _plan(header), _gate(header)
    for b, lines in batches.items():
        images = list(range(b * size, min((b + 1) * size, n)))
        if wrong := _batch_mistake(plan, gate, lines, images):
            return f"batch {b}, {wrong}"
    return None


def _plan(header: Line) -> list[tuple[str, str]]:
    """(threat, label) of the lines of a batch, in order."""
    suite = header["suite"]["resolved"]
    attacks = unique([a["name"] for a in suite.get("attacks", ())])
    corruptions = [*unique([c["name"] for c in suite.get("corruptions", ())]), *suite.get("published", ())]
    ends = ["", f"+{suite['attack']['name']}"] if suite.get("attack") else [""]
    return [
        ("", "clean"),
        *((threat_name(t), label) for t in header["threats"] for label in attacks),
        *(("", f"{label}/{s}{end}") for label in corruptions for s in suite["severities"] for end in ends),
    ]


def _gate(header: Line) -> Gate | None:
    from robustlab import config

    resolved = header["suite"]["resolved"]
    return gate_of(config.build("suite", resolved)) if "exact" in resolved else None


def _batch_mistake(plan: Sequence[tuple[str, str]], gate: Gate | None, lines: Sequence[Line], images: list[int]) -> str | None:
    found = [(threat_name(e["threat"]), e["attack"]) for e in lines]
    for got, wanted in zip(found, plan, strict=False):
        if got != wanted:
            return f"found the line of '{got[1]}' where that of '{wanted[1]}' belongs"
    if len(found) != len(plan):
        extra = len(found) > len(plan)
        return (
            f"the line of '{(found if extra else plan)[min(len(found), len(plan))][1]}' is {'one too many' if extra else 'missing'}"
        )
    correct, before = images, images
    left: dict[str, list[int]] = {}
    for (threat, label), e in zip(found, lines, strict=True):
        given = left.get(threat, correct) if threat else before if "+" in label else images
        if e["index"] != given:
            return f"{label}: given {len(e['index'])} images, not the {len(given)} that were left for it"
        kept = [i for i, v in zip(e["index"], e["verdict"], strict=True) if v]
        if threat and gate is not None and label == gate.label:
            out = dict(zip(e["index"], gate.spares(e), strict=True))
            left[threat] = [i for i in kept if not out[i]]
        elif threat:
            left[threat] = kept
        elif "/" in label:
            before = kept
        elif label == "clean":
            correct = kept
    return None


def _label(e: Line) -> str:
    return f"'{e['attack']}'"
