"""A leaderboard is a folder of records: ``entries/*.json``, and beside them the tables made from nothing else.

    board.yaml    title, suite (the one that ranks), norm, eps, note; all optional
    entries/      one record per model, suite and threat model
    ledgers/      the per-sample verdicts behind a record, under the record's name, where they were kept
    index.md      the tables; index.csv: every row of them

Only like is ranked with like: a section holds the records of one suite (every parameter of it), threat model, data set, split,
number of images and precision. A suite that stands in for another gives upper bounds: they rank by what the audit leaves of them,
and not at all without one. Within a section, rows are sorted by robust accuracy and grouped: a group starts with the best row
that is left and takes every following row whose interval overlaps that of the group's first. The data do not tell the rows of
one group apart.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robustlab.files import atomic_write, exclusive, sha256
from robustlab.results.record import Record, ThreatRow, read_record
from robustlab.types import UserError

ENTRIES, LEDGERS = "entries", "ledgers"
BOARD_KEYS = {"title": str, "suite": str, "norm": str, "eps": (int, float, str), "note": str}

TEMPLATE = """\
# {{ board.title }}
{% if board.note %}

{{ board.note | trim }}
{% endif %}
{% for s in ranked %}

## {{ s.heading }}

{{ s.facts }}

| rank | model | trainer | fidelity | clean % | robust % |{{ " too high by % |" if s.exact else "" }} 95 % interval | n | eps \
| corruptions % | forwards | backwards | seconds | links |
|---:|---|---|---|---:|---:|{{ "---:|" if s.exact else "" }}:---:|---:|---:|---:|---:|---:|---:|---|
{% for r in s.rows -%}
| {{ r.rank or "-" }} | {{ r.model | cell }} | {{ r.trainer | cell }} | {{ r.fidelity | cell }} | {{ r.clean | percent }} \
| {{ r.robust | percent }} |{{ " " ~ (r.bound | points) ~ " |" if s.exact else "" }} {{ r | interval }} | {{ r.n }} \
| {{ r.radius }} | {{ r.corruption | percent }} \
| {{ r.forwards | count }} | {{ r.backwards | count }} | {{ r.seconds | count }} | {{ r.links }} |
{% endfor %}
{%- endfor %}
{% for w in sweeps %}

## {{ w.heading }}

{{ w.facts }}
{% if curve %}

![accuracy against the radius]({{ curve }})
{% endif %}

| model | clean % |{% for r in w.radii %} {{ r }} |{% endfor %}

|---|---:|{% for r in w.radii %}---:|{% endfor %}

{% for r in w.rows -%}
| {{ r.model | cell }} | {{ r.clean | percent }} |{% for c in r.cells %} {{ c | percent }} ({{ c | interval }}) |{% endfor %}

{% endfor %}
{%- endfor %}
{% if not ranked and not sweeps %}

No records yet.
{% endif %}

