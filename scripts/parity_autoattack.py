"""Our AutoAttack beside pyautoattack's, on a trained model: robust accuracy, agreement, discordant samples, passes and seconds.

    python scripts/parity_autoattack.py --model runs/demo/trades/best.safetensors --num-examples 48 --eps 0.1 --out parity.json

Each side attacks the first test images with every seed, component after component, each on the samples that are left. Both
sides get the same model, images, threads and batch size, and take turns. The JSON file is written again after every run; with one
at hand the runs that it holds are not repeated. Exits with 1 when a goal is missed: pooled robust accuracies within 0.5 points;
agreement on clean-correct samples at least that of the reference with itself minus 0.5 points.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from robustlab.files import write_json
from robustlab.models.checkpoint import load_model
from robustlab.nodes import parse
from robustlab.types import Threat
from scripts.both_sides import NAMES, SUITES, Run, first_images, our_suite, run_ours, run_reference


def compare(ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, Any]:
    """Figures of runs with several seeds. Accuracies and agreements are shares; agreement is over the clean-correct samples."""
    clean = torch.tensor(theirs[0]["clean"]).bool()
    a, b = (torch.tensor([r["robust"] for r in runs]).bool() for runs in (ours, theirs))

    def same(p: Tensor, q: Tensor) -> float:
        return float((p == q)[clean].double().mean())

    def within(side: Tensor) -> float | None:
        return statistics.mean(same(p, q) for p, q in itertools.combinations(side, 2)) if len(side) > 1 else None

    return {
        "clean": float(clean.double().mean()),
        "ours": float(a.double().mean()),
        "reference": float(b.double().mean()),
        "difference": float(a.double().mean() - b.double().mean()),
        "agreement": statistics.mean(same(p, q) for p in a for q in b),
        "own_agreement": {"ours": within(a), "reference": within(b)},
        "killed_by_ours_alone": (~a.any(0) & b.all(0)).nonzero().squeeze(1).tolist(),
        "killed_by_reference_alone": (a.all(0) & ~b.any(0)).nonzero().squeeze(1).tolist(),
        "mixed": ((a.any(0) & ~a.all(0)) | (b.any(0) & ~b.all(0))).nonzero().squeeze(1).tolist(),
    }


def describe(figures: dict[str, Any], ours: Sequence[Run], theirs: Sequence[Run]) -> str:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    own = figures["own_agreement"]
    lines = [
        f"clean {percent(figures['clean'])}   robust: ours {percent(figures['ours'])}, reference {percent(figures['reference'])}, "
        f"difference {100 * figures['difference']:+.2f} points",
        f"agreement {percent(figures['agreement'])}; with itself under another seed: ours {percent(own['ours'])}, "
        f"reference {percent(own['reference'])}",
        f"killed by ours alone {figures['killed_by_ours_alone']}; by the reference alone {figures['killed_by_reference_alone']}; "
        f"seeds of one side differ {figures['mixed']}",
        f"{'component':<12}{'given':>7}{'kills':>7}{'forwards':>11}{'backwards':>11}{'seconds':>10}   per sample given",
    ]
    for title, runs in (("ours", ours), ("reference", theirs)):
        lines.append(f"{title}, all seeds: {sum(c['seconds'] for r in runs for c in r['components'].values()):.1f} s")
        for name in runs[0]["components"]:
            total = {k: sum(r["components"][name][k] for r in runs) for k in runs[0]["components"][name]}
            n = max(total["given"], 1)
            lines.append(
                f"  {name:<10}{total['given']:>7}{total['kills']:>7}{total['forwards']:>11}{total['backwards']:>11}"
                f"{total['seconds']:>10.2f}   {total['forwards'] / n:.0f} / {total['backwards'] / n:.0f}"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="runs/demo/trades/best.safetensors", help="checkpoint, timm:NAME or package.module:callable"
    )
    parser.add_argument("--data", default="digits", help="a data set's name, or a mapping such as '{name: npz, path: FILE}'")
    parser.add_argument("--num-examples", type=int, default=48)
    parser.add_argument("--norm", choices=NAMES, default="linf")
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--version", choices=SUITES, default="standard")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--steps", type=int, default=100, help="of APGD and FAB, both sides")
    parser.add_argument("--queries", type=int, default=5000, help="of Square, both sides")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file of all runs")
    args = parser.parse_args()

    f = load_model(args.model).eval()
    data = parse(args.data, "--data").plain()
    x, y = first_images(data, args.model, args.num_examples)
    f, x, y = f.to(args.device), x.to(args.device), y.to(args.device)
    threat, budget = Threat(args.norm, args.eps), {"steps": args.steps, "queries": args.queries}
    setting = {k: v for k, v in vars(args).items() if k not in ("out", "seeds")} | {"threads": torch.get_num_threads()}
    stored: dict[str, Any] = {"setting": setting, "ours": [], "reference": []}
    if args.out and args.out.exists():
        stored = json.loads(args.out.read_text())
        if stored["setting"] != setting:
            parser.error(f"{args.out} holds runs of another setting: {stored['setting']}")
    for seed in range(args.seeds):
        for side in ("ours", "reference"):
            if len(stored[side]) > seed:
                continue
            if side == "ours":
                run = run_ours(f, x, y, threat, our_suite(args.version, **budget), seed, args.batch_size)
            else:
                run = run_reference(f, x, y, threat, args.version, seed, args.batch_size, **budget)
            stored[side].append(run)
            stored["figures"] = compare(stored["ours"], stored["reference"]) if stored["reference"] else None
            if args.out:
                write_json(args.out, stored)
    figures, name = stored["figures"], data if isinstance(data, str) else data["name"]
    print(f"AutoAttack {args.version}, {args.norm} {args.eps:g}, {len(x)} images of {name}, {args.seeds} seeds, {args.model}")
    print(describe(figures, stored["ours"], stored["reference"]))
    own = figures["own_agreement"]["reference"]
    met = abs(figures["difference"]) <= 0.005 and (own is None or figures["agreement"] >= own - 0.005)
    print("goals (means within 0.5 points; agreement at least the reference's own minus 0.5 points):", "met" if met else "MISSED")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
