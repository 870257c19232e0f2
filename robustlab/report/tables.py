"""Leaderboard rows for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def leaderboard_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A rich table of one section.

    Args:
        title: the section's heading.
        rows: with the keys of ``results.leaderboard.Row`` (``dataclasses.asdict`` of each), in order.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("model", overflow="fold", min_width=8)
    table.add_column("fidelity", overflow="fold")
    for name in ("clean %", "robust %", "95 % interval", "corr. %", "fwd+bwd", "s/image"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in rows:
        if last is not None and row["rank"] != last:
            table.add_section()
        last = row["rank"]
        interval = "-" if row["low"] is None else f"{100 * row['low']:.1f} - {100 * row['high']:.1f}"
        table.add_row(
            str(row["rank"] or "-"),
            _plain(row["model"]),
            _plain(row["fidelity"] or "-"),
            _percent(row["clean"]),
            _percent(row["robust"]),
            interval,
            _percent(row["corruption"]),
            f"{row['forwards'] + row['backwards']:,.0f}",
            f"{row['seconds']:.3g}",
        )
    return table


def _plain(text: str) -> Any:
    """Text in which brackets are brackets, not markup."""
    from rich.text import Text

    return Text(text)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
