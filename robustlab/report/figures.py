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
CostCurve = list[tuple[float, float]]  # (passes, accuracy)
LEAST = 0.7  # passes: where the logarithmic axis begins


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


def cost_curve(records: Sequence[Mapping[str, Any]], path: str | Path) -> tuple[Path, Path]:
    """Robust accuracy against the passes that the adversary may spend on each image, one step curve per model.

    A marker shows where an attack of the suite ended. Logarithmic in the passes; what is left of one pass is clean accuracy.

    Args:
        records: records as dicts, made by an evaluation that wrote its curve. All under one suite and in one threat model, which is
            the first of each.
        path: of the figure; ``.png`` and ``.svg`` are written.

    Returns:
        The two paths.

    Raises:
        UserError: no record has a curve, or they mix suites or threat models.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    title, curves = cost_curves_of(records)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        most = max(points[-1][0] for points, _ in curves.values())
        for i, (name, (points, ends)) in enumerate(sorted(curves.items(), key=lambda item: -item[1][0][-1][1])):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            passes, accuracy = (list(v) for v in zip(*points, strict=True))
            passes, accuracy = [max(p, LEAST) for p in passes] + [max(most, 1.0)], _percent([*accuracy, accuracy[-1]])
            axes.step(passes, accuracy, where="post", color=colour, linewidth=1.6, zorder=3)
            marked = [(max(p, LEAST), 100 * _value_at(points, p)) for p in ends.values()]
            axes.plot(*zip(*marked, strict=True), color=colour, marker=marker, markersize=5, linestyle="", clip_on=False, zorder=4)
            axes.plot([], [], color=colour, marker=marker, markersize=5, label=name)
            if i == 0:
                for (p, a), attack in zip(marked, ends, strict=True):
                    axes.annotate(attack, (p, a), (-2, 6), textcoords="offset points", rotation=40, fontsize=8, color="#444444")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set(ylim=(0, 100), xlim=(LEAST, max(most, 1.0) * 1.1), xlabel="passes per image, forward and backward", ylabel=title)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title="model")
        return _save(figure, Path(path))


def cost_curves_of(records: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, tuple[CostCurve, dict[str, float]]]]:
    """What the axis is called and, for each model label, the curve's points and the passes at which each attack ended.

    Raises:
        UserError: as :func:`cost_curve`.
    """
    found = [
        (r, r["metrics"]["threats"][0]) for r in records if r["metrics"]["threats"] and r["metrics"]["threats"][0].get("curve")
    ]
    if not found:
        raise UserError("no record has a curve of robust accuracy against passes; evaluate again to get one")
    threats = {f"{t['norm']} {t['eps']:g}" for _, t in found}
    for what, names in (("suites", {r["suite"]["name"] for r, _ in found}), ("threat models", threats)):
        if len(names) > 1:
            raise UserError(f"one figure shows one of the {what}, the records have {', '.join(sorted(names))}")
    labels = [r["model"]["label"] for r, _ in found]
    if doubles := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(f"one figure shows one record of each model, there are several of {', '.join(doubles)}")
    (record, threat), *_ = found
    curves = {
        r["model"]["label"]: (
            [(p, a) for p, a in t["curve"]],
            {name: row["spent"] for name, row in t["per_attack"].items() if row.get("spent") is not None},
        )
        for r, t in found
    }
    return f"accuracy under {record['suite']['name']}, {UNITS[threat['norm']]} {threat['eps']:.4g} (%)", curves


def _value_at(points: CostCurve, passes: float) -> float:
    return [a for p, a in points if p <= passes][-1]


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


def accuracy_matrix(records: Sequence[tuple[str, Mapping[str, Any]]], path: str | Path) -> tuple[Path, Path]:
    """A heat map of accuracies under corruptions: a row for each model, a column for each corruption (the mean over severities).

    A single model gets a row for each severity instead.

    Args:
        records: label and record (as a dict) of each model, in order; all of one corruption suite.
        path: of the figure; ``.png`` and ``.svg`` are written.

    Returns:
        The two paths.

    Raises:
        UserError: no records, none with corruptions, or of different suites or images.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    title, columns, rows = matrix_of(records)
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(2.4 + 0.52 * (len(columns) + 2), 1.9 + 0.36 * len(rows)), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        shown = axes.imshow([_percent(values) for _, values in rows], cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for i, (_, values) in enumerate(rows):
            for j, value in enumerate(_percent(values)):
                colour = "black" if value > 60 else "white"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=9, color=colour)
        axes.set_xticks(
            range(len(columns)), [c.replace("_", " ") for c in columns], rotation=45, ha="right", rotation_mode="anchor"
        )
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.tick_params(length=0)
        axes.axvline(1.5, color="white", linewidth=3)
        axes.set_title(title, fontsize=11, loc="left")
        figure.colorbar(shown, ax=axes, label="accuracy (%)", shrink=0.9, pad=0.01)
        return _save(figure, Path(path))


