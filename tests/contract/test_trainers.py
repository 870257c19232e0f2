"""Every trainer there is: attacks that leave no trace (law 2), restored weights (3), BatchNorm (4), composition, fidelity (13)."""

import dataclasses
import json
import math
import typing
from collections import Counter

import pytest
import torch
from small import (
    COUPLED,
    THREAT,
    TRAINERS,
    Halt,
    Watch,
    assert_equal,
    batch,
    counted,
    net,
    norms,
    outer_of,
    quick,
    run_config,
    snapshot,
    steps,
    trainer,
    updates,
)

from robustlab import cli, commands, config
from robustlab.outer import Forward, Precise
from robustlab.registry import entries
from robustlab.rng import Rng
from robustlab.training import loop
from robustlab.training.step import train_step
from robustlab.types import BnMode, Fidelity, UserError, with_threat

MODES = typing.get_args(BnMode)


def only_inner(f, method):
    """Run the inner stages alone; returns the shards."""
    seen = []
    with pytest.raises(Halt):
        steps(f, dataclasses.replace(method, gradient=Watch(seen)), count=1)
    return seen[0]


def views_of(method):
    """The named views whose forward passes the losses ask for."""
    f, names = net(), set()
    views, rng = only_inner(f, method)[0]
    forward = Forward(Precise(f), views, rng, method, False)
    run = forward._run
    forward._run = lambda name: (names.add(name), run(name))
    for part in (method.objective, *method.regularizers):
        part(forward, views)
    return sorted(names)


# ------------------------------------------------------------------------------------------------- law 2: inner stages


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TRAINERS)
def test_inner_stages_leave_only_what_attack_bn_says(name, mode, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("backward() inside the inner maximisation")

    f = net(dropout=0.2)
    before, state = snapshot(f), torch.get_rng_state()
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "backward", refuse)
    with counted(f) as forwards:
        shards = only_inner(f, trainer(name, attack_bn=mode))
    for views, _ in shards:
        for view in views.values():
            assert view.x.grad_fn is None  # no graph; Free's images are leaves that the loss's backward pass fills
            assert not view.x.requires_grad or name == "free-at"
            assert not view.y.requires_grad
    assert all(p.grad is None and p.requires_grad for p in f.parameters())
    assert all(m.training and m.track_running_stats for m in norms(f))
    assert updates(f) == (forwards[0] if mode == "train-update" else 0)
    kept = before if mode != "train-update" else [n for n, _ in f.named_parameters()]
    assert_equal(before, snapshot(f), only=kept)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", [n for n in TRAINERS if trainer(n).inner])
def test_attack_bn_chooses_the_statistics_that_the_attack_sees(name):
    """The three modes normalise as they say: eval by the running statistics, the others by the batch's own."""
    f = net()
    with counted(f) as forwards:
        only_inner(f, trainer(name))
    if forwards[0] == 0:  # the attack lives on the loss's own gradient
        assert name == "free-at"
        return
    x = {mode: only_inner(net(), trainer(name, attack_bn=mode))[0][0]["adv"].x for mode in MODES}
    assert torch.equal(x["train-noupdate"], x["train-update"])
    assert not torch.equal(x["train-noupdate"], x["eval"])


# ------------------------------------------------------------------------------------------ law 3: restored, also on errors


@pytest.mark.parametrize("name", TRAINERS)
def test_an_error_in_any_forward_leaves_the_weights_as_they_were(name):
    method = quick(name)
    f = net()
    with counted(f) as forwards:
        steps(f, method, count=1)
    for fatal in range(1, forwards[0] + 1):
        f = net()
        before, state, count = snapshot(f), torch.get_rng_state(), 0

        def explode(module, args, fatal=fatal):
            nonlocal count
            count += 1
            if count == fatal:
                raise Halt

        handle = f.register_forward_pre_hook(explode)
        with pytest.raises(Halt):
            steps(f, method, count=1)
        handle.remove()
        assert_equal(before, snapshot(f), only=[n for n, _ in f.named_parameters()])
        assert all(p.requires_grad for p in f.parameters())
        assert all(m.track_running_stats for m in norms(f))
        assert all(m.training for m in f.modules())
        assert torch.equal(state, torch.get_rng_state())


