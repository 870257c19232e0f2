"""Our attacks beside those of torchattacks, foolbox and adversarial-library: what they reach, what they spend, how long they take.

    python scripts/bench_zoo.py --model runs/demo/trades/best.safetensors          the whole table
    python scripts/bench_zoo.py --attacks pgd ddn --num-examples 100 --seeds 1     a part of it
    python scripts/bench_zoo.py --table                                            the table of what has been measured

Rivals are used where they can be imported (``pip install --target DIR foolbox gitpython adv-lib`` and ``PYTHONPATH=DIR``). All
get the same images, model, radius and steps; PGD gets the same starting noise. Per seed all contestants of a row run in turn, in
an order that rotates, and the ratio of times is taken within it; its median and quartiles are those over the seeds, three at
least. What comes back is scored here: outside of the box or the ball (beyond rounding) nothing counts. Success is the share of
all images that are misclassified then, clean mistakes included; the median norm is over the images that were right, infinite
where nothing was found. Passes are counted by one wrapper around the model: images through ``forward``, and images whose logits
got a gradient. Results go to --out, one line per run; a second call measures only what is missing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from robustlab import config, geometry
from robustlab.models.checkpoint import load_model
from robustlab.modes import frozen
from robustlab.rng import Rng
from robustlab.types import one_hot

NAMES = {"foolbox": "foolbox", "adv_lib.attacks": "adv-lib", "torchattacks": "torchattacks"}
P = {"linf": float("inf"), "l2": 2, "l1": 1}
Run = Callable[[nn.Module, Tensor, Tensor, Tensor, int], Tensor]  # (model, images, labels, start noise, seed) -> images


class Counted(nn.Module):
    """Counts the images that go forward and those whose logits get a gradient."""

    def __init__(self, f: nn.Module):
        super().__init__()
        self.f, self.forwards, self.backwards = f, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        z = self.f(x)
        self.forwards += len(x)
        if z.requires_grad:
            z.register_hook(self._count)
        return z

    def _count(self, g: Tensor) -> None:
        self.backwards += len(g)


@dataclass(frozen=True)
class Row:
    """One line of the table: what ours is called, and the rivals' equivalents."""

    attack: str
    norm: str
    eps: float | None  # None: the smallest perturbation is looked for
    budget: str
    ours: dict[str, Any]
    rivals: dict[str, Run]
    examples: int = 10**9  # at most

    @property
    def key(self) -> str:
        return f"{self.attack} {self.norm}" + (" rescaled" if self.ours.get("rescale") else "")


def ours(row: Row) -> Run:
    attack = config.build("attack", row.attack, norm=row.norm, eps=row.eps, **row.ours)

    def run(f: nn.Module, x: Tensor, labels: Tensor, noise: Tensor, seed: int) -> Tensor:
        with frozen(f):
            return attack.run(f, x, one_hot(labels, 10, x.dtype), Rng(seed).at(torch.arange(len(x))))[0]

    return run


def noise_of(row: Row, x: Tensor, seed: int) -> Tensor:
    """The noise with which our PGD starts."""
    rng = Rng(seed).at(torch.arange(len(x))).child("restart", 0).child("start")
    return geometry.sample_ball(x, row.norm, row.eps or 0.0, rng)


# -------------------------------------------------------------------------------------------------------------- rivals


