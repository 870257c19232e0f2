"""Norm balls against convex optimisation: optimality is checked by linear programs, bisection and variational inequalities."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import optimize, stats

from robustlab.geometry import (
    NORMS,
    linear_max,
    norm_of,
    project,
    project_ball,
    project_l1,
    prox,
    sample_ball,
    steepest,
    to_hyperplane,
)  # fmt: skip
from robustlab.rng import Rng

CONVEX = ("linf", "l2", "l1")
SHAPE = (2, 2, 3)  # channels, height, width
D = math.prod(SHAPE)

unit = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1))
wide = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 1e-30]), st.floats(-3, 3), st.floats(-1e-3, 1e-3)).map(
    lambda v: v if abs(v) > 1e-60 else 0.0
)
radius = st.one_of(st.sampled_from([0.0, 0.1, 1.0, 3.0]), st.floats(1e-3, 4))


def tensors(elements, n=3):
    return arrays(np.float64, (n, *SHAPE), elements=elements, fill=st.nothing()).map(torch.from_numpy)


def limit(norm, eps):
    """linf radii are at most 1."""
    return min(eps, 1.0) if norm == "linf" else eps


def assert_feasible(p, x0, norm, eps, slack=1e-9):
    assert float(p.min()) >= 0
    assert float(p.max()) <= 1
    assert float(norm_of(p - x0, norm).max()) <= eps + slack


def random_feasible(x0, norm, eps, seed):
    """Points of ball and box, some on their boundary."""
    rng = Rng(seed).at(torch.arange(len(x0)))
    d = sample_ball(x0, norm, eps, rng) * (1 + rng.child("out").uniform((), dtype=x0.dtype) * 3).view(-1, 1, 1, 1)
    d = torch.minimum(torch.maximum(d, -x0), 1 - x0)
    size = norm_of(d, norm).clamp_min(1e-300)
    return x0 + d * (eps / size).clamp_max(1).view(-1, 1, 1, 1)


def dot(a, b):
    return (a * b).flatten(1).sum(1)


# ---------------------------------------------------------------------------------------------------------- projection


def reference_project(x, x0, norm, eps):
    """One sample, by slow bisection on the multiplier of the ball in the KKT conditions."""
    d, low, high = x - x0, -x0, 1 - x0
    if norm == "linf":
        return x0 + np.clip(d, np.maximum(low, -eps), np.minimum(high, eps))

    def at(t):
        shrunk = d / (1 + t) if norm == "l2" else np.sign(d) * np.maximum(np.abs(d) - t, 0)
        return np.clip(shrunk, low, high)

    def size(z):
        return np.sqrt((z**2).sum()) if norm == "l2" else np.abs(z).sum()

    if size(at(0)) <= eps:
        return x0 + at(0)
    if eps == 0:
        return x0
    a, b = 0.0, 1.0
    while size(at(b)) > eps:
        b *= 2
    for _ in range(200):
        a, b = ((a + b) / 2, b) if size(at((a + b) / 2)) > eps else (a, (a + b) / 2)
    return x0 + at(b)


@settings(max_examples=150, deadline=None)
@given(x0=tensors(unit), d=tensors(wide), eps=radius, norm=st.sampled_from(CONVEX))
def test_project_is_the_nearest_point_of_ball_and_box(x0, d, eps, norm):
    eps = limit(norm, eps)
    p = project(x0 + d, x0, norm, eps)
    assert_feasible(p, x0, norm, eps)
    expected = np.stack([reference_project(a, b, norm, eps) for a, b in zip((x0 + d).numpy(), x0.numpy(), strict=True)])
    np.testing.assert_allclose(p.numpy(), expected, atol=1e-8)


THREE = st.tuples(unit, unit, unit), st.tuples(*3 * [st.floats(-1.5, 1.5)])


@settings(max_examples=60, deadline=None)
@given(x0=THREE[0], d=THREE[1], eps=st.floats(0.05, 1.5), norm=st.sampled_from(CONVEX))
def test_no_point_of_a_grid_of_ball_and_box_is_nearer(x0, d, eps, norm):
    """Brute force in three dimensions: every point of a grid is tried, and the projection is about as near as the best."""
    eps, x0, n = limit(norm, eps), torch.tensor(x0, dtype=torch.float64), 25
    x = x0 + torch.tensor(d, dtype=torch.float64)
    p = project(x.view(1, 1, 1, 3), x0.view(1, 1, 1, 3), norm, eps)
    assert_feasible(p, x0.view(1, 1, 1, 3), norm, eps)
    grid = torch.cartesian_prod(*3 * [torch.linspace(0, 1, n, dtype=torch.float64)])
    grid = grid[norm_of((grid - x0).view(-1, 1, 1, 3), norm) <= eps]
    if len(grid):
        distance, best = float((p.flatten() - x).norm()), float((grid - x).norm(dim=1).min())
        assert distance <= best + 1e-9


@settings(max_examples=60, deadline=None)
@given(d=tensors(wide, 2), k=st.integers(0, 6), each=st.booleans())
def test_l0_ball_against_all_sets_of_pixels(d, k, each):
    """Of the points with at most k pixels the nearest to d; also with one k per sample."""
    p = project_ball(d, "l0", torch.tensor([float(k), float(6 - k)]) if each else k)
    for one, kept, most in zip(p, d, (k, 6 - k) if each else (k, k), strict=True):
        assert int(one.ne(0).any(0).sum()) <= most
        masks = [
            torch.zeros(6).index_fill(0, torch.tensor(c, dtype=torch.long), 1.0) for c in itertools.combinations(range(6), most)
        ]
        best = min(float((kept * (1 - m.view(1, 2, 3))).square().sum()) for m in masks)
        assert float((kept - one).square().sum()) == pytest.approx(best, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(x0=tensors(unit), d=tensors(wide), eps=radius, norm=st.sampled_from(CONVEX), seed=st.integers(0, 10**6))
def test_project_satisfies_the_variational_inequality(x0, d, eps, norm, seed):
    eps = limit(norm, eps)
    x = x0 + d
    p = project(x, x0, norm, eps)
    for y in (x0, random_feasible(x0, norm, eps, seed), linear_max(x - p, x0, norm, eps)):
        assert float(dot(x - p, y - p).max()) <= 1e-7


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_project_agrees_with_a_general_solver(norm):
    g = np.random.default_rng(0)
    for _ in range(5):
        x0, d, eps = g.random(6), g.normal(size=6), 0.8
        x0[:2] = (0, 1)
        # delta = u - v with u, v >= 0 makes the l1 norm smooth
        size = (lambda w: w.sum()) if norm == "l1" else (lambda w: np.sqrt(((w[:6] - w[6:]) ** 2).sum() + 1e-18))
        found = optimize.minimize(
            lambda w, d=d: ((w[:6] - w[6:] - d) ** 2).sum(),
            np.zeros(12) + 1e-3,
            bounds=[(0, b) for b in (*(1 - x0), *x0)],
            constraints=[{"type": "ineq", "fun": lambda w, size=size, eps=eps: eps - size(w)}],
            options={"ftol": 1e-14, "maxiter": 1000},
        )
        w = found.x[:6] - found.x[6:]
        ours = project(torch.tensor(x0 + d).view(1, 1, 2, 3), torch.tensor(x0).view(1, 1, 2, 3), norm, eps).numpy().ravel()
        np.testing.assert_allclose(ours, x0 + w, atol=2e-4)


@settings(max_examples=100, deadline=None)
@given(x0=tensors(unit), d=tensors(wide), eps=radius, norm=st.sampled_from(NORMS))
def test_project_is_idempotent_and_the_identity_inside(x0, d, eps, norm):
    eps = limit(norm, eps)
    p = project(x0 + d, x0, norm, eps)
    np.testing.assert_allclose(project(p, x0, norm, eps).numpy(), p.numpy(), atol=1e-12)
    assert torch.equal(project(x0, x0, norm, eps), x0)


@settings(max_examples=60, deadline=None)
@given(x0=tensors(unit), d=tensors(wide), norm=st.sampled_from(NORMS))
def test_a_ball_of_radius_zero_is_its_centre(x0, d, norm):
    assert torch.equal(project(x0 + d, x0, norm, 0.0), x0)
    assert torch.equal(project_ball(d, norm, 0.0), torch.zeros_like(d))
    assert torch.equal(linear_max(d, x0, norm, 0.0), x0)
    assert torch.equal(sample_ball(x0, norm, 0.0, Rng(0).at(torch.arange(3))).abs(), torch.zeros_like(x0))


@settings(max_examples=60, deadline=None)
@given(x0=tensors(unit, 4), d=tensors(wide, 4), eps=radius, norm=st.sampled_from(NORMS))
def test_samples_do_not_see_each_other(x0, d, eps, norm):
    eps = limit(norm, eps)
    for fn in (lambda a, b: project(a + b, b, norm, eps), lambda a, b: linear_max(a, b, norm, eps), lambda a, b: steepest(a, norm)):
        whole = fn(d, x0)
        for i in range(4):
            assert torch.equal(fn(d[i : i + 1], x0[i : i + 1]), whole[i : i + 1])


@settings(max_examples=100, deadline=None)
@given(d=tensors(wide), eps=radius, norm=st.sampled_from(CONVEX))
def test_project_ball_is_the_nearest_point_of_the_ball(d, eps, norm):
    p = project_ball(d, norm, eps)
    assert float(norm_of(p, norm).max()) <= eps + 1e-9
    y = eps * steepest(d - p, norm)  # the point of the ball that is furthest along the residual
    assert float(dot(d - p, y - p).max()) <= 1e-8


def test_project_l1_takes_a_radius_for_each_sample():
    d = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    radii = torch.tensor([0.0, 0.5, 1.0, 100.0], dtype=torch.float64)
    out = project_l1(d, radii)
    for i in range(4):
        torch.testing.assert_close(out[i : i + 1], project_ball(d[i : i + 1], "l1", float(radii[i])))
    assert torch.equal(out[3], d[3])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dim", [28, 64])
def test_single_precision_at_image_size_stays_inside(norm, dim):
    g = torch.Generator().manual_seed(0)
    x0 = torch.rand(3, 3, dim, dim, generator=g).round(decimals=1)
    d = torch.randn(3, 3, dim, dim, generator=g)
    for eps in {"linf": (8 / 255, 0.5), "l2": (0.5, 5.0, 60.0), "l1": (0.1, 12.0, 2000.0), "l0": (3.0, 100.0)}[norm]:
        slack = 1e-6 if norm == "linf" else 1e-5 * eps
        for p in (project(x0 + d, x0, norm, eps), linear_max(d, x0, norm, eps)):
            assert_feasible(p, x0, norm, eps, slack)
            if norm in ("l2", "l1") and eps < 10:
                assert float(norm_of(p - x0, norm).min()) >= eps * (1 - 1e-4)  # the radius is used up


def test_l0_keeps_the_pixels_with_the_largest_feasible_change():
    x0 = torch.full((1, 2, 1, 3), 0.5)
    x = x0 + torch.tensor([[[0.1, -0.3, 9.0]], [[0.3, 0.3, 0.0]]])[None]
    p = project(x, x0, "l0", 1)
    assert p[0, :, 0].tolist() == [[0.5, 0.5, 1.0], [0.5, 0.5, 0.5]]
    assert norm_of(project(x, x0, "l0", 2) - x0, "l0").tolist() == [2]
    torch.testing.assert_close(project(x, x0, "l0", 99), x.clamp(0, 1))


# ------------------------------------------------------------------------------------------------------ linear maximum


def linear_program(g, x0, norm, eps):
    """max <g, delta> over ball and box for one sample, by scipy's LP solver (linf, l1)."""
    n = len(g)
    if norm == "linf":
        found = optimize.linprog(-g, bounds=list(zip(np.maximum(-x0, -eps), np.minimum(1 - x0, eps), strict=True)))
    else:
        bounds = [(0, b) for b in (*(1 - x0), *x0)]
        found = optimize.linprog(np.concatenate([-g, g]), A_ub=np.ones((1, 2 * n)), b_ub=[eps], bounds=bounds)
    return -found.fun