def test_awp_restores_by_copy_and_not_by_subtraction():
    """A radius of 1000 would leave rounding behind if it were subtracted again. With lr 0 nothing else moves the weights."""
    f = net()
    before = snapshot(f)
    method = trainer("awp", gradient={"name": "awp", "gamma": 1000.0})
    outer = outer_of(f, method)
    train_step(outer, [batch()], method, torch.optim.SGD(outer.parameters(), lr=0.0), Rng(0))
    assert_equal(before, snapshot(f), only=[n for n, _ in f.named_parameters()])


# -------------------------------------------------------------------------------------------------- law 4: BatchNorm


TAPPED = {n for n in TRAINERS if {"manifold-mixup", "slat"} & {s.name for s in trainer(n).inner}}  # they share no pass


def cases():
    for name in TRAINERS:
        views = views_of(trainer(name))
        for chosen in [(), *[(v,) for v in views], *([tuple(views)] if len(views) > 1 else [])]:
            yield name, chosen, ()
            if len(views) > 1 and name not in TAPPED:
                yield name, chosen, (tuple(views),)


@pytest.mark.parametrize(("name", "chosen", "joint"), list(cases()))
def test_which_passes_update_running_statistics(name, chosen, joint):
    """One update for each pass that holds a view of ``bn_updates``; further evaluations of the loss (AWP) add none."""
    f = net()
    steps(f, trainer(name, attack_bn="eval", bn_updates=list(chosen), joint=[list(g) for g in joint]), count=3)
    assert updates(f) == 3 * (min(1, len(chosen)) if joint else len(chosen))


@pytest.mark.parametrize("name", TRAINERS)
def test_the_presets_update_as_they_declare(name):
    method = trainer(name)
    f = net()
    with counted(f) as forwards:
        only_inner(f, method)
    inner = forwards[0] if method.attack_bn == "train-update" else 0
    f = net()
    steps(f, method, count=2)
    assert updates(f) == 2 * (inner + len(set(method.bn_updates) & set(views_of(method))))


