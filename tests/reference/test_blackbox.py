"""Black-box attacks and patches: closed forms on linear models, budgets to the query, classifiers that have no gradients."""

import numpy as np
import pytest
import torch
from torch import nn

from robustlab import config, geometry
from robustlab.attacks.hop_skip_jump import HopSkipJump
from robustlab.attacks.patch import Patch
from robustlab.attacks.spsa import SPSA
from robustlab.evaluation.runner import evaluate
from robustlab.rng import Rng
from robustlab.types import Suite, Threat, UserError, one_hot

N, SHAPE = 12, (1, 4, 4)
D = 16


def run(attack, f, x, y, k=2, seed=0):
    return attack.run(f, x, one_hot(y, k, x.dtype), Rng(seed).at(torch.arange(len(x))))


def linear(seed=0, n=N):
    """Two classes, s = <w, x> + b, images away from the box; returns also |s|."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(D, generator=g, dtype=torch.float64)
    x = torch.rand(n, *SHAPE, generator=g, dtype=torch.float64) * 0.2 + 0.4
    b = -0.5 * w.sum()

    def f(v):
        s = v.flatten(1) @ w + b
        return torch.stack([-s, s], 1)

    return f, x, f(x).argmax(1), w, (x.flatten(1) @ w + b).abs()


class Billed:
    """Counts the images that a classifier is given."""

    def __init__(self, f):
        self.f, self.rows = f, 0

    def __call__(self, v):
        self.rows += len(v)
        return self.f(v)


def through_numpy(w, b):
    """A classifier that gradients cannot pass, as a deployed one is."""

    def f(v):
        assert not v.requires_grad
        assert not torch.is_grad_enabled()
        s = v.numpy().reshape(len(v), -1) @ w.numpy() + b
        return torch.from_numpy(np.stack([-s, s], 1))

    return f


# -------------------------------------------------------------------------------------------------------- HopSkipJump


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_hop_skip_jump_comes_near_the_closed_form(norm):
    f, x, y, w, gap = linear(n=4)
    x_adv, info = run(HopSkipJump(norm=norm, queries=20_000), f, x, y)
    assert bool((f(x_adv).argmax(1) != y).all())
    torch.testing.assert_close(info["distance"], geometry.norm_of(x_adv - x, norm))
    ratio = info["distance"] * w.norm(1 if norm == "linf" else 2) / gap
    assert float(ratio.min()) >= 1 - 1e-9
    assert float(ratio.max()) < 1.01


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_hop_skip_jump_at_the_bounds_of_the_box(norm, classes):
    """Half of the pixels are black or white. With ten classes a walk may end at a facet that is not the nearest."""
    g = torch.Generator().manual_seed(0)
    w, n = torch.randn(classes, D, generator=g, dtype=torch.float64), 3
    base = torch.randint(0, 3, (D,), generator=g).double() / 2
    x = (base + 0.02 * torch.randn(n, D, generator=g, dtype=torch.float64)).clamp(0, 1).view(n, *SHAPE)
    b = -(w @ base) + 0.7 * (torch.arange(classes) == 0)
    f = lambda v: v.flatten(1) @ w.T + b  # noqa: E731
    z, others = f(x), range(1, classes)
    ways = [geometry.to_hyperplane(x, (w[k] - w[0]).expand(n, D).view(n, *SHAPE), z[:, k] - z[:, 0], norm) for k in others]
    reach = torch.stack([((w[k] - w[0]) * d.flatten(1)).sum(1) + z[:, k] - z[:, 0] for k, d in enumerate(ways, 1)])
    size = torch.stack([geometry.norm_of(d, norm) for d in ways])
    size = torch.where(reach > -1e-9, size, torch.inf)
    x_adv, info = run(HopSkipJump(norm=norm, queries=20_000), f, x, torch.zeros(n, dtype=torch.long), k=classes)
    assert bool(((x == 0) | (x == 1)).double().mean() > 0.2)
    assert bool((f(x_adv).argmax(1) != 0).all())
    assert float((info["distance"] / size.amin(0)).min()) >= 1 - 1e-9
    reached = size.gather(0, f(x_adv).argmax(1)[None] - 1)[0]
    assert float((info["distance"] / reached).max()) < 1.01
    assert float((reached / size.amin(0)).median()) < 1.01  # most end at the nearest facet


def test_more_questions_come_nearer():
    f, x, y, w, gap = linear(n=20)
    medians = []
    for queries in (100, 1000, 8000):
        _, info = run(HopSkipJump(norm="l2", queries=queries), f, x, y)
        medians.append(float((info["distance"] * w.norm() / gap).median()))
    assert medians[0] > 1.2 * medians[1] > medians[2]
    assert medians[2] < 1.05


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("queries", [1, 2, 30, 150, 999])
def test_hop_skip_jump_keeps_its_budget_and_counts(norm, queries):
    f, x, y, _, _ = linear()
    billed = Billed(f)
    _, info = run(HopSkipJump(norm=norm, queries=queries), billed, x, y)
    assert int(info["queries"].max()) <= queries
    assert int(info["queries"].sum()) == billed.rows
    assert info["passes"].tolist() == [[q, 0] for q in info["queries"].tolist()]
    alone = Billed(f)
    run(HopSkipJump(norm=norm, queries=queries), alone, x[:1], y[:1])
    assert alone.rows == int(info["queries"][0])
    if queries >= 150:
        assert int(info["queries"].min()) > queries / 3  # and spends it


def test_hop_skip_jump_sees_decisions_only():
    f, x, y, w, _ = linear()
    attack = HopSkipJump(norm="l2", queries=800)
    logits, _ = run(attack, f, x, y)
    decisions, _ = run(attack, lambda v: one_hot(f(v).argmax(1), 2), x, y)
    assert torch.equal(logits, decisions)
    numpy, _ = run(attack, through_numpy(w, -0.5 * float(w.sum())), x, y)
    torch.testing.assert_close(numpy, logits)


def test_hop_skip_jump_says_when_there_is_nothing():
    x, y = torch.rand(4, *SHAPE), torch.tensor([0, 0, 1, 0])
    x_adv, info = run(HopSkipJump(norm="linf", eps=0.1, queries=60), lambda v: torch.tensor([[1.0, 0.0]]).repeat(len(v), 1), x, y)
    assert info["distance"].tolist() == [float("inf"), float("inf"), 0.0, float("inf")]
    assert info["queries"].tolist() == [43, 43, 1, 43]  # itself, 20 noise images, black, white, 20 of both
    torch.testing.assert_close(x_adv, x)


def test_white_is_tried_where_noise_does_not_do():
    f = lambda v: torch.stack([torch.full((len(v),), 0.99), v.flatten(1).mean(1)], 1)  # noqa: E731
    x, y = torch.rand(4, *SHAPE) * 0.5, torch.zeros(4, dtype=torch.long)
    _, info = run(HopSkipJump(norm="l2", queries=300), f, x, y)
    assert bool(info["distance"].isfinite().all())


def test_hop_skip_jump_in_a_ball():
    f, x, y, w, gap = linear()
    exact = gap / w.norm()
    eps = float(exact.median()) * 1.05
    x_adv, info = run(HopSkipJump(norm="l2", eps=eps, queries=8000), f, x, y)
    assert float(geometry.norm_of(x_adv - x, "l2").max()) <= eps * (1 + 1e-9)
    fooled = f(x_adv).argmax(1) != y
    assert torch.equal(fooled, info["distance"] <= eps)
    assert 0 < int(fooled.sum()) < N
    assert HopSkipJump(norm="l2", queries=50)(f, x, y).shape == x.shape  # a direct call needs no radius


# --------------------------------------------------------------------------------------------------------------- SPSA


def test_the_estimated_gradient_is_the_gradient_on_average():
    f, x, y, w, _ = linear(n=3)
    attack, target = SPSA(norm="linf", eps=0.3), one_hot(y, 2, x.dtype)
    errors = []
    for pairs in (50, 5000):
        g = attack._gradient(f, x, target, pairs, Rng(0).at(torch.arange(3)))
        exact = 2 * w.view(SHAPE) * torch.where(y == 0, 1.0, -1.0).view(-1, 1, 1, 1)
        errors.append(float((g - exact).norm() / exact.expand_as(g).norm()))
    assert errors[1] < 0.12  # sqrt((D - 1) / pairs) = 0.055 in expectation
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.5)


def test_spsa_breaks_what_a_linear_model_lets_be_broken():
    f, x, y, w, gap = linear(n=60)
    distance = gap / w.abs().sum()
    eps = float(distance.median())
    x_adv, _ = run(SPSA(norm="linf", eps=eps, queries=129 * 60, step=eps / 4), f, x, y)
    fooled = f(x_adv).argmax(1) != y
    assert not bool(fooled[distance > eps].any())
    assert bool(fooled[distance < 0.95 * eps].all())


def test_spsa_on_a_classifier_without_gradients():
    f, x, y, w, _ = linear()
    attack = SPSA(norm="linf", eps=0.02, queries=600, pairs=16)
    plain, info = run(attack, f, x, y)
    numpy, again = run(attack, through_numpy(w, -0.5 * float(w.sum())), x, y)
    torch.testing.assert_close(numpy, plain)
    assert torch.equal(info["passes"], again["passes"])


@pytest.mark.parametrize("queries", [1, 2, 3, 10, 129, 300, 1000])
def test_spsa_keeps_its_budget_and_counts(queries):
    f, x, y, _, _ = linear()
    billed = Billed(f)
    _, info = run(SPSA(norm="linf", eps=0.02, queries=queries), billed, x, y)
    assert int(info["passes"][:, 0].max()) <= queries
    assert int(info["passes"][:, 0].sum()) == billed.rows
    assert int(info["passes"][:, 1].max()) == 0
    assert (billed.rows > 0) == (queries >= 3)
    fooled_early = info["passes"][:, 0] < info["passes"][:, 0].max()
    if queries == 1000:
        assert bool(fooled_early.any())


def test_spsa_goes_to_a_target():
    torch.manual_seed(0)
    f = nn.Sequential(nn.Flatten(), nn.Linear(D, 4)).double()
    x = torch.rand(20, *SHAPE, dtype=torch.float64)
    goal = (f(x).argmax(1) + 1) % 4
    x_adv, _ = run(SPSA(norm="linf", eps=0.5, queries=129 * 30, step=0.05, targeted=True), f, x, goal, k=4)
    assert float((f(x_adv).argmax(1) == goal).double().mean()) > 0.8


# -------------------------------------------------------------------------------------------------------------- patch


def image_model(seed=0, h=6, w=7):
    """A linear model on 2 x h x w images with a strong spot."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, h, w, generator=g, dtype=torch.float64)
    weight[:, 3:5, 2:4] *= 1.5
    x = torch.rand(10, 2, h, w, generator=g, dtype=torch.float64)

    def f(v):
        s = (v * weight).sum((1, 2, 3)) - b
        return torch.stack([-s, s], 1)

    b = 0.0
    b = float(f(x)[:, 1].median())
    return f, x, f(x).argmax(1), weight


