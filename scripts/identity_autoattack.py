"""Does AutoAttack depend on how the images are cut into batches and shards? Counts of what differs, in float64 and float32.

    python scripts/identity_autoattack.py --model runs/demo/pgd-at/best.safetensors --eps 0.1             shortened budgets
    python scripts/identity_autoattack.py --model runs/demo/pgd-at/best.safetensors --eps 0.1 --full --batch-sizes 7 32 --shards

The largest batch is compared with every other cut: per attack and sample the verdict, the passes and the seed. Draws are keyed by
the sample, so in exact arithmetic nothing differs. In float64 nothing may (exit code 1); in float32 the sums of a matrix product
depend on its size, and what comes of that is the figure.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from robustlab import commands
from robustlab.config import build
from robustlab.evaluation import shards
from robustlab.evaluation.ledger import by_sample, read
from robustlab.evaluation.runner import evaluate
from robustlab.files import write_json
from robustlab.types import Suite, Threat

Samples = dict[Any, tuple[Any, ...]]
SHORT = (
    {"name": "apgd", "steps": 10},
    {"name": "apgd-t", "steps": 5, "n_targets": 3},
    {"name": "fab", "targeted": True, "steps": 5, "n_targets": 3},
    {"name": "square", "queries": 200},
)


def suite_of(full: bool) -> Suite:
    if full:
        return build("suite", "autoattack")
    return build("suite", {"name": "autoattack", "attacks": list(SHORT)})


def compare(one: Samples, other: Samples) -> dict[str, int]:
    """How many samples end otherwise, and how many of their attacks saw another verdict, other passes, another seed."""
    attacked = [k for k in one.keys() | other.keys() if k[0]]
    both = [k for k in attacked if k in one and k in other]
    broken = [{k[2] for k, v in found.items() if k[0] and not v[0]} for found in (one, other)]
    return {
        "samples": len({k[2] for k in one}),
        "final verdicts": len(broken[0] ^ broken[1]),
        "runs of an attack on a sample": len(attacked),
        "in one only": len(attacked) - len(both),
        "verdicts": sum(one[k][0] != other[k][0] for k in both),
        "passes": sum(one[k][2] != other[k][2] for k in both),
        "seeds": sum(one[k][1] != other[k][1] for k in both),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint")
    parser.add_argument("--data", help="a data set; default: the one of the training")
    parser.add_argument("--data-root")
    parser.add_argument("--num-examples", type=int, default=32)
    parser.add_argument("--norm", default="linf")
    parser.add_argument("--eps", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="the published budgets")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 7, 32])
    parser.add_argument("--shards", type=int, nargs="*", default=[1, 2, 5], help="each with the middle one of the batch sizes")
    parser.add_argument("--dtypes", nargs="+", choices=["float64", "float32"], default=["float64", "float32"])
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    f, _, _, splits = commands.load_pair(args.model, args.data, args.data_root, torch.device("cpu"))
    threat, sizes = Threat(args.norm, args.eps), sorted(args.batch_sizes)
    cuts = [(size, 0) for size in sizes[::-1]] + [(sizes[len(sizes) // 2 - (len(sizes) == 2)], n) for n in args.shards]
    table: dict[str, dict[str, Any]] = {}
    for dtype in args.dtypes:
        f, rows = f.to(getattr(torch, dtype)), {}
        reference: Samples = {}
        for size, n in cuts:
            entries = []
            with tempfile.TemporaryDirectory() as folder:
                outs = [Path(folder) / f"{i}" for i in range(1, n + 1)] or [Path(folder)]
                for i, out in enumerate(outs, 1):
                    common = {"threat": threat, "seed": args.seed, "num_examples": args.num_examples, "batch_size": size}
                    evaluate(f, splits.test, suite_of(args.full), **common, out=out, shard=(i, n) if n else None)
                ledgers = [out / "ledger.jsonl" for out in outs]
                entries = shards.merge(ledgers)[1] if n else read(ledgers[0])[1]
            found = by_sample(entries)
            if not reference:
                reference = found
                broken = len({k[2] for k, v in found.items() if not v[0]})
                print(f"{dtype}: {args.num_examples - broken} of {args.num_examples} robust in batches of {size}; elsewhere:")
                continue
            name = f"batches of {size}" + (f", {n} shards" if n else "")
            rows[name] = compare(reference, found)
            print(f"  {name:<24} {json.dumps(rows[name])}", flush=True)
        table[dtype] = rows
    if args.out:
        what = {"model": args.model, "threat": [args.norm, args.eps], "seed": args.seed, "full": args.full, "reference": sizes[-1]}
        write_json(args.out, what | table)
    wrong = [row[k] for row in table.get("float64", {}).values() for k in ("in one only", "verdicts", "passes", "seeds")]
    return int(any(wrong))


if __name__ == "__main__":
    sys.exit(main())
