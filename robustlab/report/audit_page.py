"""The page of an audit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from robustlab.report.drawing import draw, image_rows
from robustlab.report.figures import COLOURS
from robustlab.report.page import render

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
            "curve": draw(lambda axes: _curve(axes, found["distances"], threat)),
            "steps": draw(lambda axes: _steps(axes, found["steps"])),
            "grid": image_rows(pictures) if len(pictures["clean"]) else None,
        },
    )


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
