"""Rows of a board that robustlab did not measure: numbers that somebody claims, or that another evaluation found.

``claimed``: by the authors of the model. ``external``: measured by others, such as RobustBench. A claim names its source and is
never ranked; what it leaves open (images, seed, cost) stays open.

RobustBench keeps one JSON object per model (``model_info/<dataset>/<Linf|L2|corruptions>/<ID>.json``): accuracies are strings in
percent, eps is ``"8/255"``, ``"0.5"``, ``"None"`` or null. Both strings and floats are read; a claim made from one keeps it whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from robustlab.results.record import Record, Share, message
from robustlab.types import Norm, UserError

NORMS: dict[str, Norm] = {"Linf": "linf", "L2": "l2"}
DATASETS = {"cifar-10": "cifar10", "cifar-100": "cifar100"}


def fraction(value: str | float | None) -> float | None:
    """``"8/255"``, ``"0.5"``, 0.5 as a number; ``"None"``, ``"null"``, ``""`` and None as None.

    Raises:
        ValueError: anything else.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none", "null", "-", "n/a")):
        return None
    if isinstance(value, bool):
        raise ValueError(f"expected a number such as 8/255, got {value}")
    if isinstance(value, int | float):
        return float(value)
    top, _, bottom = value.strip().rstrip("%").partition("/")
    try:
        return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"expected a number such as 8/255, got '{value}'") from None


class ModelCard(BaseModel):
    """One of RobustBench's ``model_info`` files. Keys that are not known here are kept.

    Attributes:
        clean_acc, autoattack_acc, corruptions_acc, external, reported: percent, as strings or floats.
        external: the best known robust accuracy, where an attack stronger than AutoAttack was found.
        unreliable: whether AutoAttack's number may be too high.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    link: str
    name: str
    authors: str
    additional_data: bool
    number_forward_passes: Annotated[int, Field(ge=0)]
    dataset: str
    venue: str
    architecture: str
    eps: str | float | None
    clean_acc: str | float
    reported: str | float | None = None
    autoattack_acc: str | float | None = None
    corruptions_acc: str | float | None = None
    external: str | float | None = None
    unreliable: bool | None = None
    footnote: str | None = None

    @model_validator(mode="after")
    def _numbers(self) -> ModelCard:
        for key in ("clean_acc", "reported", "autoattack_acc", "corruptions_acc", "external"):
            value = fraction(getattr(self, key))
            if value is not None and not 0 <= value <= 100:
                raise ValueError(f"{key}: expected percent, got {value:g}")
        fraction(self.eps)
        if self.autoattack_acc is None and self.corruptions_acc is None:
            raise ValueError("expected autoattack_acc or corruptions_acc")
        return self

    def dump(self) -> dict[str, Any]:
        """The object as it was read: the same keys, the same values."""
        return self.model_dump(exclude_unset=True)


class Claim(BaseModel):
    """A row that was not measured here.

    Attributes:
        label: what tables call the model.
        kind, link: who says so, and where.
        data, norm, eps: as in a record; ``eps`` and ``norm`` are None for a corruption benchmark.
        clean, robust, best_known, corruption: fractions.
        n: how many images, if the source says.
        card: the RobustBench object that it was made from.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    claim_version: Literal[1] = 1
    label: str
    kind: Literal["claimed", "external"]
    link: str
    data: str
    norm: Norm | None
    eps: float | None
    clean: Share
    robust: Share | None = None
    best_known: Share | None = None
    corruption: Share | None = None
    unreliable: bool | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    card: dict[str, Any] | None = None


def read_card(path: str | Path) -> ModelCard:
    """Read one of RobustBench's files.

    Raises:
        UserError: cannot be read, not JSON, a key missing or of the wrong kind: one line each.
    """
    raw = _object(path)
    try:
        return ModelCard.model_validate(raw)
    except ValidationError as errors:
        raise UserError(*(f"{path}: {message(e, ModelCard)}" for e in errors.errors())) from None


def read_claim(path: str | Path) -> Claim:
    """Read a claim of a board.

    Raises:
        UserError: as :func:`read_card`.
    """
    return _claim(_object(path), str(path))


