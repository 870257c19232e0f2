"""Robust accuracy against cost: the passes of each sample in the ledger, the curve by hand, the record, the figure."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from robustlab.cli import run
from robustlab.evaluation.counting import Counter, per_sample
from robustlab.evaluation.ledger import by_sample, read
from robustlab.evaluation.result import POINTS, Tally, cost_curve
from robustlab.evaluation.runner import evaluate
from robustlab.report.figures import cost_curve as draw
from robustlab.report.figures import cost_curves_of
from robustlab.results.record import read_record, record_from, write_record
from robustlab.types import Attack, Suite, Threat, UserError


def tally(index, verdict, passes=None, forwards=0, backwards=0):
    out, more = Tally(), {} if passes is None else {"passes": passes}
    out.add({"index": index, "verdict": verdict, "forwards": forwards, "backwards": backwards, "seconds": 0.0, **more})
    return out


def test_a_curve_by_hand():
    """Six images, five correct. The first attack breaks 0 after 3 passes and 4 after 10; the second breaks 2 after 10 + 4."""
    first = tally([0, 1, 2, 3, 4], [0, 1, 1, 1, 0], [[2, 1], [5, 5], [5, 5], [5, 5], [5, 5]])
    second = tally([1, 2, 3], [1, 0, 1], [[20, 0], [4, 0], [10, 10]])
    curve, ends = cost_curve(5, 6, {"one": first, "two": second})
    assert curve == [[0, 5 / 6], [3, 4 / 6], [10, 3 / 6], [14, 2 / 6], [30, 2 / 6]]
    assert ends == {"one": 10, "two": 30}


def test_a_line_that_tells_no_passes_of_each_sample_shares_its_total():
    curve, ends = cost_curve(4, 4, {"one": tally([0, 1, 2, 3], [1, 0, 0, 1], forwards=30, backwards=20), "none": Tally()})
    assert curve == [[0, 1.0], [12.5, 0.5]]
    assert ends == {"one": 12.5, "none": 12.5}
    assert cost_curve(0, 4, {"one": Tally()}) == ([[0, 0.0]], {"one": 0})


def test_a_long_curve_is_thinned_and_right_at_its_points():
    n = 1000
    curve, _ = cost_curve(n, n, {"one": tally(list(range(n)), [0] * 900 + [1] * 100, [[i + 1, 0] for i in range(n)])})
    assert len(curve) == POINTS
    assert (curve[0], curve[-1]) == ([0, 1.0], [n, 0.1])
    assert all(accuracy == max(n - passes, 100) / n for passes, accuracy in curve)


@dataclass(frozen=True)
class Steps(Attack):
    """One step along the gradient's sign for an image of its ticket's parity, two for the others; tells what it spent, or lies."""

    name, norms = "steps", ("linf",)

    norm: str | None = None
    eps: float | None = None
    lie: int = 0

    def run(self, f, x, y, rng):
        x_adv, spent = x.clone(), torch.zeros(len(x), 2, dtype=torch.long)
        odd = rng.tickets % 2 == 1
        for rows in (torch.arange(len(x)), odd.nonzero().squeeze(1)):
            if len(rows) == 0:
                continue
            with torch.enable_grad():
                v = x_adv[rows].requires_grad_()
                loss = nn.functional.cross_entropy(f(v), y[rows])
            (g,) = torch.autograd.grad(loss, v)
            x_adv[rows] = (x_adv[rows] + HERE.eps * g.sign()).clamp(0, 1)
            spent[rows] += 1
        return x_adv, {"passes": spent + self.lie}


HERE = Threat("linf", 0.06)


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    f = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    x = torch.rand(20, 1, 4, 4)
    y = f(x).argmax(1)
    y[:2] = (y[:2] + 1) % 3
    return f, (x, y)


def suite(*attacks):
    return type("Toy", (Suite,), {"name": "toy"})(attacks=attacks)


def test_the_ledger_holds_the_passes_of_each_sample(problem, tmp_path):
    f, data = problem
    result = evaluate(f, data, suite(Steps()), threat=HERE, batch_size=6, out=tmp_path)
    _, entries = read(tmp_path / "ledger.jsonl")
    found = by_sample(entries)
    rows = range(2, 20)
    assert [found["linf 0.06", "steps", i] for i in rows] == [(int(result.robust[i]), 0, (2, 2) if i % 2 else (1, 1)) for i in rows]
    assert found["", "clean", 0] == (0, 0, None)
    (threat,) = result.threats
    broken = [i for i in rows if not result.robust[i]]
    even = sum(i % 2 == 0 for i in broken)
    assert 0 < even < len(broken) < 18
    assert threat["curve"] == [[0, 18 / 20], [2, (18 - even) / 20], [4, (18 - len(broken)) / 20]]
    assert threat["per_attack"]["steps"]["spent"] == 4


def test_passes_that_do_not_add_up_are_not_kept(problem, tmp_path):
    f, data = problem
    result = evaluate(f, data, suite(Steps(lie=1)), threat=HERE, out=tmp_path)
    assert not any("passes" in e for e in read(tmp_path / "ledger.jsonl")[1])
    assert result.per_attack["steps"]["forwards"] == 27
    assert result.threats[0]["curve"][-1][0] == 2 * 27 / 18
    counter = Counter(f)
    counter.forwards, counter.backwards = 3, 1
    assert per_sample({"passes": torch.tensor([[1, 1], [2, 0]])}, 2, counter) == [[1, 1], [2, 0]]
    wrong = ([[1, 1], [1, 0]], [[4, 1], [-1, 0]], [[3, 1]], [[1.0, 1.0], [2.0, 0.0]], [[1, 1, 0], [2, 0, 0]])
    for told in wrong:
        assert per_sample({"passes": torch.tensor(told)}, 2, counter) is None
    assert per_sample({"passes": [[1, 1], [2, 0]]}, 2, counter) is None
    assert per_sample({}, 2, counter) is None


@pytest.fixture(scope="module")
def record(problem):
    f, data = problem
    return record_from(evaluate(f, data, suite(Steps()), threat=HERE), model={"name": "m"}, data={"name": "toy"})


def test_figure(record, tmp_path, capsys):
    raw = record.model_dump(mode="json")
    other = copy.deepcopy(raw)
    other["model"]["label"] = "other"
    other["metrics"]["threats"][0]["curve"] = [[0, 1.0], [1, 0.25]]
    title, curves = cost_curves_of([raw, other])
    assert title == "accuracy under toy, $\\ell_\\infty$ 0.06 (%)"
    assert curves["m"] == ([tuple(p) for p in raw["metrics"]["threats"][0]["curve"]], {"steps": 4})
    files = draw([raw, other], tmp_path / "a"), draw([raw, other], tmp_path / "b")
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]
    assert draw([raw], tmp_path / "c")[1].read_bytes() != files[0][1].read_bytes()
    path = write_record(tmp_path / "runs/x/record.json", record)
    assert read_record(path) == record
    capsys.readouterr()
    assert run(["curve", str(tmp_path / "runs"), "--out", str(tmp_path / "drawn.png")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path}/drawn.png\nwrote {tmp_path}/drawn.svg\n"
    assert (tmp_path / "drawn.svg").read_bytes() == (tmp_path / "c.svg").read_bytes()


def test_figures_that_cannot_be(record, tmp_path, capsys):
    raw = record.model_dump(mode="json")
    old = copy.deepcopy(raw)
    del old["metrics"]["threats"][0]["curve"]
    with pytest.raises(UserError, match="no record has a curve of robust accuracy against passes; evaluate again to get one"):
        draw([old], tmp_path / "x")
    for change, message in (
        (lambda r: r["suite"].update(name="b"), "one figure shows one of the suites, the records have b, toy"),
        (lambda r: r["metrics"]["threats"][0].update(eps=0.5), "one of the threat models, the records have linf 0.06, linf 0.5"),
        (lambda r: None, "one figure shows one record of each model, there are several of m"),
    ):
        other = json.loads(json.dumps(raw))
        change(other)
        with pytest.raises(UserError, match=message):
            draw([raw, other], tmp_path / "x")
    assert not list(tmp_path.iterdir())
    assert run(["curve", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"robustlab: {tmp_path}: holds no record.json\n"
