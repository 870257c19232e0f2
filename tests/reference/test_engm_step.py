"""`engm` and `engm-approx` steps written out straight: one backward pass per sample, a fit by the normal equations."""

import pytest
import straight_line as paper
import torch
from stepwise import SHAPE, follow, logits, pgd

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
    """min(1, beta / n_i); beta is the mean of the n_i, or a number."""
    beta = sum(float(v) for v in n) / len(n) if bound == "mean" else bound
    return torch.tensor([min(1.0, beta / float(v)) for v in n], dtype=torch.float64)


@pytest.mark.parametrize("fields", [{}, {"gradient": {"bound": 0.5}}])
def test_engm_is_the_formula(fields):
    """As shipped, and with a bound that is a number."""
    bound = fields["gradient"]["bound"] if fields else "mean"
    seen = []

    def step(w, stats, velocity, x, label, draws, number):
        x_adv, _ = attacked(x, label, draws, w, stats)
        share = clip(norms(x_adv, label, w, stats), bound)
        seen.extend(share.tolist())
        return update(x_adv, label, share, w, stats, velocity)

    follow("engm", fields, step)
    assert min(seen) < 1


@pytest.mark.parametrize(("bound", "memory"), [("mean", 0.5), (1.5, 0.0), (1.5, 0.8)])
def test_engm_approx_is_the_formula(bound, memory):
    """Refitted every second step; between the fits the lengths are those of the line."""
    line = []

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


def test_samples_that_cannot_be_taken_alone_are_taken_one_backward_pass_each():
    """With a perturbed layer the lengths are those of one backward pass for each sample, by the batch's own statistics."""
    seen = []

    def step(w, stats, velocity, x, label, draws, number):
        x_0, layer = x.clone().requires_grad_(True), []
        z = logits(x_0, w, stats, "update", lambda at, h: (layer.append(h), h)[1] if at == "c1" else h)
        g, h_g = torch.autograd.grad(paper.cross_entropy(z, label) * len(x), [x_0, layer[0]])
        x_adv = paper.into_ball(x + 0.9 * EPS * g.sign(), x, EPS)

        def perturb(at, h):
            if at != "c1":
                return h
            low, high = (f(h.detach().flatten(2), 2)[:, :, None, None] for f in (torch.amin, torch.amax))
            return h + (torch.min(torch.max(h + 8 / 255 * h_g.sign(), low), high) - h).detach()

        def each(here, mode):
            z = logits(x_adv, here, stats, mode, perturb)
            return [z[i].exp().sum().log() - z[i, label[i]] for i in range(len(x))]

        n = []
        for i in range(len(x)):
            here = paper.leaves(w)
            n.append(sum((v**2).sum() for v in paper.gradient(each(here, "train")[i], here).values()).sqrt())
        seen.extend(float(v) for v in n)
        here = paper.leaves(w)
        loss = (clip(n, 0.5) * torch.stack(each(here, "update"))).sum() / len(x)
        paper.sgd(w, paper.gradient(loss, here), velocity)
        return float(loss.detach())

    follow("slat", {"gradient": {"name": "engm", "bound": 0.5, "chunk": 4}}, step)
    assert max(seen) > 0.5
