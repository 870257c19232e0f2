"""Where does single-step training overfit catastrophically on small data, and what does the guard make of it?

    PYTHONPATH=. python scripts/sweep_overfitting.py [--only NAME]... [--seeds 0 1 2] [--guards none stop rollback] [--minutes M]

FGSM training (alpha = eps, no random start) of a small net. Every few epochs, and at the end, FGSM and PGD-50 accuracy on the
first test images. One line of JSON for each run is appended to ``scripts/results/overfitting.jsonl``; runs that stand there
already are left out, so the sweep can be taken in slices.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustlab import commands, config
from robustlab.training.loop import Hooks, fit
from robustlab.types import Alone, ImageSet

OUT = Path(__file__).parent / "results" / "overfitting.jsonl"
IMAGES = 200  # of the test split, in every probe

SETTINGS: dict[str, dict[str, Any]] = {
    f"digits-{eps:g}-w{width}-lr{lr:g}": {"eps": eps, "width": width, "lr": lr, "epochs": 60}
    for eps in (0.15, 0.2, 0.25)
    for width in (16, 24, 32, 48)
    for lr in (0.1, 0.2, 0.4)
}


def configuration(setting: dict[str, Any], guard: str, seed: int) -> config.Config:
    """A run of FGSM training on digits; ``guard`` is none, stop or rollback."""
    pgd = config.build("attack", "pgd", steps=4, rel_step=0.4)
    rule = None if guard == "none" else config.Overfitting(act=guard, attack=pgd)  # type: ignore[arg-type]
    fgsm = {"name": "craft", "attack": {"name": "pgd", "steps": 1, "rel_step": 1.0, "start": "zero"}}
    return config.Config(
        trainer=config.build("trainer", "fast-at", inner=[fgsm]),
        model=config.build("model", "small_cnn", width=setting["width"]),
        data=config.build("dataset", "digits"),
        threat=config.Threat("linf", setting["eps"]),
        optimizer=config.build("optimizer", "sgd", lr=setting["lr"]),
        schedule=config.build("schedule", "cosine", warmup=4.0),
        training=config.Training(
            epochs=setting["epochs"],
            batch_size=64,
            device="cpu",
            threads=1,
            probe=config.Probe(every=5),
            guards=config.Guards(collapse=None, overfitting=rule),
        ),
        seed=seed,
    )


def accuracies(f: nn.Module, images: ImageSet, eps: float) -> dict[str, float]:
    """Clean, FGSM and PGD-50 accuracy."""
    x, y, _ = next(images.batches([torch.arange(IMAGES)]))
    was = f.training
    f.eval()
    fgsm = config.build("attack", "fgsm", norm="linf", eps=eps)(f, x, y)
    pgd = config.build("attack", "pgd", norm="linf", eps=eps, steps=50, rel_step=0.05)(f, x, y, seed=1)
    with torch.no_grad():
        found = {k: float((f(v).argmax(1) == y).float().mean()) for k, v in (("clean", x), ("fgsm", fgsm), ("pgd", pgd))}
    f.train(was)
    return found


def one(name: str, guard: str, seed: int, setting: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train once; the accuracies of every probe, the guard's view of every epoch, and what it did."""
    setting = setting or SETTINGS[name]
    run, splits, f = commands.prepare(configuration(setting, guard, seed))
    device, events = torch.device("cpu"), []
    hooks = Hooks(
        probe=lambda model: {"val_clean": (found := accuracies(model, splits.test, setting["eps"]))["clean"], **found},
        watch=lambda model: commands.watch(model, splits.train, run, splits.num_classes, device),
        export=lambda path, model, metrics: None,
        progress=lambda event: events.append(event) if event["kind"] == "epoch" else None,
    )
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcome = fit(run, f, splits, Path(folder), hooks, world=Alone(), device=device, resume=False)
    kept = ("epoch", "clean", "fgsm", "pgd", "train_robust", "stopped", "rolled_back")
    return {
        "setting": name,
        **setting,
        "guard": guard,
        "seed": seed,
        "epochs_trained": outcome.epochs,
        "stopped": outcome.stopped,
        "rolled_back": outcome.rolled_back,
        "events": [{k: round(v, 4) if isinstance(v, float) else v for k, v in e.items() if k in kept} for e in events],
        "seconds": round(time.perf_counter() - begun, 1),
    }


def done() -> set[tuple[str, str, int]]:
    lines = OUT.read_text().splitlines() if OUT.exists() else []
    return {(r["setting"], r["guard"], r["seed"]) for r in map(json.loads, lines)}


def wanted(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    for name in args.only or SETTINGS:
        yield from ((name, guard, seed) for guard in args.guards for seed in args.seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--guards", nargs="+", default=["none"], choices=["none", "stop", "rollback"])
    parser.add_argument("--minutes", type=float, default=60.0, help="start no run after so many minutes")
    args = parser.parse_args()
    begun, known = time.monotonic(), done()
    OUT.parent.mkdir(exist_ok=True)
    for case in wanted(args):
        if case in known or time.monotonic() - begun > 60 * args.minutes:
            continue
        with open(OUT, "a") as file:
            file.write(json.dumps(one(*case)) + "\n")


if __name__ == "__main__":
    main()
