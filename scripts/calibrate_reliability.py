"""The figures of every reliability check on every model of a zoo: honest nets, and seven broken defences in three strengths each.

    python scripts/calibrate_reliability.py                                   digits, 16 px: the thresholds were set on this
    python scripts/calibrate_reliability.py --size 8 --activation silu --width 8
    python scripts/calibrate_reliability.py --data fashion --root DIR         Fashion-MNIST: DIR holds fashion-mnist/*.gz

The defences are the kinds that fooled attacks in print (Athalye, Carlini, Wagner, ICML 2018; Croce et al., ICML 2022; MeanSparse).
Each wraps a robust net with batch normalisation and has a check that is meant for it (``MEANT``). Prints one row a model: the
figure of each check, ``!`` behind a warning and ``!!`` behind a failure, and the passes spent on an image.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from robustlab.config import build
from robustlab.evaluation.reliability import Finding, Report, examine
from robustlab.evaluation.reliability.checks import CHECKS
from robustlab.models import create_model
from robustlab.modes import bn_mode, frozen
from robustlab.rng import Rng
from robustlab.types import Threat, one_hot

EPS = 0.1
MEANT = {
    "saturation": "gradients",
    "quantisation": "gradients",
    "randomness": "randomness",
    "shattered": "steps",
    "probabilities": "probabilities",
    "batch_norm": "batch_dependence",
    "sparsified": "gradient_path",
}


@dataclass(frozen=True)
class Images:
    """Training and test images in [0, 1] with labels."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def digits(size: int = 16) -> Images:
    splits = build("dataset", "digits", size=size).load()
    parts = [next(part.batches([torch.arange(len(part))]))[:2] for part in (splits.train, splits.test)]
    return Images(*parts[0], *parts[1])


def fashion(root: Path, train: int = 4000, test: int = 500) -> Images:
    """The first so many images of Fashion-MNIST, from the four original files in ``root``/fashion-mnist."""

    def read(name: str, offset: int, count: int, width: int) -> np.ndarray:
        with gzip.open(root / "fashion-mnist" / name) as file:
            raw = file.read(offset + count * width)
        return np.frombuffer(raw, np.uint8)[offset:].reshape(count, width)

    parts = []
    for split, n in (("train", train), ("t10k", test)):
        x = read(f"{split}-images-idx3-ubyte.gz", 16, n, 784).reshape(n, 1, 28, 28)
        y = read(f"{split}-labels-idx1-ubyte.gz", 8, n, 1)[:, 0]
        parts += [torch.from_numpy(x.copy()).float() / 255, torch.from_numpy(y.copy()).long()]
    return Images(*parts)


