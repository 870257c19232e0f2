"""How far the cheap suites are from the exact one, on evaluations that are there: `robustlab compare` leaves many.

    python scripts/bounds_against_exact.py runs/compare-digits --out bounds.json

For each run under FOLDER/runs whose best checkpoint has a ledger of `autoattack` under FOLDER/evaluations, the suites are run on
the same images with the same seed, without an audit. Missed: robust under the cheap suite, broken under the exact one. The JSON
file is written after every run; what it holds is not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from robustlab import config
from robustlab.evaluation.rederive import rederive
from robustlab.evaluation.runner import evaluate
from robustlab.files import write_json
from robustlab.models.checkpoint import load_model
from robustlab.results.record import read_record
from robustlab.types import Threat

SUITES = ("autoattack-fast", "autoattack-quick", "screen")


def exact_ledger(folder: Path, run: str) -> Path | None:
    """Of the run's evaluation under `autoattack`."""
    for path in sorted((folder / "evaluations" / run).glob("*/record.json")):
        if read_record(path).suite.name == "autoattack":
            return path.with_name("ledger.jsonl")
    return None


def measure(run: Path, ledger: Path, precision: Literal["fp32", "bf16"]) -> dict[str, Any]:
    """Verdicts and passes of every suite on the images of an exact evaluation."""
    record, robust = read_record(ledger.with_name("record.json")), rederive(ledger).robust
    assert robust is not None
    assert record.threat is not None
    test = config.load_config(run / "config.yaml").data.load().test
    x, y, _ = next(iter(test.batches([torch.arange(len(robust))])))
    found: dict[str, Any] = {"n": len(robust), "autoattack": {"robust": robust.int().tolist(), "passes": passes(record.cost)}}
    f, threat = load_model(run / "best.safetensors").eval(), Threat(record.threat.norm, record.threat.eps)
    for suite in SUITES:
        how: dict[str, Any] = {"seed": record.seed, "batch_size": record.batch_size, "precision": precision}
        result = evaluate(f, (x, y), suite, threat=threat, audit=0, **how)
        assert result.robust is not None
        found[suite] = {"robust": result.robust.int().tolist(), "passes": passes(result.cost)}
        found[suite]["seconds"] = result.cost["seconds"]
    return found


def passes(cost: Any) -> int:
    told = cost if isinstance(cost, dict) else cost.model_dump()
    return int(told["forwards"] + told["backwards"])


def summary(found: dict[str, Any]) -> str:
    """Pooled over all runs: what each suite missed, robust accuracies, passes per image; and the worst run."""
    n = sum(r["n"] for r in found.values())
    lines = [f"{len(found)} models, {n} images"]
    for suite in ("autoattack", *SUITES):
        pairs = {name: list(zip(r["autoattack"]["robust"], r[suite]["robust"], strict=True)) for name, r in found.items()}
        missed = {name: sum(b > a for a, b in p) for name, p in pairs.items()}
        alone = sum(a > b for p in pairs.values() for a, b in p)
        accuracy = 100 * sum(b for p in pairs.values() for _, b in p) / n
        cost = sum(r[suite]["passes"] for r in found.values()) / n
        worst = max(missed, key=lambda name: missed[name])
        lines.append(
            f"{suite:<18} missed {sum(missed.values())} (most in one model: {missed[worst]}, {worst}), broken by it alone {alone}, "
            f"robust {accuracy:.2f} %, passes per image {cost:.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="names of runs")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the cheap suites' search")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for run in sorted((args.folder / "runs").iterdir()):
        ledger = exact_ledger(args.folder, run.name)
        if ledger is not None and run.name not in found and (not args.only or run.name in args.only):
            found[run.name] = measure(run, ledger, args.precision)
            write_json(args.out, found)
            print(run.name, flush=True)
    print(summary(found))


if __name__ == "__main__":
    main()