Models of one rank are not told apart: their intervals (Wilson, 95 %) overlap that of the first of the rank. Accuracies are
fractions of all n images. Forwards, backwards and seconds are what the suite's attacks spent per image.
"""


@dataclass
class Row:
    """One model in one section; accuracies are fractions, costs per image.

    ``runs`` counts the records it is the worst of; ``radius`` is eps as people write it; ``bound`` is by how many points the robust
    accuracy may be too high, where an audit says so.
    """

    model: str
    trainer: str | None
    fidelity: str | None
    clean: float
    robust: float | None
    low: float | None
    high: float | None
    n: int
    norm: str | None
    eps: float | None
    corruption: float | None
    forwards: float
    backwards: float
    seconds: float
    suite: str
    data: str
    precision: str
    entry: str
    config: str | None
    radius: str = "-"
    runs: int = 1
    rank: int | None = None
    bound: float | None = None
    links: str = field(default="", repr=False)


@dataclass
class Section:
    """Rows that rank together.

    ``series`` names what sections of a suite with several radii have in common, ``exact`` the suite that this one stands in for.
    """

    heading: str
    facts: str
    rows: list[Row]
    series: str | None = None
    exact: str | None = None


@dataclass
class SweepRow:
    """One model over several radii; ``cells`` are its rows, None where it was not scored."""

    model: str
    clean: float
    cells: list[Row | None]


@dataclass
class Sweep:
    """Sections of one suite that differ in the radius, side by side."""

    heading: str
    facts: str
    radii: list[str]
    rows: list[SweepRow]


@dataclass(frozen=True)
class Board:
    """What ``board.yaml`` says."""

    title: str = "Leaderboard"
    suite: str | None = None
    norm: str | None = None
    eps: float | None = None
    note: str = ""


def build(board_dir: str | Path) -> tuple[Path, Path]:
    """Write ``index.md`` and ``index.csv``; the same records give the same bytes.

    Returns:
        The two paths.

    Raises:
        UserError: no such folder, a bad ``board.yaml`` or a bad record; one line for each.
    """
    folder = Path(board_dir)
    board, found = read_board(folder), sections(folder)
    markdown, table = folder / "index.md", folder / "index.csv"
    curve = "curve.png" if (folder / "curve.png").exists() else None
    atomic_write(markdown, render(board, found, curve))
    atomic_write(table, _csv(found))
    return markdown, table


def add(board_dir: str | Path, record_path: str | Path, ledger: str | Path | None = None) -> Path:
    """Copy a record into a board, with its ledger if that lies beside it (``ledger.jsonl``) or is named.

    Returns:
        The entry's path. Adding the same record again changes nothing.

    Raises:
        UserError: a bad record; a ledger that is not the record's; an entry of this model, suite and threat model that differs.
    """
    folder, record = Path(board_dir), read_record(record_path)
    name = entry_name(record)
    target, raw = folder / ENTRIES / f"{name}.json", Path(record_path).read_bytes()
    beside = Path(record_path).with_name("ledger.jsonl") if ledger is None else Path(ledger)
    with exclusive(folder):
        if target.exists() and target.read_bytes() != raw:
            raise UserError(f"{target}: holds another result for this model, suite and threat model; remove it to replace it")
        if beside.exists() and record.provenance.ledger is not None:
            if sha256(beside) != record.provenance.ledger:
                raise UserError(f"{beside}: not the ledger that {record_path} was made from")
            atomic_write(folder / LEDGERS / f"{name}.jsonl", beside.read_bytes())
        elif ledger is not None:
            raise UserError(f"{beside}: no such ledger" if not beside.exists() else f"{record_path}: the record names no ledger")
        if not target.exists():
            atomic_write(target, raw)
    return target


def entry_name(record: Record) -> str:
    """The file name of a record in a board, without ``.json``."""
    parts = [record.model.label, record.suite.name, record.data.name]
    if record.threat:
        parts.append(f"{record.threat.norm}-{format_eps(record.threat.eps, record.threat.norm).replace('/', 'over')}")
    parts.append(f"n{record.data.n}")
    parts += [f"seed{record.seed}"] if record.seed else []
    parts += [record.precision] if record.precision != "fp32" else []
    return "--".join(re.sub(r"[^A-Za-z0-9._+-]+", "-", p).strip("-.") or "x" for p in parts)


def read_board(folder: Path) -> Board:
    """``board.yaml``, or defaults where there is none.

    Raises:
        UserError: not a mapping, an unknown key, or a value of the wrong kind.
    """
    import yaml

    path = folder / "board.yaml"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not path.exists():
        return Board(title=f"Leaderboard: {folder.resolve().name}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping with {', '.join(BOARD_KEYS)}")
    for key, value in raw.items():
        if key not in BOARD_KEYS:
            raise UserError(f"{path}: {key}: unknown key; expected one of {', '.join(BOARD_KEYS)}")
        if not isinstance(value, BOARD_KEYS[key]):  # type: ignore[arg-type]
            raise UserError(f"{path}: {key}: {value!r} is of the wrong kind")
    if "eps" in raw:
        raw["eps"] = _fraction(raw["eps"], path)
    return Board(**{"title": f"Leaderboard: {folder.resolve().name}", **raw})


def sections(board_dir: str | Path) -> list[Section]:
    """The tables of a board: that of the board's own suite and threat model first, models without an attack result last.

    Raises:
        UserError: as :func:`build`.
    """
    folder = Path(board_dir)
    board, records = read_board(folder), _records(folder)
    groups: dict[tuple[Any, ...], list[tuple[Path, Record, ThreatRow | None]]] = {}
    ranked: set[tuple[Any, ...]] = set()
    for path, r in records:
        for t in r.metrics.threats:
            ranked.add((_model(r), _data(r)))
            groups.setdefault((_data(r), r.suite.name, _canonical(r.suite.resolved), t.norm, t.eps, r.precision), []).append(
                (path, r, t)
            )
    for path, r in records:
        if not r.metrics.threats and (_model(r), _data(r)) not in ranked:
            groups.setdefault((_data(r), None, None, None, None, None), []).append((path, r, None))
    ambiguous = _ambiguous(r for _, r in records)
    corruption = {
        (_model(r), _data(r)): r.metrics.corruption_accuracy for _, r in records if r.metrics.corruption_accuracy is not None
    }
    out = []
    for key in sorted(groups, key=lambda k: _order(k, board)):
        rows = [_row(folder, path, r, t, corruption.get((_model(r), _data(r))), ambiguous) for path, r, t in groups[key]]
        _, first, threat = groups[key][0]
        exact = threat.audit.suite if threat is not None and threat.audit is not None else None
        rows = _rank(_worst(rows), bounds=exact is not None)
        swept = all(len(r.metrics.threats) > 1 for _, r, _ in groups[key])
        series = _canonical([*key[0], *key[1:4], key[5]]) if swept else None
        out.append(Section(_heading(first, threat), _facts(first, threat, key in _variants(groups)), rows, series, exact))
    return out


def sweeps(found: list[Section]) -> list[Sweep]:
    """The sections with a series, one table a series: models by mean accuracy, a column for each radius."""
    series: dict[str, list[Section]] = {}
    for section in found:
        if section.series is not None:
            series.setdefault(section.series, []).append(section)
    out = []
    for group in series.values():
        by_radius = [{row.model: row for row in section.rows} for section in group]
        first = group[0].rows[0]
        models = {row.model: row.clean for section in group for row in section.rows}
        rows = [SweepRow(name, clean, [rows.get(name) for rows in by_radius]) for name, clean in models.items()]
        rows.sort(key=lambda r: (-sum(c.robust or 0.0 for c in r.cells if c) / len(r.cells), r.model))
        heading = f"{first.data.split('/')[0]}, {first.norm}, {first.suite}" + (
            "" if first.precision == "fp32" else f", {first.precision}"
        )
        out.append(Sweep(heading, group[0].facts, [section.rows[0].radius for section in group], rows))
    return out


def rank_groups(rows: list[tuple[float, float]]) -> list[int]:
    """Group numbers, from 1, of intervals that are sorted from the best row to the worst."""
    ranks: list[int] = []
    lead = (0.0, 0.0)
    for low, high in rows:
        if not ranks or high < lead[0] or low > lead[1]:
            lead = (low, high)
            ranks.append(ranks[-1] + 1 if ranks else 1)
        else:
            ranks.append(ranks[-1])
    return ranks


def format_eps(eps: float, norm: str | None = None) -> str:
    """``8/255`` where eps is a multiple of 1/255 that no short decimal says as well; pixels for l0."""
    k = round(eps * 255)
    if norm == "l0" or round(eps, 3) == eps or k == 0 or abs(eps * 255 - k) > 1e-6:
        return f"{eps:.6g}"
    return f"{k}/255"


def render(board: Board, found: list[Section], curve: str | None = None) -> str:
    """The board as Markdown; ``curve`` is a figure that stands beside it."""
    from jinja2 import Environment, StrictUndefined

    env = Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=False, keep_trailing_newline=True)
    env.filters.update(
        cell=lambda v: "-" if v is None else re.sub(r"([|\\`*_<>\[\]])", r"\\\1", " ".join(str(v).split())),
        percent=lambda v: "-" if v is None else f"{100 * (v.robust if isinstance(v, Row) else v):.2f}",
        count=lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.3g}",
        points=lambda v: "?" if v is None else f"<= {v:.2f}",
        interval=lambda r: "-" if r is None or r.low is None else f"{100 * r.low:.2f} - {100 * r.high:.2f}",
    )
    ranked = [s for s in found if s.series is None]
    return env.from_string(TEMPLATE).render(board=board, ranked=ranked, sweeps=sweeps(found), curve=curve)


# ------------------------------------------------------------------------------------------------------------ private


def _records(folder: Path) -> list[tuple[Path, Record]]:
    found: list[tuple[Path, Record]] = []
    lines: list[str] = []
    for path in sorted((folder / ENTRIES).glob("*.json")):
        try:
            found.append((path, read_record(path)))
        except UserError as error:
            lines += error.lines
    if lines:
        raise UserError(*lines)
    return found


def _model(r: Record) -> tuple[str, str]:
    return r.model.label, r.model.hash


def _data(r: Record) -> tuple[str, str, int, str]:
    return r.data.name, r.data.split, r.data.n, r.data.fingerprint


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _ambiguous(records: Iterable[Record]) -> set[str]:
    """Labels that more than one model has."""
    hashes: dict[str, set[str]] = {}
    for r in records:
        hashes.setdefault(r.model.label, set()).add(r.model.hash)
    return {label for label, found in hashes.items() if len(found) > 1}


def _variants(groups: Iterable[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    """Keys that share a suite's name and all else with another key, but not its parameters."""
    seen: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for key in groups:
        seen.setdefault((key[0], key[1], *key[3:]), []).append(key)
    return {key for keys in seen.values() if len(keys) > 1 for key in keys}


