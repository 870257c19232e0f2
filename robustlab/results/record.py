"""The record: one JSON file that says what was measured, on what, how, at what cost, and where the parts are.

A record is made from an evaluation's result, written whole or not at all, and read with every key checked. ``schema_version``
grows when a reader of the old version could misunderstand a file of the new one.
"""

from __future__ import annotations

import datetime
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from robustlab.files import sha256, write_json
from robustlab.types import Fidelity, Norm, UserError

SCHEMA_VERSION = 1
Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelInfo(_Strict):
    """Which model. Records with the same label and hash are of the same model.

    Attributes:
        name: what was evaluated, as the command line names it.
        label: what tables call it.
        hash: of weights and structure, as the evaluation saw them.
        checkpoint: SHA-256 of the file, if it came from one.
        trainer, fidelity: how it was trained, if known.
        architecture: the model part's name, such as ``preact_resnet18``.
        parameters: how many.
    """

    name: str
    label: str
    hash: str
    checkpoint: str | None = None
    trainer: str | None = None
    fidelity: Fidelity | None = None
    architecture: str | None = None
    parameters: Number | None = None


class DataInfo(_Strict):
    name: str
    split: str = "test"
    n: Annotated[int, Field(ge=1)]
    fingerprint: str


class ThreatInfo(_Strict):
    norm: Norm
    eps: Annotated[float, Field(ge=0)]


class SuiteInfo(_Strict):
    name: str
    resolved: dict[str, Any]


class Proportion(_Strict):
    """k of n, with its 95 % interval."""

    k: Number
    n: Annotated[int, Field(ge=1)]
    accuracy: Share
    interval: tuple[Share, Share]


class AttackRow(_Strict):
    """What one attack did; see ``evaluation.Result.per_attack``."""

    robust_accuracy: Share
    attacked: Number
    broken: Number
    forwards: Number
    backwards: Number
    seconds: Annotated[float, Field(ge=0)]
    reached: Annotated[float, Field(ge=0)]
    outside: Number
    flags: list[str] = []
    spent: Annotated[float, Field(ge=0)] | None = None


class Cost(_Strict):
    forwards: Number
    backwards: Number
    seconds: Annotated[float, Field(ge=0)]
    forwards_per_sample: Annotated[float, Field(ge=0)]
    backwards_per_sample: Annotated[float, Field(ge=0)]


class AuditRow(_Strict):
    """The audit of a suite that stands in for another (``suite``); see ``evaluation.Result.threats``.

    Without an audit every one of the ``survivors`` that were not given the exact suite may be lost: ``left`` is their number.
    """

    suite: str
    survivors: Number
    audited: Number
    misses: Number
    left: Number
    points: Annotated[float, Field(ge=0, le=100)]
    looks: Number
    seed: int
    forwards: Number
    backwards: Number
    seconds: Annotated[float, Field(ge=0)]


class ThreatRow(_Strict):
    """``curve``: robust accuracy against passes per image, (passes, accuracy) in order; see ``evaluation.result.cost_curve``."""

    norm: Norm
    eps: Annotated[float, Field(ge=0)]
    k: Number
    robust_accuracy: Share
    interval: tuple[Share, Share]
    per_attack: dict[str, AttackRow]
    cost: Cost
    curve: list[tuple[Annotated[float, Field(ge=0)], Share]] | None = None
    audit: AuditRow | None = None

    @property
    def bounded(self) -> bool:
        """Whether the accuracy is that of its suite, or comes with the bound of an audit on what it leaves open."""
        return self.audit is None or self.audit.audited > 0 or self.audit.survivors == 0


class WorstCell(_Strict):
    corruption: str
    severity: Annotated[int, Field(ge=1, le=5)]
    accuracy: Share


class Calibrations(_Strict):
    """ECE of clean images, of each corruption by severity, and the mean over these."""

    clean: Share
    mean: Share
    corruptions: dict[str, dict[str, Share]]


class CorruptionRobustness(_Strict):
    """Accuracy under an attack on the corrupted images."""

    norm: Norm
    eps: Annotated[float, Field(ge=0)]
    mean: Share
    corruptions: dict[str, dict[str, Share]]