def test_a_joint_pass_shares_its_batch_statistics():
    """Clean and adversarial images are normalised together: one forward of all rows gives the loss."""
    f = net().double()
    method = trainer("trades", joint=[["clean", "adv"]])
    views = {"clean": batch(dtype=torch.float64)["clean"]}
    views["adv"] = dataclasses.replace(views["clean"], x=views["clean"].x.flip(3))
    outer = outer_of(f, method)
    value, _ = outer(views, Rng(0), False)
    z = f(torch.cat([views["clean"].x, views["adv"].x])).log_softmax(-1)
    p, q = z.chunk(2)
    expected = -(views["clean"].y * p).sum(-1).mean() + 6 * (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------------ the loss again


@pytest.mark.parametrize("regularizer", [None, *entries("regularizer")])
@pytest.mark.parametrize("name", TRAINERS)
def test_the_loss_can_be_evaluated_again(name, regularizer):
    """Same shard, same value, dropout included; without ``stats`` nothing but the value comes of it."""
    method = trainer(name, attack_bn="eval")
    if regularizer:
        inner = method.inner or trainer("pgd-at").inner
        part = with_threat(config.build("regularizer", regularizer), THREAT)
        method = dataclasses.replace(method, inner=inner, regularizers=(part,))
    f = net(dropout=0.3)
    shard = only_inner(f, method)[0]
    outer = outer_of(f, method).train()
    before, state = snapshot(outer), torch.get_rng_state()
    one, two = (outer.loss(shard, stats=False, sync=False)[0] for _ in range(2))
    assert torch.equal(one, two)
    assert_equal(before, snapshot(outer))
    assert torch.equal(state, torch.get_rng_state())
    three, _ = outer.loss(shard, stats=True, sync=False)
    assert torch.equal(one, three)
    assert updates(f) == len(set(method.bn_updates) & set(views_of(method)))
    other = (shard[0], dataclasses.replace(shard[1], number=1))
    assert not torch.equal(outer.loss(other, stats=False, sync=False)[0], one)


# ------------------------------------------------------------------------------------------------------ cost, fidelity


@pytest.mark.parametrize("name", TRAINERS)
def test_passes_are_what_the_trainer_says(name):
    """`passes` is what `list` and `explain` show: forwards, input gradients and weight gradients of a step."""
    said = dict(reversed(p.strip().split(" ", 1)) for p in entries("trainer")[name].passes.split(","))
    said = {kind.rstrip("s"): int(n) for kind, n in said.items()}
    f, count = net(), Counter()

    def passed(module, args, out):
        kind = "backward" if next(module.parameters()).requires_grad else "input gradient"
        count["forward"] += 1
        if out.requires_grad:
            out.register_hook(lambda grad: count.update([kind]))

    f.register_forward_hook(passed)
    steps(f, trainer(name), count=1)  # a first step may pay for more: a fit, for example
    first = count.copy()
    count.clear()
    f = net()
    f.register_forward_hook(passed)
    steps(f, trainer(name), count=2)
    assert count - first == said


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_says_how_far_it_is_verified(name, capsys):
    cls = entries("trainer")[name]
    assert cls.fidelity in typing.get_args(Fidelity)
    assert cli.run(["explain", name]) == 0
    assert [cls.fidelity in line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["fidelity"]] == [True]
    assert cli.run(["list", "trainers"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == [name]]
    assert len(lines) == 1
    assert cls.fidelity in lines[0]
    assert cls.passes in lines[0]


# --------------------------------------------------------------------------------------------------------- composition

HEAD = """
model: {name: small_cnn, width: 4}
data: {name: digits, size: 8}
threat: {norm: linf, eps: 0.1}
"""
CLEAN, ADV = (f"{{name: mixup, on: {v}, to: {v}}}" for v in ("clean", "adv"))
FRAGMENTS = {
    "mixup before the attack": lambda stages: f"  inner: [{', '.join([CLEAN.replace('}', ', alpha: 0.4}'), *stages])}]\n",
    "mixup after the attack": lambda stages: f"  inner: [{', '.join(after_the_attack(stages))}]\n",
    "one lam per sample": lambda stages: f"  inner: [{', '.join([CLEAN.replace('}', ', scope: sample}'), *stages])}]\n",
    "ema": lambda stages: "  averaging: {name: ema, decay: 0.9}\n",
    "label smoothing": lambda stages: f"  inner: [{', '.join(['{name: label-smoothing, smoothing: 0.2}', *stages])}]\n",
    "logit variation": lambda stages: (
        f"  inner: [{', '.join(stages or ['{name: craft, attack: pgd}'])}]\n  regularizers: [logit-variation]\n"
    ),
    "awp": lambda stages: "  gradient: awp\n",
    "everything": lambda stages: (
        f"  inner: [label-smoothing, {CLEAN}, {', '.join(stages or ['{name: craft, attack: pgd}'])}]\n"
        "  regularizers: [{name: logit-variation, lam: 0.2}]\n  averaging: ema\n  gradient: {name: awp, gamma: 0.005}\n"
    ),
}


def after_the_attack(stages):
    attack = next((i + 1 for i, s in enumerate(stages) if '"to": "adv"' in s), 0)
    return [*stages[:attack], ADV if stages else CLEAN, *stages[attack:]]


def compares(part):
    """Whether a loss compares two views row by row."""
    return all(isinstance(getattr(part, name, None), str) for name in ("clean", "adv"))


def cannot_mix_afterwards(method):
    """Rows of the adversarial view are compared with clean ones, or carry perturbations of layers."""
    return any(compares(p) for p in (method.objective, *method.regularizers)) or "slat" in [s.name for s in method.inner]


def in_there(name, fragment):
    """Whether the trainer has by itself what the fragment asks for."""
    method = trainer(name)
    return fragment in (method.gradient.name, *(r.name.replace("-", " ") for r in method.regularizers))


def from_yaml(tmp_path, name, fragment):
    stages = [json.dumps(config.dump(s)) for s in entries("trainer")[name]().inner]
    path = tmp_path / "run.yaml"
    path.write_text(f"trainer:\n  name: {name}\n{FRAGMENTS[fragment](stages)}{HEAD}")
    run = config.load_config(path)
    return run, trainer(run.trainer)


@pytest.mark.parametrize("fragment", FRAGMENTS)
@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_compose_in_yaml(name, fragment, tmp_path):
    if fragment == "mixup after the attack" and cannot_mix_afterwards(trainer(name)):
        with pytest.raises(UserError, match=r"row by row, but they were mixed apart|has perturbed or mixed layers"):
            steps(net(), from_yaml(tmp_path, name, fragment)[1])
        return
    run, method = from_yaml(tmp_path, name, fragment)
    f = net()
    plain = snapshot(steps(net(), trainer(name), count=2)[0].f)
    outer, terms = steps(f, method, count=2)
    assert all(math.isfinite(float(v)) for v in terms.values())
    assert float(terms["loss"]) == pytest.approx(sum(float(v) for k, v in terms.items() if k != "loss"), rel=1e-5)
    after = snapshot(f)
    if fragment == "ema":
        assert_equal(plain, after)
        average = snapshot(outer.averaged())
        assert any(not torch.equal(after[n], average[n]) for n, _ in f.named_parameters())
    elif fragment not in ("awp", "logit variation") or not in_there(name, fragment):
        assert any(not torch.equal(after[n], plain[n]) for n, _ in f.named_parameters())
    again = config.build("trainer", config.dump(run.trainer))
    assert again == run.trainer


@pytest.mark.parametrize("name", [n for n in TRAINERS if n not in COUPLED])
def test_weights_per_sample_and_clipping_reach_the_loss(name):
    """A weight of zero takes a sample out of the loss; a clipped step is as long as asked."""
    f = net(bn=False).double()
    method = dataclasses.replace(quick(name), gradient=Watch([], quick(name).gradient))
    outer = outer_of(f, method)
    view = batch(8, dtype=torch.float64)["clean"]
    half = dataclasses.replace(view, weight=torch.tensor([2.0] * 4 + [0.0] * 4, dtype=torch.float64))
    only = {"clean": dataclasses.replace(view, x=view.x[:4], y=view.y[:4], key=view.key[:4], index=view.index[:4])}
    whole = train_step(outer, [{"clean": half}], method, torch.optim.SGD(f.parameters(), lr=0.0), Rng(0))
    part = train_step(outer_of(f, method), [only], method, torch.optim.SGD(f.parameters(), lr=0.0), Rng(0))
    for term in whole:
        torch.testing.assert_close(whole[term], part[term], rtol=1e-9, atol=1e-12)

    start = torch.cat([p.detach().flatten().clone() for p in f.parameters()])
    train_step(outer, [only], method, torch.optim.SGD(f.parameters(), lr=1.0), Rng(0), clip_grad=1e-3)
    moved = torch.cat([p.detach().flatten() for p in f.parameters()]) - start
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_empties_the_gradients_and_commits_once(name):
    f = net()
    outer, _ = steps(f, trainer(name, averaging="ema"), count=3)
    assert all(p.grad is None for p in outer.parameters())
    assert not any(getattr(m, "pending", ()) for m in outer.state.modules())
    assert int(outer.state_of(outer.trainer.averaging).steps) == 3


def test_a_view_that_no_stage_makes_is_refused_with_its_name():
    with pytest.raises(UserError, match=r"'adv'.*stages make only: clean"):
        config.build("trainer", "standard", objective={"name": "cross-entropy", "on": ["adv"]})
    with pytest.raises(UserError, match=r"bn_updates.*'adv'"):
        config.build("trainer", "standard", bn_updates=["adv"])


def test_replays_are_steps_on_one_batch_as_it_is(monkeypatch, tmp_path):
    """Tickets and the micro-batch's number stay, so augmentation and dropout do too; the learning rate moves on."""
    seen, augmented, true = [], [], loop.train_step

    def recording(outer, micro, method, optimizer, rng, **more):
        seen.append((micro[0]["clean"].key.tolist(), more["first"], optimizer.param_groups[0]["lr"]))
        watched = dataclasses.replace(method, gradient=Watch(augmented, method.gradient))
        return true(outer, micro, watched, optimizer, rng, **more)

    monkeypatch.setattr(loop, "train_step", recording)
    run = run_config(trainer("free-at", replays=3), epochs=2)
    data = dataclasses.replace(run.data, augment=(config.build("stage", "flip-crop"),))
    commands.train(dataclasses.replace(run, data=data), tmp_path / "run")
    assert len(seen) == 2 * 3 * 3
    images = [shards[0][0]["clean"].x for shards in augmented]
    for i in range(0, len(seen), 3):
        assert seen[i][:2] == seen[i + 1][:2] == seen[i + 2][:2]
        assert torch.equal(images[i], images[i + 2])
    assert len({tuple(key) for key, *_ in seen}) == 6
    assert len({lr for *_, lr in seen}) == len(seen)
    assert seen[1][2] == pytest.approx(run.optimizer.lr * run.schedule.at(1 / 9, 2))
