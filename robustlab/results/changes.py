"""What a new entry, or a new version of a board, changes: rows that come, go, move, or say something else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robustlab.results.leaderboard import Row, entry_name, sections
from robustlab.results.record import read_record


@dataclass(frozen=True)
class Change:
    """One row of one section.

    Attributes:
        section: its heading.
        model: the row.
        before, after: the row then and now; None where it was not, or is no more, there.
        place_before, place_after: its position in the table, from 1.
    """

    section: str
    model: str
    before: Row | None
    after: Row | None
    place_before: int | None
    place_after: int | None

    def __str__(self) -> str:
        if self.before is None and self.after is not None:
            return f"new: {_describe(self.after, self.place_after)}"
        if self.after is None and self.before is not None:
            return f"gone: {_describe(self.before, self.place_before)}"
        assert self.before is not None
        assert self.after is not None
        parts = [f"{what} {a} -> {b}" for what, a, b in _figures(self.before, self.after) if a != b]
        if self.place_before != self.place_after:
            parts.append(f"place {self.place_before} -> {self.place_after}")
        return f"{self.model}: {', '.join(parts)}"


def changes(old: str | Path, new: str | Path) -> list[Change]:
    """What differs between two boards, or between a board and the board with one record more.

    Args:
        old: a board.
        new: a board, or a record.

    Raises:
        UserError: no such folder, a bad record.
    """
    before = sections(old)
    if Path(new).is_dir():
        after = sections(new)
    else:
        record = read_record(new)
        path = Path(old) / "entries" / f"{entry_name(record)}.json"
        after = sections(old, extra={path: record})
    tables = [{s.heading: s for s in side} for side in (before, after)]
    found = []
    for heading in dict.fromkeys(s.heading for s in [*after, *before]):
        rows = [{r.model: (i, r) for i, r in enumerate(t[heading].rows, 1)} if heading in t else {} for t in tables]
        for model in dict.fromkeys([*rows[1], *rows[0]]):
            (i, a), (j, b) = (side.get(model, (None, None)) for side in rows)
            if a is None or b is None or i != j or any(x != y for _, x, y in _figures(a, b)):
                found.append(Change(heading, model, a, b, i, j))
    return found


def _describe(row: Row, place: int | None) -> str:
    rank = f"rank {row.rank}, place {place}" if row.rank else f"place {place}, unranked"
    return f"{row.model}: {_percent(row.robust)} robust, {_percent(row.clean)} clean, {rank}"


def _figures(a: Row, b: Row) -> list[tuple[str, str, str]]:
    return [
        ("rank", str(a.rank or "-"), str(b.rank or "-")),
        ("robust", _percent(a.robust), _percent(b.robust)),
        ("clean", _percent(a.clean), _percent(b.clean)),
        ("worst", _percent(a.worst), _percent(b.worst)),
        ("corruptions", _percent(a.corruption), _percent(b.corruption)),
        ("n", str(a.n), str(b.n)),
        ("provenance", a.provenance, b.provenance),
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