class CorruptionScores(_Strict):
    """See ``evaluation.corruption_scores.scores``. mCE is by the name of its baseline, as a share: 1 is AlexNet's."""

    source: Literal["generated", "official files"]
    mean: Share
    interval: tuple[Share, Share]
    error: Share
    worst: WorstCell
    mce: dict[str, Annotated[float, Field(ge=0)]] = {}
    relative_mce: dict[str, float] = {}
    ece: Calibrations | None = None
    robust: CorruptionRobustness | None = None


class Metrics(_Strict):
    """``robust`` and ``per_attack`` are those of the first of ``threats``; ``robust`` is null without attacks."""

    clean: Proportion
    robust: Proportion | None = None
    per_attack: dict[str, AttackRow] = {}
    threats: list[ThreatRow] = []
    corruptions: dict[str, dict[str, Share]] = {}
    corruption_accuracy: Share | None = None
    corruption_scores: CorruptionScores | None = None


class Provenance(_Strict):
    """Where the number comes from.

    Attributes:
        kind, link: ``ours``: its ledger is at hand; ``claimed`` by the model's authors, or ``external``: measured by others; then
            ``link`` is their source.
        config, config_hash: the training's configuration: its path and the SHA-256 of the file as it was read.
        ledger: the SHA-256 of the file with the per-sample verdicts.
    """

    kind: Literal["ours", "claimed", "external"] = "ours"
    link: str | None = None
    command: str | None = None
    config: str | None = None
    config_hash: str | None = None
    commit: str | None = None
    date: str
    ledger: str | None = None


class ReliabilityCheck(_Strict):
    """One check of the reliability report; ``figure`` is null where it was no number. Larger is worse."""

    name: str
    verdict: Literal["pass", "warn", "fail"]
    figure: float | None
    measure: str
    advice: str


class ReliabilityInfo(_Strict):
    """Whether the robust accuracy can be believed; ``n`` images, ``skipped`` checks with the reason, the passes spent on it."""

    verdict: Literal["pass", "warn", "fail"] | None
    n: Number
    norm: Norm
    eps: Annotated[float, Field(ge=0)]
    checks: list[ReliabilityCheck]
    skipped: dict[str, str] = {}
    forwards: Number
    backwards: Number


class Record(_Strict):
    """One model under one suite. ``reliability`` is null in records that were made without the report."""

    schema_version: Literal[1] = 1
    model: ModelInfo
    data: DataInfo
    threat: ThreatInfo | None
    suite: SuiteInfo
    precision: Literal["fp32", "bf16"]
    seed: int
    batch_size: Annotated[int, Field(ge=1)]
    metrics: Metrics
    cost: Cost
    environment: dict[str, Any]
    provenance: Provenance
    reliability: ReliabilityInfo | None = None


def record_from(
    result: Any,
    *,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    command: str | None = None,
    config: str | None = None,
    config_hash: str | None = None,
    commit: str | None = None,
    date: str | None = None,
) -> Record:
    """The record of an evaluation.

    Args:
        result: an ``evaluation.Result``, or its ``to_dict()``.
        model: ``name label checkpoint trainer fidelity architecture parameters``; only ``name`` is needed.
        data: ``name`` and ``split``; a ``fingerprint`` replaces the one of the evaluated images.
        command, config, config_hash, commit: the command line, the path of the training's configuration and its SHA-256, the
            code's commit.
        date: ISO 8601; None is now, in UTC.

    Raises:
        UserError: a key that a record does not have.
    """
    r = result if isinstance(result, Mapping) else result.to_dict()
    ledger = r["ledger"]
    return _validated(
        {
            "model": {"label": model.get("name"), "hash": r["model_hash"], **model},
            "data": {"fingerprint": r["fingerprint"], **data, "n": r["n"]},
            "threat": r["threat"],
            "suite": r["suite"],
            "precision": r["precision"],
            "seed": r["seed"],
            "batch_size": r["batch_size"],
            "metrics": {key: r[key] for key in Metrics.model_fields},
            "cost": r["cost"],
            "environment": r["environment"],
            "provenance": {
                "command": command,
                "config": config,
                "config_hash": config_hash,
                "commit": commit,
                "date": date or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "ledger": sha256(ledger) if ledger and Path(ledger).exists() else None,
            },
            "reliability": r.get("reliability"),
        },
        "record",
    )


