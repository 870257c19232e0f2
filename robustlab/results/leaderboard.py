"""A leaderboard is a folder of records: ``entries/*.json``, and beside them the tables made from nothing else.

    board.yaml    title, suite (the one that ranks), norm, eps, note; all optional
    entries/      one record per model, suite and threat model; or a claim: a row that was not measured by robustlab
    ledgers/      the per-sample verdicts behind a record, under the record's name, where they were kept
    index.md      the tables; index.csv: every row of them

Only like is ranked with like: a section holds the records of one suite (every parameter of it), threat model, data set, split,
number of images and precision. A suite that stands in for another gives upper bounds: they rank by what the audit leaves of them,
and not at all without one. Within a section, rows are sorted by robust accuracy and grouped: a group starts with the best row
that is left and takes every following row whose interval overlaps that of the group's first. The data do not tell the rows of
one group apart. Corruption suites have sections of their own, ranked by the mean accuracy; images made here and published
files are different suites, so they never share one. Claims stand at the end of the section of their data set, norm and radius,
without a rank.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from robustlab.files import atomic_write, exclusive, sha256, write_json
from robustlab.results.claim import Claim, claim_from_card, norm_of_path, read_card, read_claim
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

|{% for c in s | columns %} {{ c.title }} |{% endfor %}

|{% for c in s | columns %}{{ c.rule }}|{% endfor %}

{% for r in s.rows -%}
|{% for c in s | columns %} {{ c.show(r) }} |{% endfor %}

{% endfor %}
{% if s.figure in figures %}

![accuracy under each corruption]({{ s.figure }})
{% endif %}
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
fractions of all n images. Forwards, backwards and seconds are what the suite's attacks spent per image.{% if scored %}
 Corruptions %
is the mean over corruptions of the mean over severities; its interval is that of the mean over images. Generated images were made
here, they are not the published files.{% endif %}{% if claims %}
 Rows that are claimed
(by the model's authors) or external (measured by others) were not measured here and have no rank.{% endif %}

"""


