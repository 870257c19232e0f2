"""mixup and label smoothing against their formulas, and their identities (law 8)."""

import pytest
import torch
from scipy import stats

from robustlab.labels.smoothing import LabelSmoothing
from robustlab.mixing.mixup import Mixup, mixed
from robustlab.rng import Rng
from robustlab.types import View, one_hot


def view(n=6, k=4, seed=0, **fields):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, 3, 3, generator=g)
    y = one_hot(torch.randint(k, (n,), generator=g), k)
    return View(x=x, y=y, key=torch.arange(n) + 100, index=torch.arange(n), **fields)


def run(stage, v, seed=0, number=0, name="clean"):
    return stage(None, {name: v}, Rng(seed).split(1, first=number)[0])


def test_mixup_is_the_formula_with_its_own_lam_and_partner():
    v = view(weight=torch.rand(6))
    out = run(Mixup(), v)["clean"]
    lam, j = out.info["lam"], out.info["partner"]
    assert len(set(lam.tolist())) == 1
    assert 0 < lam[0] < 1
    assert sorted(j.tolist()) == list(range(6))
    for i in range(6):
        torch.testing.assert_close(out.x[i], lam[i] * v.x[i] + (1 - lam[i]) * v.x[j[i]])
        torch.testing.assert_close(out.y[i], lam[i] * v.y[i] + (1 - lam[i]) * v.y[j[i]])
        torch.testing.assert_close(out.weight[i], lam[i] * v.weight[i] + (1 - lam[i]) * v.weight[j[i]])
    assert out.index is None
    assert torch.equal(out.key, v.key)
    torch.testing.assert_close(out.y.sum(1), torch.ones(6))


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_mixup_without_mixing_is_the_identity_bit_for_bit(scope):
    v = view()
    assert run(Mixup(alpha=0.0, scope=scope), v)["clean"] is v
    same = mixed(v, torch.ones(6), torch.randperm(6))
    assert torch.equal(same.x, v.x)
    assert torch.equal(same.y, v.y)


def test_mixup_after_the_attack_leaves_the_other_views():
    clean, adv = view(), view(seed=1)
    out = Mixup(on="adv", to="adv")(None, {"clean": clean, "adv": adv}, Rng(0))
    assert out["clean"] is clean
    assert not torch.equal(out["adv"].x, adv.x)


def test_mixup_on_one_view_to_a_new_one():
    v = view()
    out = Mixup(to="mix")(None, {"clean": v}, Rng(0))
    assert set(out) == {"clean", "mix"}
    assert out["clean"] is v


def test_mixup_draws_are_keyed_by_seed_and_micro_batch_number():
    lam = {(s, m): float(run(Mixup(), view(), s, m)["clean"].info["lam"][0]) for s in range(3) for m in range(3)}
    assert len(set(lam.values())) == 9
    assert float(run(Mixup(), view(), 1, 2)["clean"].info["lam"][0]) == lam[1, 2]


def test_per_sample_lam_is_keyed_by_ticket_whatever_the_batch():
    v = view(8)
    whole = run(Mixup(scope="sample"), v)["clean"].info["lam"]
    part = run(Mixup(scope="sample"), View(v.x[3:6], v.y[3:6], v.key[3:6]), number=5)["clean"].info["lam"]
    assert torch.equal(whole[3:6], part)
    assert len(set(whole.tolist())) == 8


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_lam_is_beta(alpha):
    n = 4000
    v = View(torch.zeros(n, 1, 1, 1), torch.zeros(n, 2), torch.arange(n))
    lam = run(Mixup(alpha=alpha, scope="sample"), v)["clean"].info["lam"]
    assert stats.kstest(lam.double().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    per_batch = [float(run(Mixup(alpha=alpha), view(), 0, m)["clean"].info["lam"][0]) for m in range(500)]
    assert stats.kstest(per_batch, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_mixing_images_stays_in_the_box():
    x = torch.ones(4096, 1, 1, 1)
    lam = torch.rand(4096)
    out = mixed(View(x, torch.ones(4096, 1), torch.arange(4096)), lam, torch.randperm(4096))
    assert float(out.x.max()) <= 1.0
    assert float(out.x.min()) >= 1.0 - 1e-6


def test_mixup_says_that_it_couples_the_batch():
    assert Mixup.coupled
    assert not LabelSmoothing.coupled


def test_smoothing_is_the_formula_and_keeps_the_rest():
    v = view(weight=torch.rand(6))
    out = run(LabelSmoothing(smoothing=0.3), v)["clean"]
    torch.testing.assert_close(out.y, 0.7 * v.y + 0.3 / 4)
    torch.testing.assert_close(out.y.sum(1), torch.ones(6))
    assert torch.equal(out.x, v.x)
    assert torch.equal(out.index, v.index)
    assert torch.equal(out.weight, v.weight)


def test_no_smoothing_is_the_identity_and_full_smoothing_is_uniform():
    v = view()
    assert torch.equal(run(LabelSmoothing(smoothing=0.0), v)["clean"].y, v.y)
    assert torch.equal(run(LabelSmoothing(smoothing=1.0), v)["clean"].y, torch.full((6, 4), 0.25))
