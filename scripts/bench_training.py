"""Our training step beside the public code's: PGD-AT, TRADES and AWP on the same network and batch.

    python scripts/bench_training.py                      preact_resnet18, batch 16, fp32, 7 rounds
    python scripts/bench_training.py --checkouts DIR      with public code: DIR/TRADES, DIR/AWP, DIR/MAIR, as published
    python scripts/bench_training.py --rounds 1 --model small_cnn

Rows: ``bare`` is the least work that the method needs, straight-line, with frozen weights during the attack; ``rice`` the steps of
Rice et al.'s PGD-AT as they publish them: weights keep collecting gradients during the attack, one more forward pass compares
restarts, one is for the log; ``official`` is the authors' own code, ``mair`` the MAIR library, both run from a checkout and left
out without one. The contestants of a method run in turn within a round, in an order that rotates; a ratio is taken within each
round, its median and quartiles over the rounds are printed. Our bf16 step is an extra row. Exits with 1 when a median misses its
goal.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from robustlab.config import build
from robustlab.models import create_model
from robustlab.modes import frozen
from robustlab.outer import Outer, context_of
from robustlab.rng import Rng
from robustlab.training.step import train_step
from robustlab.types import Threat, View, one_hot, with_threat

EPS, STEP, STEPS, BETA, GAMMA = 8 / 255, 2 / 255, 10, 6.0, 0.01
GOALS = {
    "pgd-at": {"bare": 1.05, "rice": 0.75, "mair": 1.02},
    "trades": {"bare": 1.05, "official": 0.80, "mair": 1.02},
    "awp": {"bare": 1.05, "official": 0.75, "mair": 0.75},
}
# forward passes, input gradients, weight gradients of a batch that the row "bare" makes
BARE = {"pgd-at": (11, 10, 1), "trades": (13, 10, 2), "awp": (12, 10, 2)}
Step = Callable[[], Any]


def sgd(f: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(f.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def ours(name: str, f: nn.Module, x: Tensor, labels: Tensor, precision: str) -> Step:
    trainer = with_threat(build("trainer", name), Threat("linf", EPS))
    outer = Outer(f, trainer, context_of(f, 10, len(x), tuple(x.shape[1:])), precision)
    optimizer, y, key = sgd(f), one_hot(labels, 10), torch.arange(len(x), device=x.device)
    return lambda: train_step(outer, [{"clean": View(x=x, y=y, key=key)}], trainer, optimizer, Rng(0))


# ------------------------------------------------------------------------------------------------------ straight lines


def climb(f: nn.Module, x: Tensor, x_adv: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(f(x_adv)), x_adv)
        x_adv = torch.min(torch.max(x_adv.detach() + STEP * g.sign(), x - EPS), x + EPS).clamp(0, 1)
    return x_adv


def bare(name: str, f: nn.Module, x: Tensor, labels: Tensor) -> Step:
    """Forward and backward passes, the optimizer, and next to nothing else."""
    optimizer, weights = sgd(f), [p for p in f.parameters() if p.ndim > 1]

    def loss(x_adv: Tensor) -> Tensor:
        if name != "trades":
            return F.cross_entropy(f(x_adv), labels)
        z, z_adv = f(x), f(x_adv)
        return F.cross_entropy(z, labels) + BETA * F.kl_div(z_adv.log_softmax(1), z.softmax(1), reduction="batchmean")

    def step() -> None:
        with frozen(f):
            if name == "trades":
                f.eval()
                with torch.no_grad():
                    p = f(x).softmax(1)
                start = x + 0.001 * torch.randn_like(x)
                x_adv = climb(f, x, start, lambda z: F.kl_div(z.log_softmax(1), p, reduction="sum"))
            else:
                start = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
                x_adv = climb(f.train(), x, start, lambda z: F.cross_entropy(z, labels, reduction="sum"))
        f.train()
        if name == "awp":
            grads = torch.autograd.grad(loss(x_adv), weights)
            saved = [w.detach().clone() for w in weights]
            with torch.no_grad():
                for w, g in zip(weights, grads, strict=True):
                    w.add_(g, alpha=float(GAMMA * w.norm() / g.norm().clamp_min(1e-20)))
        optimizer.zero_grad()
        loss(x_adv).backward()
        if name == "awp":
            with torch.no_grad():
                for w, s in zip(weights, saved, strict=True):
                    w.copy_(s)
        optimizer.step()

    return step


def rice_attack(f: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The work of their attack: every backward pass reaches the weights, and a last forward pass compares restarts."""
    delta = torch.zeros_like(x).uniform_(-EPS, EPS)
    delta = ((x + delta).clamp(0, 1) - x).requires_grad_()
    for _ in range(STEPS):
        F.cross_entropy(f(x + delta), labels).backward()
        assert delta.grad is not None
        d = (delta.detach() + STEP * delta.grad.sign()).clamp(-EPS, EPS)
        delta.data = (x + d).clamp(0, 1) - x
        delta.grad.zero_()
    f(x + delta)
    return (x + delta.detach()).clamp(0, 1)


