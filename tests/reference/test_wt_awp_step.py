"""`wt-awp` steps against Wu, Bojchevski, Huang (AAAI 2023), equations of section 4, written out straight (straight_line.py)."""

import pytest
import straight_line as paper
import torch

from robustlab import config
from robustlab.outer import Outer, context_of
from robustlab.rng import Rng
from robustlab.training.step import train_step
from robustlab.types import Threat, UserError, View, one_hot, with_threat

EPS, STEPS, BATCH = 0.1, 10, 6
MATRICES = ("c1.weight", "c2.weight", "l1.weight", "l2.weight")  # those with more than one dimension, in order


def wt_awp_step(w, stats, velocity, x, label, noise, gamma, lam, chosen):
    """(1 - lam) L(w) + lam L(w + v), v on the layers ``chosen`` alone."""
    x_adv = paper.into_ball(x + noise, x, EPS)
    for _ in range(STEPS):
        x_k = x_adv.clone().requires_grad_(True)
        loss = paper.cross_entropy(paper.logits(x_k, w, stats, "eval"), label)
        (g,) = torch.autograd.grad(loss, x_k)
        x_adv = paper.into_ball(x_adv + EPS / 4 * g.sign(), x, EPS)

    here = paper.leaves(w)
    natural = paper.cross_entropy(paper.logits(x_adv, here, stats, "train"), label)
    g_here = paper.gradient(natural, here)
    there = dict(w)
    for name in chosen:
        g = g_here[name]
        there[name] = w[name] + gamma * (w[name] ** 2).sum().sqrt() * g / (g**2).sum().sqrt()
    there = paper.leaves(there)
    worst = paper.cross_entropy(paper.logits(x_adv, there, stats, "update"), label)
    g_there = paper.gradient(worst, there)
    paper.sgd(w, {name: (1 - lam) * g_here[name] + lam * g_there[name] for name in w}, velocity)
    return float((1 - lam) * natural.detach() + lam * worst.detach())


@pytest.mark.parametrize(
    ("fields", "gamma", "lam", "chosen"),
    [
        ({}, 0.01, 0.5, MATRICES[:-1]),
        ({"last": True, "lam": 0.7, "gamma": 0.05}, 0.05, 0.7, MATRICES),
        ({"layers": ["c*.weight"], "last": True, "gamma": 0.3}, 0.3, 0.5, MATRICES[:2]),
        ({"layers": ["c1.*", "l?.weight"], "gamma": 0.3}, 0.3, 0.5, ("c1.weight", "l1.weight")),
    ],
)
def test_three_steps_are_the_formula(fields, gamma, lam, chosen):
    rule = {"name": "wt-awp", **fields}
    trainer = with_threat(config.build("trainer", "wt-awp", gradient=rule, attack_bn="eval"), Threat("linf", EPS))
    f = paper.module()
    w = {name: p.detach().clone() for name, p in f.named_parameters()}
    stats = {name: b.clone() for name, b in f.named_buffers()}
    velocity = {}
    outer = Outer(f, trainer, context_of(f, 5, 3 * BATCH, (2, 6, 6)))
    optimizer = torch.optim.SGD(outer.parameters(), lr=paper.LR, momentum=paper.MU, weight_decay=paper.DECAY)
    rng = Rng(7).child("step")
    for step in range(3):
        x, label = torch.rand(BATCH, 2, 6, 6, dtype=torch.float64), torch.randint(5, (BATCH,))
        key = torch.arange(BATCH) + step * BATCH
        noise = rng.child("inner", 0).at(key).child("restart", 0).child("start").uniform((2, 6, 6), -EPS, EPS, torch.float64)
        view = View(x=x, y=one_hot(label, 5, torch.float64), key=key)
        terms = train_step(outer, [{"clean": view}], trainer, optimizer, rng, first=step)
        loss = wt_awp_step(w, stats, velocity, x, label, noise, gamma, lam, chosen)
        assert float(terms["loss"]) == pytest.approx(loss, rel=1e-9)
        paper.assert_same(f, optimizer, w, stats, velocity)


# --------------------------------------------------------------------------------------------------------- identities


def one_step(rule, seed=0, shards=1):
    """The weights after a step of PGD-AT in float32 with some gradient rule."""
    torch.manual_seed(seed)
    f = paper.module().float()
    trainer = with_threat(config.build("trainer", "pgd-at", gradient=rule, attack_bn="eval"), Threat("linf", EPS))
    outer = Outer(f, trainer, context_of(f, 5, BATCH, (2, 6, 6)))
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.1)
    x, label = torch.rand(BATCH, 2, 6, 6), torch.randint(5, (BATCH,))
    rows = torch.arange(BATCH).chunk(shards)
    micro = [{"clean": View(x=x[r], y=one_hot(label[r], 5), key=r)} for r in rows]
    train_step(outer, micro, trainer, optimizer, Rng(0))
    return {name: p.detach() for name, p in f.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("shards", [1, 2])
def test_degenerate_settings_are_the_other_rules_bit_for_bit(shards):
    plain, awp = one_step("plain", shards=shards), one_step({"name": "awp", "gamma": 0.1}, shards=shards)
    wt = {"name": "wt-awp", "gamma": 0.1, "last": True}
    assert same(one_step({**wt, "lam": 0.0}, shards=shards), plain)
    assert same(one_step({**wt, "lam": 1.0}, shards=shards), awp)
    here = one_step({**wt, "gamma": 0.0}, shards=shards)
    if shards == 1:
        assert same(here, plain)
    for name in plain:  # two shards add the same numbers in another order
        torch.testing.assert_close(here[name], plain[name], rtol=1e-6, atol=1e-7)
    assert not same(one_step(wt, shards=shards), plain)
    assert not same(one_step(wt, shards=shards), awp)
    assert not same(one_step({**wt, "last": False}, shards=shards), one_step(wt, shards=shards))


def test_no_layer_to_perturb_is_refused_with_the_names():
    with pytest.raises(UserError, match=r"wt-awp: layers: no weight matrix is called 'head\.\*'; here are: c1\.weight, c2\.weight"):
        one_step({"name": "wt-awp", "layers": ["head.*"]})
    with pytest.raises(UserError, match=r"wt-awp: only l2\.weight is left and it is the last layer; set last: true"):
        one_step({"name": "wt-awp", "layers": ["l2.*"]})
