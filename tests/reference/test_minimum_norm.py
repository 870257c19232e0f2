"""On a linear classifier the smallest perturbation is known: attacks must come near it, far from the bounds and at them.

With logits W x + b the nearest point of class k solves min ||d||_p : <w_k - w_c, d> >= z_c - z_k, x + d in [0, 1]. It is found here
with scipy and numpy alone: linf and l1 as linear programs, l2 by its multiplier, l0 by trying all sets of pixels.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, linprog, minimize
from torch import nn

from robustlab import geometry, registry
from robustlab.rng import Rng
from robustlab.types import one_hot

N, SHAPE = 6, (2, 5, 5)
ATTACKS = ("deepfool", "ddn", "fmn", "pdpgd", "sigma-zero", "cw", "ead")
CASES = [(name, norm) for name in ATTACKS for norm in registry.lookup("attack", name).norms]


def linear(w: np.ndarray, b: np.ndarray, scale: float = 1.0):
    w_, b_ = torch.tensor(w), torch.tensor(b)
    return lambda x: scale * (x.flatten(1) @ w_.T + b_)


def problem(regime: str, classes: int, shape=SHAPE, gap: float = 1.0, seed: int = 0, crowd: bool = False):
    """Images of class 0 and a classifier for which class 1 is the nearest other one. ``active``: most pixels are 0 or 1.

    ``crowd``: the others are as near, so that the one with the largest logit need not be the nearest.
    """
    rng = np.random.default_rng(seed)
    d = int(np.prod(shape))
    w = rng.normal(size=(classes, d))
    base = np.full(d, 0.5) if regime == "far" else rng.choice([0.0, 1.0, 0.4], size=d)
    x = np.clip(base + rng.uniform(-0.02, 0.02, (N, d)), 0, 1)
    b = -(w @ base) - gap * np.minimum(np.arange(classes) * 2.0, 1.0 if crowd else 3.0)
    b[1:2] += gap * (not crowd)
    return w, b, x


def to_half_space(v: np.ndarray, c: float, x: np.ndarray, norm: str) -> float:
    """The smallest norm of d with <v, d> >= c and x + d in [0, 1]; inf where there is none."""
    low, high, n = -x, 1 - x, len(x)
    if np.where(v > 0, v * high, v * low).sum() < c:
        return np.inf
    if norm == "linf":  # the variables are d and t
        rows = np.block([[np.eye(n), -np.ones((n, 1))], [-np.eye(n), -np.ones((n, 1))], [-v[None], np.zeros((1, 1))]])
        sides = [*zip(low, high, strict=True), (0, None)]
        return linprog(np.r_[np.zeros(n), 1], A_ub=rows, b_ub=np.r_[np.zeros(2 * n), -c], bounds=sides).fun
    if norm == "l1":  # d = p - q
        sides = [(0, h) for h in high] + [(0, -lo) for lo in low]
        return linprog(np.ones(2 * n), A_ub=np.r_[-v, v][None], b_ub=[-c], bounds=sides).fun
    d = lambda s: np.clip(np.exp(s) * v, low, high)  # noqa: E731
    return float(np.linalg.norm(d(brentq(lambda s: v @ d(s) - c, -40, 40, xtol=1e-14, rtol=1e-15))))


def smallest(w, b, x, norm: str) -> np.ndarray:
    z = x @ w.T + b
    others = range(1, len(w))
    return np.array([min(to_half_space(w[k] - w[0], zi[0] - zi[k], xi, norm) for k in others) for xi, zi in zip(x, z, strict=True)])


def fewest(w, b, x, pixels: int) -> np.ndarray:
    """The smallest number of pixels whose change, by any amount in the box, makes another class win: all sets are tried."""
    out = []
    for xi, zi in zip(x, x @ w.T + b, strict=True):
        gains = {}
        for k in range(1, len(w)):
            v = w[k] - w[0]
            gains[k] = np.where(v > 0, v * (1 - xi), -v * xi).reshape(-1, pixels).sum(0)
        sizes = (s for s in range(1, pixels + 1) for chosen in itertools.combinations(range(pixels), s)
                 if any(gains[k][list(chosen)].sum() > zi[0] - zi[k] for k in gains))  # fmt: skip
        out.append(next(sizes, np.inf))
    return np.array(out)


def run(name: str, norm: str, f, x: np.ndarray, label: int, classes: int, shape=SHAPE, **fields):
    attack = registry.lookup("attack", name)(norm=norm, **fields)
    images = torch.tensor(x).view(len(x), *shape)
    y = one_hot(torch.full((len(x),), label), classes, torch.float64)
    x_adv, info = attack.run(f, images, y, Rng(0).at(torch.arange(len(x))))
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    found = info["distance"].isfinite()
    torch.testing.assert_close(info["distance"][found], geometry.norm_of(x_adv - images, norm)[found], rtol=0, atol=0)
    hit = f(x_adv).argmax(1) == label
    assert torch.equal(hit if fields.get("targeted") else ~hit, found)
    return info["distance"].numpy(), x_adv, info


@pytest.mark.parametrize(("classes", "scale"), [(2, 1.0), (10, 0.1)])
@pytest.mark.parametrize("regime", ["far", "active"])
@pytest.mark.parametrize(("name", "norm"), [*((n, p) for n, p in CASES if p != "l0"), *(("fab", p) for p in ("linf", "l2", "l1"))])
def test_every_attack_comes_within_a_percent_with_its_defaults(name, norm, regime, classes, scale):
    w, b, x = problem(regime, classes)
    distance, _, _ = run(name, norm, linear(w, b, scale), x, 0, classes)
    ratio = distance / smallest(w, b, x, norm)
    assert ratio.min() >= 1 - 1e-7
    assert ratio.max() <= 1.01


@pytest.mark.parametrize("scale", [0.1, 10.0])
@pytest.mark.parametrize("regime", ["far", "active"])
@pytest.mark.parametrize(("name", "norm"), [("ddn", "l2"), *(("fmn", p) for p in ("linf", "l2", "l1"))])
def test_the_last_step_finds_the_nearest_of_ten_classes_at_any_size_of_the_logits(name, norm, regime, scale):
    """The cross-entropy of DDN mixes the classes where logits are small; the class that FMN climbs towards may be a farther one."""
    w, b, x = problem(regime, 10, crowd=True)
    best = smallest(w, b, x, norm)
    distance, _, info = run(name, norm, linear(w, b, scale), x, 0, 10)
    assert (distance / best).min() >= 1 - 1e-7
    assert (distance / best).max() <= 1.01
    assert info["passes"].amax(0).tolist() <= [100 + 10 + 3, 100 + 9]
    if (name, scale) == ("ddn", 0.1):  # what the search by itself is worth
        assert (run(name, norm, linear(w, b, scale), x, 0, 10, refine=0)[0] / best).max() > 1.05


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_last_step_goes_back_to_the_boundary(norm):
    """DeepFool goes to 1.02 of the distance in its one step; every bisection halves what is left of that."""
    w, b, x = problem("far", 2)
    name = "deepfool" if norm != "l1" else "fmn"
    fields = {"overshoot": 0.02} if norm != "l1" else {"steps": 12}
    best = smallest(w, b, x, norm)
    excess = [run(name, norm, linear(w, b), x, 0, 2, refine=k, **fields)[0] / best - 1 for k in (0, 8, 16, 24)]
    if norm != "l1":
        np.testing.assert_allclose(excess[0], 0.02, rtol=1e-6)
        assert all(e.max() <= 1.03 * 2.0**-k for k, e in zip((8, 16, 24), excess[1:], strict=True))
    assert all((late <= early).all() for early, late in itertools.pairwise(excess))
    cost = [run(name, norm, linear(w, b), x, 0, 2, refine=k, **fields)[2]["passes"] for k in (0, 1, 8)]
    assert torch.equal(cost[2] - cost[1], torch.tensor([[7, 0]]).expand(N, 2))
    first = cost[1] - cost[0]  # a bisection, the look at the linearised classifier, and a question where that finds a nearer point
    assert bool((first[:, 1] == 1).all())
    assert set(first[:, 0].tolist()) <= {2, 3}


@pytest.mark.parametrize("name", ["sigma-zero", "fmn"])
@pytest.mark.parametrize(("classes", "shape"), [(2, (1, 3, 4)), (3, (1, 3, 4)), (10, (1, 3, 4)), (3, (3, 3, 4))])
def test_l0_is_the_fewest_pixels(name, classes, shape):
    """One to five or so, found by trying all sets. A pixel of three channels counts once."""
    for seed in range(2):
        w, b, x = l0_problem(classes, shape, seed)
        distance, _, _ = run(name, "l0", linear(w, b), x, 0, classes, shape, steps=100)
        best = fewest(w, b, x, pixels=12)
        assert len(np.unique(best)) >= 3
        np.testing.assert_array_equal(distance, best)


def l0_problem(classes: int, shape, seed: int):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(classes, int(np.prod(shape))))
    x = rng.uniform(0, 1, (1500, w.shape[1])).round(1)
    b = -(w @ x.mean(0)) + 4.0 * (np.arange(classes) == 0)
    return w, b, x[(x @ w.T + b).argmax(1) == 0][:40]


def test_sigma_zero_keeps_and_drops_whole_pixels():
    """The authors' code counts and thresholds values; ours counts pixels, so a small change in one channel stays beside a large.

    The third channel can move by 0.05 at most, less than any threshold on the way, and counts twenty times: where a pixel is
    changed all its channels are, and so few pixels do.
    """
    rng = np.random.default_rng(0)
    v = np.concatenate([np.ones((2, 12)), np.full((1, 12), 20.0)]).reshape(-1)
    x = np.concatenate([rng.uniform(0.3, 0.5, (10, 24)), np.full((10, 12), 0.95)], 1)
    w, b = np.stack([np.zeros(36), v]), np.array([0.0, -(x.mean(0) @ v) - 4.0])
    distance, x_adv, _ = run("sigma-zero", "l0", linear(w, b), x, 0, 2, (3, 3, 4), steps=200, refine=0)
    moved = (x_adv - torch.tensor(x).view(-1, 3, 3, 4)).ne(0)
    assert torch.equal(moved[:, 2], moved.any(1))
    assert distance.max() <= fewest(w, b, x, pixels=12).max() + 1


def test_fmn_in_l2_moves_on_the_sphere_of_its_radius():
    """Its projection scales up as well as down: where a point no longer fools the norm grows by a twentieth."""
    w, b, x = problem("far", 2)
    f, sizes, hits = linear(w, b), [], []
    images = torch.tensor(x).view(N, *SHAPE)

    def watched(z):
        out = f(z)
        sizes.append(geometry.norm_of(z.detach() - images, "l2"))
        hits.append(out.detach().argmax(1) != 0)
        return out

    registry.lookup("attack", "fmn")(norm="l2", steps=30, refine=0, alpha=1e-3, alpha_last=1e-3, gamma_last=0.05).run(
        watched, images, one_hot(torch.zeros(N, dtype=torch.long), 2, torch.float64), Rng(0).at(torch.arange(N))
    )
    sizes, hits = torch.stack(sizes[1:]), torch.stack(hits[1:])  # the first is the clean image
    ever = hits.cumsum(0) > 0
    grows = ever[1:-1] & ~hits[1:-1]
    assert int(grows.sum()) > 3 * N
    torch.testing.assert_close(sizes[2:][grows], 1.05 * sizes[1:-1][grows], rtol=1e-9, atol=0)


@pytest.mark.parametrize(("name", "norm"), [(n, p) for n, p in CASES if n != "deepfool" and p != "l0"])
def test_targeted_reaches_the_class_near_the_smallest_norm(name, norm):
    """The class to reach is not the nearest one: its region is a polytope, cut by the others."""
    shape = (1, 3, 3)
    w, b, x = problem("far", 3, shape, gap=0.2)
    best = np.array([to_region(w, b, xi, 2, norm) for xi in x])
    nearest = smallest(w, b, x, norm)
    assert (best > 1.05 * nearest).all()
    fields = {"steps": 1000} if name == "ddn" else {}
    distance, _, _ = run(name, norm, linear(w, b), x, 2, 3, shape, targeted=True, **fields)
    ratio = distance / best
    assert ratio.min() >= 1 - 1e-6
    assert ratio.max() <= 1.05


def to_region(w, b, x, k: int, norm: str) -> float:
    """The smallest norm of d for which class k wins at x + d in the box."""
    others = [j for j in range(len(w)) if j != k]
    v, c, n = w[k] - w[others], (x @ w.T + b)[others] - (x @ w.T + b)[k], len(x)
    if norm == "linf":
        rows = np.block([[np.eye(n), -np.ones((n, 1))], [-np.eye(n), -np.ones((n, 1))], [-v, np.zeros((len(v), 1))]])
        sides = [*zip(-x, 1 - x, strict=True), (0, None)]
        return linprog(np.r_[np.zeros(n), 1], A_ub=rows, b_ub=np.r_[np.zeros(2 * n), -c], bounds=sides).fun
    if norm == "l1":
        return linprog(np.ones(2 * n), A_ub=np.hstack([-v, v]), b_ub=-c, bounds=[(0, h) for h in 1 - x] + [(0, lo) for lo in x]).fun
    inside = {"type": "ineq", "fun": lambda d: v @ d - c, "jac": lambda d: v}
    start = np.linalg.lstsq(v, c, rcond=None)[0]
    sides = list(zip(-x, 1 - x, strict=True))
    result = minimize(lambda d: d @ d, start, jac=lambda d: 2 * d, bounds=sides, constraints=inside, options={"ftol": 1e-14})
    assert result.success
    return float(np.sqrt(result.fun))


# ----------------------------------------------------------------------------------------------- what all of them keep


CHEAP = {"steps": 60, "binary_steps": 6}


def cheap(name: str) -> dict:
    known = registry.lookup("attack", name).__dataclass_fields__
    return {k: v for k, v in CHEAP.items() if k in known}


def net(classes: int = 4, shape=SHAPE):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        f = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 30), nn.Tanh(), nn.Linear(30, classes))
    for p in f.parameters():
        p.data.mul_(2.0)
    return f.double().eval()


def sample(n: int = 12):
    return Rng(5).at(torch.arange(n)).uniform(SHAPE, dtype=torch.float64)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_what_is_misclassified_has_distance_zero_and_stays(name, norm):
    f, x = net(), sample()
    right = f(x).argmax(1)
    y = torch.where(torch.arange(len(x)) % 3 == 0, (right + 1) % 4, right)
    x_adv, info = registry.lookup("attack", name)(norm=norm, **cheap(name)).run(f, x, one_hot(y, 4, x.dtype), Rng(0).at(y))
    wrong = y != right
    assert torch.equal(x_adv[wrong], x[wrong])
    assert bool((info["distance"][wrong] == 0).all())
    assert bool((info["distance"][~wrong] > 0).all())
    assert bool((info["passes"][wrong] == torch.tensor([1, 0])).all())
    found = info["distance"].isfinite()
    assert float(found.double().mean()) > 0.9
    assert torch.equal(info["distance"][found], geometry.norm_of(x_adv - x, norm)[found])
    assert torch.equal(f(x_adv).argmax(1) != y, found)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_one_run_is_the_whole_curve(name, norm):
    """With a radius the verdicts are those that the distances of one run without it give, and points stay in the ball."""
    w, b, x = problem("active", 3, gap=2.0 if norm == "l0" else 1.0)
    f, images = linear(w, b), torch.tensor(x).view(N, *SHAPE)
    y, rng = one_hot(torch.zeros(N, dtype=torch.long), 3, torch.float64), Rng(0).at(torch.arange(N))
    make = registry.lookup("attack", name)
    x_free, free = make(norm=norm, **cheap(name)).run(f, images, y, rng)
    nearest = smallest(w, b, x, norm) if norm != "l0" else fewest(w, b, x.reshape(N, -1), 25)
    levels = np.quantile(free["distance"].numpy(), [0.2, 0.5, 0.8, 1.0])
    for eps in [0.5 * levels[0], *levels]:
        x_adv, info = make(norm=norm, eps=float(eps), **cheap(name)).run(f, images, y, rng)
        assert torch.equal(info["distance"], free["distance"])
        assert float(geometry.norm_of(x_adv - images, norm).max()) <= eps * (1 + 1e-12)
        inside = free["distance"] <= eps
        assert torch.equal(x_adv[inside], x_free[inside])
        fooled = f(x_adv).argmax(1) != 0
        assert bool(fooled[inside].all())
        assert not bool(fooled[torch.tensor(nearest > eps)].any())  # what no attack can do within eps


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_counts_its_passes(name, norm):
    f, x, calls = net(), sample(), []
    y = f(x).argmax(1)

    def counted(z):
        calls.append(len(z))
        return f(z)

    attack = registry.lookup("attack", name)(norm=norm, **cheap(name))
    _, info = attack.run(counted, x, one_hot(y, 4, x.dtype), Rng(0).at(y))
    assert int(info["passes"][:, 0].sum()) == sum(calls)


def test_more_steps_of_deepfool_where_the_classifier_bends():
    """One step is enough on a linear classifier; elsewhere samples leave at different steps and cost accordingly."""
    f, x = net(), sample(40)
    y = f(x).argmax(1)
    attack = registry.lookup("attack", "deepfool")
    _, info = attack(norm="l2", refine=0).run(f, x, one_hot(y, 4, x.dtype), Rng(0).at(y))
    taken = (info["passes"][:, 0] - 1) // 2
    assert int(taken.min()) >= 1
    assert len(taken.unique()) > 1
    assert torch.equal(info["passes"][:, 1], 3 * taken)
    _, short = attack(norm="l2", steps=1, refine=0).run(f, x, one_hot(y, 4, x.dtype), Rng(0).at(y))
    assert torch.equal(short["distance"].isfinite(), taken == 1)


def test_deepfool_breaks_a_tie():
    w, b = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]), np.zeros(2)
    x = np.full((1, 4), 0.5)
    distance, _, _ = run("deepfool", "l2", linear(w, b), x, 0, 2, (1, 2, 2))
    assert 0 < distance[0] < 1e-9


def test_cw_moves_pixels_that_are_exactly_black_or_white():
    """atanh(+-1) is infinite: in these variables such a pixel would never move."""
    rng = np.random.default_rng(4)
    x = rng.integers(0, 2, (4, 50)).astype(float)
    v = np.abs(rng.normal(size=50)) * np.where(x == 0, 1, -1)  # every pixel helps
    w = np.stack([np.zeros(50), v[0]])
    b = np.array([0.0, float(-(x[0] @ v[0]) - 2)])
    distance, x_adv, _ = run("cw", "l2", linear(w, b), x[:1], 0, 2, steps=1000)
    np.testing.assert_allclose(distance, smallest(w, b, x[:1], "l2"), rtol=0.02)
    assert float((x_adv.flatten() - torch.tensor(x[0])).abs().gt(1e-3).double().mean()) > 0.8


def test_no_norm_is_refused():
    x = sample(2)
    for name in ATTACKS:
        with pytest.raises(ValueError, match=f"{name}: no norm; give norm and eps"):
            registry.lookup("attack", name)().run(
                net(), x, one_hot(torch.zeros(2, dtype=torch.long), 4, x.dtype), Rng(0).at(torch.arange(2))
            )


# ------------------------------------------------------------------------------------------------- the geometry they use


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), norm=st.sampled_from(["linf", "l2", "l1"]), t=st.floats(0.01, 3))
def test_the_proximal_point_has_no_better_neighbour(seed, norm, t):
    rng = np.random.default_rng(seed)
    d = torch.tensor(rng.normal(size=(1, 1, 2, 3)))

    def value(u):
        return t * geometry.norm_of(u, norm) + (u - d).square().flatten(1).sum(1) / 2

    u = geometry.prox(d, torch.tensor([t], dtype=torch.float64), norm)
    around = u + torch.tensor(rng.normal(size=(300, 1, 2, 3)) * 10.0 ** rng.uniform(-6, 0, (300, 1, 1, 1)))
    assert bool((value(around) >= value(u) - 1e-14).all())
    assert bool((value(u * torch.linspace(0, 2, 41, dtype=torch.float64).view(-1, 1, 1, 1)) >= value(u) - 1e-12).all())


@pytest.mark.parametrize("norm", geometry.NORMS)
def test_radii_per_sample_are_the_radii_of_each(norm):
    x0, x = sample(6), sample(6).flip(0)
    eps = torch.tensor([0.0, 0.05, 0.2, 0.7, 1.0, 3.0], dtype=x.dtype) * {"linf": 1, "l2": 2, "l1": 8, "l0": 5}[norm]
    project = lambda i, e: geometry.project(x[i], x0[i], norm, e)  # noqa: E731
    ball = lambda i, e: geometry.project_ball((x - x0)[i], norm, e)  # noqa: E731
    best = lambda i, e: geometry.linear_max((x - x0)[i], x0[i], norm, e)  # noqa: E731
    for fn in (project, ball, best):
        one_by_one = torch.cat([fn(slice(i, i + 1), float(e)) for i, e in enumerate(eps)])
        torch.testing.assert_close(fn(slice(None), eps), one_by_one, rtol=0, atol=1e-12)
