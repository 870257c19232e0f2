"""The guards: what they say, and what the loop makes of it. Catastrophic overfitting is played by a `watch` that falls."""

import dataclasses
import json
import math

import pytest
import torch
import yaml
from safetensors import safe_open
from small import TinyDigits, net, run_config, trainer

from robustlab import cli, commands, config
from robustlab.training import guards, loop
from robustlab.training.guards import Act
from robustlab.types import UserError


def guarded(act="stop", method="fast-at", epochs=5, **rule):
    rule = config.Overfitting(act=act, num_examples=16, steps=1, **rule)
    probe = config.Probe(every=1, num_examples=10, steps=1)
    return run_config(method, epochs=epochs, probe=probe, checkpoint_every=3, guards=config.Guards(overfitting=rule))


@pytest.fixture
def falls(monkeypatch):
    """Accuracy on training images is 0.7, and 0.4 after the epochs listed, as long as FGSM crafts; with another attack 0.65."""

    def install(*epochs):
        seen, epoch_of = [], [0]
        true = loop.run_epoch

        def run_epoch(run, method, *args):
            epoch_of[0] = args[5] + 1
            seen.append((args[5] + 1, method.inner[-1].attack.steps))
            return true(run, method, *args)

        def watch(*args):
            return 0.4 if epoch_of[0] in epochs and seen[-1][1] == 1 else 0.7 if seen[-1][1] == 1 else 0.65

        monkeypatch.setattr(loop, "run_epoch", run_epoch)
        monkeypatch.setattr(commands, "watch", watch)
        return seen

    return install


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def tensors(folder):
    with safe_open(folder / "state.safetensors", "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict


# ------------------------------------------------------------------------------------------------------ what they say


@pytest.mark.parametrize(
    ("now", "act", "before", "expected"),
    [
        (0.5, "stop", False, Act.CONTINUE),
        (0.49, "stop", False, Act.STOP),
        (0.49, "rollback", False, Act.ROLLBACK),
        (0.49, "rollback", True, Act.STOP),
    ],
)
def test_a_fall_of_more_than_the_drop(now, act, before, expected):
    verdict = guards.catastrophic_overfitting(now, 0.7, 0.2 + 1e-9, 7, act, before)
    assert verdict.act is expected
    if expected is not Act.CONTINUE:
        assert "epoch 8" in verdict.reason
        assert "from 70.0% to 49.0%" in verdict.reason
        assert "\n" not in verdict.reason


@pytest.mark.parametrize("where", ["0.weight", "1.running_var"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_and_statistics_that_are_not_finite(where, value):
    f = net()
    assert guards.finite_weights(f, 0).act is Act.CONTINUE
    f.state_dict()[where].view(-1)[-1] = value
    verdict = guards.finite_weights(f, 2)
    assert verdict.act is Act.STOP
    assert f"{where} is not finite after epoch 3" in verdict.reason


def test_what_the_guard_sees_is_pgd_on_training_images(monkeypatch):
    run = guarded()
    splits = TinyDigits(size=8).load()
    f = dataclasses.replace(run.model, num_classes=10, in_channels=1).build()
    asked = []
    true = type(splits.train).batches

    def batches(self, index_batches, device="cpu"):
        index_batches = list(index_batches)
        asked.extend(index_batches)
        return true(self, index_batches, device)

    monkeypatch.setattr(type(splits.train), "batches", batches)
    values = {commands.watch(f, splits.train, run, 10, torch.device("cpu")) for _ in range(2)}
    assert len(values) == 1
    one, two = asked
    assert torch.equal(one, two)
    assert len(set(one.tolist())) == 16
    assert one.tolist() != sorted(one.tolist())  # files are often sorted by class
    x, y, _ = next(true(splits.train, [one]))
    f.eval()
    clean = float((f(x).argmax(1) == y).float().mean())
    assert values.pop() <= clean
    none = dataclasses.replace(run, threat=config.Threat("linf", 0.0))
    assert commands.watch(f, splits.train, none, 10, torch.device("cpu")) == clean


# --------------------------------------------------------------------------------------------------- what the loop does


def test_the_run_stops_in_the_epoch_of_the_fall(falls, tmp_path):
    seen = falls(3, 4)
    outcome = commands.train(guarded("stop"), tmp_path / "run")
    assert [e for e, _ in seen] == [1, 2, 3]
    assert outcome.epochs == 3
    assert "catastrophic overfitting in epoch 3" in outcome.stopped
    rows = lines(tmp_path / "run")
    assert [r["train_robust"] for r in rows] == [0.7, 0.7, 0.4]
    assert rows[-1]["stopped"] == outcome.stopped
    assert "val_clean" not in rows[-1]  # `best` cannot become an overfitted epoch
    assert outcome.best["epoch"] <= 2


def test_a_rollback_goes_back_an_epoch_and_on_with_another_attack(falls, tmp_path):
    seen = falls(4)
    outcome = commands.train(guarded("rollback"), tmp_path / "run")
    assert seen == [(1, 1), (2, 1), (3, 1), (4, 1), (4, 10), (5, 10)]
    assert outcome.epochs == 5
    assert outcome.stopped == ""
    assert "back to epoch 3" in outcome.rolled_back
    rows = lines(tmp_path / "run")
    assert [r["epoch"] for r in rows] == [1, 2, 3, 4, 4, 5]
    assert [("rolled_back" in r) for r in rows] == [False, False, False, True, False, False]


def test_after_a_rollback_training_is_the_other_trainer_from_that_state(falls, tmp_path):
    """The weights are those of three epochs of FGSM and two of the other attack, and of nothing in between."""
    falls(4)
    attack = trainer("pgd-at", inner=[{"name": "craft", "attack": {"name": "pgd", "steps": 3}}]).inner[0].attack
    commands.train(guarded("rollback", attack=attack), tmp_path / "run")
    falls()
    run = guarded("stop")
    true = loop.train_step

    def switched(outer, micro, method, optimizer, rng, **more):
        if more["first"] >= 3 * 3:  # three steps an epoch
            method = dataclasses.replace(method, inner=(dataclasses.replace(method.inner[0], attack=attack),))
        return true(outer, micro, method, optimizer, rng, **more)

    loop.train_step = switched
    try:
        commands.train(run, tmp_path / "by hand")
    finally:
        loop.train_step = true
    one, two = tensors(tmp_path / "run"), tensors(tmp_path / "by hand")
    assert all(torch.equal(one[k], two[k]) for k in two)


@pytest.mark.parametrize("cut", [(4, 0), (4, 1), (5, 0)])
def test_a_run_cut_around_a_rollback_resumes_bit_for_bit(falls, tmp_path, cut):
    """``cut``: epoch, and whether the rollback lies behind."""

    class Cut(Exception):
        pass

    falls(4)
    commands.train(guarded("rollback"), tmp_path / "whole")
    rolled = [0]

    def stop(event):
        rolled[0] += "rolled_back" in event
        if event["kind"] == "step" and event["epoch"] + 1 == cut[0] and rolled[0] >= cut[1]:
            raise Cut

    falls(4)
    with pytest.raises(Cut):
        commands.train(guarded("rollback"), tmp_path / "cut", progress=stop)
    outcome = commands.train(guarded("rollback"), tmp_path / "cut", resume=True)
    assert outcome.rolled_back
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    one, two = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    files = [(tmp_path / d / "last.safetensors").read_bytes() for d in ("whole", "cut")]
    assert files[0] == files[1]


def test_a_second_fall_stops(falls, tmp_path, monkeypatch):
    falls(2)
    true = commands.watch
    monkeypatch.setattr(commands, "watch", lambda *args: 0.1 if true(*args) == 0.65 else true(*args))
    outcome = commands.train(guarded("rollback"), tmp_path / "run")
    assert outcome.rolled_back
    assert "again, after a rollback" in outcome.stopped
    assert outcome.epochs == 2


def test_free_training_rolls_back_too(monkeypatch, tmp_path):
    """Its stage has memory, which stays behind unused."""
    values = iter([0.7, 0.3, 0.7, 0.7])
    monkeypatch.setattr(commands, "watch", lambda *args: next(values))
    outcome = commands.train(guarded("rollback", "free-at", epochs=3), tmp_path / "run")
    assert outcome.epochs == 3
    assert outcome.rolled_back


def test_a_guard_that_could_change_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="standard has no attack that a rollback could replace"):
        commands.train(guarded("rollback", "standard"), tmp_path / "run")
    run = dataclasses.replace(guarded("stop"), threat=config.Threat("l0", 5))
    with pytest.raises(UserError, match="not l0"):
        loop.safer_trainer(run)


def test_a_run_whose_statistics_overflow_stops_with_a_line(tmp_path, monkeypatch):
    true = loop.train_step

    def breaks(outer, *args, **more):
        terms = true(outer, *args, **more)
        outer.f.norm1.running_var[0] = math.inf
        return terms

    monkeypatch.setattr(loop, "train_step", breaks)
    outcome = commands.train(run_config("standard"), tmp_path / "run")
    assert outcome.epochs == 1
    assert "norm1.running_var is not finite after epoch 1" in outcome.stopped


@pytest.mark.parametrize("after", [1, 2, 20])
def test_a_loss_that_is_not_finite_is_found_where_it_was_however_seldom_one_looks(after, tmp_path, monkeypatch):
    true, calls = loop.train_step, []

    def breaks(*args, **more):
        calls.append(0)
        return true(*args, **more) | ({"loss": torch.tensor(math.nan)} if len(calls) == 2 else {})

    monkeypatch.setattr(loop, "train_step", breaks)
    monkeypatch.setattr(loop, "looks_after", lambda device: after)
    outcome = commands.train(run_config("standard", batch_size=8), tmp_path / "run")
    assert "the loss is nan in epoch 1, step 1" in outcome.stopped
    assert lines(tmp_path / "run")[-1]["step"] == 2


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def yaml_run(tmp_path):
    def write(rule):
        path = tmp_path / "run.yaml"
        path.write_text(
            yaml.safe_dump(
                {
                    "trainer": "fast-at",
                    "model": {"name": "small_cnn", "width": 4},
                    "data": {"name": "digits", "size": 8},
                    "threat": {"norm": "linf", "eps": 0.1},
                    "training": {
                        "epochs": 3,
                        "device": "cpu",
                        "threads": 1,
                        "probe": {"num_examples": 20, "steps": 1},
                        "guards": {"overfitting": rule},
                    },
                }
            )
        )
        return path

    return write


def test_the_screen_shows_what_the_guard_did(yaml_run, tmp_path, capsys, monkeypatch):
    values = iter([0.7, 0.3, 0.7, 0.7])
    monkeypatch.setattr(commands, "watch", lambda *args: next(values))
    path = yaml_run({"act": "rollback", "attack": {"name": "pgd", "steps": 2}})
    assert cli.run(["train", str(path), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert said.err.count("rolled back: catastrophic overfitting in epoch 2") == 1
    [line] = [row for row in said.out.splitlines() if row.startswith("robust overfitting: ")]
    rows = [r for r in lines(tmp_path / "run") if "val_robust" in r]
    lost = 100 * (max(r["val_robust"] for r in rows) - rows[-1]["val_robust"])
    assert f"last is {lost:.1f} points under best (val pgd-1)" in line


def test_the_command_ends_with_1_where_the_guard_stops(yaml_run, tmp_path, capsys, monkeypatch):
    values = iter([0.7, 0.3])
    monkeypatch.setattr(commands, "watch", lambda *args: next(values))
    assert cli.run(["train", str(yaml_run({})), "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert [row for row in said if row.startswith("stopped: catastrophic overfitting in epoch 2")]


def test_a_mistake_in_the_guard_is_named(yaml_run, tmp_path, capsys):
    assert cli.run(["train", str(yaml_run({"act": "rolback"})), "--out", str(tmp_path / "run")]) == 2
    assert "training.guards.overfitting.act" in capsys.readouterr().err
