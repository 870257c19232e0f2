"""`free-at` steps against Shafahi et al. (NeurIPS 2019), algorithm 1, written out straight (tests/reference/straight_line.py)."""

import pytest
import straight_line as paper
import torch
from beside import beside, direction, into


@pytest.mark.parametrize("replays", [1, 3])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_three_batches_are_the_algorithm(norm, replays):
    """One backward pass gives the gradients of weights and image; the perturbation goes on through replays and batches."""
    delta = torch.zeros(6, 2, 6, 6, dtype=torch.float64)

    def step(w, stats, velocity, x, label, nothing, eps):
        nonlocal delta
        x_adv = into(x + delta, x, norm, eps).requires_grad_(True)
        here = paper.leaves(w)
        loss = paper.cross_entropy(paper.logits(x_adv, here, stats, "update"), label)
        *of_weights, g = torch.autograd.grad(loss, [*here.values(), x_adv])
        paper.sgd(w, dict(zip(w, of_weights, strict=True)), velocity)
        delta = into(x_adv.detach() + eps * direction(g, norm), x, norm, eps) - x
        return float(loss.detach())

    assert beside("free-at", norm, step, lambda rng, key: None, replays=replays) == 3 * replays
    assert float(delta.abs().amax()) > 0.01