def matrix_of(records: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[str, list[str], list[tuple[str, list[float]]]]:
    """Title, columns (clean, mean, then the corruptions) and the rows of :func:`accuracy_matrix`.

    Raises:
        UserError: as :func:`accuracy_matrix`.
    """
    found = [(label, r) for label, r in records if r["metrics"]["corruptions"]]
    if not found:
        raise UserError("no record has accuracies under corruptions; nothing to draw")
    kinds = {(r["suite"]["name"], (r["metrics"].get("corruption_scores") or {}).get("source", "generated")) for _, r in found}
    names = list(found[0][1]["metrics"]["corruptions"])
    if len(kinds) > 1 or any(list(r["metrics"]["corruptions"]) != names for _, r in found):
        raise UserError(f"one figure shows one corruption suite, the records have {', '.join(' '.join(k) for k in sorted(kinds))}")
    (suite, source), *_ = kinds
    label, first = found[0]
    title = f"accuracy (%) under {suite}, {source}, {first['data']['name']}"
    if len(found) > 1:
        rows = [(name, _accuracies(r, names, "mean")) for name, r in found]
    else:
        title = f"{label}: {title}"
        severities = [s for s in first["metrics"]["corruptions"][names[0]] if s != "mean"]
        rows = [(f"severity {s}", _accuracies(first, names, s)) for s in severities]
    return title, ["clean", "mean", *names], rows


def _accuracies(record: Mapping[str, Any], names: Sequence[str], key: str) -> list[float]:
    """Clean accuracy, the mean over the corruptions, and each corruption's."""
    each = [record["metrics"]["corruptions"][name][key] for name in names]
    return [record["metrics"]["clean"]["accuracy"], sum(each) / len(each), *each]


def corruption_grid(rows: Sequence[tuple[str, Sequence[Any]]], columns: Sequence[str], path: str | Path) -> tuple[Path, Path]:
    """One image under many corruptions: a row for each, a column for each severity.

    Args:
        rows: the corruption's name and its images, arrays (H, W, 3) or (H, W) of uint8, one for each column.
        columns: what stands above them.
        path: of the figure; ``.png`` and ``.svg`` are written.

    Returns:
        The two paths.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wide, margin = 2 if len(rows) > 8 else 1, 0.25 + 0.068 * max(len(name) for name, _ in rows)
    deep = -(-len(rows) // wide)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(wide * (margin + 0.8 * len(columns)), 0.42 + 0.8 * deep), dpi=160)
        FigureCanvasAgg(figure)
        width, height = figure.get_size_inches()
        for i, (name, images) in enumerate(rows):
            block, row = divmod(i, deep)
            left = block * (margin + 0.8 * len(columns)) + margin - 0.05
            bottom = height - 0.35 - 0.8 * (row + 1)
            figure.text(
                (left - 0.08) / width, (bottom + 0.38) / height, name.replace("_", " "), ha="right", va="center", fontsize=8
            )
            for j, image in enumerate(images):
                axes = figure.add_axes(((left + 0.8 * j) / width, bottom / height, 0.76 / width, 0.76 / height))
                axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                axes.set_axis_off()
                if row == 0:
                    axes.set_title(columns[j], fontsize=8, pad=3)
        return _save(figure, Path(path))