def trained(data: Images, *, robust: bool, steps: int = 360, lr: float = 0.1, **fields: object) -> nn.Module:
    """A small_cnn after ``steps`` steps of SGD on batches of 64, of adversarial training with PGD-5 if ``robust``; in eval mode."""
    torch.manual_seed(0)
    f = create_model("small_cnn", num_classes=10, in_channels=1, **fields)
    attack = build("attack", "pgd", norm="linf", eps=EPS, steps=5)
    optimizer = torch.optim.SGD(f.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    rng = Rng(0).child("calibrate")
    order = torch.cat([rng.split(1, first=e)[0].permutation(len(data.x)) for e in range(steps * 64 // len(data.x) + 1)])
    for step in range(steps):
        index = order[step * 64 : step * 64 + 64]
        x, y = data.x[index], one_hot(data.y[index], 10)
        if robust:
            with frozen(f), bn_mode(f, "eval"):
                x, _ = attack.run(f, x, y, rng.child("attack", step).at(index))
        f.train()
        loss = F.cross_entropy(f(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return f.eval()


# ----------------------------------------------------------------------------------------------------- broken defences


Between = Callable[[Tensor], Tensor] | None


class Around(nn.Module):
    """A net between two functions."""

    def __init__(self, f: nn.Module, before: Between = None, after: Between = None):
        super().__init__()
        self.f, self.before, self.after = f, before, after

    def forward(self, x: Tensor) -> Tensor:
        z = self.f(x if self.before is None else self.before(x))
        return z if self.after is None else self.after(z)


class BatchStatistics(nn.Module):
    """Batch normalisation that forgot to leave train mode."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.norm.weight, self.norm.bias, training=True)


class Sparsified(nn.Module):
    """MeanSparse: what lies within ``alpha`` standard deviations of its channel's mean becomes the mean; the rest is left alone."""

    def __init__(self, norm: nn.Module, alpha: float):
        super().__init__()
        self.norm, self.alpha, self.mean, self.std = norm, alpha, torch.zeros(()), torch.zeros(())
        self.fitting = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.fitting:
            self.mean, self.std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
        return torch.where((x - self.mean).abs() <= self.alpha * self.std, self.mean.expand_as(x), x)


def replaced(f: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module], most: int = 1000) -> nn.Module:
    """A copy of ``f`` whose first ``most`` batch normalisations are what ``make`` makes of them."""
    f = copy.deepcopy(f)
    places = [name for name, module in f.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for name in places[:most]:
        parent, _, leaf = name.rpartition(".")
        owner = f.get_submodule(parent)
        setattr(owner, leaf, make(getattr(owner, leaf)))
    return f


def sparsified(f: nn.Module, alpha: float, x: Tensor) -> nn.Module:
    f = replaced(f, lambda norm: Sparsified(norm, alpha))
    with torch.no_grad():
        f(x)
    for module in f.modules():
        if isinstance(module, Sparsified):
            module.fitting = False
    return f


def broken(f: nn.Module, x: Tensor) -> Iterator[tuple[str, float, nn.Module]]:
    """(defence, strength, model) for every broken defence around ``f``, a robust net with batch normalisation; ``x`` to fit on."""
    for scale in (100.0, 300.0, 1000.0):
        yield "saturation", scale, Around(f, after=lambda z, s=scale: s * z)
    for levels in (16.0, 8.0, 4.0):
        yield "quantisation", levels, Around(f, before=lambda x, n=levels: (x * n).round() / n)
    for sigma in (0.02, 0.05, 0.1):
        yield "randomness", sigma, Around(f, before=lambda x, s=sigma: x + s * torch.randn_like(x))
    for slope in (2.0, 4.0, 8.0):  # a dither of 0.01: invisible, and the gradient's sign is the dither's
        yield "shattered", slope, Around(f, before=lambda x, s=slope: x + 0.01 * torch.sin(100 * s * x))
    for temperature in (0.5, 1.0, 2.0):
        yield "probabilities", temperature, Around(f, after=lambda z, t=temperature: (z / t).softmax(-1))
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in f.modules())
    for most in (1, (norms + 1) // 2, norms):
        yield "batch_norm", most, replaced(f, BatchStatistics, most)
    for alpha in (0.25, 0.5, 1.0):
        yield "sparsified", alpha, sparsified(f, alpha, x)


# ---------------------------------------------------------------------------------------------------------- the table


def honest(data: Images, **fields: object) -> dict[str, nn.Module]:
    """Robust and standard nets, with batch normalisation and without."""
    plain = {"norm": "none", "lr": 0.02}
    return {
        "robust, batch norm": trained(data, robust=True, **fields),
        "robust, no norm": trained(data, robust=True, **fields, **plain),
        "standard, batch norm": trained(data, robust=False, **fields),
        "standard, no norm": trained(data, robust=False, **fields, **plain),
    }


def report(f: nn.Module, data: Images, seed: int = 0) -> Report:
    """The reliability report on the first test images that ``f`` classifies correctly."""
    with torch.no_grad(), torch.random.fork_rng():
        right = (f(data.x_test[:200]).argmax(1) == data.y_test[:200]).nonzero().squeeze(1)
    return examine(f, data.x_test[right], data.y_test[right], Threat("linf", EPS), seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=("digits", "fashion"), default="digits")
    parser.add_argument("--root", type=Path, help="folder that holds fashion-mnist/")
    parser.add_argument("--size", type=int, default=16, help="of the digits")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--activation", default="relu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = digits(args.size) if args.data == "digits" else fashion(args.root)
    nets = honest(data, width=args.width, activation=args.activation)
    rows = [(name, None, f) for name, f in nets.items()]
    rows += [(f"{kind} {strength:g}", MEANT[kind], f) for kind, strength, f in broken(nets["robust, batch norm"], data.x[:500])]
    names = [check.name for check in CHECKS]
    print(f"{'':22}" + "".join(f"{name.replace('_', ' ')[:12]:>14}" for name in names) + f"{'passes':>8}")
    flagged = {True: 0, False: 0}
    for name, meant, f in rows:
        found = report(f, data)
        by_name = {c.name: c for c in found.checks}
        cells = [_cell(by_name.get(n), n == meant) for n in names]
        print(f"{name:22}" + "".join(f"{cell:>14}" for cell in cells) + f"{(found.forwards + found.backwards) / found.n:8.0f}")
        if meant is not None:
            flagged[by_name[meant].verdict != "pass"] += 1
    print(f"{flagged[True]} of {sum(flagged.values())} broken defences flagged by the check that is meant for them (marked *)")


def _cell(finding: Finding | None, meant: bool) -> str:
    if finding is None:
        return "-"
    figure = "nan" if finding.figure is None else f"{finding.figure:.3g}"
    return f"{'*' if meant else ''}{figure}{ {'pass': '', 'warn': ' !', 'fail': ' !!'}[finding.verdict] }"


if __name__ == "__main__":
    main()