def _order(key: tuple[Any, ...], board: Board) -> tuple[Any, ...]:
    data, suite, resolved, norm, eps, precision = key
    wanted = (
        suite is not None
        and precision == "fp32"
        and all(mine is None or mine == theirs for mine, theirs in ((board.suite, suite), (board.norm, norm)))
        and (board.eps is None or abs(board.eps - eps) < 1e-9)
    )
    return (suite is None, not wanted, precision != "fp32", suite or "", norm or "", eps or 0.0, data, resolved or "")


def _row(folder: Path, path: Path, r: Record, t: ThreatRow | None, corruption: float | None, ambiguous: set[str]) -> Row:
    cost = r.cost if t is None else t.cost
    label = f"{r.model.label} ({r.model.hash[:8]})" if r.model.label in ambiguous else r.model.label
    row = Row(
        model=label,
        trainer=r.model.trainer,
        fidelity=r.model.fidelity,
        clean=r.metrics.clean.accuracy,
        robust=None if t is None else t.robust_accuracy,
        low=None if t is None else t.interval[0],
        high=None if t is None else t.interval[1],
        n=r.data.n,
        norm=None if t is None else t.norm,
        eps=None if t is None else t.eps,
        corruption=corruption,
        forwards=cost.forwards_per_sample,
        backwards=cost.backwards_per_sample,
        seconds=cost.seconds / r.data.n,
        suite=r.suite.name,
        data=f"{r.data.name}/{r.data.split}",
        precision=r.precision,
        entry=path.relative_to(folder).as_posix(),
        config=r.provenance.config,
        radius="-" if t is None else format_eps(t.eps, t.norm),
        bound=t.audit.points if t is not None and t.audit is not None and t.bounded else None,
    )
    row.links = _links(folder, row)
    return row


