"""Leaderboard rows for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def leaderboard_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A rich table of one section, 80 columns wide for names of up to 15 letters; a line separates the ranks.

    Args:
        title: the section's heading.
        rows: one per model, with the keys of ``results.leaderboard.Row`` (``dataclasses.asdict`` of each), in order.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("model", overflow="fold", min_width=8)
    table.add_column("fidelity", no_wrap=True)
    scored = any(row.get("source") for row in rows)
    names = ("clean %", "corr. %   95 %", "worst %", "ECE %") if scored else ("clean %", "robust %   95 %", "corr. %", "passes")
    for name in (*names, "s/image"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in rows:
        if last is not None and row["rank"] != last:
            table.add_section()
        last = row["rank"]
        interval = "" if row["low"] is None else f"  {100 * row['low']:4.1f}-{100 * row['high']:.1f}"
        table.add_row(
            str(row["rank"] or "-"),
            Text(row["model"]),  # brackets are brackets here, not markup
            (row["fidelity"] or "-").removesuffix("-verified"),
            _percent(row["clean"]),
            *(
                (_percent(row["corruption"]) + interval, _percent(row["worst"]), _percent(row["ece"]))
                if scored
                else (_percent(row["robust"]) + interval, _percent(row["corruption"]), _passes(row))
            ),
            "-" if row["seconds"] is None else f"{row['seconds']:.3g}",
        )
    return table


def _passes(row: Mapping[str, Any]) -> str:
    return "-" if row["forwards"] is None else f"{row['forwards'] + row['backwards']:,.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
