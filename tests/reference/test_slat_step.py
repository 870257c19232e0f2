"""`slat` against Park and Lee (2021), section 3, written out straight; the perturbed layer against the authors' code."""

import json
from pathlib import Path

import pytest
import straight_line as paper
import torch
from stepwise import follow, logits

from robustlab.latent.slat import adding

EPS, ETA, ALPHA, LATENT_ALPHA = 0.1, 8 / 255, 0.9, 1.8
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "slat.json").read_text())


def one_step(sites, norm):
    def step(w, stats, velocity, x, label, draws, number):
        x_0, seen = x.clone().requires_grad_(True), {}

        def keep(layer, h):
            if layer in sites:
                seen[layer] = h
            return h

        loss = paper.cross_entropy(logits(x_0, w, stats, "update", keep), label)  # one pass gives every gradient
        g, *latent = torch.autograd.grad(loss * len(x), [x_0, *(seen[s] for s in sites)])
        if norm == "linf":
            x_adv = paper.into_ball(x + ALPHA * EPS * g.sign(), x, EPS)
        else:
            x_adv = into_l2(x, g, ALPHA * EPS)
        signs = {s: h.sign() for s, h in zip(sites, latent, strict=True)}

        def perturb(layer, h):
            if layer not in signs:
                return h
            low, high = (f(h.detach().flatten(2), 2)[:, :, None, None] for f in (torch.amin, torch.amax))
            delta = (LATENT_ALPHA * ETA * signs[layer]).clamp(-ETA, ETA)
            return h + (torch.min(torch.max(h + delta, low), high) - h).detach()

        here = paper.leaves(w)
        loss = paper.cross_entropy(logits(x_adv, here, stats, "update", perturb), label)
        paper.sgd(w, paper.gradient(loss, here), velocity)
        return float(loss.detach())

    return step


def into_l2(x, g, radius):
    """The point of the ball and the box with the largest <g, x' - x>, by bisection on the multiplier, sample by sample."""
    out = []
    for image, slope in zip(x, g, strict=True):
        low, high = 0.0, 1.0
        while ((image + high * slope).clamp(0, 1) - image).square().sum().sqrt() < radius and high < 1e12:
            high *= 2
        for _ in range(200):
            middle = (low + high) / 2
            longer = ((image + middle * slope).clamp(0, 1) - image).square().sum().sqrt() > radius
            low, high = (low, middle) if longer else (middle, high)
        out.append((image + low * slope).clamp(0, 1))
    return torch.stack(out)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("sites", [None, ("c1", "r1"), ("r2",)])
def test_slat_is_the_algorithm(sites, norm):
    """``None``: the preset as shipped perturbs the image and the first convolution."""
    stage = {"name": "slat", "sites": sites, "eta": ETA}
    follow("slat", {"inner": [stage]} if sites else {}, one_step(sites or ("c1",), norm), norm=norm)


def test_a_perturbed_layer_is_that_of_the_authors_code():
    for case in GOLDEN["cases"]:
        h, g = (torch.tensor(case[k], dtype=torch.float64) for k in ("h", "grad"))
        size = min(2 * case["alpha"], 1.0) * case["eta"]
        expected = torch.tensor(case["perturbed"], dtype=torch.float64)
        torch.testing.assert_close(adding(size * g.sign())(h), expected, rtol=0, atol=1e-6)
        assert not torch.allclose(expected, h, atol=1e-3)
