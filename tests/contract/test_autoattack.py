"""The components of AutoAttack: what they cost, closed forms, few and many classes, images of any shape, batches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, linprog
from torch import nn

from robustlab import config, geometry
from robustlab.attacks import apgd_t, apgd_walk, square_proposals, square_walk, square_windows
from robustlab.attacks.apgd import APGD
from robustlab.attacks.apgd_t import APGDTargeted, targets_of
from robustlab.attacks.fab import FAB
from robustlab.attacks.screen import Screen
from robustlab.attacks.square import Square
from robustlab.evaluation.counting import Counter
from robustlab.evaluation.runner import evaluate
from robustlab.rng import Rng
from robustlab.types import Threat, one_hot, with_rows

EPS = {"linf": 0.06, "l2": 0.5, "l1": 2.0}
NORMS = list(EPS)


def linear(classes: int, shape=(1, 4, 4), bias: float = 0.0, seed: int = 0) -> nn.Module:
    """A linear classifier in float64; class 0 ahead by ``bias``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        f = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), classes)).double().eval()
    with torch.no_grad():
        f[1].bias.zero_()[0] += bias
    return f


def images(n: int, shape=(1, 4, 4), seed: int = 1) -> torch.Tensor:
    return torch.rand(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attack_counted(attack, f, x, y, index=None):
    """What ``run`` returns, and the rows that went forward and came back."""
    counter = Counter(f)
    x_adv, info = attack.run(
        counter, x, one_hot(y, f(x[:1]).shape[1], x.dtype), Rng(0).at(torch.arange(len(x)) if index is None else index)
    )
    return x_adv, info, (counter.forwards, counter.backwards)


# ------------------------------------------------------------------------------------------------------------------ cost


@pytest.mark.parametrize(
    ("suite", "norm", "costs"),
    [
        ("autoattack", "linf", [(101, 101), (910, 909), (1801, 900), (5001, 0)]),
        ("autoattack", "l2", [(101, 101), (910, 909), (1801, 900), (5001, 0)]),
        ("autoattack", "l1", [(515, 515), (516, 515), (1801, 900), (5001, 0)]),
        ("autoattack-plus", "linf", [(505, 505), (505, 505), (1001, 4500), (5001, 0), (910, 909), (1801, 900)]),
        ("autoattack-rand", "l2", [(2020, 2020), (2020, 2020)]),
    ],
)
def test_passes_for_a_sample_that_nothing_breaks(suite, norm, costs):
    """Ten classes. Never more than the authors' code: standard 102/101, 919/909, 1828/900, 5003/0; l1 516/515, 521/515; plus
    506/505, 506/505, 1011/5000, ...; rand 2021/2020 twice. Square evaluates no proposal that changes nothing."""
    f, x, y = linear(10, bias=50.0), images(1), torch.zeros(1, dtype=torch.long)
    plan = config.build("suite", suite)
    assert len(plan.attacks) == len(costs)
    for attack, (forwards, backwards) in zip(plan.attacks, costs, strict=True):
        if attack.name == "square" and norm != "linf":  # the same loop
            assert attack.queries == forwards - 1
            attack, forwards = dataclasses.replace(attack, queries=300), 301
        x_adv, info, counted = attack_counted(dataclasses.replace(attack, norm=norm, eps=1e-3), f, x, y)
        assert f(x_adv).argmax() == 0
        assert info["passes"].tolist() == [list(counted)]
        if attack.name == "square":
            assert 0.3 * forwards < counted[0] <= forwards
            assert counted[1] == 0
        else:
            assert counted == (forwards, backwards)


@pytest.mark.parametrize("norm", NORMS)
def test_targets_side_by_side_find_what_they_find_one_by_one(norm):
    """The same samples are broken; one that is not gets the point of largest loss of all its searches."""
    f, x = net(5, (2, 8, 8)), images(24, (2, 8, 8))
    y, rng = f(x).argmax(1), Rng(0).at(torch.arange(24))
    eps, target = 0.7 * EPS[norm], one_hot(y, 5, x.dtype)
    attack = APGDTargeted(norm=norm, eps=eps, steps=10, n_targets=3)
    together, _ = attack.run(f, x, target, rng)
    missed = f(together).argmax(1) != y
    alone, best = torch.zeros_like(missed), torch.full((24,), -torch.inf, dtype=x.dtype)
    for t, towards in enumerate(targets_of(f(x), target, 3).unbind(1)):
        source = rng.child("target", t, "restart", 0, "start")
        for s, point, _ in apgd_t.side_by_side(f, x, target, towards[:, None], apgd_walk.Settings(norm, eps, 10), [source]):
            alone[s.row] |= point.fooled
            best[s.row] = torch.maximum(best[s.row], point.value)
    assert 0 < int(alone.sum()) < 24
    assert torch.equal(missed, alone)
    reached = torch.stack([apgd_t.loss(f(together), target, t) for t in targets_of(f(x), target, 3).unbind(1)]).amax(0)
    torch.testing.assert_close(reached[~missed], best[~missed])


@pytest.mark.parametrize("attack", [APGDTargeted(steps=6, n_targets=3), FAB(targeted=True, steps=4, n_targets=3), Screen(steps=6)])
def test_how_many_rows_go_at_once_changes_nothing(attack):
    f, x = net(5, (2, 8, 8)), images(14, (2, 8, 8))
    y, most, results = f(x).argmax(1), [], []
    for rows in (None, 1, 7, 1000):

        def watched(v, seen=most):
            seen[-1] = max(seen[-1], len(v))
            return f(v)

        most.append(0)
        tried = with_rows(dataclasses.replace(attack, norm="linf", eps=0.4 * EPS["linf"]), rows)
        results.append(tried.run(watched, x, one_hot(y, 5, x.dtype), Rng(0).at(torch.arange(14))))
    for x_adv, info in results[1:]:
        torch.testing.assert_close(x_adv, results[0][0])
        assert torch.equal(info["passes"], results[0][1]["passes"])
    assert most[3] > 14 >= most[0], "all targets of all samples at once, where there is room"


@pytest.mark.parametrize("attack", [APGD(), APGDTargeted(), FAB(targeted=True), FAB(restarts=3), Square()], ids=lambda a: a.name)
@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_stops_costing_once_it_is_fooled(attack, norm):
    """One image at the boundary, one far from it: together they cost what they cost alone, and the first next to nothing."""
    f, x = linear(4), images(40)
    z = f(x).detach()
    gap = z.topk(2).values.diff(dim=1).abs().squeeze(1)
    rows = torch.stack([gap.argmin(), gap.argmax()])
    x, y = x[rows], z.argmax(1)[rows]
    attack = dataclasses.replace(attack, norm=norm, eps=float(gap.min()) * {"linf": 3, "l2": 6, "l1": 12}[norm])
    if attack.name == "square":
        attack = dataclasses.replace(attack, queries=150)
    x_adv, info, counted = attack_counted(attack, f, x, y)
    assert info["passes"].sum(0).tolist() == list(counted)
    assert (f(x_adv).argmax(1) != y).tolist() == [True, False]
    assert info["passes"][0, 0] <= min(70, 0.5 * info["passes"][1, 0])


# --------------------------------------------------------------------------------------------- hyperplanes, closed forms


def shortest(w: np.ndarray, c: float, x: np.ndarray, norm: str) -> float:
    """min ||d|| with <w, d> = -c and x + d in [0, 1], by scipy; infinite where there is none."""
    n = len(w)
    low, high = -x, 1 - x
    if norm == "l2":

        def d(log_t: float) -> np.ndarray:
            return np.clip(-np.sign(c) * np.exp(log_t) * w, low, high)

        if (w @ d(40) + c) * np.sign(c) > 0:
            return np.inf
        log_t = brentq(lambda t: w @ d(t) + c, -40, 40, xtol=1e-14, rtol=1e-15)
        return float(np.sqrt((d(log_t) ** 2).sum()))
    # d = p - q with p, q >= 0; linf adds the bound t
    objective = np.concatenate([np.zeros(2 * n), [1.0]]) if norm == "linf" else np.concatenate([np.ones(2 * n), [0.0]])
    bounds = [(0, h) for h in high] + [(0, -v) for v in low] + [(0, None)]
    eye = np.eye(n)
    above = np.block([[eye, eye, -np.ones((n, 1))]]) if norm == "linf" else None
    equal = np.concatenate([w, -w, [0.0]])[None]
    found = linprog(objective, A_ub=above, b_ub=None if above is None else np.zeros(n), A_eq=equal, b_eq=[-c], bounds=bounds)
    return float(found.fun) if found.status == 0 else np.inf


@pytest.mark.parametrize("norm", NORMS)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.05, 0.5, 3.0]), zeros=st.booleans())
def test_the_way_to_a_hyperplane_is_the_shortest_in_the_box(norm, seed, scale, zeros):
    rng = np.random.default_rng(seed)
    w, x = rng.normal(size=9), rng.uniform(-0.3, 1.3, 9).clip(0, 1)
    w *= (rng.uniform(size=9) > 0.4) if zeros else 1
    c = float(rng.normal() * scale)
    d = geometry.to_hyperplane(torch.tensor(x)[None], torch.tensor(w)[None], torch.tensor([c], dtype=torch.float64), norm)[
        0
    ].numpy()
    assert (x + d).min() >= -1e-12
    assert (x + d).max() <= 1 + 1e-12
    expected = shortest(w, c, x, norm)
    if np.isfinite(expected):
        assert abs(w @ d + c) <= 1e-9
        assert float(geometry.norm_of(torch.tensor(d)[None], norm)) == pytest.approx(expected, rel=1e-7, abs=1e-8)
    else:
        assert np.allclose(d[w != 0], np.where(-c * w > 0, 1 - x, -x)[w != 0])  # all the way


