"""The page of one or several training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robustlab.report.drawing import draw, image_rows
from robustlab.report.figures import COLOURS
from robustlab.report.page import render


def run_page(shown: Sequence[Mapping[str, Any]], differences: Mapping[str, Sequence[Any]]) -> str:
    """The report of runs.

    Args:
        shown: for each run ``run`` (with ``name config epochs others gap()``), and ``input weights images``, which may be None.
        differences: keys of the configurations that differ, with the value of each run.
    """
    runs = [s["run"] for s in shown]
    names = ", ".join(r.name for r in runs)
    return render(
        "run.html.j2",
        title=f"Training of {names}" if len(runs) < 4 else f"{len(runs)} trainings",
        rows=[_row(r) for r in runs],
        events=[_event(r.name, e) for r in runs for e in r.others],
        figures={
            "loss": draw(lambda axes: _lines(axes, runs, "loss", "loss")),
            "rate": draw(lambda axes: _lines(axes, runs, "lr", "learning rate")),
            "probe": draw(lambda axes: _probes(axes, runs)) if any(r.probed() for r in runs) else None,
            "weights": draw(lambda axes: _weights(axes, shown)) if any(s["weights"] for s in shown) else None,
        },
        details=[
            {
                "name": s["run"].name,
                "input": draw(lambda axes, s=s: _around(axes, s["input"]), (4.4, 3.4)) if s["input"] else None,
                "grid": image_rows(s["images"]) if s["images"] else None,
            }
            for s in shown
            if s["input"] or s["images"]
        ],
        differences=differences,
    )


def _row(run: Any) -> dict[str, Any]:
    gap, config = run.gap(), run.config
    threat = config.get("threat", {})

    def name(part: Any) -> str:
        return str(part.get("name", "-") if isinstance(part, Mapping) else part)

    return {
        "name": run.name,
        "trainer": name(config.get("trainer")),
        "model": name(config.get("model")),
        "threat": f"{threat.get('norm', '-')} {threat.get('eps', '-')}",
        "epochs": len(run.epochs),
        "best": gap["best"]["val_robust"] if gap else None,
        "best_epoch": gap["best"]["epoch"] if gap else None,
        "last": gap["last"]["val_robust"] if gap else None,
        "points": gap["points"] if gap else None,
        "hours": sum(e.get("seconds") or 0.0 for e in run.epochs) / 3600,
    }


def _event(name: str, event: Mapping[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in event.items() if k not in ("kind", "epoch", "step")}
    text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items())
    return {"run": name, "epoch": event.get("epoch", "-"), "kind": event.get("kind", "-"), "text": text}


def _lines(axes: Any, runs: Sequence[Any], key: str, label: str) -> None:
    for i, run in enumerate(runs):
        found = [(e["epoch"], e[key]) for e in run.epochs if e.get(key) is not None]
        if found:
            axes.plot(*zip(*found, strict=True), color=COLOURS[i % len(COLOURS)], label=run.name)
    axes.set(xlabel="epoch", ylabel=label)
    axes.set_ylim(bottom=0)
    axes.legend()


def _probes(axes: Any, runs: Sequence[Any]) -> None:
    for i, run in enumerate(runs):
        colour, found = COLOURS[i % len(COLOURS)], run.probed()
        epochs = [e["epoch"] for e in found]
        axes.plot(epochs, [100 * e["val_robust"] for e in found], color=colour, marker="o", markersize=3, label=run.name)
        axes.plot(epochs, [100 * e["val_clean"] for e in found], color=colour, linestyle="--")
    axes.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 101))
    axes.legend()


def _weights(axes: Any, shown: Sequence[Mapping[str, Any]]) -> None:
    for i, s in enumerate(shown):
        if s["weights"]:
            colour, line = COLOURS[i % len(COLOURS)], s["weights"]
            axes.plot(line["alpha"], line["adversarial"], color=colour, label=s["run"].name)
            axes.plot(line["alpha"], line["clean"], color=colour, linestyle="--")
    axes.set(xlabel="distance, in units of the filters' norms", ylabel="mean cross-entropy")
    axes.legend()


def _around(axes: Any, found: Mapping[str, Any]) -> None:
    r = found["radius"]
    shown = axes.imshow(found["loss"], origin="lower", extent=(-r, r, -r, r), cmap="viridis")
    axes.grid(visible=False)
    axes.set(xlabel="random signs", ylabel="signs of the gradient")
    axes.figure.colorbar(shown, ax=axes, label="mean cross-entropy")
