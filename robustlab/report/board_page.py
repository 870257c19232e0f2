"""A leaderboard as one HTML page that needs no network: sort, filter, search, and clean against robust accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustlab.report.page import count, percent, picture, render

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 330, 44, 24, 34, 44


@dataclass(frozen=True)
class Column:
    """A column: the key of a row that it shows and sorts by, how, and the key that its tooltip comes from."""

    title: str
    key: str
    show: Any = None
    number: bool = True
    always: bool = False


COLUMNS = (
    Column("rank", "rank", always=True),
    Column("model", "model", number=False, always=True),
    Column("clean %", "clean", percent, always=True),
    Column("robust %", "robust", percent, always=True),
    Column("best known %", "best_known", percent),
    Column("unreliable", "unreliable", number=False),
    Column("extra data", "extra_data", number=False),
    Column("architecture", "architecture", number=False),
    Column("venue", "venue", number=False),
    Column("95 % interval", "low", always=True),
    Column("n", "n", always=True),
    Column("eps", "eps", always=True),
    Column("corruptions %", "corruption", percent),
    Column("worst %", "worst", percent),
    Column("worst case", "worst_where", number=False),
    Column("ECE %", "ece", percent),
    Column("mCE %", "mce", number=False),
    Column("relative mCE %", "relative_mce", number=False),
    Column("attacked %", "corruption_robust", percent),
    Column("images", "source", number=False),
    Column("trainer", "trainer", number=False),
    Column("fidelity", "fidelity", number=False),
    Column("forwards", "forwards", count),
    Column("backwards", "backwards", count),
    Column("seconds", "seconds", count),
    Column("provenance", "provenance", number=False, always=True),
    Column("checkpoint", "checkpoint", number=False),
)


def board_page(board: Mapping[str, Any], sections: Sequence[Mapping[str, Any]], sweeps: Sequence[Any], curve: Path | None) -> str:
    """The page.

    Args:
        board: ``title`` and ``note``.
        sections: ``heading``, ``facts``, perhaps ``figure`` (the path of a PNG) and ``rows``, each row with the keys of
            ``results.leaderboard.Row`` and ``links``, pairs of text and address.
        sweeps: tables over several radii, as ``results.leaderboard.sweeps`` gives them.
        curve: a PNG that goes into the page, or None.
    """
    shown = [_section(i, s) for i, s in enumerate(sections)]
    rows = [row for s in sections for row in s["rows"]]
    return render(
        "board.html.j2",
        title=board["title"],
        board=board,
        sections=shown,
        sweeps=sweeps,
        curve=None if curve is None else picture(curve.read_bytes()),
        provenances=sorted({row["provenance"] for row in rows}),
        ranks=sorted({row["rank"] for row in rows if row["rank"] is not None}),
    )


def _section(number: int, section: Mapping[str, Any]) -> dict[str, Any]:
    rows = section["rows"]
    needless = ("robust", "eps") if any(row.get("source") for row in rows) else ()
    columns = [c for c in COLUMNS if (c.always and c.key not in needless) or any(row.get(c.key) not in (None, "-") for row in rows)]
    out, last = [], None
    for i, row in enumerate(rows):
        words = (row["model"], row["trainer"], row["architecture"], row["venue"], row["fidelity"], row["suite"], row["data"])
        out.append(
            {
                "key": f"{number}-{i}",
                "provenance": row["provenance"],
                "rank": "" if row["rank"] is None else row["rank"],
                "leads": row["rank"] != last,
                "text": " ".join(str(w) for w in words if w).lower(),
                "cells": [*(_cell(c, row) for c in columns), _links(row)],
            }
        )
        last = row["rank"]
    titles = [{"title": c.title, "number": c.number, "sortable": True} for c in columns]
    return {
        "heading": section["heading"],
        "facts": section["facts"],
        "columns": [*titles, {"title": "links", "number": False, "sortable": False}],
        "rows": out,
        "plot": _plot(number, rows),
        "figure": None if section.get("figure") is None else picture(section["figure"].read_bytes()),
    }


def _cell(column: Column, row: Mapping[str, Any]) -> dict[str, Any]:
    value, title = row.get(column.key), None
    if column.key == "low":
        text = "-" if value is None else f"{percent(value)} - {percent(row['high'])}"
    elif column.key == "eps":
        text, title = row["radius"], None if value is None else f"{value:.6g}"
    elif column.key == "checkpoint":
        text, title = ("-", None) if value is None else (value[:8], f"SHA-256 {value}")
    elif isinstance(value, bool):
        text = "yes" if value else "no"
        title = "a check of the reliability report failed" if column.key == "unreliable" and value else None
    else:
        text = column.show(value) if column.show else "-" if value is None else str(value)
    return {
        "text": text,
        "value": "" if value is None else value,
        "number": column.number,
        "name": column.key == "model",
        "title": title,
        "links": None,
    }


def _links(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "text": "",
        "value": "",
        "number": False,
        "name": False,
        "title": None,
        "links": [{"text": t, "href": h} for t, h in row["links"]],
    }


def _plot(number: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Positions of the scatter; None where fewer than two rows have both accuracies."""
    points = [(i, row) for i, row in enumerate(rows) if row["robust"] is not None]
    if len(points) < 2:
        return None
    x0, x1 = _range([row["clean"] for _, row in points])
    y0, y1 = _range([v for _, row in points for v in (row["robust"], row["low"], row["high"]) if v is not None])
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(v: float) -> float:
        return round(LEFT + (v - x0) / (x1 - x0) * (right - LEFT), 1)

    def up(v: float) -> float:
        return round(bottom - (v - y0) / (y1 - y0) * (bottom - TOP), 1)

    placed: list[tuple[float, float]] = []
    marks = []
    for i, row in points:
        x, y = across(row["clean"]), up(row["robust"])
        text_y = y + 4
        while any(abs(text_y - b) < 12 and abs(x - a) < 110 for a, b in placed):
            text_y += 12
        near = text_y - y <= 28  # a name farther down would stand at other points; a crowd keeps its tooltips
        if near:
            placed.append((x, text_y))
        left = x > WIDTH * 0.75
        known = row["low"] is not None
        interval = f" [{percent(row['low'])}, {percent(row['high'])}]" if known else ""
        marks.append(
            {
                "key": f"{number}-{i}",
                "x": x,
                "y": y,
                "low": up(row["low"]) if known else None,
                "high": up(row["high"]) if known else None,
                "text_y": round(text_y, 1),
                "shift": -9 if left else 9,
                "anchor": "end" if left else "start",
                "measured": row["provenance"] == "ours",
                "name": row["model"] if near else "",
                "title": f"{row['model']}: clean {percent(row['clean'])}, robust {percent(row['robust'])}{interval}",
            }
        )
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": right,
        "top": TOP,
        "bottom": bottom,
        "x_ticks": [{"at": across(v), "text": f"{100 * v:g}"} for v in _ticks(x0, x1)],
        "y_ticks": [{"at": up(v), "text": f"{100 * v:g}"} for v in _ticks(y0, y1)],
        "points": marks,
    }


def _step(low: float, high: float) -> float:
    return next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 1.0) if (high - low) / s <= 8)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """A range of round numbers around the values, inside [0, 1]."""
    low, high = min(values), max(values)
    pad = max((high - low) * 0.08, 0.01)
    low, high = max(low - pad, 0.0), min(high + pad, 1.0)
    step = _step(low, high)
    return round(math.floor(low / step + 1e-9) * step, 6), round(min(math.ceil(high / step - 1e-9) * step, 1.0), 6)


def _ticks(low: float, high: float) -> list[float]:
    step = _step(low, high)
    return [round(low + i * step, 6) for i in range(round((high - low) / step) + 1)]