def rice(f: nn.Module, x: Tensor, labels: Tensor) -> Step:
    optimizer = sgd(f)

    def step() -> None:
        x_adv = rice_attack(f.train(), x, labels)
        loss = F.cross_entropy(f(x_adv), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        F.cross_entropy(f(x), labels)  # for the log, with a graph

    return step


# --------------------------------------------------------------------------------------------------------- public code


def load(path: Path, name: str) -> Any:
    """A module from a file of a checkout, or None."""
    import importlib.util

    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def official_trades(module: Any, f: nn.Module, x: Tensor, labels: Tensor) -> Step:
    optimizer, cuda = sgd(f), torch.Tensor.cuda

    def step() -> None:
        if not x.is_cuda:  # their noise is moved to a GPU, unasked
            torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
        try:
            loss = module.trades_loss(f, x, labels, optimizer, step_size=STEP, epsilon=EPS, perturb_steps=STEPS, beta=BETA)
        finally:
            torch.Tensor.cuda = cuda  # type: ignore[method-assign]
        loss.backward()
        optimizer.step()

    return step


def official_awp(module: Any, f: nn.Module, x: Tensor, labels: Tensor) -> Step:
    """Their weight perturbation in the order of their training script, whose attack is Rice's."""
    optimizer, proxy = sgd(f), copy.deepcopy(f)
    adversary = module.AdvWeightPerturb(model=f, proxy=proxy, proxy_optim=torch.optim.SGD(proxy.parameters(), lr=0.01), gamma=GAMMA)

    def step() -> None:
        x_adv = rice_attack(f.train(), x, labels)
        diff = adversary.calc_awp(inputs_adv=x_adv, targets=labels)
        adversary.perturb(diff)
        loss = F.cross_entropy(f(x_adv), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        adversary.restore(diff)
        F.cross_entropy(f(x), labels)

    return step


def mair(folder: Path | None, name: str, f: nn.Module, x: Tensor, labels: Tensor) -> Step | None:
    """MAIR, installed or from a checkout; None where it cannot be imported."""
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        import mair as library
    except ImportError as error:
        print(f"  mair left out: {error}")
        return None
    model = library.RobModel(f, n_classes=10)
    if name == "trades":
        trainer = library.TRADES(model, eps=EPS, alpha=STEP, steps=STEPS, beta=BETA)
    else:
        trainer = library.AT(model, eps=EPS, alpha=STEP, steps=STEPS)
    minimizer = {"minimizer": f"AWP(rho={GAMMA})"} if name == "awp" else {}
    trainer.setup(optimizer="SGD(lr=0.01, momentum=0.9, weight_decay=5e-4)", **minimizer)

    def step() -> None:
        model.train()
        trainer._init_dicts_record_save()
        trainer._update_weight((x, labels))

    return step


def contestants(name: str, f: nn.Module, x: Tensor, labels: Tensor, folder: Path | None) -> dict[str, Step]:
    """Every row of a method, each with its own copy of the network."""

    def new() -> nn.Module:
        return copy.deepcopy(f).train()

    rows: dict[str, Step | None] = {
        "ours": ours(name, new(), x, labels, "fp32"),
        "ours bf16": ours(name, new(), x, labels, "bf16"),
        "bare": bare(name, new(), x, labels),
    }
    if name == "pgd-at":
        rows["rice"] = rice(new(), x, labels)
    if folder is not None and name == "trades" and (module := load(folder / "TRADES/trades.py", "official_trades")):
        rows["official"] = official_trades(module, new(), x, labels)
    if folder is not None and name == "awp" and (module := load(folder / "AWP/AT_AWP/utils_awp.py", "official_awp")):
        rows["official"] = official_awp(module, new(), x, labels)
    rows["mair"] = mair(folder and folder / "MAIR", name, new(), x, labels)
    return {row: step for row, step in rows.items() if step is not None}


# --------------------------------------------------------------------------------------------------------- measurement


def seconds(step: Step, device: str) -> float:
    start = time.perf_counter()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after one round that does not count."""
    names, times = list(steps), {name: [] for name in steps}
    for r in range(rounds + 1):
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            t = seconds(steps[name], device)
            if r:
                times[name].append(t)
    return times


def report(name: str, times: dict[str, list[float]]) -> bool:
    """Print the times and ratios; whether all goals are met."""
    forwards, inputs, weights = BARE[name]
    print(f"{name}: bare is {forwards} forwards, {inputs} input gradients, {weights} weight gradients")
    met = True
    for row, t in times.items():
        line = f"  {row:<10} {1000 * statistics.median(t):9.1f} ms"
        if row != "ours":
            ratios = [a / b for a, b in zip(times["ours"], t, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
            line += f"   ours / {row:<10} {middle:.3f}  quartiles {low:.3f} .. {high:.3f}"
            if row in GOALS[name]:
                line += f"  goal {GOALS[name][row]:.2f}  {'met' if middle <= GOALS[name][row] else 'MISSED'}"
                met &= middle <= GOALS[name][row]
        print(line)
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="preact_resnet18")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--method", choices=GOALS, action="append", help="may be repeated; default: all")
    parser.add_argument("--checkouts", type=Path, help="folder with TRADES, AWP, MAIR as their authors publish them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    f = create_model(args.model, num_classes=10).to(args.device)
    x = torch.rand(args.batch_size, 3, 32, 32).to(args.device)
    labels = torch.randint(10, (len(x),)).to(args.device)
    print(f"{args.model}, batch {len(x)}, fp32, {args.device}, {args.threads} threads, torch {torch.__version__}")
    met = True
    for name in args.method or GOALS:
        met &= report(name, measure(contestants(name, f, x, labels, args.checkouts), args.rounds, args.device))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
