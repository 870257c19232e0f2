"""The checks: each measures one figure, larger is worse, and holds it against two thresholds.

The thresholds were set on digits at 16 px with small_cnn at linf 0.1: between the figures of honest nets (robust and standard, with
and without batch normalisation) and those of seven broken defences, as ``scripts/calibrate_reliability.py`` prints them. They were
then held against Fashion-MNIST and other nets (tests/reference/test_broken_defences.py) without another change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustlab import losses
from robustlab.evaluation.reliability.subject import Smoothed, Spy, Subject, random_search

STEPS = (1, 5, 20)
TINY = 1e-30  # a gradient of float32 below it has underflown, or soon will
PIECES = 8  # of the path along which gradients are added up
QUERIES = 60
DRAWS, SMOOTH_STEPS = 4, 10
CURVE_STEPS = 10


@dataclass(frozen=True)
class Check:
    """One question to the model.

    Attributes:
        name: its name in the record.
        measure: what the figure is, in words.
        advice: what to do when it is large: one sentence.
        warn, fail: figures above them get that verdict.
        cost: passes per image, forwards and backwards together, at most.
        figure: measures it.
        attack: whether it needs a threat model in which PGD works.
        white_box: whether it needs the points where PGD ends, which cost ``WHITE_BOX`` passes more, once.
    """

    name: str
    measure: str
    advice: str
    warn: float
    fail: float
    cost: int
    figure: Callable[[Subject], float]
    attack: bool = True
    white_box: bool = False


# ------------------------------------------------------------------------------------------------ the model by itself


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """The largest difference of logits of each image over the spread of its logits: (n,)."""
    spread = a.amax(1) - a.amin(1)
    return (a - b).abs().amax(1) / spread.clamp_min(torch.finfo(a.dtype).tiny)


def randomness(s: Subject) -> float:
    return float(torch.stack([_apart(s.z, s.logits(s.x)) for _ in range(2)]).amax(0).median())


def batch_dependence(s: Subject) -> float:
    """Every image among other images, and fewer, than before; less what repetition alone changes."""
    order = torch.arange(len(s.x), device=s.x.device)
    halves = (order[::2], order[1::2].flip(0)) if len(s.x) > 1 else (order,)
    z = torch.empty_like(s.z)
    for rows in halves:
        z[rows] = s.logits(s.x[rows])
    noise = _apart(s.z, s.logits(s.x)).median()
    return max(0.0, float(_apart(s.z, z).median() - 2 * noise))


def probabilities(s: Subject) -> float:
    inside = (s.z >= -1e-6).all(1) & (s.z <= 1 + 1e-6).all(1)
    return float((inside & ((s.z.sum(1) - 1).abs() < 1e-3)).double().mean())


def inference_gradients(s: Subject) -> float:
    """Two for going back, one for a graph that is built although nobody asked for it."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), Spy() as spy:
        s.logits(s.x)
    return 2.0 if spy.calls else 1.0 if spy.graph else 0.0


# ---------------------------------------------------------------------------------------------------------- gradients


def gradients(s: Subject) -> float:
    g = s.slope(s.x, losses.cross_entropy).flatten(1)
    size = g.abs().amax(1)
    return float((~g.isfinite().all(1) | (size < TINY)).double().mean())


def gradient_path(s: Subject) -> float:
    """By the fundamental theorem: |m(x') - m(x) - sum_k <grad m(x_k), x' - x> / K| over the larger of both, summed over the images.

    m is the margin, x' where PGD ended, x_k the middles of K equal pieces between. Exact for a linear model, and within quadrature
    error for every continuous one; steps, flat spots and dither hide from the gradient what they do to the loss.
    """
    x_adv, m_adv = s.attacked(STEPS[-1])
    d = x_adv - s.x
    change = m_adv - losses.margin(s.z, s.y)
    told = torch.zeros_like(change)
    for k in range(PIECES):
        g = s.slope(s.x + (k + 0.5) / PIECES * d, losses.margin).nan_to_num(0.0, 0.0, 0.0)
        told += (g * d).flatten(1).sum(1) / PIECES
    larger = torch.maximum(change.abs(), told.abs()).sum()
    return float((change - told).abs().sum() / larger.clamp_min(torch.finfo(told.dtype).tiny))


# ------------------------------------------------------------------------------------------------------------- attacks


def _white_box(s: Subject) -> Tensor:
    """Whether each image survives PGD, whatever the number of steps: (n,)."""
    return torch.stack([s.attacked(k)[1] for k in STEPS]).amax(0) <= 0


def steps(s: Subject) -> float:
    """Images whose margin lies lower after 20 steps than after one, by more than 2 % of what one step gained."""
    clean = losses.margin(s.z, s.y)
    one, many = s.attacked(STEPS[0])[1], s.attacked(STEPS[-1])[1]
    return float((many < one - 0.02 * (one - clean).abs()).double().mean())


