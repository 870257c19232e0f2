"""Counter-based draws against an arbitrary-precision reference, the distributions they claim, and law 5."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from robustlab.rng import Rng

W32, W64 = 2**32 - 1, 2**64 - 1


def splitmix64(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & W64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & W64
    return x ^ (x >> 31)


def lowbias32(x):
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & W32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & W32
    return x ^ (x >> 16)


def word(key, ticket, j):
    k = splitmix64(splitmix64(ticket & W64) ^ (key & W64))
    return lowbias32(lowbias32((j * 0x9E3779B9 + (k & W32)) & W32) ^ (k >> 32))


def signed(x):
    return x - 2**32 if x >> 31 else x


whole = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=200, deadline=None)
@given(key=st.integers(-(2**70), 2**70), tickets=st.lists(whole, min_size=1, max_size=4))
def test_bits_are_those_of_the_big_integer_reference(key, tickets):
    ours = Rng(key).at(torch.tensor(tickets)).bits((7,))
    assert ours.tolist() == [[signed(word(key, t, j)) for j in range(7)] for t in tickets]


def test_the_counter_wraps_as_32_bit_words_do():
    ours = Rng(3).at(torch.tensor([5])).bits((70_000,))[0]
    for j in (0, 1, 46_341, 65_535, 65_536, 69_999):
        assert int(ours[j]) == signed(word(3, 5, j))


def test_child_keys_are_a_hash_of_the_path():
    digest = hashlib.blake2b(b"(7, 'attack', 3)", digest_size=8).digest()
    assert Rng(7).child("attack", 3).key == int.from_bytes(digest, "little")
    assert Rng(7).child(np.int64(3), np.str_("a")).key == Rng(7).child(3, "a").key


def test_different_paths_have_different_keys():
    r = Rng(0)
    paths = [
        ("a", "b"),
        ("ab",),
        ("a",),
        ("b", "a"),
        ("a", 1),
        ("a", "1"),
        ("a1",),
        (1, "a"),
        (11,),
        (1, 1),
        ("a', 'b",),
        ("",),
        (),
    ]
    keys = {r.child(*p).key for p in paths}
    keys |= {r.child("a").child("b").key, Rng(1).child("a", "b").key, Rng(-1).child("a", "b").key}
    assert len(keys) == len(paths) + 3


def test_every_possible_normal_is_finite_and_follows_the_quantile_function(monkeypatch):
    for low in (0, 511):  # the bits below the 23 that count
        words = (torch.arange(2**23) << 9 | low).to(torch.int32)
        monkeypatch.setattr(Rng, "bits", lambda self, shape, words=words: words[None])
        z = Rng(0).normal(words.shape)[0]
        assert bool(torch.isfinite(z).all())
        assert torch.equal(z, -z.flip(0))
        expected = special.ndtri((np.arange(2**23) + 0.5) / 2**23)
        assert np.abs(z.numpy() / expected - 1).max() < 2e-5


def test_normal_uses_the_top_23_bits():
    r = Rng(11).at(torch.arange(50))
    top = (r.bits((9,)).long() & W32) >> 9
    expected = special.ndtri((top.numpy() + 0.5) / 2**23)
    np.testing.assert_allclose(r.normal((9,)).numpy(), expected, rtol=1e-5, atol=1e-7)


def test_uniform_uses_the_top_24_bits_and_stays_below_one():
    r = Rng(11).at(torch.arange(50))
    top = (r.bits((9,)).long() & W32) >> 8
    assert torch.equal(r.uniform((9,)).double(), top.double() / 2**24)
    u = Rng(0).at(torch.arange(1000)).uniform((1000,))
    assert float(u.min()) >= 0
    assert float(u.max()) < 1


@pytest.mark.parametrize("eps", [8 / 255, 0.1, 1 / 3, 1.0, 1e-6])
def test_symmetric_uniforms_stay_in_their_interval(eps):
    u = Rng(0).at(torch.arange(500)).uniform((1000,), -eps, eps)
    assert float(u.abs().max()) <= float(torch.tensor(eps))


def ks(sample, cdf):
    return stats.kstest(sample.double().flatten().numpy(), cdf).pvalue


@pytest.mark.parametrize("layout", [(200_000, 1), (1, 200_000), (447, 447)])
def test_uniform_and_normal_have_their_distributions(layout):
    r = Rng(1).child("test").at(torch.arange(layout[0]))
    assert ks(r.uniform((layout[1],)), stats.uniform.cdf) > 1e-3
    assert ks(r.normal((layout[1],)), stats.norm.cdf) > 1e-3


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 1.5, 4.0, 100.0])
def test_gamma_has_its_distribution(alpha):
    assert ks(Rng(2).at(torch.arange(50_000)).gamma((), alpha), stats.gamma(alpha).cdf) > 1e-3


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.2), (1.0, 1.0), (2.0, 5.0), (0.5, 3.0), (20.0, 20.0)])
def test_beta_has_its_distribution(a, b):
    lam, law = Rng(3).at(torch.arange(50_000)).beta((), a, b), stats.beta(a, b)
    low = lam < 0.9  # above, single precision rounds a good part of Beta(0.2, 0.2) to 1
    assert stats.binomtest(int(low.sum()), 50_000, law.cdf(0.9)).pvalue > 1e-3
    assert ks(lam[low], lambda t: law.cdf(t) / law.cdf(0.9)) > 1e-3


def test_beta_of_a_tiny_parameter_is_a_fair_coin():
    lam = Rng(4).at(torch.arange(20_000)).beta((), 1e-4, 1e-4)
    assert float(((lam > 1e-3) & (lam < 1 - 1e-3)).float().mean()) < 5e-3
    assert abs(float(lam.mean()) - 0.5) < 0.02


def test_integers_are_uniform_and_in_range():
    r = Rng(5).at(torch.arange(60_000))
    n = r.integers((), 7)
    assert n.dtype == torch.int64
    assert stats.chisquare(np.bincount(n, minlength=7)).pvalue > 1e-3
    high = torch.arange(60_000) % 5 + 1
    n = r.integers((), high)
    assert bool((n < high).all())
    assert int(n.max()) == 4
    assert set(r.integers((3,), 1).unique().tolist()) == {0}
    assert int(r.integers((20,), 2**24).max()) < 2**24


def test_neighbouring_tickets_counters_and_keys_are_uncorrelated():
    u = Rng(6).at(torch.arange(2000)).uniform((200,)).double() - 0.5
    v = Rng(7).at(torch.arange(2000)).uniform((200,)).double() - 0.5
    pairs = {"tickets": (u[1:], u[:-1]), "counters": (u[:, 1:], u[:, :-1]), "keys": (u, v), "diagonal": (u[1:, 1:], u[:-1, :-1])}
    for name, (a, b) in pairs.items():
        z = float((a * b).mean()) * 12 * math.sqrt(a.numel())
        assert abs(z) < 4.5, name


def test_no_two_words_of_a_stream_agree_more_often_than_chance():
    words = Rng(8).at(torch.arange(300)).bits((3072,)).flatten()
    n = words.numel()
    collisions = n - len(words.unique())
    expected = n * (n - 1) / 2 / 2**32
    assert abs(collisions - expected) < 6 * math.sqrt(expected)


@settings(max_examples=50, deadline=None)
@given(tickets=st.lists(whole, min_size=1, max_size=8), seed=st.integers(0, 2**40), data=st.data())
def test_draws_do_not_depend_on_the_batch(tickets, seed, data):
    rows = data.draw(st.lists(st.integers(0, len(tickets) - 1), min_size=1, max_size=8))
    r = Rng(seed).child("x").at(torch.tensor(tickets))
    for draw in (
        lambda q: q.bits((2, 3)),
        lambda q: q.normal((2, 3)),
        lambda q: q.gamma((2,), 0.5),
        lambda q: q.beta((), 0.3, 2.0),
        lambda q: q.integers((2,), 9),
    ):
        assert torch.equal(draw(r)[rows], draw(r.select(torch.tensor(rows))))


def test_tickets_may_be_of_any_integer_type():
    for dtype in (torch.int32, torch.uint8, torch.int16):
        assert torch.equal(Rng(0).at(torch.arange(5).to(dtype)).bits((4,)), Rng(0).at(torch.arange(5)).bits((4,)))
    r = Rng(0).at(torch.arange(5))
    assert torch.equal(r.select(torch.tensor([True, False, True, False, False])).bits((4,)), r.bits((4,))[[0, 2]])


def test_odd_shapes():
    r = Rng(0).at(torch.arange(3))
    assert r.bits(()).shape == (3,)
    assert r.bits((0,)).shape == (3, 0)
    assert r.normal((2, 0, 4)).shape == (3, 2, 0, 4)
    none = Rng(0).at(torch.arange(0))
    assert none.bits((2, 3)).shape == (0, 2, 3)
    assert none.beta((), 1.0, 1.0).shape == (0,)
    assert r.gamma((2, 3), 0.5).shape == (3, 2, 3)
    assert torch.equal(r.bits(()), r.bits((5,))[:, 0])
    with pytest.raises(ValueError, match="no tickets"):
        Rng(0).bits((1,))


def test_sample_draws_ignore_the_micro_batch_and_batch_draws_ignore_the_tickets():
    first, second = Rng(0).at(torch.arange(4)).split(2)
    assert torch.equal(first.bits((3,)), second.bits((3,)))
    assert not torch.equal(first.permutation(50), second.permutation(50))
    assert first.batch_seed() != second.batch_seed()
    assert torch.equal(first.permutation(50), first.at(torch.arange(9)).permutation(50))
    assert first.child("a").batch_seed() != first.child("b").batch_seed()
    assert first.child("a").number == 0
    assert second.child("a").number == 1


def test_split_numbers_are_global():
    assert [r.number for r in Rng(0).split(3, first=2)] == [2, 3, 4]
    assert [r.number for r in Rng(0).split(3, first=1, stride=4)] == [1, 5, 9]
    assert torch.equal(Rng(0).split(5)[3].permutation(20), Rng(0).split(1, first=3)[0].permutation(20))


def test_permutations_are_permutations_and_uniform():
    counts = np.zeros((4, 4))
    for r in Rng(9).split(4000):
        p = r.permutation(4)
        assert sorted(p.tolist()) == [0, 1, 2, 3]
        counts[np.arange(4), p.numpy()] += 1
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


def test_huge_and_negative_keys_and_seeds_work():
    for seed in (-1, -(2**80), 2**80, 2**63):
        r = Rng(seed).at(torch.arange(2))
        assert bool(torch.isfinite(r.child("a").normal((3,))).all())
        assert 0 <= r.batch_seed() < 2**63
        r.permutation(3)
    assert not torch.equal(Rng(-1).child("a").at(torch.arange(2)).bits((4,)), Rng(1).child("a").at(torch.arange(2)).bits((4,)))


def test_drawing_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    r = Rng(0).at(torch.arange(3))
    r.normal((3,)), r.beta((), 1, 1), r.permutation(4), r.batch()
    assert torch.equal(torch.get_rng_state(), state)
