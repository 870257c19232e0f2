"""PGD-10 beside torchattacks' and a bare loop: what the library costs on top of the network.

    python scripts/bench_attack.py                     both models, 21 rounds
    python scripts/bench_attack.py --model small_cnn --rounds 5

The three run in turn within a round, in an order that rotates, on the same images and from the same kind of start; a ratio is taken
within each round, and its median and quartiles over the rounds are printed. One number of threads for all. Exits with 1 when a
median misses its goal: 1.05 over the bare loop, 1.02 over torchattacks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from robustlab.attacks.pgd import PGD
from robustlab.models import create_model
from robustlab.modes import frozen
from robustlab.rng import Rng
from robustlab.types import one_hot

MODELS = {"preact_resnet18": 16, "small_cnn": 128}  # name: batch size
GOALS = {"bare": 1.05, "torchattacks": 1.02}
EPS, STEP, STEPS = 8 / 255, 2 / 255, 10


def bare(f: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The least that can be written down."""
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(STEPS):
        x_adv.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(f(x_adv), labels, reduction="sum"), x_adv)
        x_adv = torch.min(torch.max(x_adv.detach() + STEP * g.sign(), x - EPS), x + EPS).clamp(0, 1)
    return x_adv


def contestants(f: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Callable[[], Tensor]]:
    import torchattacks

    attack = PGD(norm="linf", eps=EPS, steps=STEPS, step=STEP)
    y, rng = one_hot(labels, 10), Rng(0).at(torch.arange(len(x), device=x.device))
    theirs = torchattacks.PGD(f, eps=EPS, alpha=STEP, steps=STEPS)

    def ours() -> Tensor:
        with frozen(f):
            return attack.run(f, x, y, rng)[0]

    return {"ours": ours, "torchattacks": lambda: theirs(x, labels), "bare": lambda: bare(f, x, labels)}


def seconds(work: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    result = work()
    if result.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(works: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after one round that does not count."""
    names, times = list(works), {name: [] for name in works}
    for r in range(rounds + 1):
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            t = seconds(works[name])
            if r:
                times[name].append(t)
    return times


def report(model: str, batch: int, times: dict[str, list[float]]) -> bool:
    """Print the ratios; whether all goals are met."""
    medians = ", ".join(f"{name} {1000 * statistics.median(t):.1f} ms" for name, t in times.items())
    print(f"{model}, batch {batch}, {len(times['ours'])} rounds: {medians}")
    met = True
    for name, goal in GOALS.items():
        ratios = [a / b for a, b in zip(times["ours"], times[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        verdict = "met" if middle <= goal else "MISSED"
        print(f"  ours / {name:<13} median {middle:.3f}  quartiles {low:.3f} .. {high:.3f}  goal {goal}  {verdict}")
        met &= middle <= goal
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--model", choices=MODELS, action="append", help="may be repeated; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    torch.set_num_threads(args.threads)
    met = True
    for model in args.model or MODELS:
        torch.manual_seed(0)
        f = create_model(model, num_classes=10).to(args.device).eval()
        x = torch.rand(MODELS[model], 3, 32, 32).to(args.device)
        labels = torch.randint(10, (len(x),)).to(args.device)
        met &= report(model, len(x), measure(contestants(f, x, labels), args.rounds))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
