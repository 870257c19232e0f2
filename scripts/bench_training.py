"""Our training step beside the public code's: PGD-AT, TRADES and AWP on the same network and batch.

    python scripts/bench_training.py                      preact_resnet18, batch 16, fp32, 7 rounds
    python scripts/bench_training.py --checkouts DIR      with public code: DIR/RICE, DIR/TRADES, DIR/AWP, DIR/MAIR, as published
    python scripts/bench_training.py --device cuda --batch-size 128 --json times.json
    python scripts/bench_training.py --rounds 1 --model small_cnn

    RICE    github.com/locuslab/robust_overfitting        TRADES  github.com/yaodongyu/TRADES
    AWP     github.com/csdongxian/AWP                     MAIR    github.com/Harry24k/MAIR

Rows: ``bare`` is the least work that the method needs, straight-line, with frozen weights during the attack; ``official`` the
authors' own code, run from a checkout: their attack, loss and weight perturbation, in the order of their training loop, with what
it logs; ``mair`` the MAIR library, installed or from a checkout. Without a checkout of Rice et al.'s PGD-AT, ``rice`` is the same
work in straight lines: weights keep collecting gradients during the attack, one more forward pass compares restarts, one is for
the log. MAIR always attacks in eval mode, which is cheaper than train mode; ``ours eval``, our step with ``attack_bn: eval``, does
the same work. Ours and ``bare`` run in channels_last, as ``robustlab train`` does; public code in the format that it is published
with, and ``mair nhwc`` is MAIR given ours. The networks normalise by themselves; what the public code does for that is left out.

The contestants of a method run in turn within a round, in an order that rotates; a ratio is taken within each round, its median
and quartiles over the rounds are printed. Our bf16 step is an extra row. Exits with 1 when a median misses its goal.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

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
    "pgd-at": {("ours", "bare"): 1.05, ("ours", "rice"): 0.75, ("ours", "official"): 0.75, ("ours", "mair"): 1.02},
    "trades": {("ours", "bare"): 1.05, ("ours", "official"): 0.80, ("ours", "mair"): 1.02},
    "awp": {("ours", "bare"): 1.05, ("ours", "official"): 0.75, ("ours", "mair"): 0.75},
}
# forward passes, input gradients, weight gradients of a batch that the row "bare" makes
BARE = {"pgd-at": (11, 10, 1), "trades": (13, 10, 2), "awp": (12, 10, 2)}
Step = Callable[[], Any]


def sgd(f: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(f.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def ours(name: str, f: nn.Module, x: Tensor, labels: Tensor, precision: str = "fp32", **fields: Any) -> Step:
    trainer = with_threat(build("trainer", {"name": name, **fields}), Threat("linf", EPS))
    outer = Outer(f, trainer, context_of(f, 10, len(x), (3, 32, 32)), precision)
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
                    w.addcmul_(g, GAMMA * w.norm() / g.norm().clamp_min(1e-20))
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
    return delta.detach()


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


def attack_of(path: Path) -> Callable[..., Tensor] | None:
    """The function ``attack_pgd`` of a training script, which cannot be imported: it asks for a GPU and a data set at once."""
    if not path.is_file():
        return None
    tree = ast.parse(path.read_text(), str(path))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in ("attack_pgd", "clamp")]
    space = {"torch": torch, "nn": nn, "F": F, "lower_limit": 0, "upper_limit": 1, "normalize": lambda images: images}
    exec(compile(tree, str(path), "exec"), space)
    return space["attack_pgd"]  # type: ignore[return-value]


@contextlib.contextmanager
def at_home(x: Tensor) -> Iterator[None]:
    """Public code moves what it makes to a GPU, unasked; it stays on the CPU inside, where ``x`` is."""
    cuda = torch.Tensor.cuda
    if not x.is_cuda:
        torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.cuda = cuda  # type: ignore[method-assign]


def log(f: nn.Module, x: Tensor, labels: Tensor, z_adv: Tensor, loss_adv: Tensor) -> None:
    """What the training loops of Rice et al. and of AWP note after each update; the clean pass has a graph, as theirs."""
    z = f(x)
    loss = F.cross_entropy(z, labels)
    for logits, value in ((z_adv, loss_adv), (z, loss)):
        value.item()
        (logits.max(1)[1] == labels).sum().item()


def official_pgd(attack: Callable[..., Tensor], f: nn.Module, x: Tensor, labels: Tensor) -> Step:
    """Their attack in the order of their training script."""
    optimizer = sgd(f)

    def step() -> None:
        f.train()
        with at_home(x):
            delta = attack(f, x, labels, EPS, STEP, STEPS, 1, "l_inf").detach()
        z = f((x + delta).clamp(0, 1))
        loss = F.cross_entropy(z, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log(f, x, labels, z, loss)

    return step


def official_trades(module: Any, f: nn.Module, x: Tensor, labels: Tensor) -> Step:
    optimizer = sgd(f)

    def step() -> None:
        f.train()
        optimizer.zero_grad()
        with at_home(x):
            loss = module.trades_loss(f, x, labels, optimizer, step_size=STEP, epsilon=EPS, perturb_steps=STEPS, beta=BETA)
        loss.backward()
        optimizer.step()

    return step


def official_awp(module: Any, attack: Callable[..., Tensor], f: nn.Module, x: Tensor, labels: Tensor) -> Step:
    """Their attack and weight perturbation in the order of their training script."""
    optimizer, proxy = sgd(f), copy.deepcopy(f)
    adversary = module.AdvWeightPerturb(model=f, proxy=proxy, proxy_optim=torch.optim.SGD(proxy.parameters(), lr=0.01), gamma=GAMMA)

    def step() -> None:
        f.train()
        with at_home(x):
            delta = attack(f, x, labels, EPS, STEP, STEPS, 1, "l_inf").detach()
        x_adv = (x + delta).clamp(0, 1)
        diff = adversary.calc_awp(inputs_adv=x_adv, targets=labels)
        adversary.perturb(diff)
        z = f(x_adv)
        loss = F.cross_entropy(z, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        adversary.restore(diff)
        log(f, x, labels, z, loss)

    return step


def mair_library(folder: Path | None) -> Any:
    """MAIR, from a checkout or installed; None where it cannot be imported.

    Its tables, pictures and data sets need packages that its training step does not: those that are absent are stood in for
    while it is imported.
    """
    if folder is not None and folder.is_dir() and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    absent: list[str] = []
    try:
        while True:
            try:
                import mair

                return mair
            except ImportError as error:
                name = str(error.name) if isinstance(error, ModuleNotFoundError) else "mair"
                if name in absent or name.split(".")[0] in ("mair", "torch", "numpy"):
                    print(f"mair left out: {error}")
                    return None
                absent.append(name)
                sys.modules[name] = MagicMock()
    finally:
        for name in absent:
            del sys.modules[name]


def mair(library: Any, name: str, f: nn.Module, x: Tensor, labels: Tensor) -> Step:
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


def official(name: str, new: Callable[[], nn.Module], x: Tensor, labels: Tensor, folder: Path) -> Step | None:
    """The authors' code, or None without a checkout of it."""
    if name == "trades":
        module = load(folder / "TRADES/trades.py", "official_trades")
        return module and official_trades(module, new(), x, labels)
    attack = attack_of(folder / ("RICE/train_cifar.py" if name == "pgd-at" else "AWP/AT_AWP/train_cifar10.py"))
    if attack is None or name == "pgd-at":
        return attack and official_pgd(attack, new(), x, labels)
    module = load(folder / "AWP/AT_AWP/utils_awp.py", "official_awp")
    return module and official_awp(module, attack, new(), x, labels)


