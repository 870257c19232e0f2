"""Schedules against their curves written out, at their edges, and as the value of any number."""

import itertools
import math

import pytest

from robustlab import config
from robustlab.registry import entries
from robustlab.types import Schedule, Threat, UserError, with_threat


def schedule(name, **fields):
    return config.build("schedule", name, **fields)


def curve(s, epochs, points=400):
    return [s.at(epochs * i / points, epochs) for i in range(points + 1)]


def test_constant_rises_from_zero_and_stays():
    assert curve(schedule("constant"), 10) == [1.0] * 401
    s = schedule("constant", value=3.0, warmup=2)
    assert [s.at(t, 10) for t in (0, 0.5, 1, 2, 9)] == [0.0, 0.75, 1.5, 3.0, 3.0]


def test_linear_is_a_line_that_ends():
    s = schedule("linear", start=1.0, end=3.0)
    assert [s.at(t, 8) for t in (0, 2, 4, 8)] == [1.0, 1.5, 2.0, 3.0]
    short = schedule("linear", start=0.0, end=0.4, epochs=4)
    assert [short.at(t, 100) for t in (0, 1, 4, 99)] == pytest.approx([0.0, 0.1, 0.4, 0.4])


@pytest.mark.parametrize("warmup", [0.0, 3.0])
def test_cosine_is_half_a_cosine(warmup):
    s = schedule("cosine", start=2.0, end=0.5, warmup=warmup)
    for t in (warmup, warmup + 1, 7.25, 11):
        expected = 0.5 + 1.5 * (1 + math.cos(math.pi * (t - warmup) / (12 - warmup))) / 2
        assert s.at(t, 12) == pytest.approx(expected)
    assert s.at(12, 12) == pytest.approx(0.5)
    if warmup:
        assert [s.at(t, 12) for t in (0, 1.5)] == [0.0, 1.0]


def test_piecewise_changes_at_its_milestones():
    s = schedule("piecewise")
    assert [s.at(t, 200) for t in (0, 99.99, 100, 149.99, 150, 200)] == [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    third = schedule("piecewise", milestones=[1 / 3], values=[1.0, 0.5])
    assert third.at(1, 3) == 0.5  # although 1 / 3 is not exact in binary
    warm = schedule("piecewise", warmup=10)
    assert [warm.at(t, 200) for t in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert schedule("piecewise", milestones=[], values=[0.7]).at(3, 9) == 0.7


def test_one_cycle_goes_up_and_down():
    s = schedule("one-cycle", start=0.1, peak=1.0, end=0.0, top=0.4)
    assert [s.at(t, 10) for t in (0, 2, 4, 7, 10)] == pytest.approx([0.1, 0.55, 1.0, 0.5, 0.0])
    assert schedule("one-cycle", top=0.0).at(0, 10) == 1.0
    assert schedule("one-cycle", top=1.0).at(10, 10) == pytest.approx(1.0)


@pytest.mark.parametrize("name", sorted(entries("schedule")))
def test_every_schedule_is_finite_within_its_bounds_and_holds_after_the_end(name):
    for epochs in (1, 7, 200):
        values = curve(schedule(name), epochs)
        assert all(math.isfinite(v) and 0 <= v <= 1 for v in values)
        assert schedule(name).at(epochs + 5, epochs) == pytest.approx(values[-1])


@pytest.mark.parametrize("name", sorted(set(entries("schedule")) - {"piecewise"}))
def test_continuous_schedules_do_not_jump(name):
    warm = {"warmup": 2.0} if "warmup" in entries("schedule")[name].__dataclass_fields__ else {}
    values = curve(schedule(name, **warm), 20, points=4000)
    assert max(abs(a - b) for a, b in itertools.pairwise(values)) < 0.01


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"values": [1.0, 0.1]}, r"values: expected one more than milestones \(3\), got 2"),
        ({"milestones": [0.7, 0.2]}, "milestones: must rise"),
        ({"milestones": [0.5, 1.5]}, "milestones"),
    ],
)
def test_impossible_pieces_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        schedule("piecewise", **fields)


def test_any_number_of_a_trainer_may_be_a_schedule():
    """``trainer.at`` resolves the whole tree; what is no schedule stays the very object."""
    method = config.build(
        "trainer",
        "awp",
        inner=[{"name": "craft", "attack": {"name": "pgd", "eps": {"name": "linear", "start": 0.0, "end": 0.2}}}],
        gradient={"name": "awp", "gamma": {"name": "piecewise", "milestones": [0.5], "values": [0.0, 0.01]}},
    )
    method = with_threat(method, Threat("linf", 0.1))
    assert isinstance(method.gradient.gamma, Schedule)
    early, late = method.at(1, 10), method.at(5, 10)
    assert early.inner[0].attack.eps == pytest.approx(0.02)
    assert late.inner[0].attack.eps == pytest.approx(0.1)
    assert (early.gradient.gamma, late.gradient.gamma) == (0.0, 0.01)
    assert early.objective is method.objective
    plain = with_threat(config.build("trainer", "awp"), Threat("linf", 0.1))
    assert plain.at(3, 10) is plain