def test_a_hyperplane_without_a_direction_is_not_approached():
    x = torch.rand(2, 1, 2, 2)
    for norm in NORMS:
        assert torch.equal(geometry.to_hyperplane(x, torch.zeros_like(x), torch.tensor([1.0, 0.0]), norm), torch.zeros_like(x))
    with pytest.raises(ValueError, match="l0"):
        geometry.to_hyperplane(x, x, torch.ones(2), "l0")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("classes", [2, 5])
def test_fab_finds_the_distance_of_a_linear_classifier(norm, targeted, classes):
    f, x = linear(classes, shape=(2, 3, 3)), images(10, (2, 3, 3)).mul(1.4).sub(0.2).clamp(0, 1)
    z, w = f(x).detach(), f[1].weight.detach().numpy()
    y = z.argmax(1)
    x_adv, info, _ = attack_counted(FAB(norm=norm, targeted=targeted), f, x, y)
    expected = []
    for i, c in enumerate(y.tolist()):
        others = [k for k in range(classes) if k != c]
        expected.append(min(shortest(w[k] - w[c], float(z[i, k] - z[i, c]), x[i].flatten().numpy(), norm) for k in others))
    reachable = np.isfinite(expected)
    assert reachable.sum() >= 8
    distance = info["distance"].numpy()
    np.testing.assert_allclose(distance[reachable], np.array(expected)[reachable], rtol=0.01)
    assert (distance >= np.array(expected) - 1e-9).all()
    assert np.isinf(distance[~reachable]).all()
    assert bool((f(x_adv).argmax(1) != y)[torch.tensor(reachable)].all())
    torch.testing.assert_close(
        geometry.norm_of(x_adv - x, norm)[torch.tensor(reachable)], info["distance"][torch.tensor(reachable)]
    )


