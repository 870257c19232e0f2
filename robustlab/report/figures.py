"""Figures, from records alone; the same records give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustlab.files import atomic_write
from robustlab.types import UserError

# Okabe and Ito's colours: told apart under the common kinds of colour blindness, and in print by the markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "robustlab",
    "svg.fonttype": "path",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
UNITS = {"linf": "$\\ell_\\infty$", "l2": "$\\ell_2$", "l1": "$\\ell_1$", "l0": "$\\ell_0$"}
Curve = list[tuple[float, float, float, float]]  # (eps, accuracy, low, high), fractions


def accuracy_curve(records: Sequence[Mapping[str, Any]], path: str | Path) -> tuple[Path, Path]:
    """Robust accuracy against the radius, one curve per model, with 95 % intervals as bands; radius 0 is clean accuracy.

    Args:
        records: records as dicts. Those of one model label make one curve; all in one norm.
        path: of the figure; ``.png`` and ``.svg`` are written.

    Returns:
        The two paths.

    Raises:
        UserError: no record has a robust accuracy, or the records mix norms or suites.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    norm, suite, curves = curves_of(records)
    order = sorted(curves, key=lambda name: -sum(p[1] for p in curves[name]) / len(curves[name]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for i, name in enumerate(order):
            eps, accuracy, low, high = (list(v) for v in zip(*curves[name], strict=True))
            colour = COLOURS[i % len(COLOURS)]
            axes.fill_between(eps, _percent(low), _percent(high), color=colour, alpha=0.15, linewidth=0)
            axes.plot(
                eps,
                _percent(accuracy),
                color=colour,
                marker=MARKERS[i % len(MARKERS)],
                markersize=5,
                label=name,
                clip_on=False,
                zorder=3,
            )
        axes.set(ylim=(0, 100), ylabel=f"accuracy under {suite} (%)", xlabel=f"radius {UNITS[norm]}, in units of the pixel range")
        if norm == "l0":
            axes.set_xlabel("pixels changed")
        axes.set_xlim(left=0)
        axes.margins(x=0.02)
        _ticks(axes, norm, sorted({p[0] for curve in curves.values() for p in curve}))
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title="model")
        return _save(figure, Path(path))


def curves_of(records: Sequence[Mapping[str, Any]]) -> tuple[str, str, dict[str, Curve]]:
    """The norm, the suite's name and, for each model label, its points in order of the radius.

    Raises:
        UserError: as :func:`accuracy_curve`.
    """
    threats = [(r, t) for r in records for t in r["metrics"]["threats"]]
    if not threats:
        raise UserError("no record has an accuracy under attack; nothing to draw")
    for what, found in (("norms", {t["norm"] for _, t in threats}), ("suites", {r["suite"]["name"] for r, _ in threats})):
        if len(found) > 1:
            raise UserError(f"one figure shows one of the {what}, the records have {', '.join(sorted(found))}")
    points: dict[str, dict[float, tuple[float, float, float, float]]] = {}
    for r, t in threats:
        curve = points.setdefault(r["model"]["label"], {})
        clean = r["metrics"]["clean"]
        curve.setdefault(0.0, (0.0, clean["accuracy"], *clean["interval"]))
        new = (t["eps"], t["robust_accuracy"], *t["interval"])
        if t["eps"] > 0 and (t["eps"] not in curve or new[1] < curve[t["eps"]][1]):
            curve[t["eps"]] = new
    record, threat = threats[0]
    return threat["norm"], record["suite"]["name"], {name: [c[e] for e in sorted(c)] for name, c in points.items()}


def _percent(values: list[float]) -> list[float]:
    return [100 * v for v in values]


def _ticks(axes: Any, norm: str, radii: list[float]) -> None:
    """Ticks at the radii measured, as k/255 where they are that and not short decimals, unless there are too many."""
    if len(radii) > 9:
        return
    short = all(round(e, 3) == e for e in radii)
    whole = all(abs(e * 255 - round(e * 255)) < 1e-6 for e in radii)
    text = [f"{round(e * 255)}/255" if e and whole and not short else f"{e:.3g}" for e in radii]
    axes.set_xticks(radii, text)


def _save(figure: Any, path: Path) -> tuple[Path, Path]:
    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    for target, metadata in ((png, {"Software": None}), (svg, {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=target.suffix[1:], metadata=metadata)
        atomic_write(target, buffer.getvalue())
    return png, svg
