"""On a linear classifier the worst case has a closed form: attacks must reach it, far from the bounds and at them.

Two classes with logits (0, <w, x> + b); with label c the cross-entropy is softplus(s), s = (-1)^c (<w, x> + b). So the worst case
maximises <v, d>, v = (-1)^c w, over ||d|| <= eps and x + d in [0, 1]. The maximum is found here with scipy and numpy alone:
linf: each coordinate by itself; l2: the multiplier of d = clip(v / (2 lam)) by root finding; l1: a fractional knapsack.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, linprog
from torch import nn

from robustlab.attacks.apgd import APGD
from robustlab.attacks.fgsm import FGSM
from robustlab.attacks.pgd import PGD

N, SHAPE = 12, (2, 5, 5)
D = int(np.prod(SHAPE))
EPS = {"linf": 0.1, "l2": 0.7, "l1": 3.0}


class Linear(nn.Module):
    def __init__(self, w: np.ndarray, b: float, classes: int = 2):
        super().__init__()
        self.w, self.b, self.classes = torch.tensor(w), b, classes

    def forward(self, x):
        s = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(s), s] + [torch.full_like(s, -50.0)] * (self.classes - 2), dim=1)


def gain_far(v: np.ndarray, norm: str, eps: float) -> float:
    """max <v, d> over the ball: eps times the dual norm."""
    return eps * {"linf": np.abs(v).sum(), "l2": np.sqrt((v**2).sum()), "l1": np.abs(v).max()}[norm]


def gain_boxed(v: np.ndarray, x: np.ndarray, norm: str, eps: float) -> float:
    """max <v, d> over ball and box."""
    low, high = -x, 1 - x
    if norm == "linf":
        return float((v * np.where(v > 0, np.minimum(eps, high), np.maximum(-eps, low))).sum())
    if norm == "l2":

        def d(log_lam: float) -> np.ndarray:
            return np.clip(v / (2 * np.exp(log_lam)), low, high)

        log_lam = brentq(lambda t: (d(t) ** 2).sum() - eps**2, -30, 30, xtol=1e-14, rtol=1e-15)
        return float(v @ d(log_lam))
    # l1 as a linear program in d = p - q
    result = linprog(
        np.concatenate([-v, v]), A_ub=np.ones((1, 2 * len(v))), b_ub=[eps], bounds=[(0, h) for h in high] + [(0, -lo) for lo in low]
    )
    return float(-result.fun)


@pytest.fixture(params=["far", "active"])
def problem(request):
    rng = np.random.default_rng(0)
    w = rng.normal(size=D)
    x = rng.uniform(0.48, 0.52, (N, D)) if request.param == "far" else rng.uniform(0, 1, (N, D)).round(1)
    b = float(-(x.mean(0) @ w))
    labels = rng.integers(0, 2, N)
    return request.param, w, b, x, labels


def worst_loss(regime: str, w, b, x, labels, norm: str) -> np.ndarray:
    sign = np.where(labels == 0, 1.0, -1.0)
    v = sign[:, None] * w
    if regime == "far" and norm != "l1":  # one coordinate takes the whole l1 radius, so the box always matters there
        gain = np.array([gain_far(vi, norm, EPS[norm]) for vi in v])
    else:
        gain = np.array([gain_boxed(vi, xi, norm, EPS[norm]) for vi, xi in zip(v, x, strict=True)])
    return np.logaddexp(0, sign * (x @ w + b) + gain)


def run(attack, w, b, x, labels) -> tuple[np.ndarray, np.ndarray]:
    f = Linear(w, b).eval()
    x_adv = attack(f, torch.tensor(x).view(N, *SHAPE), torch.tensor(labels), seed=3)
    z = f(x_adv)
    return nn.functional.cross_entropy(z, torch.tensor(labels), reduction="none").numpy(), x_adv.flatten(1).numpy() - x


ATTACKS = {
    "fgsm": FGSM,
    "pgd": lambda norm, eps: PGD(norm=norm, eps=eps, steps=100, rel_step=0.25),
    "pgd-best": lambda norm, eps: PGD(norm=norm, eps=eps, steps=100, rel_step=0.25, keep="best", loss="margin"),
    "apgd": lambda norm, eps: APGD(norm=norm, eps=eps, steps=100),
}


@pytest.mark.parametrize(("name", "norm"), [*itertools.product(ATTACKS, ["linf", "l2"]), ("fgsm", "l1")])
def test_reaches_the_closed_form_worst_case(name, norm, problem):
    regime, w, b, x, labels = problem
    if name == "apgd":
        b, labels = correct_far_from_the_boundary(w, x, labels)
    reached, d = run(ATTACKS[name](norm=norm, eps=EPS[norm]), w, b, x, labels)
    expected = worst_loss(regime, w, b, x, labels, norm)
    size = {"linf": np.abs(d).max(1), "l2": np.sqrt((d**2).sum(1)), "l1": np.abs(d).sum(1)}[norm]
    assert size.max() <= EPS[norm] * (1 + 1e-9)
    assert (x + d).min() >= 0
    assert (x + d).max() <= 1
    np.testing.assert_allclose(reached, expected, atol=1e-5, rtol=0)
    if regime == "active":
        assert (np.isclose(x + d, 0) | np.isclose(x + d, 1)).mean() > 0.05


def test_l1_ends_within_the_order_of_its_step(problem):
    """In l1 a fixed step circles the optimum, at a distance that falls with the step."""
    regime, w, b, x, labels = problem
    best = np.log(np.expm1(worst_loss(regime, w, b, x, labels, "l1")))  # the largest s
    sign = np.where(labels == 0, 1.0, -1.0)
    gaps = []
    for rel_step in (0.1, 0.01):
        d = run(PGD(norm="l1", eps=EPS["l1"], steps=400, rel_step=rel_step), w, b, x, labels)[1]
        gain = sign * (d @ w)
        gaps.append(((best - sign * (x @ w + b) - gain) / gain).max())
    assert gaps[0] < 0.03
    assert gaps[1] < 0.003


def correct_far_from_the_boundary(w, x, labels):
    """A bias and labels with which no attack can succeed: APGD stops at the first point that fools, so it must find none."""
    b = float(np.abs(x @ w).max() + 1.1 * max(gain_far(w, n, e) for n, e in EPS.items()))
    return b, np.ones_like(labels)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "attack", [lambda n, e: PGD(norm=n, eps=e, steps=100, rel_step=0.25, loss="dlr"), lambda n, e: APGD(norm=n, eps=e, loss="dlr")]
)
def test_dlr_reaches_it_too(attack, norm, problem):
    """Three classes, the third far below: the DLR loss is a rising function of -s."""
    regime, w, _, x, labels = problem
    b, labels = correct_far_from_the_boundary(w, x, labels)
    f = Linear(w, b, classes=3).eval()
    x_adv = attack(norm, EPS[norm])(f, torch.tensor(x).view(N, *SHAPE), torch.tensor(labels), seed=3)
    s = x_adv.flatten(1).numpy() @ w + b
    np.testing.assert_allclose(np.logaddexp(0, -s), worst_loss(regime, w, b, x, labels, norm), atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_targeted_lowers_the_loss_of_the_target(norm, problem):
    """With two classes the targeted attack on class t is the untargeted one on the other class."""
    _, w, b, x, labels = problem
    for make in (FGSM, lambda **kw: PGD(steps=100, rel_step=0.25, start="zero", **kw)):
        to_target = run(make(norm=norm, eps=EPS[norm], targeted=True), w, b, x, 1 - labels)[1]
        away = run(make(norm=norm, eps=EPS[norm]), w, b, x, labels)[1]
        np.testing.assert_allclose(to_target @ w, away @ w, atol=1e-5)


def test_restarts_keep_the_best_point_of_each_sample():
    """The loss |x - .5| has its maxima at both ends, and the start decides which one is reached; the higher end must win."""

    def f(x):
        t = x.flatten(1).sum(1) - 0.5
        s = torch.where(t > 0, 2 * t, -t)  # up to 0.2 on the right, 0.1 on the left: never positive enough to fool
        return torch.stack([torch.full_like(s, 5.0), s], dim=1)

    x, y = torch.full((40, 1, 1, 1), 0.5, dtype=torch.float64), torch.zeros(40, dtype=torch.long)
    one = PGD(norm="linf", eps=0.1, steps=20)(f, x, y)
    many = PGD(norm="linf", eps=0.1, steps=20, restarts=12)(f, x, y)
    assert 0.2 < (one > 0.5).double().mean() < 0.8
    torch.testing.assert_close(many, torch.full_like(x, 0.6))