def test_fab_within_a_radius_and_on_what_is_misclassified():
    f, x = linear(3), images(12)
    y = f(x).argmax(1)
    y[:2] = (y[:2] + 1) % 3
    far, info, _ = attack_counted(FAB(norm="l2", refine=0), f, x, y)
    assert info["distance"][:2].tolist() == [0.0, 0.0]
    assert torch.equal(far[:2], x[:2])
    eps = float(info["distance"].median())
    near, inside, _ = attack_counted(FAB(norm="l2", eps=eps, refine=0), f, x, y)
    assert torch.equal(inside["distance"] <= eps, info["distance"] <= eps)
    assert torch.equal(f(near).argmax(1) != y, info["distance"] <= eps)
    assert float(geometry.norm_of(near - x, "l2").max()) <= eps * (1 + 1e-12)


def test_fab_restarts_never_end_farther_away():
    torch.manual_seed(3)
    f = nn.Sequential(nn.Flatten(), nn.Linear(16, 30), nn.ReLU(), nn.Linear(30, 5)).double().eval()
    x = images(30)
    y = f(x).argmax(1)
    for norm in NORMS:
        one = attack_counted(FAB(norm=norm, steps=15, refine=0), f, x, y)[1]["distance"]
        many = attack_counted(FAB(norm=norm, steps=15, restarts=4, refine=0), f, x, y)[1]["distance"]
        assert bool((many <= one).all())
        assert bool((many < one).any())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_targeted_apgd_reaches_the_worst_case_with_any_number_of_classes(norm, classes):
    """Linear logits, never fooled: towards the only rival that is not far behind, the margin's closed form is the best there is."""
    f, x = linear(classes, bias=30.0), images(6)
    with torch.no_grad():
        f[1].bias[2:] -= 100.0
        f[1].weight[2:] = 0.0
        f[1].weight[0] = 0.0
    y, v = torch.zeros(6, dtype=torch.long), (f[1].weight[1] - f[1].weight[0]).detach()
    best = geometry.linear_max(v.view(1, 1, 4, 4).expand(6, 1, 4, 4), x, norm, EPS[norm])
    x_adv, _, _ = attack_counted(APGDTargeted(norm=norm, eps=EPS[norm], n_targets=1), f, x, y)
    gain, most = ((p - x).flatten(1) @ v for p in (x_adv, best))
    torch.testing.assert_close(gain, most, rtol=0.02 if norm == "l1" else 1e-6, atol=0)


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("classes", [2, 3])
def test_apgd_in_l1_reaches_the_worst_case(loss, classes):
    f, x = linear(classes, bias=30.0), images(6)
    with torch.no_grad():
        f[1].bias[2:] -= 100.0
        f[1].weight[2:] = 0.0
        f[1].weight[0] = 0.0
    y, v = torch.zeros(6, dtype=torch.long), (f[1].weight[1] - f[1].weight[0]).detach()
    best = geometry.linear_max(v.view(1, 1, 4, 4).expand(6, 1, 4, 4), x, "l1", EPS["l1"])
    x_adv, _, _ = attack_counted(APGD(norm="l1", eps=EPS["l1"], loss=loss), f, x, y)
    gain, most = ((p - x).flatten(1) @ v for p in (x_adv, best))
    torch.testing.assert_close(gain, most, rtol=0.02, atol=0)


