"""Catastrophic overfitting, for real: a setting found by scripts/sweep_overfitting.py, with and without the guard. Minutes."""

import importlib.util
from pathlib import Path

import pytest

SETTING = "digits-0.2-w48-lr0.2"


@pytest.fixture(scope="module")
def sweep():
    path = Path(__file__).parents[2] / "scripts" / "sweep_overfitting.py"
    spec = importlib.util.spec_from_file_location("sweep_overfitting", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def probes(run):
    return [e for e in run["events"] if "pgd" in e]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fgsm_training_overfits_and_the_guard_sees_it(sweep, seed):
    """Without the guard FGSM accuracy passes 60 % while PGD-50 is under 5 %; with it the run stops in the epoch of the fall."""
    free = sweep.one(SETTING, "none", seed)
    assert free["epochs_trained"] == free["epochs"]
    assert any(e["fgsm"] > 0.6 and e["pgd"] < 0.05 for e in probes(free))
    stopped = sweep.one(SETTING, "stop", seed)
    seen = [e["train_robust"] for e in stopped["events"]]
    assert "catastrophic overfitting" in stopped["stopped"]
    assert stopped["epochs_trained"] < free["epochs"]
    assert max(seen) - seen[-1] > 0.2
    assert all(max(seen[: i + 1]) - now <= 0.2 for i, now in enumerate(seen[:-1]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_rollback_saves_the_run(sweep, seed):
    """The final PGD-50 accuracy is at least 80 % of the best before the fall."""
    run = sweep.one(SETTING, "rollback", seed)
    fall = next(i for i, e in enumerate(run["events"]) if "rolled_back" in e)
    best = max(e["pgd"] for e in run["events"][:fall] if "pgd" in e)
    assert run["stopped"] == ""
    assert best > 0.1
    assert probes(run)[-1]["pgd"] >= 0.8 * best