def claim_from_card(card: ModelCard, kind: Literal["claimed", "external"], link: str | None, norm: str | None) -> Claim:
    """A row from RobustBench's object.

    Args:
        card: the object.
        kind: who says so. ``claimed`` takes the accuracy that the authors reported, where there is one.
        link: the source; None takes the object's own.
        norm: of the threat model, which the object does not name (its folder does); None for corruptions.
    """
    robust = card.reported if kind == "claimed" and fraction(card.reported) is not None else card.autoattack_acc
    return _claim(
        {
            "label": card.name,
            "kind": kind,
            "link": link or card.link,
            "data": DATASETS.get(card.dataset, card.dataset),
            "norm": norm,
            "eps": fraction(card.eps),
            "clean": _share(card.clean_acc),
            "robust": _share(robust),
            "best_known": _share(card.external),
            "corruption": _share(card.corruptions_acc),
            "unreliable": card.unreliable,
            "card": card.dump(),
        },
        card.name,
    )


def card_from(record: Record, about: Mapping[str, Any] | None = None) -> ModelCard:
    """A record as RobustBench's object: accuracies as strings in percent with two digits, eps as people write it.

    Args:
        record: with one threat model, or with corruptions alone.
        about: what a record does not know: ``name authors link venue additional_data number_forward_passes footnote reported``.

    Raises:
        UserError: the record has neither a robust accuracy nor corruptions; a key that the object does not have.
    """
    from robustlab.results.leaderboard import format_eps

    known = dict(about or {})
    if unknown := set(known) - set(ModelCard.model_fields):
        raise UserError(f"{sorted(unknown)[0]}: no key of RobustBench's model_info")
    m, robust = record.metrics, record.metrics.robust
    if robust is None and m.corruption_accuracy is None:
        raise UserError(f"{record.model.label}: neither a robust accuracy nor corruptions to export")
    measured: dict[str, Any] = {
        "link": record.provenance.link or "",
        "name": record.model.label,
        "authors": "",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": record.data.name,
        "venue": f"robustlab, {record.provenance.date[:10]}",
        "architecture": record.model.architecture or record.model.name,
        "eps": format_eps(record.threat.eps, record.threat.norm) if record.threat else None,
        "clean_acc": f"{100 * m.clean.accuracy:.2f}",
        "reported": None,
        **(
            {"autoattack_acc": f"{100 * robust.accuracy:.2f}"}
            if robust
            else {"corruptions_acc": f"{100 * (m.corruption_accuracy or 0):.2f}"}
        ),
        **({"unreliable": record.reliability.verdict == "fail"} if record.reliability and record.reliability.verdict else {}),
        "footnote": f"{record.suite.name}, first {record.data.n} images"
        + (f", 95 % interval {100 * robust.interval[0]:.2f} to {100 * robust.interval[1]:.2f}." if robust else "."),
    }
    return ModelCard.model_validate(measured | known)


def card_folder(record: Record) -> str:
    """Where RobustBench looks for a record's object: ``cifar10/Linf``."""
    names = {ours: theirs for theirs, ours in NORMS.items()}
    if record.threat is None:
        return f"{record.data.name}/corruptions"
    if record.threat.norm not in names:
        raise UserError(f"{record.model.label}: RobustBench has no folder for {record.threat.norm}; it has Linf, L2, corruptions")
    return f"{record.data.name}/{names[record.threat.norm]}"


def norm_of_path(path: str | Path) -> Norm | None:
    """The norm that a RobustBench path names in its folder; None for corruptions.

    Raises:
        UserError: the folder names neither.
    """
    parent = Path(path).resolve().parent.name
    if parent in NORMS:
        return NORMS[parent]
    if re.match("corruptions", parent):
        return None
    raise UserError(f"{path}: give --norm; the file does not lie in a folder named Linf, L2 or corruptions")


def _share(percent: str | float | None) -> float | None:
    value = fraction(percent)
    return None if value is None else value / 100


def _object(path: str | Path) -> dict[str, Any]:
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object")
    return raw


def _claim(raw: Mapping[str, Any], where: str) -> Claim:
    try:
        return Claim.model_validate(raw)
    except ValidationError as errors:
        raise UserError(*(f"{where}: {message(e, Claim)}" for e in errors.errors())) from None
