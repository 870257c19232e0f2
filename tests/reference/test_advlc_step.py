"""`advlc` against Li and Spratling (2022), written out straight; its top-q term against the authors' code."""

import json
from pathlib import Path

import pytest
import straight_line as paper
import torch
from stepwise import follow, pgd

from robustlab.regularizers.logit_variation import LogitVariation

EPS, STEPS, LAM, SHARE = 0.1, 10, 0.3, 0.1
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "advlc.json").read_text())


def step(w, stats, velocity, x, label, draws, number):
    """The attack starts at x; all passes are in train mode and renew the statistics."""
    x_adv, _ = pgd(x, label, 0.0, EPS, STEPS, EPS / 4, w, stats, "update")
    here = paper.leaves(w)
    z_adv = paper.logits(x_adv, here, stats, "update")
    z = paper.logits(x, here, stats, "update")
    gaps = sorted(
        (z - z_adv).abs().flatten().unbind(), key=lambda v: v.item(), reverse=True
    )  # over the whole batch, not per sample
    top = sum(gaps[: int(SHARE * len(gaps))])
    loss = paper.cross_entropy(z_adv, label) + LAM * top / len(x)
    paper.sgd(w, paper.gradient(loss, here), velocity)
    return float(loss.detach())


def test_advlc_is_the_algorithm():
    follow("advlc", {}, step)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"share {c['share']}")
def test_the_term_and_its_gradients_are_those_of_the_authors_code(case):
    z, z_adv = (torch.tensor(case[k], dtype=torch.float64, requires_grad=True) for k in ("z", "z_adv"))
    forward = {"clean": z, "adv": z_adv}.__getitem__
    (term,) = LogitVariation(share=case["share"])(forward, {}).values()
    assert float(term.value) == pytest.approx(case["value"], abs=1e-5)
    for g, name in zip(torch.autograd.grad(term.value, [z, z_adv]), ("grad_z", "grad_z_adv"), strict=True):
        torch.testing.assert_close(g, torch.tensor(case[name], dtype=torch.float64), rtol=0, atol=1e-5)