# ------------------------------------------------------------------------------------------------------ classes, shapes


def net(classes: int, shape, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 24), nn.ReLU(), nn.Linear(24, classes)).double().eval()


def short(name: str = "autoattack", steps: int = 8, queries: int = 40):
    """The suite with small budgets."""
    plan = config.build("suite", name)
    cut = {"steps": steps, "queries": queries}
    return dataclasses.replace(
        plan, attacks=tuple(dataclasses.replace(a, **{k: v for k, v in cut.items() if hasattr(a, k)}) for a in plan.attacks)
    )


@pytest.mark.parametrize("name", ["autoattack", "autoattack-plus", "autoattack-rand"])
@pytest.mark.parametrize(
    ("classes", "shape"), [(2, (1, 6, 6)), (3, (3, 5, 9)), (4, (1, 12, 12)), (7, (2, 11, 4)), (10, (1, 3, 3)), (1000, (1, 4, 4))]
)
def test_any_number_of_classes_and_any_shape(name, classes, shape):
    if classes == 1000 and name == "autoattack-plus":
        pytest.skip("untargeted FAB goes back once for each class: minutes")
    f, x = net(classes, shape), images(5, shape).float()
    f = f.float()
    y = f(x).argmax(1)
    for norm in NORMS:
        result = evaluate(f, (x, y), short(name, steps=3, queries=12), threat=Threat(norm, EPS[norm]))
        assert result.clean_accuracy == 1.0
        for row in result.per_attack.values():
            assert row["outside"] == 0


