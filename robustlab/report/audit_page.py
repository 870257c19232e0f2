"""The page of an audit."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from robustlab.report.figures import COLOURS, STYLE
from robustlab.report.page import picture, render

MOODS = {"robust": "good", "not robust": "bad", "unreliable": "doubt", "chance": "bad"}
SEVERITY = 3


def audit_page(found: Mapping[str, Any], pictures: Mapping[str, Any]) -> str:
    """The report of an audit as one HTML page.

    Args:
        found: what ``auditing.audit`` found, by part.
        pictures: ``clean`` and ``adversarial`` (m, C, H, W) in [0, 1], and what each was taken for, ``before`` and ``after``.
    """
    record, reliability = found["suite"]["record"], found["suite"]["record"]["reliability"]
    corruptions = found["corruptions"]["record"]
    threat = record["threat"]
    eps = threat["eps"]
    whole = abs(eps * 255 - round(eps * 255)) < 1e-6 and round(eps, 3) != eps
    radius = f"{round(eps * 255)}/255" if whole else f"{eps:.4g}"
    return render(
        "audit.html.j2",
        title=f"Audit of {record['model']['label']}",
        record=record,
        where=f"{threat['norm']} {radius}",
        verdict=found["verdict"],
        mood=MOODS[found["verdict"]["level"]],
        reliability=reliability,
        distances=found["distances"],
        classes=found["classes"],
        corruptions=corruptions,
        severities=sorted({s for row in corruptions["metrics"]["corruptions"].values() for s in row if s != "mean"}),
        calibration=found["calibration"],
        severity=SEVERITY,
        environment=sorted((k, v) for k, v in record["environment"].items() if v is not None),
        command=found["command"],
        figures={
            "curve": _draw(lambda axes: _curve(axes, found["distances"], threat)),
            "steps": _draw(lambda axes: _steps(axes, found["steps"])),
            "grid": _grid(pictures) if len(pictures["clean"]) else None,
        },
    )


def _draw(paint: Any, size: tuple[float, float] = (5.2, 3.2)) -> str:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=140, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure.add_subplot())
        return _png(figure)


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return picture(buffer.getvalue())


def _curve(axes: Any, distances: Mapping[str, Any], threat: Mapping[str, Any]) -> None:
    eps = [p["eps"] for p in distances["curve"]]
    axes.plot(eps, [100 * p["accuracy"] for p in distances["curve"]], color=COLOURS[0], label=distances["attack"])
    checks = distances["checks"]
    value = np.array([100 * c["apgd"] for c in checks])
    low, high = (np.array([100 * c["interval"][i] for c in checks]) for i in (0, 1))
    bars = (np.maximum(value - low, 0), np.maximum(high - value, 0))
    axes.errorbar([c["eps"] for c in checks], value, bars, fmt="o", color=COLOURS[1], capsize=3, label="apgd")
    axes.axvline(threat["eps"], color="#888888", linewidth=1, linestyle=":")
    axes.set(ylim=(0, 101), xlabel=f"radius, {threat['norm']}", ylabel="accuracy (%)")
    axes.set_xlim(left=0)
    axes.legend()


def _steps(axes: Any, steps: list[dict[str, float]]) -> None:
    axes.plot([s["steps"] for s in steps], [s["loss"] for s in steps], marker="o", color=COLOURS[0])
    axes.set(xscale="log", xlabel="PGD steps", ylabel="mean cross-entropy")
    axes.set_xticks([s["steps"] for s in steps], [f"{s['steps']:g}" for s in steps])
    axes.minorticks_off()


def _grid(pictures: Mapping[str, Any]) -> str:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    clean, adversarial = pictures["clean"], pictures["adversarial"]
    change = adversarial - clean
    change = 0.5 + change / (2 * np.abs(change).max(axis=(1, 2, 3), keepdims=True).clip(1e-12))
    with matplotlib.rc_context(STYLE | {"font.size": 8}):
        figure = Figure(figsize=(1.15 * len(clean) + 0.2, 3.9), dpi=140, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(3, len(clean), squeeze=False)
        for row, images in zip(axes, (clean, adversarial, change), strict=True):
            for place, image in zip(row, images, strict=True):
                place.imshow(image[0] if len(image) == 1 else image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1)
                place.set_axis_off()
        for i in range(len(clean)):
            axes[0, i].set_title(str(pictures["before"][i])[:14])
            axes[1, i].set_title(str(pictures["after"][i])[:14])
        return _png(figure)