def gain(x, y, weight, side):
    """The exact change of the margin that the best values of each square make: (N, places...)."""
    sign = torch.where(y == 0, 1.0, -1.0).view(-1, 1, 1, 1) * weight
    room = torch.where(sign > 0, 1 - x, x) * sign.abs()
    return torch.nn.functional.avg_pool2d(room.sum(1, keepdim=True), side, 1, divisor_override=1).squeeze(1)


def test_a_patch_with_every_place_tried_is_the_exact_best():
    f, x, y, weight = image_model()
    safe = lambda v: f(v) + 1e3 * one_hot(y, 2, v.dtype)  # noqa: E731 - never fooled
    x_adv, info = run(Patch(norm="l0", eps=4, steps=12, step=0.2, positions=30, stride=1, loss="margin"), safe, x, y)
    best = gain(x, y, weight, 2)
    sign = torch.where(y == 0, 1.0, -1.0)
    got = ((x_adv - x) * weight).sum((1, 2, 3)) * sign
    torch.testing.assert_close(got, best.flatten(1).amax(1))
    place = best.flatten(1).argmax(1)
    assert torch.equal(info["corner"], torch.stack([place // best.shape[2], place % best.shape[2]], 1))


def test_a_patch_is_one_square_and_the_ball_holds_it():
    f, x, y, _ = image_model()
    for eps, side in ((4, 2), (8, 2), (9, 3), (1, 1), (100, 6)):
        x_adv, info = run(Patch(norm="l0", eps=eps, steps=5, positions=3), f, x, y)
        projected = geometry.project(x_adv, x, "l0", eps)  # takes nothing away in the evaluator
        torch.testing.assert_close(projected, x_adv, atol=1e-15, rtol=0)
        assert float(geometry.norm_of(x_adv - x, "l0").max()) <= side**2
        for before, after, corner in zip(x, x_adv, info["corner"].tolist(), strict=True):
            rows, columns = (after != before).any(0).nonzero().T
            if len(rows):
                assert corner[0] <= int(rows.min()) <= int(rows.max()) < corner[0] + side
                assert corner[1] <= int(columns.min()) <= int(columns.max()) < corner[1] + side


def test_a_patch_counts_its_passes_and_stops():
    f, x, y, _ = image_model()
    calls = []

    def counted(v):
        calls.append(len(v))
        return f(v)

    x_adv, info = run(Patch(norm="l0", eps=1, steps=5, positions=3, step=0.3), counted, x, y)
    assert int(info["passes"][:, 0].sum()) == sum(calls)
    fooled = f(x_adv).argmax(1) != y
    assert 0 < int(fooled.sum()) < len(x)
    assert int(info["passes"][~fooled, 0].min()) == 1 + 3 * 6
    assert int(info["passes"][:, 1].max()) == 1 + 3 * 5


def test_a_patch_that_does_not_fit_the_radius():
    with pytest.raises(UserError, match=r"size: a patch of 3 x 3 changes 9 pixels, more than eps = 8"):
        config.build("attack", "patch", size=3, norm="l0", eps=8)
    f, x, y, _ = image_model()
    assert torch.equal(run(Patch(norm="l0", eps=0.5), f, x, y)[0], x)


# ---------------------------------------------------------------------------------------------------- the evaluator


def test_the_evaluator_scores_black_boxes_on_a_numpy_callable():
    _, x, y, w, gap = linear(n=40)
    f = through_numpy(w.float(), -0.5 * float(w.sum()))
    for norm, dual, attack in (
        ("linf", w.abs().sum(), "spsa"),
        ("linf", w.abs().sum(), "hop-skip-jump"),
        ("l2", w.norm(), "hop-skip-jump"),
    ):
        part = config.build("attack", attack, queries=2000)
        eps = float((gap / dual).median())
        suite = type("Toy", (Suite,), {"name": "toy"})(attacks=(part,))
        result = evaluate(f, (x, y), suite, threat=Threat(norm, eps), batch_size=16)
        row = result.per_attack[attack]
        assert row["backwards"] == row["outside"] == 0
        assert 0 < row["forwards"] <= 2000 * row["attacked"]
        robust = gap / dual > eps
        assert bool(result.robust[robust].all())
        assert result.robust_accuracy < 0.5 + 0.2


def test_the_evaluator_scores_patches():
    f, x, y, weight = image_model()
    suite = type("Toy", (Suite,), {"name": "toy"})(attacks=(Patch(steps=8, positions=42, stride=1, step=0.3),))
    result = evaluate(f, (x.float(), y), suite, threat=Threat("l0", 1.0))
    margin = f(x).gather(1, y[:, None]).squeeze(1) * 2
    exact = margin > 2 * gain(x, y, weight, 1).flatten(1).amax(1)
    assert 0 < int(exact.sum()) < len(x)
    assert torch.equal(result.robust, exact)
    assert result.per_attack["patch"]["reached"] <= 1
    assert result.per_attack["patch"]["outside"] == 0
