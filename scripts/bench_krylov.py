"""What the second order adds: steps in Krylov subspaces beside the gradient step of the same l2 norm, on digits.

    python scripts/bench_krylov.py                          trains a ReLU and a SiLU net, a minute in all
    python scripts/bench_krylov.py --model runs/demo/pgd-at/best.safetensors

For every m: the mean increase of the loss (cross-entropy, float64) over the test digits; the mean of the paired differences to the
gradient step; the share of the digits on which the increase is lower than the gradient step's. First for the steps themselves, all
of the same norm, then after the projection on [0, 1], which shortens them. The last row is the direction of the paper's text.
Exits with 1 when a mean paired difference of the steps themselves is negative.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from robustlab import config, geometry, losses
from robustlab.attacks.krylov import Krylov, curvature
from robustlab.models import create_model
from robustlab.models.checkpoint import load_model, read_meta
from robustlab.modes import frozen
from robustlab.types import ImageSet, one_hot

BASES = (1, 2, 5, 9)


@dataclass(frozen=True)
class Row:
    """Increases of the loss (N,), float64, of one kind of step: as it is, and projected on the box."""

    label: str
    free: Tensor
    boxed: Tensor


def train(data: ImageSet, activation: str, adversarial: float, epochs: int, width: int = 16) -> nn.Module:
    """A small net, trained with FGSM of radius ``adversarial`` (0: on clean images), in eval mode."""
    x, y, _ = next(iter(data.batches([torch.arange(len(data))])))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        f = create_model("small_cnn", num_classes=10, in_channels=x.shape[1], width=width, activation=activation).train()
        optimizer = torch.optim.SGD(f.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(64):
                x_k = x[rows]
                if adversarial:
                    x_k.requires_grad_()
                    (g,) = torch.autograd.grad(F.cross_entropy(f(x_k), y[rows], reduction="sum"), x_k)
                    x_k = (x_k.detach() + adversarial * g.sign()).clamp(0, 1)
                optimizer.zero_grad()
                F.cross_entropy(f(x_k), y[rows]).backward()
                optimizer.step()
    return f.eval()


def measure(f: nn.Module, x: Tensor, labels: Tensor, eps: float, bases: Sequence[int] = BASES) -> list[Row]:
    """All kinds of steps of norm ``eps`` from images (N, C, H, W); the gradient step is the first row."""
    f, x = f.double(), x.double()
    y = one_hot(labels, 10, x.dtype)
    kinds = {"gradient": Krylov(m=1)}
    kinds |= {f"m = {m}": Krylov(m=m) for m in bases} | {f"newton, m = {max(bases)}": Krylov(m=max(bases), mode="newton")}
    with frozen(f):
        g, product = curvature(f, x, y, losses.cross_entropy)

        @torch.no_grad()
        def increase(x_adv: Tensor) -> Tensor:
            return losses.cross_entropy(f(x_adv), y) - losses.cross_entropy(f(x), y)

        rows = []
        for label, attack in kinds.items():
            d = eps * geometry.steepest(g, "l2") if label == "gradient" else attack.direction(g, product, eps)
            x_adv = x + d.view_as(x)
            rows.append(Row(label, increase(x_adv), increase(geometry.project(x_adv, x, "l2", eps))))
    return rows


def describe(rows: Sequence[Row]) -> str:
    def figures(step: Tensor, gradient: Tensor) -> str:
        gain = step - gradient
        lower = 100 * (gain < -1e-12).double().mean()
        return f"{float(step.mean()):12.6f}{float(gain.mean()):+12.6f}{float(lower):8.1f} %"

    head = f"{'':<16}{'increase':>12}{'paired':>12}{'lower':>10}   {'boxed':>12}{'paired':>12}{'lower':>10}"
    lines = [f"{r.label:<16}{figures(r.free, rows[0].free)}   {figures(r.boxed, rows[0].boxed)}" for r in rows]
    return "\n".join([head, *lines])


def met(rows: Sequence[Row]) -> bool:
    """Whether no trust-region step is worse than the gradient step in the mean (m = 1 is that step, up to rounding)."""
    return all(float((r.free - rows[0].free).mean()) >= -1e-12 for r in rows if r.label.startswith("m ="))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="a checkpoint for digits; may be repeated")
    parser.add_argument("--eps", type=float, default=0.5)
    parser.add_argument("--num-examples", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--adversarial", type=float, default=0.0, help="radius of the FGSM training; 0 trains on clean images")
    args = parser.parse_args()
    models = {path: load_model(path) for path in args.model}
    sizes = {path: read_meta(path)["image_shape"] for path in models}
    if not models:
        data = config.build("dataset", "digits").load().train
        models = {f"small_cnn, {a}": train(data, a, args.adversarial, args.epochs) for a in ("relu", "silu")}
    good = True
    for name, f in models.items():
        channels, size, _ = sizes.get(name, (1, 16, 16))
        test = config.build("dataset", "digits", size=size, channels=channels).load().test
        x, y, _ = next(iter(test.batches([torch.arange(min(args.num_examples, len(test)))])))
        rows = measure(f, x, y, args.eps)
        with torch.no_grad():
            accuracy = float((f(x.double()).argmax(1) == y).double().mean())
        print(f"{name}: {len(x)} digits, accuracy {100 * accuracy:.1f} %, l2 norm {args.eps:g}")
        print(describe(rows), end="\n\n")
        good &= met(rows)
    print("mean paired differences at least zero:", "met" if good else "MISSED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
