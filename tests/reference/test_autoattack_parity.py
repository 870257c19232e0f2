"""The components of AutoAttack beside pyautoattack's, on a small trained net with budgets cut alike; l1 step by step."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from robustlab import geometry
from robustlab.attacks import apgd, apgd_walk, square_proposals, square_windows
from robustlab.attacks.fab import FAB
from robustlab.attacks.pgd import PGD
from robustlab.rng import Rng
from robustlab.types import Threat, one_hot
from scripts.both_sides import our_suite, reference, reference_component, run_ours, run_reference
from scripts.parity_autoattack import compare

EPS = {"linf": 0.12, "l2": 0.7, "l1": 2.0}
COMPONENTS = {"apgd-ce": 0, "apgd-t": 1, "fab-t": 2, "square": 3}  # their places in the suite
BUDGET = {"steps": 20, "queries": 150}
N = 150


@pytest.fixture(scope="module")
def trained():
    """A small net, adversarially trained for a few seconds, and images that it has not seen and classifies correctly."""
    torch.manual_seed(0)
    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(raw.images, dtype=torch.float32)[order, None] / 16, torch.tensor(raw.target)[order]
    f = nn.Sequential(
        *(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(384, 10)),
    ).eval()
    optimizer = torch.optim.Adam(f.parameters(), 3e-3)
    attack = PGD(norm="linf", eps=0.12, steps=4)
    for epoch in range(4):
        for rows in (500 + torch.randperm(len(x) - 500)).split(64):
            loss = nn.functional.cross_entropy(f(attack(f, x[rows], y[rows], seed=epoch)), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    right = (f(x[:400]).argmax(1) == y[:400]).nonzero().squeeze(1)[:N]
    return f, x[right], y[right]


def side_by_side(f, x, y, norm, name, seeds=(0, 1)):
    """One component of both sides: the figures, and the costs of the first seed."""
    threat, suite = Threat(norm, EPS[norm]), our_suite("standard", **BUDGET)
    suite = dataclasses.replace(suite, attacks=(suite.attacks[COMPONENTS[name]],))
    ours = [run_ours(f, x, y, threat, suite, seed, N) for seed in seeds]
    theirs = [run_reference(f, x, y, threat, "standard", seed, N, attacks=(name,), **BUDGET) for seed in seeds]
    (row,), (other,) = ours[0]["components"].values(), theirs[0]["components"].values()
    figures = compare(ours, theirs)
    assert 0.1 < figures["reference"] < 0.97  # neither side has an easy time
    assert row["forwards"] <= other["forwards"]
    assert row["backwards"] <= other["backwards"]
    return figures


def one_short(shape, s, u, v):
    """Windows as the reference draws them: never in the last row or column."""
    h, w = shape[-2:]
    return square_corner(shape, s, u * (h - s) / (h - s + 1), v * (w - s) / (w - s + 1))


square_corner = square_windows.corner


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("name", COMPONENTS)
def test_each_component_has_the_reference_s_verdicts(trained, name, norm, monkeypatch):
    f, x, y = trained
    if name == "fab-t" and norm != "linf":
        x, y = x[:60], y[:60]
    monkeypatch.setattr(square_windows, "corner", one_short)
    figures = side_by_side(f, x, y, norm, name)
    assert abs(figures["difference"]) <= 0.02 + 0.01 * (name == "square")
    assert figures["agreement"] >= min(figures["own_agreement"].values()) - 0.02  # of either side: two seeds are a small sample


@pytest.mark.parametrize("norm", EPS)
def test_square_gains_from_the_last_row_and_column(trained, norm):
    """On 8 x 8 images they matter: several points."""
    assert side_by_side(*trained, norm, "square")["difference"] < -0.01


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_suite_has_the_reference_s_verdicts(trained, norm):
    f, x, y = (trained[0], *(t[:70] for t in trained[1:]))
    threat = Threat(norm, EPS[norm])
    ours = [run_ours(f, x, y, threat, our_suite("standard", **BUDGET), seed, 250) for seed in (0, 1)]
    theirs = [run_reference(f, x, y, threat, "standard", seed, 250, **BUDGET) for seed in (0, 1)]
    figures = compare(ours, theirs)
    assert abs(figures["difference"]) <= 0.02
    assert figures["agreement"] >= figures["own_agreement"]["reference"] - 0.02
    assert figures["killed_by_reference_alone"] == []


@pytest.mark.slow
@pytest.mark.parametrize("version", ["plus", "rand"])
def test_the_other_versions_have_the_reference_s_verdicts(trained, version):
    f, x, y = (trained[0], *(t[:40] for t in trained[1:]))
    threat, budget = Threat("linf", EPS["linf"]), {"steps": 10, "queries": 60}
    ours = [run_ours(f, x, y, threat, our_suite(version, **budget), seed, 250) for seed in (0, 1)]
    theirs = [run_reference(f, x, y, threat, version, seed, 250, **budget) for seed in (0, 1)]
    figures = compare(ours, theirs)
    assert abs(figures["difference"]) <= 0.03
    assert figures["agreement"] >= figures["own_agreement"]["reference"] - 0.03


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("targeted", [False, True])
def test_fab_finds_the_reference_s_distances(trained, norm, targeted):
    """Neither side stops at a radius: theirs is given the whole box."""
    f, x, y = (trained[0], *(t[:40] for t in trained[1:]))
    attack = FAB(norm=norm, steps=20, targeted=targeted, n_targets=4, refine=0)
    _, info = attack.run(f, x, one_hot(y, 10), Rng(0).at(torch.arange(len(x))))
    run = reference(f, 10, Threat(norm, 1.0 if norm == "linf" else 1e-9), "standard", 0, steps=20)
    run.fab.n_target_classes = 4
    run.fab.eps = 1e-9
    theirs = torch.full((len(x),), torch.inf)
    run.fab.targeted = targeted
    for target in range(2, 6) if targeted else (None,):
        run.fab.target_class = target
        with torch.random.fork_rng():
            x_adv = run.fab.attack_single_run(x, y, is_targeted=targeted)
        with torch.no_grad():
            broken = f(x_adv).argmax(1) != y
        theirs = torch.where(broken, theirs.minimum(geometry.norm_of(x_adv - x, norm)), theirs)
    f.zero_grad()
    both = theirs.isfinite() & info["distance"].isfinite()
    assert int(both.sum()) >= 38
    ours, theirs = info["distance"][both], theirs[both]
    assert float(ours.median()) == pytest.approx(float(theirs.median()), rel=0.02)
    assert float((ours / theirs).log().abs().median()) < 0.005


def test_apgd_in_l1_follows_the_reference_step_by_step(trained, monkeypatch):
    """From one start, in float64, with our projection in both: every best point of a run of 40 steps is the same.

    The reference counts as changed what its rounding has moved, x + d - d; the test takes that out.
    """
    from pyautoattack import autopgd_base

    f, x, y = copy.deepcopy(trained[0]).double(), trained[1][:60].double(), trained[2][:60]
    eps = 2.0
    monkeypatch.setattr(autopgd_base, "L1_projection", lambda x, d, e: geometry.project(x + d, x, "l1", e) - x - d)
    monkeypatch.setattr(autopgd_base, "L0_norm", lambda d: (d.abs() > 2e-6).flatten(1).sum(1))
    start = geometry.project(x + torch.randn_like(x), x, "l1", eps)
    nowhere = torch.zeros(len(x), dtype=torch.long)
    settings = apgd_walk.Settings("l1", eps, 40)
    target = one_hot(y, 10, x.dtype)
    ((s, _, cost),) = apgd_walk._search(f, x, target, nowhere, apgd.LOSSES["ce"], settings, start)
    torch.set_default_dtype(torch.float64)
    try:
        theirs = autopgd_base.APGDAttack(f, n_iter=40, norm="L1", eps=eps, loss="ce", device="cpu")
        theirs.init_hyperparam(x)
        best, _, loss, _ = theirs.attack_single_run(x, y, x_init=start)
    finally:
        torch.set_default_dtype(torch.float32)
    assert cost == 41
    torch.testing.assert_close(s.best, loss, rtol=0, atol=1e-9)
    torch.testing.assert_close(s.x_best, best, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", EPS)
def test_square_proposes_what_the_reference_proposes(norm, monkeypatch):
    """From the same point with the reference's own window, signs and orientation: the same image, query after query."""
    from pyautoattack.square import SquareAttack

    shape, s, queries = (2, 10, 10), 3, 6
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(5))
    images, drawn = [], []

    def f(z):
        images.append(z.clone())
        return torch.tensor([[9.0 - 0.1 * len(images), 0.0]])  # every proposal is kept, none fools

    theirs = SquareAttack(f, norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[norm], eps=EPS[norm], p_init=0.1, device="cpu")
    theirs.n_queries, theirs.rescale_schedule = queries, False

    def record(name, call, *args, **kwargs):
        drawn.append((name, call(*args, **kwargs)))
        return drawn[-1][1]

    for name in ("random_int", "random_choice", "eta"):
        monkeypatch.setattr(theirs, name, functools.partial(record, name, getattr(theirs, name)))
    with torch.random.fork_rng():
        theirs.perturb(x, torch.tensor([0]))
    starts = [i for i, (name, _) in enumerate(drawn) if name == "random_int"][:: 2 if norm == "linf" else 4]
    assert len(starts) == queries
    pattern = None if norm == "linf" else square_proposals.pattern_of(s, norm)[1].float()
    for q, first in enumerate(starts):
        places = [float(v) for name, v in drawn[first : first + 9] if name == "random_int"]
        if norm == "linf":
            sign, places, turned = drawn[first + 2][1].flatten(), [*places[:2], 0.0, 0.0], True
        else:
            turned = float((drawn[first + 4][1] - pattern).abs().max()) < 1e-5
            places, sign = places[:4], drawn[first + 5][1].flatten()
        u = [*((p + 0.5) / (10 - s + 1) for p in places), 0.25 if turned else 0.75, *(0.25 if v < 0 else 0.75 for v in sign)]
        u = torch.tensor([u], dtype=torch.float64)
        best = images[q + 1]
        move = (v[:, 0] for v in square_proposals.moves(norm, u[:, None], torch.tensor([s]), x.shape))
        new = square_proposals.propose(norm, square_proposals.ground(x, norm, EPS[norm]), best, EPS[norm], s, tuple(move))[0]
        torch.testing.assert_close(new, images[q + 2], atol=2e-5, rtol=0)
        assert not torch.equal(new, best)


def test_the_reference_is_driven_as_it_drives_itself(trained):
    """Component by component as here, or by its own loop: the same verdicts."""
    f, x, y = (trained[0], *(t[:40] for t in trained[1:]))
    threat = Threat("linf", EPS["linf"])
    ours = run_reference(f, x, y, threat, "standard", 3, 250, steps=10, queries=40)
    run = reference(f, 10, threat, "standard", 3, steps=10, queries=40)
    with torch.random.fork_rng():
        x_adv, _ = run.run_standard_evaluation(x, y)
    f.zero_grad()
    assert (f(x_adv).argmax(1) == y).int().tolist() == ours["robust"]
    assert reference_component(run, "fab-t") is run.fab