@settings(max_examples=40, deadline=None)
@given(x0=tensors(unit, 2), g=tensors(st.floats(-3, 3), 2), eps=radius, norm=st.sampled_from(["linf", "l1"]))
def test_linear_max_attains_the_linear_program(x0, g, eps, norm):
    eps = limit(norm, eps)
    p = linear_max(g, x0, norm, eps)
    assert_feasible(p, x0, norm, eps)
    for i, value in enumerate(dot(g, p - x0)):
        assert float(value) == pytest.approx(linear_program(g[i].numpy().ravel(), x0[i].numpy().ravel(), norm, eps), abs=1e-7)


@settings(max_examples=150, deadline=None)
@given(x0=tensors(unit), g=tensors(wide), eps=radius)
def test_linear_max_in_l2_satisfies_the_kkt_conditions(x0, g, eps):
    p = linear_max(g, x0, "l2", eps)
    assert_feasible(p, x0, "l2", eps)
    # p = clamp(s g) with one scale s per sample; either the radius is used up, or every coordinate that gains is at its bound
    z, bound = p - x0, torch.where(g > 0, 1 - x0, x0)
    for i in range(len(g)):
        gains = (g[i].abs() > 1e-12 * g[i].abs().max()) & (bound[i] > 0)
        stuck = (z[i].abs() - bound[i]).abs() < 1e-12
        free = gains & ~stuck
        if bool(free.any()):
            assert float(z[i].norm()) == pytest.approx(eps, abs=1e-6)
            leader = (g[i].abs() * free).argmax()
            s = z[i].flatten()[leader] / g[i].flatten()[leader]
            assert float((z[i] - s * g[i])[free].abs().max()) <= 1e-9
            assert bool((s * g[i].abs() >= z[i].abs() - 1e-9).all())
        assert bool((z[i] * g[i] >= 0).all())