@dataclass
class Row:
    """One model in one section; accuracies are fractions, costs per image.

    In the section of a corruption suite ``low`` and ``high`` are those of ``corruption``, and ``source`` says which images.
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
    n: int | None
    norm: str | None
    eps: float | None
    corruption: float | None
    forwards: float | None
    backwards: float | None
    seconds: float | None
    suite: str
    data: str
    precision: str
    entry: str
    config: str | None
    radius: str = "-"
    runs: int = 1
    rank: int | None = None
    bound: float | None = None
    best_known: float | None = None
    unreliable: bool | None = None
    extra_data: bool | None = None
    architecture: str | None = None
    venue: str | None = None
    provenance: str = "ours"
    model_hash: str | None = None
    checkpoint: str | None = None
    source: str | None = None
    worst: float | None = None
    worst_where: str | None = None
    ece: float | None = None
    mce: str | None = None
    relative_mce: str | None = None
    corruption_robust: float | None = None
    links: str = field(default="", repr=False)


@dataclass
class Section:
    """Rows that rank together.

    ``series`` names what sections of a suite with several radii have in common, ``exact`` the suite that this one stands in for;
    ``figure`` is a corruption suite's.
    """

    heading: str
    facts: str
    rows: list[Row]
    series: str | None = None
    exact: str | None = None
    figure: str | None = None


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
    written = tables(folder)
    for name, text in written.items():
        atomic_write(folder / name, text)
    markdown, table = (folder / name for name in written)
    return markdown, table


def tables(folder: Path) -> dict[str, str]:
    """File name to content of what :func:`build` writes.

    Raises:
        UserError: as :func:`build`.
    """
    board, found = read_board(folder), sections(folder)
    curve = "curve.png" if (folder / "curve.png").exists() else None
    figures = [s.figure for s in found if s.figure and (folder / s.figure).exists()]
    return {"index.md": render(board, found, curve, figures), "index.csv": _csv(found)}


def add(
    board_dir: str | Path,
    record_path: str | Path,
    ledger: str | Path | None = None,
    *,
    kind: Literal["ours", "claimed", "external"] = "ours",
    link: str | None = None,
    norm: str | None = None,
) -> Path:
    """Copy a record into a board, with its ledger if that lies beside it (``ledger.jsonl``) or is named.

    Args:
        board_dir, record_path: the board; the record, or (claimed or external) one of RobustBench's ``model_info`` files.
        ledger: of the record, where it does not lie beside it.
        kind, link: for what was not measured here: who says so, and where. A RobustBench file names its own link.
        norm: of a RobustBench file that does not lie in a folder ``Linf``, ``L2`` or ``corruptions``.

    Returns:
        The entry's path. Adding the same record again changes nothing.

    Raises:
        UserError: a bad record; a ledger that is not the record's; an entry of this model, suite and threat model that differs.
    """
    folder = Path(board_dir)
    if kind != "ours" and "schema_version" not in peek(record_path):
        card = read_card(record_path)
        claim = claim_from_card(card, kind, link, norm or norm_of_path(record_path))
        return _put(folder, _file_name([claim.label, kind, claim.data, claim.norm or "corruptions"]), claim.model_dump(mode="json"))
    record = read_record(record_path)
    name = entry_name(record)
    if kind != "ours":
        if link is None:
            raise UserError(f"{record_path}: {kind} by whom? give the link to the source")
        theirs = record.model_copy(update={"provenance": record.provenance.model_copy(update={"kind": kind, "link": link})})
        return _put(folder, name, theirs.model_dump(mode="json"))
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
    parts += ["official"] if record.metrics.corruption_scores and record.metrics.corruption_scores.source != "generated" else []
    parts += [f"seed{record.seed}"] if record.seed else []
    parts += [record.precision] if record.precision != "fp32" else []
    return _file_name(parts)


def _file_name(parts: Iterable[str]) -> str:
    return "--".join(re.sub(r"[^A-Za-z0-9._+-]+", "-", p).strip("-.") or "x" for p in parts)


def _put(folder: Path, name: str, value: dict[str, Any]) -> Path:
    """Write an entry, unless another one of this name is there."""
    target = folder / ENTRIES / f"{name}.json"
    with exclusive(folder):
        if target.exists() and peek(target) != value:
            raise UserError(f"{target}: holds another result for this model, suite and threat model; remove it to replace it")
        write_json(target, value)
    return target


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


def sections(board_dir: str | Path, extra: Mapping[Path, Record] | None = None) -> list[Section]:
    """The tables of a board: that of the board's own suite and threat model first, models without an attack result last.

    Args:
        board_dir: the board.
        extra: records that are not in it, or replace one, by the path that they would have.

    Raises:
        UserError: as :func:`build`.
    """
    folder = Path(board_dir)
    board, known = read_board(folder), entries(folder)
    records = sorted(({path: r for path, r in known if isinstance(r, Record)} | dict(extra or {})).items())
    groups: dict[tuple[Any, ...], list[tuple[Path, Record, ThreatRow | None]]] = {}
    ranked: set[tuple[Any, ...]] = set()
    for path, r in records:
        for t in r.metrics.threats:
            ranked.add((_model(r), _data(r)))
            groups.setdefault((_data(r), r.suite.name, _canonical(r.suite.resolved), t.norm, t.eps, r.precision), []).append(
                (path, r, t)
            )
    for path, r in records:
        if r.metrics.corruption_scores is not None:
            key = (_data(r), r.suite.name, _canonical([r.suite.resolved, r.seed]), None, None, r.precision)
            groups.setdefault(key, []).append((path, r, None))
        elif not r.metrics.threats and (_model(r), _data(r)) not in ranked:
            groups.setdefault((_data(r), None, None, None, None, None), []).append((path, r, None))
    ambiguous = _ambiguous(r for _, r in records)
    corruption = _corruption_column([r for _, r in records])
    out = []
    for key in sorted(groups, key=lambda k: _order(k, board)):
        rows = [_row(folder, path, r, t, corruption.get((_model(r), _data(r))), ambiguous) for path, r, t in groups[key]]
        _, first, threat = groups[key][0]
        exact = threat.audit.suite if threat is not None and threat.audit is not None else None
        rows = _rank(_worst(rows), bounds=exact is not None)
        swept = all(len(r.metrics.threats) > 1 for _, r, _ in groups[key])
        series = _canonical([*key[0], *key[1:4], key[5]]) if swept else None
        facts = _facts(first, threat, key in _variants(groups)) + _near(key, groups)
        figure = _figure(_heading(first, threat), out) if rows[0].source else None
        out.append(Section(_heading(first, threat), facts, rows, series, exact, figure))
    return _with_claims(out, [(path.relative_to(folder).as_posix(), c) for path, c in known if isinstance(c, Claim)])


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


def render(board: Board, found: list[Section], curve: str | None = None, figures: Sequence[str] = ()) -> str:
    """The board as Markdown; ``curve`` and the sections' ``figures`` stand beside it."""
    from jinja2 import Environment, StrictUndefined

    env = Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=False, keep_trailing_newline=True)
    env.filters.update(
        cell=_cell,
        percent=lambda v: "-" if v is None else f"{100 * (v.robust if isinstance(v, Row) else v):.2f}",
        interval=_interval,
        columns=columns_of,
    )
    ranked = [s for s in found if s.series is None]
    claims = any(r.provenance != "ours" for s in ranked for r in s.rows)
    known = {"curve": curve, "claims": claims, "figures": figures, "scored": any(r.source for s in ranked for r in s.rows)}
    return env.from_string(TEMPLATE).render(board=board, ranked=ranked, sweeps=sweeps(found), **known)


