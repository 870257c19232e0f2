"""The audit: five models, five verdicts; every part is kept; an interrupted audit goes on; the page in a browser."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import assert_fits, needs_browser, opened
from sklearn.datasets import load_digits

from robustlab import auditing
from robustlab.cli import run
from robustlab.evaluation.statistics import wilson
from robustlab.evaluation.verdict import verdict

MODELS = '''
import torch
from sklearn.datasets import load_digits
from torch import nn

def templates():
    """Distances to the mean image of each class, on the images that are not for testing."""
    bunch = load_digits()
    x, y = torch.tensor(bunch.images).float().flatten(1) / 16, torch.tensor(bunch.target)
    m = torch.stack([x[y == k].mean(0) for k in range(10)])
    f = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        f[1].weight.copy_(2 * m)
        f[1].bias.copy_(-m.square().sum(1))
    return f

def sure():
    return nn.Sequential(templates(), nn.Softmax(1))

def guessing():
    torch.manual_seed(0)
    f = templates()
    nn.init.normal_(f[1].weight)
    nn.init.zeros_(f[1].bias)
    return f
'''
SMALL = ["--data", "{name: digits, size: 8}", "-n", "24", "--suite", "pgd-20", "--batch-size", "16"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "strangers.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def audit(name, *more):
    return run(["audit", f"strangers:{name}", *SMALL, *more])


def found(here, name):
    return json.loads((here / "audits" / f"strangers-{name}" / "audit.json").read_text())


def test_a_robust_callable(here, capsys):
    assert audit("templates", "--eps", "0.02") == 0
    said = capsys.readouterr().out
    told = found(here, "templates")
    assert said.startswith("Robust on")
    assert told["verdict"]["level"] == "robust"
    assert len(told["classes"]) == 10
    assert sum(c["n"] for c in told["classes"]) == 24
    accuracies = [p["accuracy"] for p in told["distances"]["curve"]]
    assert accuracies == sorted(accuracies, reverse=True), "robust accuracy falls with the radius"
    assert accuracies[0] == told["suite"]["record"]["metrics"]["clean"]["accuracy"]
    losses = [s["loss"] for s in told["steps"]]
    assert all(b > a - 1e-5 for a, b in itertools.pairwise(losses)), "on a linear model more steps do not lower the loss"
    assert set(told["calibration"]) == {"clean", "adversarial", "corrupted"}


def test_a_model_that_is_not_robust(here):
    assert audit("templates", "--eps", "0.5") == 0
    assert found(here, "templates")["verdict"]["level"] == "not robust"


def test_a_model_at_chance(here):
    assert audit("guessing", "--eps", "0.02") == 0
    assert found(here, "guessing")["verdict"]["level"] == "chance"


def test_probabilities_make_it_unreliable_and_it_says_why(here, capsys):
    assert audit("sure", "--eps", "0.05", "--suite", "pgd-50-10") == 0
    told = found(here, "sure")["verdict"]
    assert told["level"] == "unreliable"
    assert any(reason.startswith("probabilities:") for reason in told["reasons"])
    assert "probabilities" in capsys.readouterr().out


def test_an_interrupted_audit_goes_on(here, capsys, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(auditing, "loss_against_steps", stop)
        assert audit("templates", "--eps", "0.02") != 0
    folder = here / "audits" / "strangers-templates"
    assert not (folder / "report.html").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in (folder / "parts").iterdir()}
    assert set(kept) == {"suite.json", "corruptions.json", "distances.json"}
    capsys.readouterr()
    assert audit("templates", "--eps", "0.02") == 2
    assert "--resume" in capsys.readouterr().err
    assert audit("templates", "--eps", "0.03", "--resume") == 2
    assert "another eps: 0.02 there, 0.03 here" in capsys.readouterr().err
    assert audit("templates", "--eps", "0.02", "--resume") == 0
    assert {name: (folder / "parts" / name).stat().st_mtime_ns for name in kept} == kept, "nothing is done twice"
    assert (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["audit", "strangers:templates", *SMALL], "give --eps"),
        (["audit", "strangers:templates", *SMALL, "--eps", "0.1", "--norm", "l0"], "expected one of linf, l2, l1"),
        (["audit", "strangers:nothing", *SMALL, "--eps", "0.1"], "nothing"),
        (["audit", "strangers:templates", "--eps", "0.1"], "--data"),
        (["audit", "strangers:templates", *SMALL, "--eps", "0.1", "--suite", "autoatack"], "autoattack"),
    ],
)
def test_mistakes_are_one_line(here, capsys, arguments, says):
    assert run(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert says in line


@needs_browser
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page(here, width):
    if not (here / "audits").exists():
        assert audit("templates", "--eps", "0.1") == 0
    with opened(here / "audits" / "strangers-templates" / "report.html", width) as p:
        assert_fits(p)
        assert p.get_attribute("#verdict", "data-level") in ("robust", "not robust")
        assert p.locator("img").count() == 3
        for i in range(3):
            assert p.locator("img").nth(i).evaluate("e => e.complete && e.naturalWidth > 100")


def case(clean, robust, n=100, checks=()):
    share = [SimpleNamespace(accuracy=k / n, interval=wilson(k, n)) for k in (clean, robust)]
    reliability = SimpleNamespace(checks=[SimpleNamespace(name=name, verdict=v, advice="Do.") for name, v in checks])
    threat = SimpleNamespace(norm="linf", eps=8 / 255)
    return SimpleNamespace(metrics=SimpleNamespace(clean=share[0], robust=share[1]), threat=threat, reliability=reliability)


@pytest.mark.parametrize(
    ("record", "level"),
    [
        (case(95, 50), "robust"),
        (case(95, 50, checks=[("steps", "warn")]), "robust"),
        (case(95, 50, checks=[("steps", "fail")]), "unreliable"),
        (case(95, 0, checks=[("steps", "fail")]), "not robust"),
        (case(12, 0), "chance"),
        (case(12, 10, checks=[("steps", "fail")]), "chance"),
        (case(60, 10), "not robust"),
        (case(60, 11), "robust"),
    ],
)
def test_the_order_of_the_verdicts(record, level):
    assert verdict(record, 10).level == level


def test_templates_classify_digits():
    """The stand-in for a stranger's model is no strawman."""
    scope = {}
    exec(MODELS, scope)
    bunch = load_digits()
    x = torch.tensor(bunch.images[:300]).float()[:, None] / 16
    assert np.mean(scope["templates"]()(x).argmax(1).numpy() == bunch.target[:300]) > 0.85
