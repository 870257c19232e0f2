"""`iat` and `manifold-iat` against Lamb et al. (2022), algorithm 1, written out straight; the mixing against public code."""

import json
from pathlib import Path

import pytest
import straight_line as paper
import torch
from stepwise import CLASSES, SHAPE, follow, logits, pgd, soft_cross_entropy

from robustlab.mixing.manifold_mixup import combining
from robustlab.mixing.mixup import mixed
from robustlab.objectives.cross_entropy import CrossEntropy
from robustlab.types import View, one_hot

EPS, STEPS = 0.1, 7
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "iat.json").read_text())


def draw_mix(draws, stage, alpha):
    """One lam and one partner for each sample of the batch, by the stage's place."""
    source = draws.child("inner", stage)
    lam = float(source.child("lam").at(torch.tensor([draws.number])).beta((), alpha, alpha))
    return lam, source.child("partner").permutation(6)


def one_step(sites, alpha):
    def step(w, stats, velocity, x, label, draws, number):
        start = draws.child("inner", 0).child("restart", 0).child("start").uniform(SHAPE, -EPS, EPS, torch.float64)
        x_adv, _ = pgd(x, label, start, EPS, STEPS, EPS / 4, w, stats, "update")
        y = torch.eye(CLASSES, dtype=torch.float64)[label]
        here, total = paper.leaves(w), 0
        for stage, images in ((1, x), (2, x_adv)):  # each half has its own lam, partners and layer
            lam, j = draw_mix(draws, stage, alpha)
            site = sites[0]
            if len(sites) > 1:
                source = draws.child("inner", stage).child("site")
                site = sites[int(source.at(torch.tensor([number])).integers((), len(sites)))]

            def change(layer, h, site=site, lam=lam, j=j):
                return lam * h + (1 - lam) * h[j] if layer == site else h

            z = logits(images, here, stats, "update", change)
            total = total + 0.5 * soft_cross_entropy(z, lam * y + (1 - lam) * y[j])
        paper.sgd(w, paper.gradient(total, here), velocity)
        return float(total.detach())

    return step


def test_iat_is_the_algorithm():
    follow("iat", {}, one_step(("input",), 1.0))


@pytest.mark.parametrize("sites", [None, ("input", "c1", "r2"), ("r1", "features")])
def test_manifold_iat_is_the_algorithm(sites):
    """``None``: the preset as shipped mixes images or what the last layer is given."""
    stages = [
        {"name": "craft", "attack": {"name": "pgd", "steps": STEPS, "rel_step": 0.25}},
        *({"name": "manifold-mixup", "alpha": 2.0, "sites": sites, "on": v, "to": f"{v}_mix"} for v in ("clean", "adv")),
    ]
    follow("manifold-iat", {"inner": stages} if sites else {}, one_step(sites or ("input", "features"), 2.0), count=5)


def test_the_loss_is_that_of_public_code():
    """Their mixed images and the mean of their two mixed cross-entropies, from their functions on the same draws."""
    case = {k: torch.tensor(v, dtype=torch.float64) for k, v in GOLDEN["inputs"].items() if not isinstance(v, str)}
    y = one_hot(case["label"].long(), case["weight"].shape[0], torch.float64)
    views, key = {}, torch.arange(len(y))
    for name in ("clean", "adv"):
        lam = case[f"lam_{name}"].expand(len(y))
        views[f"{name}_mix"] = mixed(View(x=case[name], y=y, key=key), lam, case[f"partner_{name}"].long())
        expected = torch.tensor(GOLDEN["outputs"][f"mixed_{name}"], dtype=torch.float64)
        torch.testing.assert_close(views[f"{name}_mix"].x, expected, rtol=0, atol=1e-6)
    terms = CrossEntropy(on=("clean_mix", "adv_mix"))(lambda name: views[name].x.flatten(1) @ case["weight"].T, views)
    loss = sum(t.coef * t.value.mean() for t in terms.values())
    assert float(loss) == pytest.approx(GOLDEN["outputs"]["loss"], abs=1e-5)


def test_mixing_of_layers_is_that_of_the_authors_code():
    """Manifold mixup's function on a hidden state and one-hot targets."""
    case = json.loads((Path(__file__).parents[1] / "golden" / "manifold_mixup.json").read_text())
    h, y, mixed_h, mixed_y = (torch.tensor(case[k], dtype=torch.float64) for k in ("h", "y", "mixed_h", "mixed_y"))
    lam, partner = torch.full((4,), case["lam"], dtype=torch.float64), torch.tensor(case["partner"])
    torch.testing.assert_close(combining(lam, partner)(h), mixed_h, rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed(View(x=h, y=y, key=partner), lam, partner).y, mixed_y, rtol=0, atol=1e-6)