def unbounded(s: Subject) -> float:
    _, margin = s.attacked(STEPS[-1], s.unbounded_radius())
    return float((margin <= 0).double().mean())


def black_box(s: Subject) -> float:
    return float((_white_box(s) & (random_search(s, QUERIES) > 0)).double().mean())


def eps_curve(s: Subject) -> float:
    """The largest rise from a radius to a larger one, of eps / 2, eps, 2 eps."""
    eps = s.threat.eps
    radii = [eps / 2, eps, min(2 * eps, s.unbounded_radius())]
    accuracies = [float((s.attacked(CURVE_STEPS, radius)[1] <= 0).double().mean()) for radius in radii]
    return max(0.0, *(b - a for i, a in enumerate(accuracies) for b in accuracies[i:]))


def smoothed_surrogate(s: Subject) -> float:
    x_adv = s.pgd(SMOOTH_STEPS, f=Smoothed(s, DRAWS))
    return float((_white_box(s) & (s.margin(x_adv) > 0)).double().mean())


WHITE_BOX = sum(2 * k + 1 for k in STEPS)

# In the order in which a small budget is spent.
CHECKS = (
    Check(
        "randomness",
        "change of the logits between equal forwards, over their spread",
        "The model answers at random: attack the mean of its answers (EOT, the rand version of AutoAttack).",
        warn=1e-4,
        fail=1e-3,
        cost=3,
        figure=randomness,
        attack=False,
    ),
    Check(
        "batch_dependence",
        "change of the logits with the other images of the batch, over their spread",
        "An answer depends on the rest of the batch: look for batch normalisation in train mode.",
        warn=1e-3,
        fail=1e-2,
        cost=2,
        figure=batch_dependence,
        attack=False,
    ),
    Check(
        "probabilities",
        "share of images whose outputs are probabilities",
        "The model returns probabilities: return logits, or the losses of the attacks flatten.",
        warn=0.5,
        fail=0.9,
        cost=0,
        figure=probabilities,
        attack=False,
    ),
    Check(
        "inference_gradients",
        "2: the forward goes back; 1: it builds a graph; 0: neither",
        "The model differentiates or optimises while it answers: attack through that loop, or transfer from the model without it.",
        warn=0.5,
        fail=1.5,
        cost=1,
        figure=inference_gradients,
        attack=False,
    ),
    Check(
        "gradients",
        "share of images whose gradient is zero, not finite or below 1e-30",
        "Gradients vanish: attack a differentiable copy (BPDA), or rescale the logits.",
        warn=0.05,
        fail=0.25,
        cost=2,
        figure=gradients,
        attack=False,
    ),
    Check(
        "gradient_path",
        "share of the margin's change along PGD's way that the gradients do not tell",
        "Gradients do not tell how the loss changes: replace steps, thresholds and dither by smooth ones for the attack (BPDA).",
        warn=0.05,
        fail=0.15,
        cost=2 * PIECES,
        figure=gradient_path,
        white_box=True,
    ),
    Check(
        "steps",
        "share of images with a lower margin after 20 steps than after 1",
        "More steps do not raise the loss: look for gradients that mislead, and try other step sizes.",
        warn=0.25,
        fail=0.5,
        cost=0,
        figure=steps,
        white_box=True,
    ),
    Check(
        "unbounded",
        "robust accuracy at a radius that holds every image",
        "An attack without a bound must break everything: this one fails, so its verdicts within the bound say little.",
        warn=0.05,
        fail=0.2,
        cost=2 * STEPS[-1] + 1,
        figure=unbounded,
    ),
    Check(
        "black_box",
        "share of images that survive PGD and fall to a random search",
        "A search without gradients beats the one with them: run Square with its full budget, and attack by transfer.",
        warn=0.05,
        fail=0.15,
        cost=QUERIES,
        figure=black_box,
        white_box=True,
    ),
    Check(
        "eps_curve",
        "largest rise of robust accuracy with eps",
        "A larger ball holds the smaller one, so robust accuracy cannot rise: the attack gets lost in it.",
        warn=0.05,
        fail=0.15,
        cost=3 * (2 * CURVE_STEPS + 1),
        figure=eps_curve,
    ),
    Check(
        "smoothed_surrogate",
        "share of images that survive PGD and fall to PGD on a smoothed model",
        "Smoothed gradients attack better than the model's own: attack a copy without its thresholds, and transfer.",
        warn=0.05,
        fail=0.15,
        cost=2 * DRAWS * SMOOTH_STEPS + 1,
        figure=smoothed_surrogate,
        white_box=True,
    ),
)
