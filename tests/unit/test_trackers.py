"""Where events go: JSON lines that survive a crash, TensorBoard files, a tracker that is not installed."""

import json
import sys
import types

import pytest

from robustlab.training.trackers import Jsonl, open_trackers
from robustlab.types import UserError

EVENT = {"kind": "epoch", "epoch": 1, "step": 17, "loss": 0.5, "robust": float("nan"), "stopped": "why"}


def test_lines_are_appended_and_cut_back_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Jsonl(path)
    log.log(EVENT)
    kept = log.length
    log.log(EVENT | {"epoch": 2})
    log.close()
    again = Jsonl(path, kept)
    again.log(EVENT | {"epoch": 3})
    again.close()
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [1, 3]


def test_numbers_that_are_none_become_null_so_that_every_line_is_json(tmp_path):
    log = Jsonl(tmp_path / "m.jsonl")
    log.log(EVENT)
    log.close()
    assert json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail)["robust"] is None


def test_tensorboard_gets_every_number_at_its_step(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    jsonl, others = open_trackers(("jsonl", "tensorboard"), tmp_path, {}, 0)
    for tracker in (jsonl, *others):
        tracker.log({k: v for k, v in EVENT.items() if k != "robust"})
        tracker.close()
    events = loader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    (scalar,) = events.Scalars("loss")
    assert (scalar.step, scalar.value) == (17, 0.5)


def test_wandb_is_told_the_run_and_the_numbers(tmp_path, monkeypatch):
    told = []
    run = types.SimpleNamespace(log=lambda values, step: told.append((values, step)), finish=lambda: told.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **how: told.append(how) or run))
    _, (tracker,) = open_trackers(("wandb",), tmp_path, {"seed": 3}, 0)
    tracker.log({k: v for k, v in EVENT.items() if k != "robust"})
    tracker.close()
    assert told[0]["config"] == {"seed": 3}
    assert told[0]["resume"] == "allow"
    assert told[1:] == [({"loss": 0.5}, 17), "finished"]


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'robustlab\[wandb\]'"):
        open_trackers(("wandb",), tmp_path, {}, 0)