def write_record(path: str | Path, record: Record) -> Path:
    """Write a record, whole or not at all.

    Raises:
        UserError: the place cannot be written.
    """
    write_json(path, record.model_dump(mode="json"))
    return Path(path)


def read_record(path: str | Path) -> Record:
    """Read and check a record.

    Raises:
        UserError: no such file, not JSON, of a newer version; a key that is missing, unknown or of the wrong kind: one line each.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error
    except ValueError as error:
        where = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}: {where}not JSON: {getattr(error, 'msg', error)}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deep to be a record") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a record (a JSON object), got {_kind(raw)}")
    version = raw.get("schema_version")
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version: {version} is newer than this robustlab reads ({SCHEMA_VERSION}); upgrade robustlab"
        )
    if "schema_version" not in raw:
        raise UserError(f"{path}: schema_version: missing; this is not a record")
    return _validated(raw, str(path))


def _validated(raw: Mapping[str, Any], where: str) -> Record:
    try:
        record = Record.model_validate(raw)
    except ValidationError as errors:
        raise UserError(*(f"{where}: {message(e, Record)}" for e in errors.errors())) from None
    if wrong := _inconsistent(record):
        raise UserError(f"{where}: {wrong}")
    return record


def message(error: Any, model: type[BaseModel]) -> str:
    """One of pydantic's errors about a model in one line, with the nearest key for an unknown one."""
    key, parent = ".".join(map(str, error["loc"])), error["loc"][:-1]
    if error["type"] == "missing":
        return f"{key}: missing"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), _keys_at(parent, model), n=1, cutoff=0.5)
        return f"{key}: unknown key" + (f" (did you mean '{near[0]}'?)" if near else "")
    text = error["msg"][0].lower() + error["msg"][1:]
    value = error.get("input")
    shown = _kind(value) if isinstance(value, dict | list) else json.dumps(value, default=str)
    return f"{key}: {text}, got {shown}"


def _keys_at(place: tuple[Any, ...], model: type[BaseModel]) -> list[str]:
    """The keys that a model may have at a place."""
    found: Any = model
    for part in place:
        hint = found.model_fields[part].annotation if hasattr(found, "model_fields") and part in found.model_fields else None
        models = [h for h in (hint, *getattr(hint, "__args__", ())) if isinstance(h, type) and issubclass(h, BaseModel)]
        found = models[0] if models else found
    return list(found.model_fields)


def _inconsistent(r: Record) -> str | None:
    """The first figure that contradicts another."""
    n = r.data.n
    pairs = [("metrics.clean", r.metrics.clean), ("metrics.robust", r.metrics.robust)]
    for name, p in pairs:
        if p is None:
            continue
        if p.n != n or p.k > n:
            return f"{name}: {p.k} of {p.n}, but data.n is {n}"
        if abs(p.accuracy - p.k / n) > 1e-9:
            return f"{name}.accuracy: {p.accuracy} is not {p.k}/{n}"
    for i, t in enumerate(r.metrics.threats):
        if t.k > r.metrics.clean.k or abs(t.robust_accuracy - t.k / n) > 1e-9:
            return (
                f"metrics.threats.{i}: {t.k} robust of {r.metrics.clean.k} correct and {n} in all does not fit {t.robust_accuracy}"
            )
        if t.audit is not None and not t.audit.misses <= t.audit.audited <= t.audit.survivors - t.audit.left <= r.metrics.clean.k:
            return f"metrics.threats.{i}.audit: {t.audit.model_dump(include={'survivors', 'audited', 'misses', 'left'})} do not fit"
    if r.metrics.robust is not None and (not r.metrics.threats or r.metrics.threats[0].k != r.metrics.robust.k):
        return "metrics.robust: differs from the first of metrics.threats"
    if (r.threat is None) != (r.metrics.robust is None):
        return "threat: given together with metrics.robust, or neither"
    return None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "a truth value"}
    return names.get(type(value), "null")
