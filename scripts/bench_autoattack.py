"""How long AutoAttack takes: the reference beside our engines, block by block, every cost counted.

    python scripts/bench_autoattack.py --bed resnet --data-root DATA.npz --block-size 16 --blocks 1 --first-block 0 --out bench.json
    python scripts/bench_autoattack.py --bed cnn --model runs/demo/trades/best.safetensors --data digits --eps 0.1 --out cnn.json

Beds: ``resnet``, the standard ResNet-18 inside pyautoattack at linf 1/255 on CIFAR-10; ``broken``, the same at 8/255, where nothing
survives; ``cnn``, a checkpoint. Modes: ``reference`` as shipped; ``tuned``, the reference given our prepared model; ``exact``;
``bf16``; ``fast``, ``quick``, ``screen``: the suites of these names, left out where there are none. A block of images goes through
the modes in the order given, the next block in the reverse order. Time covers everything after model and images are in memory:
checks, preparation, warm-up, verification. The first images of the test set are used, the misclassified too. Verdicts count by the
untouched model in float32. The JSON file is written after every mode of every block; runs that it holds are not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from robustlab.evaluation.prepare import prepare
from robustlab.files import write_json
from robustlab.models.checkpoint import load_model
from robustlab.registry import entries
from robustlab.types import Suite, Threat
from scripts.both_sides import first_images, our_suite, run_ours, run_reference

EPS = {"resnet": 1 / 255, "broken": 8 / 255, "cnn": 8 / 255}
SUITES = {"fast": "autoattack-fast", "quick": "autoattack-quick", "screen": "screen"}
MODES = ("reference", "tuned", "exact", "bf16", *SUITES)
Run = dict[
    str, Any
]  # seconds, load, clean, robust: (N,) lists of 0 and 1; components: {name: {given, forwards, backwards, seconds, kills}}


def bundled_resnet() -> nn.Module:
    """The ResNet-18 for CIFAR-10 that the reference package brings along, a standard net."""
    import pyautoattack
    from pyautoattack.examples import resnet

    f = resnet.ResNet18()
    weights = Path(pyautoattack.__file__).parent / "examples" / "model_test.pt"
    f.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return f.eval()


def images(data: str, root: str | None, model: str | None, count: int) -> tuple[Tensor, Tensor]:
    """The first test images; ``root`` is an .npz file, or the folder of a data set by name."""
    if root is not None and root.endswith(".npz"):
        return first_images({"name": "npz", "path": root, "num_classes": 10}, model, count)
    if root is not None:
        os.environ["ROBUSTLAB_DATA"] = root
    return first_images(data, model, count)


class Tuned(nn.Module):
    """A prepared model as the reference wants it: a module."""

    def __init__(self, f: nn.Module, x: Tensor):
        super().__init__()
        self.search = (prepare(f, x),)  # in a tuple: the reference must find no weights to fill with gradients

    def forward(self, x: Tensor) -> Tensor:
        return self.search[0](x)


def run_mode(mode: str, f: nn.Module, x: Tensor, y: Tensor, threat: Threat, args: argparse.Namespace, seed: int) -> Run | None:
    """One mode on one block; None where the suite does not exist."""
    if mode in SUITES and SUITES[mode] not in entries("suite"):
        return None
    budget = {"steps": args.steps, "queries": args.queries}
    load, start = os.getloadavg()[0], time.perf_counter()
    if mode in ("reference", "tuned"):
        attacked = Tuned(f, x).eval() if mode == "tuned" else f
        run: Run = run_reference(attacked, x, y, threat, "standard", seed, args.reference_batch_size, args.attacks, **budget)
    else:
        suite: str | Suite = SUITES[mode] if mode in SUITES else chosen(our_suite("standard", **budget), args.attacks)
        precision: Literal["fp32", "bf16"] = "bf16" if mode == "bf16" or (mode in SUITES and args.precision == "bf16") else "fp32"
        audit = {"audit": args.audit} if mode in SUITES else {}
        run = run_ours(f, x, y, threat, suite, seed, args.batch_size, precision=precision, **audit)
    return {"seconds": time.perf_counter() - start, "load": load, **run}


def chosen(suite: Suite, names: Sequence[str]) -> Suite:
    """The suite, or its attacks of these names (those of the reference)."""
    own = {"apgd": "apgd-ce", "apgd-t": "apgd-t", "fab": "fab-t", "square": "square"}
    return Suite(attacks=tuple(a for a in suite.attacks if own[a.name] in names)) if names else suite


def warm_up(f: nn.Module, x: Tensor) -> None:
    """Libraries load and threads start before the first clock; nothing of a mode is kept."""
    with torch.enable_grad():
        v = x[:4].clone().requires_grad_()
        torch.autograd.grad(f(v).sum(), v)


def summary(blocks: dict[str, dict[str, Run]], modes: Sequence[str]) -> str:
    """Per mode: ratios of the blocks to the reference, accuracy, both directions of disagreement, passes by component."""
    lines = [f"blocks {len(blocks)}; load at each start {[round(r['load'], 1) for b in blocks.values() for r in b.values()]}"]
    for mode in modes:
        runs = {k: (b["reference"], b[mode]) for k, b in blocks.items() if mode in b and "reference" in b}
        if not runs:
            continue
        ratios = [a["seconds"] / b["seconds"] for a, b in runs.values()]
        theirs, ours = ([v for pair in runs.values() for v in pair[i]["robust"]] for i in (0, 1))
        alone = [sum(p > q for p, q in zip(*pair, strict=True)) for pair in ((ours, theirs), (theirs, ours))]
        wide = (max(ratios) - min(ratios)) / statistics.median(ratios) > 0.25
        spread = f"[{min(ratios):.2f}, {max(ratios):.2f}]{'  WIDE, repeat' if wide else ''}"
        lines.append(
            f"{mode:<12}{statistics.median(ratios):7.2f}x {spread}  "
            f"robust {100 * statistics.mean(ours):.2f} % (reference {100 * statistics.mean(theirs):.2f} %), of {len(ours)}; "
            f"killed by the reference alone {alone[0]}, by this alone {alone[1]}"
        )
        for name in next(iter(runs.values()))[1]["components"]:
            rows = [b["components"].get(name, {}) for _, b in runs.values()]
            total = {k: sum(r.get(k, 0) for r in rows) for k in ("given", "kills", "forwards", "backwards", "seconds")}
            n = max(total["given"], 1)
            survivors = total["given"] - total["kills"]
            lines.append(
                f"    {name:<12}given {total['given']:>5}  kills {total['kills']:>4}  "
                f"per sample given {total['forwards'] / n:8.1f} / {total['backwards'] / n:7.1f}  seconds {total['seconds']:9.2f}"
                + (f"  ({total['seconds'] / survivors:.3f} per survivor)" if survivors else "")
            )
    second = [(b["reference"]["robust"], b["second-seed"]["robust"]) for b in blocks.values() if "second-seed" in b]
    if second:
        differing = sum(p != q for pair in second for p, q in zip(*pair, strict=True))
        lines.append(f"reference under another seed: {differing} of {sum(len(a) for a, _ in second)} verdicts differ")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bed", choices=EPS, required=True)
    parser.add_argument("--model", help="checkpoint, for the bed cnn")
    parser.add_argument("--data", default="cifar10", help="data set, where --data-root is no .npz file")
    parser.add_argument("--data-root", help="an .npz file with x_test and y_test, or the folder of data sets")
    parser.add_argument("--eps", type=float, help="linf radius; default that of the bed")
    parser.add_argument("--block-size", type=int, default=16, help="images in a block")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--first-block", type=int, default=0)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["reference", "exact", "bf16", "fast", "quick", "screen"])
    parser.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        default="bf16",
        help="of fast, quick and screen; bf16 where hardware has it",
    )
    parser.add_argument("--audit", type=int, default=0, help="samples that fast, quick and screen audit; its time is in theirs")
    parser.add_argument("--second-seed", action="store_true", help="run the reference once more, under another seed")
    parser.add_argument("--attacks", nargs="+", default=[], choices=("apgd-ce", "apgd-t", "fab-t", "square"), help="only these")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--reference-batch-size", type=int, default=128, help="take the fastest of 32, 64, 128, 250")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file of all runs; one at hand is continued")
    args = parser.parse_args()
    if (args.bed == "cnn") != (args.model is not None):
        parser.error("--model goes with --bed cnn, and only with it")
    if args.threads:
        torch.set_num_threads(args.threads)

    f = bundled_resnet() if args.model is None else load_model(args.model).eval()
    threat = Threat("linf", EPS[args.bed] if args.eps is None else args.eps)
    last = args.first_block + args.blocks
    x, y = images(args.data, args.data_root, args.model, last * args.block_size)
    f, x, y = f.to(args.device), x.to(args.device), y.to(args.device)
    free = ("blocks", "first_block", "modes", "out", "second_seed", "data_root", "device")
    setting = {k: v for k, v in vars(args).items() if k not in free}
    setting |= {"eps": threat.eps, "threads": torch.get_num_threads(), "torch": torch.__version__}
    setting |= {} if x.device.type == "cpu" else {"device": torch.cuda.get_device_name(x.device)}
    stored: dict[str, Any] = {"setting": setting, "blocks": {}}
    if args.out and args.out.exists():
        stored = json.loads(args.out.read_text())
        if stored["setting"] != setting:
            parser.error(f"{args.out} holds runs of another setting: {stored['setting']}")
    warm_up(f, x)
    for k in range(args.first_block, last):
        some = slice(k * args.block_size, (k + 1) * args.block_size)
        if len(x[some]) == 0:
            break
        block = stored["blocks"].setdefault(str(k), {})
        order = [*args.modes, *(["second-seed"] if args.second_seed else [])]
        for mode in order if k % 2 == 0 else reversed(order):
            if mode in block:
                continue
            real, seed = ("reference", args.seed + 1) if mode == "second-seed" else (mode, args.seed)
            with contextlib.redirect_stdout(sys.stderr):  # the reference talks
                run = run_mode(real, f, x[some].clone(), y[some].clone(), threat, args, seed)
            if run is None:
                print(f"block {k} {mode}: no such suite, left out", flush=True)
                continue
            block[mode] = run
            print(f"block {k} {mode}: {run['seconds']:.2f} s, robust {sum(run['robust'])} of {len(run['robust'])}", flush=True)
            if args.out:
                write_json(args.out, stored)
    print(f"{args.bed}, linf {threat.eps:g}, blocks of {args.block_size}, {torch.get_num_threads()} threads, seed {args.seed}")
    print(summary(stored["blocks"], [m for m in MODES if m in args.modes]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