def contestants(name: str, f: nn.Module, x: Tensor, labels: Tensor, folder: Path | None) -> dict[str, Step]:
    """Every row of a method, each with its own copy of the network."""

    def new() -> nn.Module:
        return copy.deepcopy(f).train()

    def nhwc() -> nn.Module:
        return new().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    x_nhwc = x.to(memory_format=torch.channels_last)
    rows = {
        "ours": ours(name, nhwc(), x_nhwc, labels),
        "ours bf16": ours(name, nhwc(), x_nhwc, labels, "bf16"),
        "bare": bare(name, nhwc(), x_nhwc, labels),
    }
    if folder is not None and (step := official(name, new, x, labels, folder)):
        rows["official"] = step
    elif name == "pgd-at":
        rows["rice"] = official_pgd(lambda f, x, labels, *_: rice_attack(f, x, labels), new(), x, labels)
    if (library := mair_library(folder and folder / "MAIR")) is not None:
        rows["mair"] = mair(library, name, new(), x, labels)
        rows["mair nhwc"] = mair(library, name, nhwc(), x_nhwc, labels)
        if name == "pgd-at":
            rows["ours eval"] = ours(name, nhwc(), x_nhwc, labels, attack_bn="eval")
    return rows


# --------------------------------------------------------------------------------------------------------- measurement


