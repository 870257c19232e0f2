"""`engm` and `engm-approx` steps written out straight: one backward pass per sample, a fit by the normal equations."""

import pytest
import straight_line as paper
import torch
from stepwise import SHAPE, follow, pgd

EPS, STEPS = 0.1, 10


def norms(x, label, w, stats):
    """The length of the gradient of each sample's loss in all weights, by the running statistics."""
    out = []
    for i in range(len(x)):
        here = paper.leaves(w)
        g = paper.gradient(paper.cross_entropy(paper.logits(x[i : i + 1], here, stats, "eval"), label[i : i + 1]), here)
        out.append(sum((v**2).sum() for v in g.values()).sqrt())
    return torch.stack(out)


def attacked(x, label, draws, w, stats):
    start = draws.child("inner", 0).child("restart", 0).child("start").uniform(SHAPE, -EPS, EPS, torch.float64)
    x_adv, g = pgd(x, label, start, EPS, STEPS, EPS / 4, w, stats, "update")
    return x_adv, torch.tensor(
        [float((len(x) * v).square().sum().sqrt()) for v in g], dtype=torch.float64
    )  # of each loss, not of their mean


def update(x_adv, label, share, w, stats, velocity):
    here = paper.leaves(w)
    z = paper.logits(x_adv, here, stats, "update")
    each = torch.stack([z[i].exp().sum().log() - z[i, label[i]] for i in range(len(z))])
    loss = (share * each).sum() / len(z)
    paper.sgd(w, paper.gradient(loss, here), velocity)
    return float(loss.detach())


def clip(n, bound):
    return torch.tensor([min(1.0, bound / float(v)) for v in n], dtype=torch.float64)


@pytest.mark.parametrize("bound", [None, 0.5])
def test_engm_is_the_formula(bound):
    """``None``: the preset as shipped."""
    seen = []

    def step(w, stats, velocity, x, label, draws, number):
        x_adv, _ = attacked(x, label, draws, w, stats)
        share = clip(norms(x_adv, label, w, stats), bound or 1.0)
        seen.extend(share.tolist())
        return update(x_adv, label, share, w, stats, velocity)

    follow("engm", {"gradient": {"bound": bound}} if bound else {}, step)
    assert min(seen) < 1


@pytest.mark.parametrize("memory", [0.0, 0.8])
def test_engm_approx_is_the_formula(memory):
    """Refitted every second step; between the fits the lengths are those of the line."""
    bound, line = 1.5, []

    def step(w, stats, velocity, x, label, draws, number):
        x_adv, g = attacked(x, label, draws, w, stats)
        if number % 2 == 0:
            n = norms(x_adv, label, w, stats)
            a = ((g - g.mean()) * (n - n.mean())).sum() / ((g - g.mean()) ** 2).sum()
            new = torch.stack([a, n.mean() - a * g.mean()])
            line[:] = [new if not line else memory * line[0] + (1 - memory) * new]
        else:
            n = line[0][0] * g + line[0][1]
        return update(x_adv, label, clip(n.clamp_min(1e-30), bound), w, stats, velocity)

    fields = {"gradient": {"bound": bound, "refit": 2, "memory": memory}}
    outer, _, _ = follow("engm-approx", fields, step, count=6)
    state = outer.state_of(outer.trainer.gradient)
    torch.testing.assert_close(state.line.double(), line[0], rtol=1e-5, atol=1e-8)
