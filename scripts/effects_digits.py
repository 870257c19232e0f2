"""The effect that each method's paper claims, measured on digits against ``pgd-at`` over seeds; one plain yes or no for each.

    robustlab compare configs/digits/*.yaml --seeds 3 --out runs/compare-digits
    PYTHONPATH=. python scripts/effects_digits.py --runs runs/compare-digits --out runs/effects-digits [--train] [--only NAME...]

Reads the last weights of ``runs/<label>``, ``runs/<label>-seed1``, ... of a comparison, says which are missing, and trains nothing:
with ``--train`` what is missing is trained into ``OUT/trained``, and so is the second setting of IAT, which no comparison holds.
Writes ``OUT/effects.json`` and ``OUT/effects.md`` after every line.

Figures are means over the test images, models in eval mode, x' by PGD-10 in the run's threat model; the lengths of the samples'
gradients are of training images, since those are what a step meets. All draws have the seed 0: models see the same noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import robustlab as rl
from robustlab import commands, config, losses
from robustlab.attacks.backward_smoothing import BackwardSmoothing
from robustlab.attacks.pgd import PGD
from robustlab.attacks.steps import input_gradient
from robustlab.corruptions import tables
from robustlab.files import atomic_write, write_json
from robustlab.geometry import project, sample_ball, steepest
from robustlab.latent.slat import gradients
from robustlab.models.checkpoint import load_model
from robustlab.modes import perturbed
from robustlab.registry import entries
from robustlab.rng import Rng
from robustlab.types import Alone, Attack, UserError, View, one_hot
from robustlab.weight_perturbation.awp import matrices
from robustlab.weight_perturbation.engm import clipping

CONFIGS = Path(__file__).parents[1] / "configs" / "digits"
GAMMAS = (0.005, 0.01, 0.03)  # that of trades-awp and mart-awp; that of awp and wt-awp; a larger one
SEVERITIES = (2, 4)
IMAGES = 500  # of each split
ROOM = "-room"  # the second setting of IAT, where robust training costs clean accuracy; at 16 px and eps 0.1 it costs none
ROOM_SETTINGS = ("data.size=8", "threat.eps=0.2")


# --------------------------------------------------------------------------------------------------------- what is measured


def loss_rise(value: Callable[[], Tensor], leaves: Sequence[Tensor], gamma: float, steps: int = 10) -> float:
    """max L(w + v) - L(w) over ||v_l|| <= gamma ||w_l||, by projected steepest ascent from v = 0; the best point counts.

    Args:
        value: the loss () at the present weights.
        leaves: w_l, the weights to perturb; they come back as they were.
        gamma: relative radius of each layer.
        steps: of 2.5 / steps of the radius.
    """
    radii = [gamma * w.detach().norm() for w in leaves]
    v, found = [torch.zeros_like(w) for w in leaves], []
    for _ in range(steps + 1):
        with perturbed(list(leaves), v):
            loss = value()
            grads = torch.autograd.grad(loss, list(leaves))
        found.append(float(loss.detach()))
        v = [into_ball(a + 2.5 / steps * r * unit(g), r) for a, g, r in zip(v, grads, radii, strict=True)]
    return max(found) - found[0]


def unit(g: Tensor) -> Tensor:
    """g / ||g||; zero where g is."""
    return g / g.norm().clamp_min(torch.finfo(g.dtype).tiny)


def into_ball(v: Tensor, radius: Tensor) -> Tensor:
    return v * (radius / v.norm().clamp_min(torch.finfo(v.dtype).tiny)).clamp_max(1.0)


def gradient_cosine(f: nn.Module, x: Tensor, y: Tensor, eta: Tensor) -> float:
    """The mean cosine between the gradients of CE(f(x), y) and CE(f(x + eta), y) at the images; y (N, K)."""
    g, g_eta = (input_gradient(f, v, y, losses.cross_entropy).g for v in (x, x + eta))
    return float((steepest(g, "l2") * steepest(g_eta, "l2")).flatten(1).sum(1).mean())


def divergence(f: nn.Module, x: Tensor, x_0: Tensor) -> float:
    """The mean of KL(softmax f(x) || softmax f(x_0))."""
    with torch.no_grad():
        return float(losses.kl_logits(f(x), f(x_0)).mean())


def gradient_lengths(f: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """||g_i|| (N,): the length of each sample's gradient of the cross-entropy in all trained weights; y (N, K)."""
    params = {k: p.detach() for k, p in f.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return losses.cross_entropy(torch.func.functional_call(f, params, (x[None],)), y[None]).sum()

    def length(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([g.square().sum() for g in torch.func.grad(loss)(params, x, y).values()]).sum().sqrt()

    return torch.func.vmap(length, chunk_size=50)(x, y)


def latent_length(f: nn.Module, x: Tensor, y: Tensor, sites: Sequence[str]) -> float:
    """The mean over the images of the L1 norm of the gradients of CE(f(x), y) at the outputs of layers, added up; y (N, K)."""
    _, latent = gradients(f, View(x=x, y=y, key=torch.arange(len(x))), sites)
    return sum(float(g.flatten(1).abs().sum(1).mean()) for g in latent.values())


def inner_loss(f: nn.Module, x: Tensor, y: Tensor, attack: Attack) -> tuple[float, int]:
    """The mean cross-entropy at the images that an attack finds, and its forward and backward passes for each; y (N, K)."""
    x_adv, info = attack.run(f, x, y, Rng(0).at(torch.arange(len(x))))
    with torch.no_grad():
        value = losses.cross_entropy(f(x_adv), y).mean()
    return float(value), int(info["passes"].sum(1).max())


def accuracy(f: nn.Module, x: Tensor, y: Tensor) -> float:
    """In per cent; y (N, K)."""
    with torch.no_grad():
        return 100 * float((f(x).argmax(1) == y.argmax(1)).float().mean())


# ------------------------------------------------------------------------------------------------------------ of one model


class Trained:
    """The last weights of a run, in eval mode, with images x (N, C, H, W) and one-hot y (N, K) of its test split."""

    def __init__(self, folder: Path):
        self.run = config.load_config(folder / "config.yaml")
        self.f = load_model(folder / "last.safetensors").eval()
        self.norm, self.eps = self.run.threat.norm, self.run.threat.eps
        self.x, self.y = images(self.run.data, "test")

    def pgd(self, steps: int, x: Tensor, y: Tensor) -> Tensor:
        return PGD(norm=self.norm, eps=self.eps, steps=steps)(self.f, x, y)

    @functools.cached_property
    def x_adv(self) -> Tensor:
        return self.pgd(10, self.x, self.y)

    @functools.cached_property
    def lengths(self) -> Tensor:
        x, y = images(self.run.data, "train")
        return gradient_lengths(self.f, self.pgd(10, x, y), y)

    @property
    def contributions(self) -> Tensor:
        """The same after the bound of the run's gradient rule, the images being one batch; lengths are exact also for estimates."""
        (share,) = clipping([self.lengths], getattr(self.run.trainer.gradient, "bound", None), Alone())
        return share * self.lengths

    @property
    def noise(self) -> Tensor:
        return sample_ball(self.x, self.norm, self.eps, Rng(0).child("eta").at(torch.arange(len(self.x))))


@functools.cache
def images(data: Any, split: str) -> tuple[Tensor, Tensor]:
    """The first images of a split, and their classes as probabilities."""
    splits = data.load()
    chosen = getattr(splits, split)
    x, y, _ = next(iter(chosen.batches([torch.arange(min(IMAGES, len(chosen)))])))
    return x, one_hot(y, splits.num_classes, x.dtype)


@functools.cache
def corrupted(data: Any) -> list[Tensor]:
    """The test images under every corruption of small images, at two severities."""
    x, _ = images(data, "test")
    names = [name for name, corruption in entries("corruption").items() if "cifar" in tables(corruption)]
    return [rl.corrupt(x, name, severity=s, seed=0) for name in names for s in SEVERITIES]


def rise(m: Trained, gamma: float) -> float:
    """Of the adversarial loss, x' fixed, over the weights with more than one dimension."""
    return loss_rise(lambda: losses.cross_entropy(m.f(m.x_adv), m.y).mean(), list(matrices(m.f).values()), gamma)


def logit_gap(m: Trained) -> float:
    with torch.no_grad():
        return float((m.f(m.x) - m.f(m.x_adv)).abs().mean())


def chosen_start(m: Trained) -> float:
    """KL from the clean output at the start of the run's own stage."""
    stage = next(s for s in m.run.trainer.inner if isinstance(s, BackwardSmoothing))
    stage = dataclasses.replace(stage, norm=m.norm, eps=m.eps)
    view = View(x=m.x, y=m.y, key=torch.arange(len(m.x)))
    return divergence(m.f, m.x, stage(m.f, {"clean": view}, Rng(0))["adv"].info["start"])


def random_start(m: Trained) -> float:
    return divergence(m.f, m.x, project(m.x + m.noise, m.x, m.norm, m.eps))


def krylov(m: Trained) -> Attack:
    """The inner attack of the configuration ``krylov-at``."""
    stage = config.load_config(CONFIGS / "krylov-at.yaml").trainer.inner[0]
    return dataclasses.replace(stage.attack, norm=m.norm, eps=m.eps)  # type: ignore[attr-defined]


def pgd_of_equal_cost(m: Trained) -> float:
    _, passes = inner_loss(m.f, m.x, m.y, krylov(m))
    return inner_loss(m.f, m.x, m.y, PGD(norm=m.norm, eps=m.eps, steps=passes // 2))[0]


@functools.cache
def slat_sites() -> tuple[str, ...]:
    return tuple(config.load_config(CONFIGS / "slat.yaml").trainer.inner[0].sites)  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------------- the claims

Measure = Callable[[Trained], float]


@dataclass(frozen=True)
class Effect:
    """A claim: ``measure`` of the model ``on`` is smaller or larger than ``other`` of the model ``against``.

    Attributes:
        method: whose claim it is.
        what: the figure, in words.
        claim: ``close`` is at most five points lower, at no more than half the passes.
        measure, other: figures of a model; ``other`` None is the same as ``measure``.
        on, against: labels of runs; ``on`` empty is the method's own.
    """

    method: str
    what: str
    claim: Literal["smaller", "larger", "close"]
    measure: Measure
    against: str = "pgd-at"
    on: str = ""
    other: Measure | None = None

    def seen(self, theirs: float, ours: float, cheap: bool = True) -> bool:
        if self.claim == "close":
            return ours >= theirs - 5 and cheap
        return ours < theirs if self.claim == "smaller" else ours > theirs


def effects() -> Iterator[Effect]:
    for method, base in (("awp", "pgd-at"), ("wt-awp", "pgd-at"), ("trades-awp", "trades"), ("mart-awp", "mart")):
        for gamma in GAMMAS:
            what = f"rise of the adversarial loss at the worst weights within gamma {gamma}"
            yield Effect(method, what, "smaller", functools.partial(rise, gamma=gamma), base)
    yield Effect("advlc", "mean abs(z(x) - z(x'))", "smaller", logit_gap)
    for base in ("pgd-at", "fast-at"):
        what = "cosine of the input gradients at x and at x + noise"
        yield Effect("gradalign", what, "larger", lambda m: gradient_cosine(m.f, m.x, m.y, m.noise), base)
    what = f"L1 norm of the gradients at {' and '.join(slat_sites())}"
    yield Effect("slat", what, "smaller", lambda m: latent_length(m.f, m.x, m.y, slat_sites()))
    own = "backward-smoothing"
    yield Effect(own, "KL at its start, against a uniform one; its own model", "larger", chosen_start, own, other=random_start)
    yield Effect(own, "accuracy under PGD-50, %", "close", lambda m: accuracy(m.f, m.pgd(50, m.x, m.y), m.y), "trades")
    for name in ("iat", "manifold-iat"):
        for place, where in (("", ""), (ROOM, ", 8 px and eps 0.2")):
            what = f"clean accuracy{where}, %"
            yield Effect(name, what, "larger", lambda m: accuracy(m.f, m.x, m.y), f"pgd-at{place}", f"{name}{place}")
    for name in ("engm", "engm-approx"):
        what = "variance of what the samples contribute to a step: the lengths of their gradients after the bound, last weights"
        yield Effect(name, what, "smaller", lambda m: float(m.contributions.var()))
        what = "of the lengths of the samples' gradients, last weights"
        yield Effect(name, f"variance {what}", "smaller", lambda m: float(m.lengths.var()))
        yield Effect(name, f"spread / mean {what}", "smaller", lambda m: float(m.lengths.std() / m.lengths.mean()))
    what = "accuracy over all corruptions, %"
    yield Effect("augrmixat", what, "larger", lambda m: statistics.mean(accuracy(m.f, x, m.y) for x in corrupted(m.run.data)))
    for label in ("pgd-at", "krylov-at"):
        what = f"loss of its inner attack, against PGD of as many passes; model of {label}"
        reached: Measure = lambda m: inner_loss(m.f, m.x, m.y, krylov(m))[0]  # noqa: E731
        yield Effect("krylov-at", what, "larger", reached, label, label, other=pgd_of_equal_cost)


# --------------------------------------------------------------------------------------------------------------- the runs


class Runs:
    """Finds runs by label and seed, each loaded once; trains what is missing where that is allowed."""

    def __init__(self, folder: Path, out: Path, train: bool):
        self.folder, self.out, self.train = folder, out, train
        self._loaded: dict[str, Trained] = {}

    def get(self, label: str, seed: int) -> Trained | None:
        name = f"{label}-seed{seed}" if seed else label
        places = (self.folder / "runs" / name, self.out / "trained" / name)
        if self.train and not any((place / "last.safetensors").exists() for place in places):
            self._train(label, seed, places[1])
        for place in places:
            if name not in self._loaded and (place / "last.safetensors").exists():
                self._loaded[name] = Trained(place)
        return self._loaded.get(name)

    def _train(self, label: str, seed: int, place: Path) -> None:
        settings = ROOM_SETTINGS if label.endswith(ROOM) else ()
        run = config.load_config(CONFIGS / f"{label.removesuffix(ROOM)}.yaml", settings)
        print(f"training {place.name}", flush=True)
        commands.train(dataclasses.replace(run, seed=run.seed + seed), place, resume=True)

    def passes(self, label: str) -> int | None:
        """Forwards and backwards of a step for each image, as the comparison counted them; None where it did not."""
        try:
            cost = json.loads((self.folder / "costs" / f"{label}.json").read_text(encoding="utf-8"))["cost"]
        except OSError:
            return None
        return int(cost["forwards"] + cost["backwards"])


def row_of(effect: Effect, runs: Runs, seeds: int) -> dict[str, Any]:
    """An effect over the seeds; ``missing`` names the runs that there are not."""
    labels, found, missing = (effect.against, effect.on or effect.method), [], []
    costs = [runs.passes(label) if effect.claim == "close" else None for label in labels]
    cheap = effect.claim != "close" or (None not in costs and 2 * costs[1] <= costs[0])  # type: ignore[operator]
    for seed in range(seeds):
        models = [runs.get(label, seed) for label in labels]
        missing += [f"{label} of seed {seed}" for label, m in zip(labels, models, strict=True) if m is None]
        theirs, ours = models
        if theirs is not None and ours is not None:
            found.append({"seed": seed, "against": (effect.other or effect.measure)(theirs), "method": effect.measure(ours)})
    row: dict[str, Any] = {k: getattr(effect, k) for k in ("method", "what", "claim")}
    row |= {"against": effect.against, "of": len(found), "missing": list(dict.fromkeys(missing)), "seeds": found}
    if effect.claim == "close":
        row["passes"] = dict(zip(labels, costs, strict=True))
    if found:
        means = [statistics.fmean(v[k] for v in found) for k in ("against", "method")]
        row["mean"] = dict(zip(("against", "method"), means, strict=True))
        row["seen"] = effect.seen(*means, cheap)
        row["seen_in"] = sum(effect.seen(v["against"], v["method"], cheap) for v in found)
    return row


# ------------------------------------------------------------------------------------------------------------- the tables


def spread(row: dict[str, Any], key: str) -> str:
    """Mean and, of several seeds, range."""
    values = [v[key] for v in row["seeds"]]
    ends = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
    return f"{row['mean'][key]:.4g}{ends}"


def claim_of(row: dict[str, Any]) -> str:
    if row["claim"] != "close":
        return str(row["claim"])
    told = " and ".join(f"{n if n is not None else 'unknown'} for {label}" for label, n in row["passes"].items())
    return f"within 5 points at half the passes ({told})"


def line(row: dict[str, Any]) -> str:
    if not row["of"]:
        return f"{row['method']}: {row['what']}: not measured; missing: {', '.join(row['missing'])}"
    answer = f"{'yes' if row['seen'] else 'no'}, in {row['seen_in']} of {row['of']}"
    left = f"; missing: {', '.join(row['missing'])}" if row["missing"] else ""
    figures = f"against {row['against']}: {spread(row, 'against')}; it: {spread(row, 'method')}"
    return f"{row['method']}: {row['what']}; {figures}; {claim_of(row)}: {answer}{left}"


HEAD = ("method", "figure", "claimed", "against", "its mean (range)", "the method's", "seen in the mean", "in seeds")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(HEAD)} |", "|---|---|---|---|---:|---:|---|---|"]
    for row in rows:
        figures = ["-", "-", "-"]
        if row["of"]:
            figures = [spread(row, "against"), spread(row, "method"), "yes" if row["seen"] else "**no**"]
        cells = [f"`{row['method']}`", row["what"], claim_of(row), f"`{row['against']}`", *figures]
        lines.append(f"| {' | '.join(cells)} | {row.get('seen_in', 0)} of {row['of']} |")
    missing = sorted({name for row in rows for name in row["missing"]})
    return "\n".join(lines) + "\n" + (f"\nMissing: {', '.join(missing)}.\n" if missing else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/compare-digits"), help="the folder of a comparison")
    parser.add_argument("--out", type=Path, default=Path("runs/effects-digits"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="methods")
    parser.add_argument("--train", action="store_true", help="train what is missing, into OUT/trained")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs, rows = Runs(args.runs, args.out, args.train), []
    wanted = [e for e in effects() if not args.only or e.method in args.only]
    if not wanted:
        raise UserError(f"--only: expected some of {', '.join(dict.fromkeys(e.method for e in effects()))}")
    for effect in wanted:
        rows.append(row_of(effect, runs, args.seeds))
        print(line(rows[-1]), flush=True)
        told = {"command": commands.command_line(), "commit": commands.commit(), "images": IMAGES, "rows": rows}
        write_json(args.out / "effects.json", told)
        atomic_write(args.out / "effects.md", markdown(rows))


if __name__ == "__main__":
    main()