@settings(max_examples=100, deadline=None)
@given(x0=tensors(unit), g=tensors(wide), eps=radius, norm=st.sampled_from(CONVEX), seed=st.integers(0, 10**6))
def test_no_feasible_point_beats_linear_max(x0, g, eps, norm, seed):
    eps = limit(norm, eps)
    best = dot(g, linear_max(g, x0, norm, eps))
    for y in (random_feasible(x0, norm, eps, seed), project(x0 + 100 * g, x0, norm, eps), x0):
        assert bool((dot(g, y) <= best + 1e-9).all())


def test_linear_max_in_l0_is_the_best_choice_of_pixels():
    g = torch.Generator().manual_seed(0)
    x0, grad = torch.rand(5, 2, 2, 3, generator=g), torch.randn(5, 2, 2, 3, generator=g)
    gain = (torch.where(grad > 0, 1 - x0, x0) * grad.abs()).sum(1).flatten(1)
    for k in (1, 2, 5):
        p = linear_max(grad, x0, "l0", k)
        assert_feasible(p, x0, "l0", k, 0)
        torch.testing.assert_close(dot(grad, p - x0), gain.topk(k).values.sum(1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_size_of_the_gradient_does_not_matter(norm, dtype):
    gen = torch.Generator().manual_seed(1)
    x0, g = torch.rand(4, *SHAPE, generator=gen, dtype=dtype), torch.randn(4, *SHAPE, generator=gen, dtype=dtype)
    eps = 2.0 if norm == "l0" else 0.3
    plain = linear_max(g, x0, norm, eps), steepest(g, norm)
    for scale in (1e-36, 1e-25, 1e-8, 1e8, 1e25, 1e36):
        p = linear_max(g * scale, x0, norm, eps)
        assert_feasible(p, x0, norm, eps, 1e-5)
        torch.testing.assert_close(p, plain[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(steepest(g * scale, norm), plain[1], atol=1e-5, rtol=1e-5)
        assert_feasible(project(x0 + g * scale, x0, norm, eps), x0, norm, eps, 1e-5)


def test_a_gradient_of_many_magnitudes_stays_feasible():
    g = torch.tensor([1.0, -1e-10, 1e-20, 1e-30, -1e-38, 0.0]).view(1, 1, 2, 3)
    x0 = torch.tensor([0.99, 0.5, 0.5, 0.5, 0.5, 0.5]).view(1, 1, 2, 3)
    for norm in CONVEX:
        assert_feasible(linear_max(g, x0, norm, 0.2), x0, norm, 0.2, 1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_no_move(norm):
    x0 = torch.rand(2, *SHAPE)
    zero = torch.zeros_like(x0)
    assert torch.equal(linear_max(zero, x0, norm, 0.5 if norm != "l0" else 2), x0)
    assert torch.equal(steepest(zero, norm), zero)
    half = torch.cat([zero[:1], torch.ones_like(x0[:1])])
    p = linear_max(half, x0, norm, 0.5 if norm != "l0" else 2)
    assert torch.equal(p[0], x0[0])
    assert not torch.equal(p[1], x0[1])


@settings(max_examples=60, deadline=None)
@given(x0=tensors(unit, 2), g=tensors(st.floats(-3, 3), 2), k=st.integers(0, 6))
def test_l0_against_all_sets_of_pixels(x0, g, k):
    """Of the points that differ from x0 in at most k pixels project finds the nearest to x, clamped, linear_max the best."""
    boxed, nearest, best = (x0 + g).clamp(0, 1), project(x0 + g, x0, "l0", k), linear_max(g, x0, "l0", k)
    assert_feasible(nearest, x0, "l0", k, 0)
    assert_feasible(best, x0, "l0", k, 0)
    far, gain = [], []
    for chosen in itertools.combinations(range(6), k):
        mask = torch.zeros(6, dtype=torch.bool)
        mask[list(chosen)] = True
        mask = mask.view(1, 1, 2, 3)
        far.append((torch.where(mask, boxed, x0) - boxed).square().flatten(1).sum(1))
        gain.append(dot(g, torch.where(mask, torch.where(g > 0, 1 - x0, -x0), 0.0)))
    torch.testing.assert_close((nearest - boxed).square().flatten(1).sum(1), torch.stack(far).amin(0), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(dot(g, best - x0), torch.stack(gain).amax(0), atol=1e-12, rtol=1e-12)
    each = linear_max(g, x0, "l0", torch.tensor([float(k), 0.0]))
    torch.testing.assert_close(dot(g, each - x0)[0], dot(g, best - x0)[0], atol=1e-12, rtol=1e-12)
    assert torch.equal(each[1], x0[1])


@settings(max_examples=80, deadline=None)
@given(x=tensors(unit), w=tensors(st.floats(-3, 3)), c=st.floats(-4, 4), norm=st.sampled_from(CONVEX))
def test_to_hyperplane_satisfies_the_kkt_conditions(x, w, c, norm):
    """One multiplier explains d: coordinates that could help more per unit of the norm are at their bounds."""
    assume(abs(c) > 1e-3)
    d = to_hyperplane(x, w, torch.full((len(x),), c, dtype=x.dtype), norm)
    assert_feasible(x + d, x, norm, 1e9)
    help_ = -math.copysign(1, c) * w  # moving along its sign brings the function to zero
    room = torch.where(help_ > 0, 1 - x, x)
    for h, r, d_i in zip(help_.flatten(1), room.flatten(1), d.flatten(1), strict=True):
        reach, gained, strong = float((h.abs() * r).sum()), float((h * d_i).sum()), h.abs() > 1e-9
        assert gained == pytest.approx(min(abs(c), reach), abs=1e-7)
        assert bool((h * d_i >= 0).all())
        free = strong & (d_i.abs() < r - 1e-9)
        if norm == "linf" and bool(free.any()):  # all that are free move equally, and nothing moves farther
            assert float((d_i[free].abs() - d_i.abs().max()).abs().max()) < 1e-8
        if norm == "l2" and bool(free.any()):  # those that are free move in proportion to h, the others would move at least as far
            rate = float((d_i[free].abs() / h[free].abs()).max())
            assert float((d_i[free].abs() - rate * h[free].abs()).abs().max()) < 1e-7
            assert bool((d_i[strong].abs() <= rate * h[strong].abs() + 1e-7).all())
        if norm == "l1" and bool((d_i.abs() > 1e-9).any()):  # a coordinate moves only when all stronger ones are at their bounds
            weakest = float(h[d_i.abs() > 1e-9].abs().min())
            assert not bool((free & (h.abs() > weakest + 1e-9)).any())


@settings(max_examples=80, deadline=None)
@given(d=tensors(wide), t=st.floats(0.01, 3), norm=st.sampled_from(CONVEX))
def test_prox_satisfies_the_optimality_conditions(d, t, norm):
    """(d - u) / t is a subgradient of the norm at u: its dual norm is at most one, and <d - u, u> = t ||u||."""
    u = prox(d, torch.full((len(d),), t, dtype=d.dtype), norm)
    dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[norm]
    assert float(norm_of(d - u, dual).max()) <= t * (1 + 1e-9) + 1e-12
    torch.testing.assert_close(dot(d - u, u), t * norm_of(u, norm), atol=1e-9, rtol=1e-9)


# ------------------------------------------------------------------------------------------------------------ the rest


@settings(max_examples=100, deadline=None)
@given(g=tensors(st.floats(-3, 3)), norm=st.sampled_from(CONVEX))
def test_steepest_attains_the_dual_norm(g, norm):
    dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[norm]
    assume(bool((norm_of(g, "linf") > 1e-6).all()))
    s = steepest(g, norm)
    assert float(norm_of(s, norm).max()) <= 1 + 1e-12
    torch.testing.assert_close(dot(g, s), norm_of(g, dual))


def test_norms():
    d = torch.tensor([[[[3.0, 0.0]], [[-4.0, 0.0]]], [[[0.0, 0.0]], [[0.0, 0.0]]]])
    assert {n: norm_of(d, n).tolist() for n in NORMS} == {"linf": [4, 0], "l2": [5, 0], "l1": [7, 0], "l0": [1, 0]}


@pytest.mark.parametrize("norm", NORMS)
def test_samples_of_the_ball_are_inside_and_keyed_by_ticket(norm):
    x = torch.rand(50, 3, 4, 4)
    eps = 5 if norm == "l0" else 0.7
    rng = Rng(0).at(torch.arange(50))
    d = sample_ball(x, norm, eps, rng)
    assert d.dtype == x.dtype
    assert float(norm_of(d, norm).max()) <= eps * (1 + 1e-6)
    assert torch.equal(sample_ball(x[7:9], norm, eps, rng.select(torch.arange(7, 9))), d[7:9])
    assert len(d.flatten(1).unique(dim=0)) == 50


@pytest.mark.parametrize("norm", CONVEX)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (1, 2, 3), (3, 4, 4)])
def test_samples_of_the_ball_are_uniform(norm, shape):
    n, dim, eps = 4000, math.prod(shape), 0.3
    d = sample_ball(torch.zeros(n, *shape), norm, eps, Rng(1).at(torch.arange(n))).double()
    r = norm_of(d, norm) / eps
    assert stats.kstest((r**dim).numpy(), stats.uniform.cdf).pvalue > 1e-4  # the volume inside radius r grows as r^D
    first = d.flatten(1)[:, 0]
    assert stats.kstest(first.numpy(), (-first).numpy()).pvalue > 1e-4
    if dim > 1:  # the direction does not depend on the radius, and coordinates are exchangeable
        flat = d.flatten(1)
        assert abs(stats.spearmanr(r.numpy(), (flat[:, 0].abs() / flat.abs().sum(1)).numpy()).statistic) < 4 / math.sqrt(n)
        assert stats.kstest(flat[:, 0].numpy(), flat[:, -1].numpy()).pvalue > 1e-4
        assert abs(float((flat[:, 0].sign() * flat[:, 1].sign()).mean())) < 4 / math.sqrt(n)


def test_a_marginal_of_each_ball_is_the_closed_form():
    n, eps = 20_000, 1.0
    x = torch.zeros(n, 1, 1, 2)
    disc = sample_ball(x, "l2", eps, Rng(2).at(torch.arange(n))).flatten(1)[:, 0].double().numpy()
    assert stats.kstest(disc, stats.beta(1.5, 1.5, loc=-1, scale=2).cdf).pvalue > 1e-4  # Wigner's semicircle
    diamond = sample_ball(x, "l1", eps, Rng(2).at(torch.arange(n))).flatten(1)[:, 0].double().numpy()
    assert stats.kstest(diamond, stats.triang(0.5, loc=-1, scale=2).cdf).pvalue > 1e-4


def test_l0_samples_choose_pixels_uniformly():
    d = sample_ball(torch.zeros(3000, 2, 2, 3), "l0", 2, Rng(3).at(torch.arange(3000)))
    used = d.ne(0).any(1).flatten(1)
    assert used.sum(1).unique().tolist() == [2]
    assert stats.chisquare(used.sum(0).numpy()).pvalue > 1e-4
    assert stats.kstest(d[d != 0].numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-4


def test_an_unknown_norm_is_named():
    x = torch.rand(1, 1, 2, 2)
    for call in (
        lambda: norm_of(x, "l3"),
        lambda: project_ball(x, "l3", 1),
        lambda: project(x, x, "l3", 1),
        lambda: linear_max(x, x, "l3", 1),
        lambda: steepest(x, "l3"),
        lambda: sample_ball(x, "l3", 1, Rng(0).at(torch.arange(1))),
    ):
        with pytest.raises(ValueError, match="unknown norm 'l3'"):
            call()