def test_targets_are_the_most_likely_wrong_classes():
    z = torch.tensor([[1.0, 5.0, 3.0, 4.0], [9.0, 2.0, 7.0, 2.0]])
    y = one_hot(torch.tensor([3, 0]), 4)
    assert targets_of(z, y, 9).tolist() == [[1, 2, 0], [2, 1, 3]]
    assert targets_of(z, y, 2).tolist() == [[1, 2], [2, 1]]


# --------------------------------------------------------------------------------------------------------------- square


@pytest.mark.parametrize("norm", NORMS)
def test_square_needs_nothing_but_numbers(norm):
    """A function of NumPy, called without a graph; its margins only ever fall, query by query, for every sample by itself."""
    w = np.random.default_rng(0).normal(size=(4, 18))
    seen = {}

    def f(x):
        assert not x.requires_grad
        z = np.tanh(x.numpy().reshape(len(x), -1) @ w.T)
        for row, image in zip(z, x, strict=True):
            seen[image.numpy().tobytes()] = row
        return z

    x = images(6, (2, 3, 3))
    y = torch.as_tensor(f(x)).argmax(1)
    x_adv = Square(norm=norm, eps=EPS[norm] * 2, queries=200)(f, x, y)
    z, clean = (torch.stack([torch.as_tensor(seen[i.numpy().tobytes()]) for i in batch]) for batch in (x_adv, x))
    margins = [t.gather(1, y[:, None]).squeeze(1) - t.scatter(1, y[:, None], -9.0).amax(1) for t in (z, clean)]
    assert bool((margins[0] < margins[1]).all())


