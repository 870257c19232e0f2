"""APGD against pyautoattack's: step by step from the same start in float64, and by verdicts on a small trained net."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from robustlab.attacks import apgd_walk
from robustlab.attacks.apgd import APGD
from robustlab.attacks.pgd import PGD
from scripts.parity_apgd import Parity, compare


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(raw.images, dtype=torch.float32)[order, None] / 16, torch.tensor(raw.target)[order]


@pytest.fixture(scope="module")
def trained():
    """A small net, adversarially trained for a few seconds, and 300 images that it has not seen."""
    torch.manual_seed(0)
    x, y = digits()
    f = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    ).eval()
    optimizer = torch.optim.Adam(f.parameters(), 3e-3)
    attack = PGD(norm="linf", eps=0.12, steps=4)
    for epoch in range(5):
        for rows in (500 + torch.randperm(len(x) - 500)).split(64):
            loss = nn.functional.cross_entropy(f(attack(f, x[rows], y[rows], seed=epoch)), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return f, x[:300], y[:300]


@pytest.mark.parametrize(
    ("norm", "eps", "loss"), [("linf", 0.12, "ce"), ("l2", 0.7, "ce"), pytest.param("linf", 0.12, "dlr", marks=pytest.mark.slow)]
)
def test_verdicts_agree_with_the_reference(trained, norm, eps, loss):
    f, x, y = trained
    result = compare(f, x, y, norm, eps, loss)
    assert 0.3 < float(result.reference.double().mean()) < 0.9  # neither side has an easy time
    assert abs(result.difference) <= 0.015
    assert result.between >= Parity.within(result.reference) - 0.015


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.15), ("l2", 0.8)])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_follows_the_reference_step_by_step(trained, monkeypatch, norm, eps, loss):
    """From one start, in float64 and away from the bounds (where the l2 projections are the same), every best point is the same.

    One quirk of the reference is put in for the test: at the first checkpoint it takes the first step for a rise when the loss
    after it is positive. With it there is nothing left between the two but rounding.
    """
    from pyautoattack.autopgd_base import APGDAttack

    f, x, y = trained
    x, y = (0.2 * x + 0.4).double()[:200], y[:200]
    f = nn.Sequential(_Widen(), copy.deepcopy(f)).double().eval()
    starts, begin, record = [], apgd_walk.begin, apgd_walk.record

    def begin_and_remember(*args):
        state = begin(*args)
        starts.append(state.x.clone())
        return state

    def record_with_the_quirk(s, g, value, first):
        record(s, g, value, first)
        if first:
            s.value = torch.zeros_like(value)

    monkeypatch.setattr(apgd_walk, "begin", begin_and_remember)
    monkeypatch.setattr(apgd_walk, "record", record_with_the_quirk)
    ours = APGD(norm=norm, eps=0.2 * eps, loss=loss)(f, x, y, seed=1)
    torch.set_default_dtype(torch.float64)
    try:
        theirs = APGDAttack(f, norm={"linf": "Linf", "l2": "L2"}[norm], eps=0.2 * eps, loss=loss, device="cpu")
        theirs.init_hyperparam(x)
        best, survives, _, _ = theirs.attack_single_run(x, y, x_init=starts[0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert 40 < int(survives.sum()) < 190
    assert torch.equal(f(ours).argmax(1) == y, survives)
    torch.testing.assert_close(ours[survives], best[survives], atol=1e-6, rtol=0)


class _Widen(nn.Module):
    """Undoes the squeeze of the images into [.4, .6]."""

    def forward(self, x):
        return 5 * (x - 0.4)


def test_checkpoints_are_those_of_the_paper():
    """p_0 = 0, p_1 = .22, p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06); w_j = ceil(100 p_j). In hundredths, to be exact."""
    p = [0, 22]
    while p[-1] < 100:
        p.append(p[-1] + max(p[-1] - p[-2] - 3, 6))
    expected = [w for w in p[1:] if w <= 100]
    assert list(apgd_walk.checkpoints(100)) == expected == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(apgd_walk.checkpoints(100).values()) == [22, 19, 16, 13, 10, 7, 6, 6]