def torchattack(name: str, **fields: Any) -> Run:
    def run(f: nn.Module, x: Tensor, labels: Tensor, noise: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        attack = getattr(importlib.import_module("torchattacks"), name)(f, **fields)
        if hasattr(attack, "seed"):
            attack.seed = seed
        if name != "PGD":
            return attack(x, labels)
        with mock.patch.object(torch.Tensor, "uniform_", lambda like, *_: like.copy_(noise)):
            return attack(x, labels)

    return run


def adv_lib(name: str, **fields: Any) -> Run:
    def run(f: nn.Module, x: Tensor, labels: Tensor, noise: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return getattr(importlib.import_module("adv_lib.attacks"), name)(f, x, labels, **fields)

    return run


def foolbox(name: str, eps: float | None = None, **fields: Any) -> Run:
    def run(f: nn.Module, x: Tensor, labels: Tensor, noise: Tensor, seed: int) -> Tensor:
        fb, ep = importlib.import_module("foolbox"), importlib.import_module("eagerpy")
        torch.manual_seed(seed)
        attack = getattr(fb.attacks, name)(**fields)
        attack.get_random_start = lambda x0, _: x0 + ep.astensor(noise)
        model = fb.PyTorchModel(f, bounds=(0, 1), device="cpu")
        out = attack.run(model, x, fb.criteria.Misclassification(labels), **({} if eps is None else {"epsilon": eps}))
        return out.raw if hasattr(out, "raw") else out

    return run


def found() -> dict[str, str]:
    """The rivals that can be imported, with their versions. adv-lib wants a plotting client that nothing here uses."""
    sys.modules.setdefault("visdom", types.SimpleNamespace(Visdom=object))  # type: ignore[arg-type]
    versions = {}
    for module, name in NAMES.items():
        try:
            package = importlib.import_module(module.partition(".")[0])
            importlib.import_module(module)
        except ImportError:
            continue
        versions[name] = str(getattr(package, "__version__", "?"))
    return versions


def table(eps: float) -> Iterator[Row]:
    """The rows. Ours spend passes at the end of a search, so they get so many fewer steps: at most 101 + 98 in all.

    torchattacks' Square compresses its schedule of window sizes, made for 10,000 queries, into the budget unless told not to.
    """
    step = eps / 4
    yield Row("pgd", "linf", eps, "20 steps", {"steps": 20, "step": step}, {
        "torchattacks": torchattack("PGD", eps=eps, alpha=step, steps=20),
        "foolbox": foolbox("LinfPGD", eps, abs_stepsize=step, steps=20)})  # fmt: skip
    yield Row("apgd", "linf", eps, "50 steps, ce", {"steps": 50, "restarts": 1}, {
        "torchattacks": torchattack("APGD", norm="Linf", eps=eps, steps=50, loss="ce"),
        "adv-lib": adv_lib("apgd", eps=eps, norm=P["linf"], n_iter=50, loss_function="ce")})  # fmt: skip
    yield Row("apgd", "l2", 8 * eps, "50 steps, ce", {"steps": 50, "restarts": 1}, {
        "torchattacks": torchattack("APGD", norm="L2", eps=8 * eps, steps=50, loss="ce"),
        "adv-lib": adv_lib("apgd", eps=8 * eps, norm=P["l2"], n_iter=50, loss_function="ce")})  # fmt: skip
    yield Row("square", "linf", eps, "1000 queries", {"queries": 1000}, {
        "torchattacks": torchattack("Square", norm="Linf", eps=eps, n_queries=1000, resc_schedule=False)})  # fmt: skip
    yield Row("square", "linf", eps, "1000 queries, rescaled", {"queries": 1000, "rescale": True}, {
        "torchattacks": torchattack("Square", norm="Linf", eps=eps, n_queries=1000)})  # fmt: skip
    yield Row("square", "l2", 8 * eps, "1000 queries", {"queries": 1000}, {
        "torchattacks": torchattack("Square", norm="L2", eps=8 * eps, n_queries=1000, resc_schedule=False)})  # fmt: skip
    yield Row("ddn", "l2", None, "100 steps", {"steps": 89, "refine": 9}, {
        "foolbox": foolbox("DDNAttack", steps=100), "adv-lib": adv_lib("ddn", steps=100, levels=None)})  # fmt: skip
    for norm, name in (("linf", "LInf"), ("l2", "L2"), ("l1", "L1")):
        yield Row("fmn", norm, None, "100 steps", {"steps": 89, "refine": 9}, {
            "foolbox": foolbox(f"{name}FMNAttack", steps=100),
            "adv-lib": adv_lib("fmn", norm=P[norm], steps=100)})  # fmt: skip
    for norm in ("linf", "l2"):
        yield Row("fab", norm, None, "20 steps", {"steps": 18}, {
            "torchattacks": torchattack("FAB", norm=norm.capitalize(), eps=1e3, steps=20),
            "adv-lib": adv_lib("fab", norm=P[norm], n_iter=20)}, examples=200)  # fmt: skip
    yield Row("cw", "l2", None, "9 x 100 steps", {"steps": 100}, {
        "foolbox": foolbox("L2CarliniWagnerAttack", steps=100),
        "adv-lib": adv_lib("carlini_wagner_l2", max_iterations=100),
        "torchattacks": torchattack("CW", steps=900)}, examples=200)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- measure


def score(f: nn.Module, row: Row, x: Tensor, labels: Tensor, x_adv: Tensor) -> dict[str, float]:
    with torch.no_grad():
        right, size = f(x).argmax(1) == labels, geometry.norm_of(x_adv - x, row.norm)
        inside = (x_adv.flatten(1).amin(1) >= 0) & (x_adv.flatten(1).amax(1) <= 1)
        if row.eps is not None:
            inside &= size <= row.eps * (1 + 1e-4)
        hit = (f(x_adv).argmax(1) != labels) & inside
    if row.eps is not None:
        return {"reached": 100 * float((hit | ~right).double().mean()), "outside": int((~inside).sum())}
    size = torch.where(hit, size, torch.inf)[right]
    return {"reached": float(size.median()), "missed": int(size.isinf().sum()), "outside": int((~inside).sum())}


def measure(row: Row, who: str, f: nn.Module, x: Tensor, labels: Tensor, seed: int, batch: int) -> dict[str, Any]:
    run, counted = ours(row) if who == "ours" else row.rivals[who], Counted(f).eval()
    out, start = [], time.perf_counter()
    for part in torch.arange(len(x)).split(batch):
        noise = noise_of(row, x[part], seed) if row.attack == "pgd" else x[part]
        out.append(run(counted, x[part], labels[part], noise, seed).detach().to(x.dtype))
    seconds = time.perf_counter() - start
    cost = {"forwards": counted.forwards / len(x), "backwards": counted.backwards / len(x), "seconds": seconds}
    return {"row": row.key, "who": who, "seed": seed, "n": len(x), **score(f, row, x, labels, torch.cat(out)), **cost}


# --------------------------------------------------------------------------------------------------------------- print


def lines(rows: list[Row], results: list[dict[str, Any]]) -> Iterator[str]:
    """The table in markdown."""
    yield "| attack | budget | images x seeds | success % or norm | theirs | passes (F + B) | theirs | time, theirs / ours |"
    yield "|---|---|---|---:|---:|---:|---:|---:|"
    for row in rows:
        own = {(r["seed"], r["n"]): r for r in results if r["row"] == row.key and r["who"] == "ours"}
        for who in row.rivals:
            mine = [r for r in results if r["row"] == row.key and r["who"] == who and (r["seed"], r["n"]) in own]
            pairs = [(own[r["seed"], r["n"]], r) for r in mine if r["n"] == max(m["n"] for m in mine)]
            if not pairs:
                continue
            ratios = sorted(b["seconds"] / a["seconds"] for a, b in pairs)
            quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
            reached, spent = zip(*((_reached(row, p), _passes(p)) for p in zip(*pairs, strict=True)), strict=True)
            name = f"`{row.attack}` {row.norm}" + (f" {row.eps:g}" if row.eps is not None else "")
            wall = f"{quartiles[1]:.2f} ({quartiles[0]:.2f} .. {quartiles[2]:.2f})" if len(ratios) > 2 else "-"
            size = f"{pairs[0][1]['n']} x {len(pairs)}"
            yield f"| {name} | {row.budget} | {size} | {reached[0]} | {who} {reached[1]} | {spent[0]} | {spent[1]} | {wall} |"


def _reached(row: Row, runs: tuple[dict[str, Any], ...]) -> str:
    value, missed = statistics.mean(r["reached"] for r in runs), sum(r.get("missed", 0) + r["outside"] for r in runs)
    return (f"{value:.2f}" if row.eps is not None else f"{value:.4f}") + (f" ({missed} lost)" if missed else "")


def _passes(runs: tuple[dict[str, Any], ...]) -> str:
    forwards, backwards = (statistics.mean(r[k] for r in runs) for k in ("forwards", "backwards"))
    return f"{forwards:.0f} + {backwards:.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/trades/best.safetensors")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--eps", type=float, default=0.1, help="in linf; l2 has eight times that")
    parser.add_argument("--num-examples", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--attacks", nargs="*", help="names, or name:norm; all if not given")
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_zoo.jsonl"))
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    versions = found()
    print("rivals:", ", ".join(f"{k} {v}" for k, v in versions.items()) or "none", flush=True)
    wanted = args.attacks or [row.attack for row in table(args.eps)]
    rows = [row for row in table(args.eps) if row.attack in wanted or f"{row.attack}:{row.norm}" in wanted]
    results = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if not args.table:
        f = load_model(args.model).eval()
        x, labels, _ = config.build("dataset", args.data, size=args.size).load().test.at(torch.arange(args.num_examples))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for row in rows:
            for seed in range(args.seeds):
                n = min(args.num_examples, row.examples)
                done = {r["who"] for r in results if (r["row"], r["seed"], r["n"]) == (row.key, seed, n)}
                names = ["ours", *(r for r in row.rivals if r.partition(" ")[0] in versions)]
                if done >= set(names):
                    continue
                for who in names[seed % len(names) :] + names[: seed % len(names)]:
                    result = measure(row, who, f, x[:n], labels[:n], seed, args.batch_size)
                    print(json.dumps(result), flush=True)
                    results = [r for r in results if (r["row"], r["seed"], r["who"], r["n"]) != (row.key, seed, who, n)] + [result]
                    args.out.write_text("".join(json.dumps(r) + "\n" for r in results))
    print("\n".join(lines(rows, results)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