def test_square_reaches_the_best_vertex_of_a_linear_classifier():
    f, x = linear(2, bias=30.0), images(5).mul(0.6).add(0.2)
    v = (f[1].weight[1] - f[1].weight[0]).detach().view(1, 1, 4, 4)
    x_adv, info, _ = attack_counted(Square(norm="linf", eps=0.06, queries=800), f, x, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(x_adv, x + 0.06 * v.sign())
    assert int(info["passes"][:, 0].max()) < 700  # proposals of what is there already are not evaluated


def test_square_skips_only_what_changes_nothing(monkeypatch):
    """With every proposal evaluated, the points are the same."""
    f, x = net(5, (2, 8, 8)), images(8, (2, 8, 8))
    y = f(x).argmax(1)
    attack = Square(norm="linf", eps=0.02, queries=300)
    lean, cheap, _ = attack_counted(attack, f, x, y)
    propose = square_proposals.propose

    def never_the_same(*args):
        new, moved = propose(*args)
        return new, torch.ones_like(moved)

    monkeypatch.setattr(square_walk, "propose", never_the_same)
    full, dear, _ = attack_counted(attack, f, x, y)
    assert torch.equal(lean, full)
    assert int(cheap["passes"].sum()) < int(dear["passes"].sum())


@pytest.mark.parametrize("norm", NORMS)
def test_speculating_changes_nothing_but_the_cost(norm):
    """Twenty samples, some fooled on the way: in step, and each at its own pace, a few at a time."""
    f, x = net(5, (2, 8, 8)), images(20, (2, 8, 8))
    y = f(x).argmax(1)
    attack = Square(norm=norm, eps=EPS[norm] * {"linf": 1.0, "l2": 0.8, "l1": 1}[norm], queries=330)
    calls = [[], []]
    results = []
    for speculate, seen in zip((False, True), calls, strict=True):

        def watched(v, seen=seen):
            seen.append(len(v))
            return f(v)

        results.append(attack_counted(dataclasses.replace(attack, speculate=speculate, rows=48), watched, x, y))
    (plain, info, counted), (ahead, more, total) = results
    assert torch.equal(plain, ahead)
    assert torch.equal(info["queries"], more["queries"])
    assert torch.equal(info["queries"], info["passes"][:, 0])
    assert more["passes"].sum(0).tolist() == list(total)
    assert counted[0] < total[0] < 1.6 * counted[0], "what is judged in vain is billed"
    left = int((f(plain).argmax(1) == y).sum())
    assert 0 < left < 20
    assert max(calls[1][2:]) <= 48
    some = torch.tensor([3, 11, 17])
    alone, cost, _ = attack_counted(dataclasses.replace(attack, speculate=True), f, x[some], y[some], some)
    assert torch.equal(alone, ahead[some])
    assert torch.equal(cost["passes"], more["passes"][some]), "what a sample costs does not depend on the others"
    narrow, info, less = attack_counted(dataclasses.replace(attack, speculate=True, lookahead=3), f, x, y)
    assert torch.equal(narrow, plain)
    assert counted[0] < less[0] < total[0], "fewer at once, fewer in vain"


def test_speculating_alone_takes_a_fraction_of_the_calls():
    f, x = net(5, (2, 8, 8)), images(2, (2, 8, 8))
    y, calls = f(x).argmax(1), []

    def watched(v):
        calls.append(len(v))
        return f(v)

    Square(norm="linf", eps=0.01, queries=400, speculate=True, rows=32)(watched, x, y)
    many = len(calls)
    calls.clear()
    Square(norm="linf", eps=0.01, queries=400)(watched, x, y)
    assert many < 0.4 * len(calls)


@pytest.mark.parametrize(("shape", "s"), [((1, 7, 5), 3), ((2, 4, 9), 4), ((3, 6, 6), 1)])
def test_square_windows_lie_in_the_image_reach_every_edge_and_differ_between_samples(shape, s):
    n, (c, h, w) = 4000, shape
    u = Rng(0).at(torch.arange(n)).uniform((2,), dtype=torch.float64)
    at = square_windows.window(torch.Size((n, *shape)), s, u[:, 0], u[:, 1])
    mask = torch.zeros(n, c * h * w).scatter_(1, at.flatten(1), 1.0)
    mask = mask.view(n, *shape)
    assert bool((mask.flatten(1).sum(1) == c * s * s).all())
    rows, columns = mask[:, 0].amax(2), mask[:, 0].amax(1)
    draws = torch.cat([u, u.new_zeros(n, 3 + c)], 1)[:, None]
    moves = square_proposals.moves("linf", draws, torch.tensor([s]), torch.Size((n, *shape)))
    for seen, told in zip((rows, columns), moves[:2], strict=True):
        assert torch.equal(seen.bool(), told[:, 0])
    assert bool((rows.sum(1) == s).all())
    assert bool((columns.sum(1) == s).all())
    places = torch.stack([rows.argmax(1), columns.argmax(1)], 1)
    found, count = places.unique(dim=0, return_counts=True)
    assert len(found) == (h - s + 1) * (w - s + 1)
    assert float(count.max() / count.min()) < 2.0


def test_square_window_sides_follow_the_schedule():
    sides = [
        square_windows.side(0.8, q, torch.Size((1, 3, 32, 32)), "linf")
        for q in (0, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 5000)
    ]
    assert sides == [29, 29, 20, 20, 14, 10, 7, 5, 4, 3, 3]
    assert [square_windows.side(0.8, q, torch.Size((1, 3, 32, 32)), "l2") for q in (0, 11, 51, 4001)] == [29, 21, 15, 3]
    assert square_windows.side(0.8, 0, torch.Size((1, 1, 2, 9)), "l1") == 2


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 5, 9), (2, 3, 2), (1, 1, 1)])
def test_square_starts_at_the_radius(norm, shape):
    x = torch.full((20, *shape), 0.5, dtype=torch.float64)
    start = square_proposals.tiles(x, norm, 0.3, Rng(0).at(torch.arange(20)))
    torch.testing.assert_close(geometry.norm_of(start - x, norm), torch.full((20,), 0.3, dtype=torch.float64))
    assert len({p.numpy().tobytes() for p in start}) > 1


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_square_proposals_spend_the_radius(norm):
    x = torch.full((50, 2, 9, 9), 0.5, dtype=torch.float64)
    rng = Rng(0).at(torch.arange(50))
    best = square_proposals.tiles(x, norm, 0.3, rng)
    new = square_proposals.between_windows(norm, x, best, 0.3, 3, rng.child("q").uniform((7,), dtype=torch.float64))
    torch.testing.assert_close(geometry.norm_of(new - x, norm), torch.full((50,), 0.3, dtype=torch.float64))
    assert bool((new != best).flatten(1).any(1).all())


