"""The table of ``robustlab compare``: cells, markdown and CSV from what ``comparing.table`` found."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from robustlab.results.leaderboard import format_eps

Found = Mapping[str, Any]


def columns(found: Found) -> list[str]:
    """The titles of the table's columns."""
    figures = ["clean %", f"{found['pgd']} %", f"{found['suite']} %", "95 %", "to the first", "p"]
    return ["method", "fidelity", *figures, "passes", "in all", "seconds", "best - last"]


def cells(found: Found) -> list[list[str]]:
    """The rows of the table, as strings."""
    out = []
    for row in found["rows"]:
        passes, pair = row["passes"], row["runs"][0]["paired"]
        each = f"{passes['forwards']:.4g} + {passes['backwards']:.4g}" + (
            f", x{passes['replays']}" if passes["replays"] > 1 else ""
        )
        robust, between = row["robust"], "-"
        if robust is not None:
            between = " - ".join(f"{100 * v:.1f}" for v in robust["interval"]) if robust["interval"] else "-"
        out.append(
            [
                row["label"],
                row["fidelity"],
                _figure(row["clean"], 100),
                _figure(row["pgd"], 100),
                _figure(robust, 100, spread=False),
                between,
                _figure(row["difference"], 100, sign="+"),
                "-" if pair is None else f"{pair['p']:.2g}",
                each,
                f"{passes['total']:,.0f}",
                _figure(row["seconds"], 1, spread=False),
                _figure(row["gap"], 1),
            ]
        )
    return out


def _figure(value: Mapping[str, Any] | None, scale: float, *, sign: str = "", spread: bool = True) -> str:
    """A mean, and half its interval where it is one over seeds."""
    if value is None:
        return "-"
    text = f"{scale * value['mean']:{sign}.1f}"
    if spread and value["of"] > 1:
        text += f" ± {scale * (value['interval'][1] - value['mean']):.1f}"
    return text


def heading(found: Found) -> str:
    """What was compared, in one line."""
    norm, eps, seeds = found["threat"]["norm"], found["threat"]["eps"], found["seeds"]
    where = f"{', '.join(found['models'])} on {found['data']}, {norm} {format_eps(eps, norm)}"
    return f"{where}; {found['n'] or 'no'} test images, {seeds} seed{'s' if seeds > 1 else ''}"


def notes(found: Found) -> list[str]:
    """How to read the table, and what happened in its runs."""
    first, seeds = found["rows"][0]["label"], found["seeds"]
    over = "Student's t over the seeds" if seeds > 1 else "Wilson's, over the test images"
    lines = [
        f"Intervals: 95 %, {over}. To the first: points of {found['suite']} above {first}; p: McNemar's exact test of the two on "
        f"the same test images{', first seed' if seeds > 1 else ''}.",
        "Passes: forwards + backwards per image and step, counted; in all: over the whole training. Seconds: of training. "
        "Best - last: robust overfitting, points of the probe on validation images.",
    ]
    if found["bound"]:
        lines.append(f"{found['suite']} stands in for an exact suite: its accuracies are upper bounds.")
    if found["done"] < found["planned"]:
        lines.append(f"Not finished: {found['done']} of {found['planned']} runs.")
    for row in found["rows"]:
        for run in row["runs"]:
            who = f"{row['label']}, seed {run['seed']}"
            lines += [f"{who}: {what}: {run[key]}" for key, what in _EVENTS.items() if run[key]]
            if run["robust"] is None:
                lines.append(f"{who}: has no checkpoint")
            if run["reliability"] not in (None, "pass"):
                lines.append(f"{who}: reliability of {found['suite']}: {run['reliability']}; `robustlab evaluate` says why")
    return lines


_EVENTS = {"stopped": "stopped", "rolled_back": "rolled back"}


def markdown(found: Found) -> str:
    """The table with its heading and notes."""

    def line(words: Sequence[str]) -> str:
        return f"| {' | '.join(words)} |"

    titles = columns(found)
    rule = "|---|---|" + "---:|" * (len(titles) - 2)
    rows = [line([f"`{row[0]}`", *row[1:]]) for row in cells(found)]
    text = "\n".join([line(titles), rule, *rows])
    return f"{heading(found)}\n\n{text}\n\n" + "\n".join(f"- {note}" for note in notes(found)) + f"\n\n`{found['command']}`\n"


def csv_text(found: Found) -> str:
    """One line a run, with its full figures."""
    out = io.StringIO()
    names = ["label", "trainer", "fidelity", "seed", "n"]
    names += [f"{key}{end}" for key in ("clean", "pgd", "robust") for end in ("", "_low", "_high")]
    names += [
        "difference",
        "p",
        "forwards",
        "backwards",
        "replays",
        "epochs",
        "passes_total",
        "seconds",
        "best_minus_last",
        "stopped",
    ]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in found["rows"]:
        passes = row["passes"]
        for run in row["runs"]:
            shares = [run[key] for key in ("clean", "pgd", "robust")]
            figures = [v for s in shares for v in ((s["accuracy"], *s["interval"]) if s else ("", "", ""))]
            pair, gap = run["paired"] or {}, run["gap"] or {}
            figures += [pair.get("difference", ""), pair.get("p", "")]
            figures += [passes[k] for k in ("forwards", "backwards", "replays", "epochs", "total")]
            figures += [run["seconds"], gap.get("points", ""), run["stopped"]]
            writer.writerow([row["label"], row["trainer"], row["fidelity"], run["seed"], found["n"] or "", *figures])
    return out.getvalue()