@dataclass(frozen=True)
class Column:
    """One column of a section's table: its title, the Markdown rule under it, and what it shows of a row."""

    title: str
    rule: str
    show: Callable[[Row], str]
    always: bool = False


def _cell(value: Any) -> str:
    return "-" if value is None else re.sub(r"([|\\`*_<>\[\]])", r"\\\1", " ".join(str(value).split()))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _interval(row: Row | None) -> str:
    return "-" if row is None or row.low is None or row.high is None else f"{100 * row.low:.2f} - {100 * row.high:.2f}"


def _yes(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "no"


# RobustBench's columns in its order, then what it does not show.
COLUMNS = (
    Column("rank", "---:", lambda r: str(r.rank or "-"), True),
    Column("model", "---", lambda r: _cell(r.model), True),
    Column("clean %", "---:", lambda r: _percent(r.clean), True),
    Column("robust %", "---:", lambda r: _percent(r.robust), True),
    Column("too high by %", "---:", lambda r: "-" if r.bound is None else f"at most {r.bound:.2f}"),
    Column("best known %", "---:", lambda r: _percent(r.best_known)),
    Column("unreliable", "---", lambda r: _yes(r.unreliable)),
    Column("extra data", "---", lambda r: _yes(r.extra_data)),
    Column("architecture", "---", lambda r: _cell(r.architecture)),
    Column("venue", "---", lambda r: _cell(r.venue)),
    Column("95 % interval", ":---:", _interval, True),
    Column("n", "---:", lambda r: "-" if r.n is None else str(r.n), True),
    Column("eps", "---:", lambda r: r.radius, True),
    Column("corruptions %", "---:", lambda r: _percent(r.corruption)),
    Column("worst %", "---:", lambda r: "-" if r.worst is None else f"{_percent(r.worst)} ({r.worst_where})"),
    Column("ECE %", "---:", lambda r: _percent(r.ece)),
    Column("mCE %", "---:", lambda r: r.mce or "-"),
    Column("relative mCE %", "---:", lambda r: r.relative_mce or "-"),
    Column("attacked %", "---:", lambda r: _percent(r.corruption_robust)),
    Column("images", "---", lambda r: r.source or "-"),
    Column("trainer", "---", lambda r: _cell(r.trainer)),
    Column("fidelity", "---", lambda r: _cell(r.fidelity)),
    Column("forwards", "---:", lambda r: _count(r.forwards)),
    Column("backwards", "---:", lambda r: _count(r.backwards)),
    Column("seconds", "---:", lambda r: _count(r.seconds)),
    Column("provenance", "---", lambda r: r.provenance, True),
    Column("links", "---", lambda r: r.links, True),
)


OF_CORRUPTIONS = ("source", "worst", "worst_where", "ece", "mce", "relative_mce", "corruption_robust")  # fields
OF_ATTACKS = ("robust %", "eps")  # columns that the section of a corruption suite needs no place for


def columns_of(section: Section) -> list[Column]:
    """The columns in which a row of the section has something to show."""
    needless = OF_ATTACKS if any(r.source for r in section.rows) else ()
    return [c for c in COLUMNS if (c.always and c.title not in needless) or any(c.show(r) != "-" for r in section.rows)]


def entries(folder: Path) -> list[tuple[Path, Record | Claim]]:
    """The records and claims of a board, by file name.

    Raises:
        UserError: one line for each that is none.
    """
    found: list[tuple[Path, Record | Claim]] = []
    lines: list[str] = []
    for path in sorted((folder / ENTRIES).glob("*.json")):
        try:
            claim = "claim_version" in peek(path)
            found.append((path, read_claim(path) if claim else read_record(path)))
        except UserError as error:
            lines += error.lines
    if lines:
        raise UserError(*lines)
    return found


# ------------------------------------------------------------------------------------------------------------ private


def _with_claims(found: list[Section], claims: list[tuple[str, Claim]]) -> list[Section]:
    """Each claim at the end of the first section of its data set, norm and radius; the others in sections of their own."""
    rest: dict[str, Section] = {}
    for entry, c in claims:
        row = _claim_row(entry, c)

        def fits(section: Section, row: Row = row, data: str = c.data) -> bool:
            first = section.rows[0]
            return (
                section.series is None
                and section.exact is None
                and (first.data.split("/")[0], first.norm, first.eps) == (data, row.norm, row.eps)
            )

        place = next((s for s in found if fits(s)), None)
        if place is None:
            heading = f"{c.data}, {c.norm} {row.radius}" if c.norm else f"{c.data}, corruptions"
            place = rest.setdefault(heading, Section(f"{heading}, not measured here", "Claimed and external figures.", []))
        place.rows.append(row)
    for section in [*found, *rest.values()]:
        measured = [r for r in section.rows if r.venue is None or r.provenance == "ours"]
        told = [r for r in section.rows if r not in measured]
        section.rows = [*measured, *sorted(told, key=lambda r: (-_score(r)[0], -r.clean, r.model))]
    return [*found, *rest.values()]


def _claim_row(entry: str, c: Claim) -> Row:
    card = c.card or {}
    return Row(
        model=c.label,
        trainer=None,
        fidelity=None,
        clean=c.clean,
        robust=c.robust,
        low=None,
        high=None,
        n=c.n,
        norm=c.norm,
        eps=c.eps,
        corruption=c.corruption,
        forwards=None,
        backwards=None,
        seconds=None,
        suite="-",
        data=c.data,
        precision="-",
        entry=entry,
        config=None,
        radius="-" if c.eps is None else format_eps(c.eps, c.norm),
        best_known=c.best_known,
        unreliable=c.unreliable,
        extra_data=card.get("additional_data"),
        architecture=card.get("architecture"),
        venue=card.get("venue") or "-",
        provenance=c.kind,
        links=f"[entry]({entry}) [source]({c.link})",
    )


def _near(key: tuple[Any, ...], groups: Iterable[tuple[Any, ...]]) -> str:
    """A note where another section has nearly the same radius: 0.031 is not 8/255."""
    data, suite, resolved, norm, eps, precision = key
    close = sorted(
        {
            k[4]
            for k in groups
            if (k[0], k[1], k[2], k[3], k[5]) == (data, suite, resolved, norm, precision)
            and k[4]
            and eps
            and 0 < abs(k[4] / eps - 1) < 0.05
        }
    )
    if not close:
        return ""
    others = ", ".join(format_eps(e, norm) for e in close)
    return f" {format_eps(eps, norm)} ({eps:.6g}) is not {others}: the radii differ, so these models rank apart."


def peek(path: str | Path) -> Any:
    """The JSON of a file, or an empty object: for telling what kind of entry it is."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


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
        and (board.eps is None or (eps is not None and abs(board.eps - eps) < 1e-9))
    )
    return (
        suite is None,
        not wanted,
        norm is None,
        precision != "fp32",
        suite or "",
        norm or "",
        eps or 0.0,
        data,
        resolved or "",
    )


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
        unreliable=None if r.reliability is None or r.reliability.verdict is None else r.reliability.verdict == "fail",
        architecture=r.model.architecture,
        provenance=r.provenance.kind,
        model_hash=r.model.hash,
        checkpoint=r.model.checkpoint,
    )
    if (s := r.metrics.corruption_scores) is not None and t is None:
        row.corruption, row.source, (row.low, row.high) = s.mean, s.source, s.interval
        row.worst, row.worst_where = s.worst.accuracy, f"{s.worst.corruption} {s.worst.severity}"
        row.ece = None if s.ece is None else s.ece.mean
        row.mce, row.relative_mce = (_by_baseline(m) for m in (s.mce, s.relative_mce))
        row.corruption_robust = None if s.robust is None else s.robust.mean
    row.links = _links(folder, row) + (f" [source]({r.provenance.link})" if r.provenance.link else "")
    return row


def _by_baseline(values: Mapping[str, float]) -> str | None:
    return ", ".join(f"{100 * v:.2f} ({name})" for name, v in values.items()) or None


def _corruption_column(records: Iterable[Record]) -> dict[Any, float]:
    """The mean accuracy under corruptions of each model, for the tables of attacks; nothing if the records mix suites or images."""
    found = [r for r in records if r.metrics.corruption_accuracy is not None]
    if len({_canonical([r.suite.model_dump(), r.seed]) for r in found}) > 1:
        return {}
    return {(_model(r), _data(r)): r.metrics.corruption_accuracy or 0.0 for r in found}


def _figure(heading: str, before: Iterable[Section]) -> str:
    """The file name of a section's figure."""
    stem, taken = "corruptions-" + re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-"), {s.figure for s in before}
    return next(name for k in range(1, len(taken) + 2) if (name := f"{stem}{'' if k == 1 else f'-{k}'}.png") not in taken)


def _links(folder: Path, row: Row) -> str:
    links = [f"[record]({row.entry})"]
    if row.config and (path := find_above(folder, row.config)):
        links.append(f"[config]({Path(os.path.relpath(path, folder.resolve())).as_posix()})")
    elif row.config:
        links.append(f"`{row.config}`")
    ledger = Path(LEDGERS) / Path(row.entry).with_suffix(".jsonl").name
    if (folder / ledger).exists():
        links.append(f"[ledger]({ledger.as_posix()})")
    return " ".join(links)


def link_pairs(links: str) -> list[tuple[str, str]]:
    """The text and address of each Markdown link of a row."""
    return re.findall(r"\[([^\]]+)\]\(([^)]+)\)", links)


def find_above(folder: Path, name: str) -> Path | None:
    """The file of a relative name, in the first folder above the board (or the board itself) that holds it."""
    if Path(name).is_absolute():
        return None
    return next((above / name for above in (folder.resolve(), *folder.resolve().parents) if (above / name).is_file()), None)


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
    able = [r for r in rows if r.provenance == "ours" and not (bounds and r.bound is None)]
    if all(r.low is not None for r in able):
        intervals = [((r.low or 0.0) - (r.bound or 0.0) / 100, r.high or 0.0) for r in able]
        for row, rank in zip(able, rank_groups(intervals), strict=True):
            row.rank = rank
    return rows


def _heading(r: Record, t: ThreatRow | None) -> str:
    if t is None and (s := r.metrics.corruption_scores) is not None:
        return f"{r.data.name}, {r.suite.name}, {s.source}"
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
    if t is None and r.metrics.corruption_scores is not None:
        text += _corruption_facts(r)
    if t is not None and t.audit is not None:
        text += (
            f" Upper bounds on the robust accuracy under {t.audit.suite}, beside which they do not rank; the audit says by how many"
            " points at most they are too high (95 %). A record without one has no rank: `robustlab evaluate --resume --audit N`."
        )
    if variant and t is not None:
        text += f" Suite parameters: `{_canonical(r.suite.resolved)}`."
    return text


def _corruption_facts(r: Record) -> str:
    """Which corrupted images these are."""
    rows, suite = r.metrics.corruptions, r.suite.resolved
    severities = ", ".join(str(s) for s in suite.get("severities", ()))
    text = f" {len(rows)} corruptions at severities {severities};"
    if suite.get("files"):
        return f"{text} published files (`{suite['files'][:12]}`)."
    size = suite.get("size")
    how = f", at {size} px: every pixel is repeated, the corrupted image averaged back" if size else ""
    return f"{text} images generated here, seed {r.seed}{how}."


def _csv(found: list[Section]) -> str:
    names = [f for f in Row.__dataclass_fields__ if f not in ("links", "radius", "model_hash", "checkpoint")]
    if not any(row.source for section in found for row in section.rows):
        names = [name for name in names if name not in OF_CORRUPTIONS]
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
