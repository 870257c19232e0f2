"""How near the smallest perturbation every minimum-norm attack comes where that is known: on linear classifiers.

    python scripts/distances_linear.py                                      the whole table
    python scripts/distances_linear.py --attacks hop-skip-jump ddn:l2       a part of it

Logits W x + b in float64, defaults of every attack, images of class 0; ``far``: pixels near 0.5; ``active``: most are 0 or 1, and
the nearest point has coordinates at their bounds. ``scale`` multiplies the logits. The nearest point of class k is the solution of
min ||d||_p : <v, d> >= c, x + d in [0, 1], with v = w_k - w_0 and c = z_0 - z_k. Coordinate i has room r_i in the direction of v_i
and moves by min(t rho_i, r_i) for one multiplier t, rho_i = 1 (linf) or |v_i| (l2), which is found on the sorted breakpoints
r_i / rho_i; in l1 those with the largest |v_i| move first; in l0 all sets of pixels are tried. The smallest over k counts. All this
is numpy and shares nothing with the attacks. Printed: median and largest ratio of what the attack found to that (l0: the share of
images with the fewest pixels, and the most pixels too many), how many found nothing, and the mean of the passes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from robustlab import registry
from robustlab.rng import Rng
from robustlab.types import one_hot

ATTACKS = ("deepfool", "fab", "ddn", "fmn", "pdpgd", "cw", "ead", "sigma-zero", "hop-skip-jump")
FIELDS = {"hop-skip-jump": {"queries": 30_000}}
SHAPE, SMALL = (2, 5, 5), (1, 3, 4)  # l0 tries all sets of the pixels of the small one
Solver = Callable[[np.ndarray, float, np.ndarray], float]


def problem(regime: str, classes: int, shape: tuple[int, ...], images: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (K, D), biases (K,), images (N, D) of class 0; the bias puts the others 1 to 4 behind it."""
    rng, d = np.random.default_rng(seed), int(np.prod(shape))
    w = rng.normal(size=(classes, d))
    base = np.full(d, 0.5) if regime == "far" else rng.choice([0.0, 1.0, 0.4], size=d)
    b = -(w @ base) - np.where(np.arange(classes) > 0, rng.uniform(1, 4, classes), 0.0)
    x = np.clip(base + rng.uniform(-0.05, 0.05, (20 * images, d)), 0, 1)
    return w, b, x[(x @ w.T + b).argmax(1) == 0][:images]


def to_linf_or_l2(v: np.ndarray, c: float, room: np.ndarray, norm: str) -> float:
    """The gain of the multiplier t is sum |v_i| min(t rho_i, r_i), which rises: the first breakpoint that is enough, a line."""
    v, room = np.abs(v)[v != 0], room[v != 0]
    rho = np.ones_like(v) if norm == "linf" else v
    order = np.argsort(room / rho)
    v, room, rho = v[order], room[order], rho[order]
    spent = np.r_[0.0, np.cumsum(v * room)]  # by those that are at their bound
    slope = np.r_[np.cumsum((v * rho)[::-1])[::-1], 0.0]  # of those that are not
    gain = spent[:-1] + slope[:-1] * room / rho
    if gain[-1] < c:
        return np.inf
    j = int(np.searchsorted(gain, c))
    d = np.minimum((c - spent[j]) / slope[j] * rho, room)
    return float(d.max() if norm == "linf" else np.linalg.norm(d))


def to_l1(v: np.ndarray, c: float, room: np.ndarray) -> float:
    order = np.argsort(-np.abs(v))
    gain = np.r_[0.0, np.cumsum(np.abs(v[order]) * room[order])]
    if gain[-1] < c:
        return np.inf
    j = int(np.searchsorted(gain, c)) - 1
    return float(room[order][:j].sum() + (c - gain[j]) / np.abs(v[order][j]))


def to_l0(v: np.ndarray, c: float, room: np.ndarray, pixels: int) -> float:
    gain = (np.abs(v) * room).reshape(-1, pixels).sum(0)
    sets = np.array(list(itertools.product([0, 1], repeat=pixels)))
    enough = sets @ gain > c
    return float(sets[enough].sum(1).min()) if enough.any() else np.inf


def smallest(w: np.ndarray, b: np.ndarray, x: np.ndarray, norm: str, pixels: int) -> np.ndarray:
    """The distance of each image to the nearest point of another class (N,)."""
    solver: Solver = {
        "l1": to_l1,
        "l0": lambda v, c, room: to_l0(v, c, room, pixels),
    }.get(norm, lambda v, c, room: to_linf_or_l2(v, c, room, norm))
    best = np.full(len(x), np.inf)
    for i, (image, z) in enumerate(zip(x, x @ w.T + b, strict=True)):
        for k in range(1, len(w)):
            v = w[k] - w[0]
            best[i] = min(best[i], solver(v, z[0] - z[k], np.where(v > 0, 1 - image, image)))
    return best


def measure(name: str, norm: str, regime: str, classes: int, scale: float, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """The distances found, the smallest ones, and the passes, over all seeds."""
    shape, out = SMALL if norm == "l0" else SHAPE, []
    for seed in range(args.seeds):
        w, b, x = problem(regime, classes, shape, args.images, seed)
        w_, b_ = torch.tensor(scale * w), torch.tensor(scale * b)
        images, y = torch.tensor(x).view(-1, *shape), one_hot(torch.zeros(len(x), dtype=torch.long), classes, torch.float64)
        attack = registry.lookup("attack", name)(norm=norm, **FIELDS.get(name, {}))
        _, info = attack.run(lambda v, w_=w_, b_=b_: v.flatten(1) @ w_.T + b_, images, y, Rng(seed).at(torch.arange(len(x))))
        out.append((info["distance"].numpy(), smallest(w, b, x, norm, int(np.prod(shape[1:]))), info["passes"].numpy()))
    found, best, passes = (np.concatenate(part) for part in zip(*out, strict=True))
    return {"found": found, "best": best, "passes": passes.mean(0)}


def line(result: dict[str, np.ndarray], norm: str) -> str:
    found, best = result["found"], result["best"]
    hit, cost = np.isfinite(found), f"{result['passes'][0]:.0f} + {result['passes'][1]:.0f}"
    lost = f"{int((~hit).sum())} of {len(hit)}"
    if norm == "l0":
        return f"{100 * (found == best).mean():.0f} % exact | +{(found - best)[hit].max():.0f} | {lost} | {cost} |"
    ratio = found[hit] / best[hit]
    assert ratio.min() > 1 - 1e-9, "nearer than the nearest point"
    return f"{np.median(ratio):.4f} | {ratio.max():.4f} | {lost} | {cost} |"


def rows(wanted: list[str]) -> Iterator[tuple[str, str]]:
    for name in ATTACKS:
        for norm in registry.lookup("attack", name).norms:
            if not wanted or name in wanted or f"{name}:{norm}" in wanted:
                yield name, norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", nargs="*", default=[], help="names, or name:norm; all if not given")
    parser.add_argument("--images", type=int, default=6, help="per classifier")
    parser.add_argument("--seeds", type=int, default=4, help="classifiers")
    args = parser.parse_args()
    print("| attack | box | classes | logits times | median | worst | nothing found | passes (F + B) |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for name, norm in rows(args.attacks):
        for regime, classes, scale in itertools.product(("far", "active"), (2, 10), (1.0, 0.1)):
            result = measure(name, norm, regime, classes, scale, args)
            print(f"| `{name}` {norm} | {regime} | {classes} | {scale:g} | {line(result, norm)}", flush=True)


if __name__ == "__main__":
    main()