def seconds(step: Step, device: str) -> float:
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after one round that does not count."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for r in range(rounds + 1):
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            t = seconds(steps[name], device)
            if r:
                times[name].append(t)
    return times


def ratios(name: str, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Each of our fp32 rows over each other row: median and quartiles over the rounds, with the goal where there is one."""
    out = []
    for over in times:
        for mine in ("ours", "ours eval"):
            goal = GOALS[name].get((mine, over))
            if over == mine or mine not in times or (mine == "ours eval" and not over.startswith("mair")):
                continue
            each = [a / b for a, b in zip(times[mine], times[over], strict=True)]
            low, middle, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
            met = None if goal is None else middle <= goal
            out.append({"ours": mine, "over": over, "median": middle, "quartiles": [low, high], "goal": goal, "met": met})
    return out


def report(name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """Print the times and ratios of a method, and return them."""
    counted = dict(zip(("forwards", "input gradients", "weight gradients"), BARE[name], strict=True))
    print(f"{name}: bare is {', '.join(f'{n} {what}' for what, n in counted.items())}")
    for row, t in times.items():
        print(f"  {row:<10} {1000 * statistics.median(t):9.1f} ms")
    found = ratios(name, times)
    for r in found:
        goal = "" if r["goal"] is None else f"  goal {r['goal']:.2f}  {'met' if r['met'] else 'MISSED'}"
        low, high = r["quartiles"]
        print(f"  {r['ours']:>9} / {r['over']:<10} {r['median']:.3f}  quartiles {low:.3f} .. {high:.3f}{goal}", flush=True)
    for (mine, over), limit in GOALS[name].items():
        if over not in times and over != "rice":
            print(f"  {mine:>9} / {over:<10} not measured, no public code here; goal {limit:.2f}")
    return {"seconds": times, "bare": counted, "ratios": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="preact_resnet18")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--method", choices=GOALS, action="append", help="may be repeated; default: all")
    parser.add_argument("--checkouts", type=Path, help="folder with RICE, TRADES, AWP, MAIR as their authors publish them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, seconds and ratios there")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    setting = {"model": args.model, "batch": args.batch_size, "precision": "fp32", "device": args.device, "threads": args.threads}
    setting |= {"torch": torch.__version__, "rounds": args.rounds}
    if args.device != "cpu":
        torch.cuda.set_device(torch.device(args.device).index or 0)  # public code moves its tensors to the current one
        setting |= {"gpu": torch.cuda.get_device_name(), "tf32 convolutions": torch.backends.cudnn.allow_tf32}
    torch.manual_seed(0)
    f = create_model(args.model, num_classes=10).to(args.device)
    x = torch.rand(args.batch_size, 3, 32, 32).to(args.device)
    labels = torch.randint(10, (len(x),)).to(args.device)
    print(", ".join(f"{k} {v}" for k, v in setting.items()), flush=True)
    methods = {}
    for name in args.method or GOALS:
        methods[name] = report(name, measure(contestants(name, f, x, labels, args.checkouts), args.rounds, args.device))
    if args.json is not None:
        args.json.write_text(json.dumps({"setting": setting, "methods": methods}, indent=1) + "\n")
    return 0 if all(r["met"] is not False for m in methods.values() for r in m["ratios"]) else 1


if __name__ == "__main__":
    sys.exit(main())
