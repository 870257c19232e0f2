"""Reports of training runs: what a run's folder tells, what its checkpoint shows, and how two runs differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robustlab import commands
from robustlab import config as configuration
from robustlab.nodes import parse
from robustlab.rng import Rng
from robustlab.types import Threat, UserError, one_hot, with_threat

IMAGES, GRID, ALPHAS = 64, 11, tuple(i / 5 for i in range(-5, 6))
CHECKPOINTS = ("best", "last")


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
        name, path: the folder.
        config: its configuration, as nested plain values.
        events: the lines of ``metrics.jsonl``.
        epochs: those that end an epoch.
    """

    name: str
    path: Path
    config: dict[str, Any]
    events: list[dict[str, Any]]

    @property
    def epochs(self) -> list[dict[str, Any]]:
        return [e for e in self.events if e.get("kind") == "epoch"]

    @property
    def others(self) -> list[dict[str, Any]]:
        """What guards and the like have said."""
        return [e for e in self.events if e.get("kind") not in ("epoch", "step")]

    def probed(self) -> list[dict[str, Any]]:
        return [e for e in self.epochs if e.get("val_robust") is not None]

    def gap(self) -> dict[str, Any] | None:
        """Robust overfitting: the best probe against the last one."""
        probed = self.probed()
        if not probed:
            return None
        best = max(probed, key=lambda e: e["val_robust"])
        return {"best": best, "last": probed[-1], "points": 100 * (best["val_robust"] - probed[-1]["val_robust"])}


def read_run(path: str | Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: no such folder, or none of a run.
    """
    folder = Path(path)
    metrics, config = folder / "metrics.jsonl", folder / "config.yaml"
    if not metrics.exists() or not config.exists():
        raise UserError(
            f"{folder}: not the folder of a run: it has no {'metrics.jsonl' if not metrics.exists() else 'config.yaml'}"
        )
    told = parse(config.read_text(encoding="utf-8"), str(config)).plain()
    events = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            break  # torn by a kill: what follows is not the run's
    return Run(folder.resolve().name, folder, told, events)


def report(paths: Sequence[Path], out: Path, *, data_root: str | None = None, progress: Callable[[str], None] = print) -> Path:
    """Write the report of runs as one HTML page.

    Args:
        paths: the runs' folders.
        out: the page.
        data_root: of the data sets' files.
        progress: takes one line when a part begins.

    Raises:
        UserError: a folder that is none of a run, or a checkpoint that cannot be read.
    """
    from robustlab.files import atomic_write
    from robustlab.report.run_page import run_page

    runs = [read_run(path) for path in paths]
    shown = []
    for run in runs:
        progress(f"{run.name}: landscapes and images")
        shown.append({"run": run, **pictures(run, data_root)})
    atomic_write(out, run_page(shown, differences([r.config for r in runs])))
    return out


def pictures(run: Run, data_root: str | None) -> dict[str, Any]:
    """The loss landscapes of the best checkpoint, and images before and after PGD-20; nothing where there is no checkpoint yet."""
    from robustlab.evaluation.landscape import input_landscape, weight_landscape

    checkpoint = next(
        (run.path / f"{name}.safetensors" for name in CHECKPOINTS if (run.path / f"{name}.safetensors").exists()), None
    )
    if checkpoint is None:
        return {"input": None, "weights": None, "images": None}
    f, meta, _, splits = commands.load_pair(str(checkpoint), None, data_root, torch.device("cpu"))
    assert meta is not None
    f.eval()
    threat = Threat(**meta["threat"])
    if threat.norm == "l0":
        return {"input": None, "weights": None, "images": None}
    x, y, _ = next(iter(splits.test.batches([torch.arange(min(IMAGES, len(splits.test)))])))
    rng = Rng(0).child("report")
    pgd = with_threat(configuration.build("attack", "pgd", steps=10), threat)
    radius = threat.eps if threat.norm == "linf" else 8 / 255
    flat = input_landscape(f, x.clone(), y, 2 * radius, GRID, rng.child("input"))
    line = weight_landscape(f, x, y, splits.num_classes, pgd, ALPHAS, rng.child("weights"))
    strong = with_threat(configuration.build("attack", "pgd", steps=20), threat)
    first = slice(0, 8)
    x_adv = strong(f, x[first], one_hot(y[first], splits.num_classes), seed=0)
    with torch.no_grad():
        before, after = f(x[first]).argmax(1), f(x_adv).argmax(1)
    names = splits.class_names
    images = {
        "clean": x[first].numpy(),
        "adversarial": x_adv.detach().numpy(),
        "before": [names[int(k)] for k in before],
        "after": [names[int(k)] for k in after],
    }
    return {"input": {"radius": 2 * radius, "loss": flat.tolist()}, "weights": line, "images": images}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain values as ``{"a.b.0.c": value}``."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}{key}.").items()}
    if isinstance(value, list) and value:
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{prefix}{i}.").items()}
    return {prefix[:-1]: value}


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys in which configurations differ, each with its values; None where one lacks the key."""
    tables = [flat(c) for c in configs]
    keys = dict.fromkeys(k for t in tables for k in t)
    found = {k: [t.get(k) for t in tables] for k in keys}
    return {k: values for k, values in found.items() if any(v != values[0] for v in values)}


def compare_runs(
    first: Path, second: Path, *, suite: str, num_examples: int, data_root: str | None = None, checkpoint: str = "best"
) -> dict[str, Any]:
    """How two runs differ: configuration, metrics, and McNemar's test on the same test images, clean and under a suite.

    Args:
        first, second: the runs' folders.
        suite: of attacks; under the threat model of each run, which must be the same.
        num_examples: the first so many test images.
        data_root: of the data sets' files.
        checkpoint: ``best`` or ``last``.

    Raises:
        UserError: a folder that is none of a run; runs with different data or threat models.
    """
    from robustlab.evaluation.runner import evaluate
    from robustlab.evaluation.statistics import mcnemar

    runs = [read_run(path) for path in (first, second)]
    results, threats, prints = [], [], []
    for run in runs:
        f, meta, _, splits = commands.load_pair(str(run.path / f"{checkpoint}.safetensors"), None, data_root, torch.device("cpu"))
        assert meta is not None
        threats.append(Threat(**meta["threat"]))
        results.append(evaluate(f, splits.test, suite, threat=threats[-1], num_examples=num_examples))
        prints.append(results[-1].fingerprint)
    if prints[0] != prints[1]:
        raise UserError(f"diff: {runs[0].name} and {runs[1].name} see different test images; their verdicts cannot be paired")
    if threats[0] != threats[1]:
        raise UserError(f"diff: the threat models differ, {threats[0]} and {threats[1]}; their verdicts cannot be paired")
    a, b = results
    paired = {"clean": mcnemar(a.clean.tolist(), b.clean.tolist())}
    if a.robust is not None and b.robust is not None:
        paired[f"robust, {suite}"] = mcnemar(a.robust.tolist(), b.robust.tolist())
    return {
        "names": [run.name for run in runs],
        "config": differences([run.config for run in runs]),
        "gaps": [run.gap() for run in runs],
        "results": results,
        "paired": paired,
        "n": a.n,
    }


def plain(found: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`compare_runs` found, JSON-able."""
    from dataclasses import asdict

    kept = {k: found[k] for k in ("names", "config", "gaps", "n")}
    paired = {k: asdict(p) | {"difference": p.difference} for k, p in found["paired"].items()}
    return {**kept, "paired": paired, "results": [r.to_dict() for r in found["results"]]}