# ---------------------------------------------------------------------------------------------------------- randomness


def test_averaged_gradients_of_a_deterministic_model_are_its_gradients():
    f, x = linear(5, bias=20.0), images(6)
    y = torch.zeros(6, dtype=torch.long)
    for norm in NORMS:
        for loss in ("ce", "dlr"):
            once, info, _ = attack_counted(APGD(norm=norm, eps=EPS[norm], steps=12, loss=loss), f, x, y)
            averaged, more, counted = attack_counted(APGD(norm=norm, eps=EPS[norm], steps=12, loss=loss, eot=4), f, x, y)
            torch.testing.assert_close(averaged, once)
            assert torch.equal(more["passes"], 4 * info["passes"])
            assert counted == tuple(more["passes"].sum(0).tolist())


def test_averaged_gradients_see_through_noise():
    """Logits whose slope drowns in noise that changes with every pass: the mean of many passes still points the right way."""
    f, x = linear(2, bias=30.0), images(16)
    v = (f[1].weight[1] - f[1].weight[0]).detach().flatten()

    def noisy(z):
        slope = 0.4 * torch.randn(len(z), 16, dtype=z.dtype)
        return f(z) + torch.stack([torch.zeros(len(z)), (slope * (z - 0.5).flatten(1)).sum(1)], 1)

    y = torch.zeros(16, dtype=torch.long)
    gain = {}
    for eot in (1, 20):
        torch.manual_seed(0)
        x_adv = APGD(norm="l2", eps=0.5, steps=10, eot=eot, loss="dlr")(noisy, x, y)
        gain[eot] = float(((x_adv - x).flatten(1) @ v).mean())
    assert gain[20] > 1.5 * gain[1]


# -------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("name", "norm"), [("autoattack", "linf"), ("autoattack", "l2"), ("autoattack", "l1"), ("autoattack-plus", "linf")]
)
def test_no_verdict_depends_on_the_batch(name, norm):
    f, x = net(6, (1, 6, 6)), images(10, (1, 6, 6))
    y = f(x).argmax(1)
    results = [
        evaluate(f, (x.float(), y), short(name, 6, 25), threat=Threat(norm, EPS[norm] / 2), seed=3, batch_size=b)
        for b in (10, 1, 3)
    ]
    assert 0 < int(results[0].robust.sum()) < 10
    for other in results[1:]:
        assert torch.equal(other.robust, results[0].robust)
        for label, row in results[0].per_attack.items():
            same = other.per_attack[label]
            assert [same[k] for k in ("attacked", "broken", "forwards", "backwards")] == [
                row[k] for k in ("attacked", "broken", "forwards", "backwards")
            ]