def _links(folder: Path, row: Row) -> str:
    links = [f"[record]({row.entry})"]
    if row.config and (target := _locate(folder, row.config)):
        links.append(f"[config]({target})")
    elif row.config:
        links.append(f"`{row.config}`")
    ledger = Path(LEDGERS) / Path(row.entry).with_suffix(".jsonl").name
    if (folder / ledger).exists():
        links.append(f"[ledger]({ledger.as_posix()})")
    return " ".join(links)


def _locate(folder: Path, config: str) -> str | None:
    """A configuration's path as seen from the board, if a folder above the board holds it."""
    if Path(config).is_absolute():
        return None
    for above in [folder.resolve(), *folder.resolve().parents]:
        if (above / config).is_file():
            return Path(os.path.relpath(above / config, folder.resolve())).as_posix()
    return None


def _worst(rows: list[Row]) -> list[Row]:
    """One row per model: of several records the one with the lowest accuracy."""
    best: dict[str, Row] = {}
    count: dict[str, int] = {}
    for row in rows:
        count[row.model] = count.get(row.model, 0) + 1
        old = best.get(row.model)
        if old is None or _score(row) < _score(old):
            best[row.model] = row
    for model, row in best.items():
        row.runs = count[model]
    return list(best.values())


def _score(row: Row) -> tuple[float, float, str]:
    main = row.robust if row.robust is not None else row.corruption if row.corruption is not None else 0.0
    return main, row.clean, row.entry


def _rank(rows: list[Row], bounds: bool) -> list[Row]:
    """Sort and rank; of upper bounds only those that an audit limits, by intervals that reach down to the limit."""
    rows = sorted(rows, key=lambda r: (bounds and r.bound is None, -_score(r)[0], -r.clean, r.model, r.entry))
    able = [r for r in rows if r.bound is not None] if bounds else rows
    if all(r.low is not None for r in able):
        intervals = [((r.low or 0.0) - (r.bound or 0.0) / 100, r.high or 0.0) for r in able]
        for row, rank in zip(able, rank_groups(intervals), strict=True):
            row.rank = rank
    return rows


def _heading(r: Record, t: ThreatRow | None) -> str:
    if t is None:
        return f"{r.data.name}, no attack"
    return (
        f"{r.data.name}, {t.norm} {format_eps(t.eps, t.norm)}, {r.suite.name}"
        + ("" if r.precision == "fp32" else f", {r.precision}")
        + ("" if t.audit is None else ": upper bounds")
    )


def _facts(r: Record, t: ThreatRow | None, variant: bool) -> str:
    text = f"The first {r.data.n} {r.data.split} images (fingerprint `{r.data.fingerprint[:12]}`)."
    if r.precision != "fp32":
        text += f" The search ran in {r.precision}; these figures do not compare with full precision."
    if t is not None and t.audit is not None:
        text += (
            f" Upper bounds on the robust accuracy under {t.audit.suite}, beside which they do not rank; the audit says by how many"
            " points at most they are too high (95 %). A record without one has no rank: `robustlab evaluate --resume --audit N`."
        )
    if variant and t is not None:
        text += f" Suite parameters: `{_canonical(r.suite.resolved)}`."
    return text


def _csv(found: list[Section]) -> str:
    names = [f for f in Row.__dataclass_fields__ if f not in ("links", "radius")]
    names.insert(0, names.pop(names.index("rank")))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for section in found:
        for row in section.rows:
            writer.writerow(["" if (v := getattr(row, name)) is None else v for name in names])
    return text.getvalue()


def _fraction(value: Any, path: Path) -> float:
    try:
        top, _, bottom = str(value).partition("/")
        return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{path}: eps: expected a number such as 0.1 or 8/255, got {value!r}") from None
