"""SWA against its recurrence and torch's own, when snapshots are taken, and BatchNorm statistics for the average."""

import dataclasses

import pytest
import small
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from robustlab import commands, config
from robustlab.averaging.swa import Swa
from robustlab.models.checkpoint import load_model
from robustlab.modes import bn_mode
from robustlab.outer import Outer, context_of
from robustlab.rng import Rng
from robustlab.training.refresh import refresh_statistics
from robustlab.types import Context


def net():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 4, 2))


def step(f, seed):
    """Something that changes weights and buffers."""
    g = torch.Generator().manual_seed(seed)
    f.train()(torch.rand(5, 1, 4, 4, generator=g).to(f[0].weight))
    with torch.no_grad():
        for p in f.parameters():
            p.add_(torch.randn(p.shape, generator=g).to(p))


def state_of(swa, f, steps=None, epochs=None):
    return swa.init_state(Context(f=f, num_classes=2, num_samples=8, image_shape=(1, 4, 4), steps=steps, epochs=epochs))


def test_it_is_the_mean_of_the_snapshots_as_torch_computes_it():
    f, swa = net().double(), Swa()
    state, theirs, seen = state_of(swa, f), AveragedModel(f), []
    for t in range(5):
        step(f, t)
        swa.update(state, f)
        theirs.update_parameters(f)
        seen.append({n: p.detach().clone() for n, p in f.named_parameters()})
    for n, p in swa.averaged(state, f).named_parameters():
        torch.testing.assert_close(p, torch.stack([s[n] for s in seen]).mean(0), rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(p, dict(theirs.module.named_parameters())[n].detach(), rtol=1e-13, atol=1e-14)
    assert int(state.count) == 5


@pytest.mark.parametrize(
    ("start", "every", "expected"),
    [
        (0.5, 1.0, [8, 10, 12]),  # 12 steps in 6 epochs: the ends of the last three
        (0.75, 0.5, [10, 11, 12]),
        (0.0, 2.5, [2, 7, 12]),  # counted back from the last step
        (0.9, 4.0, [12]),
    ],
)
def test_snapshots_are_taken_at_the_ends_of_periods(start, every, expected):
    f, swa = net(), Swa(start=start, every=every)
    state, taken = state_of(swa, f, steps=12, epochs=6), []
    for t in range(1, 13):
        step(f, t)
        before = int(state.count)
        swa.update(state, f)
        if int(state.count) > before:
            taken.append(t)
    assert taken == expected
    if len(expected) == 1:  # law 8: one snapshot is the live model, bit for bit
        for name, value in f.state_dict().items():
            assert torch.equal(swa.averaged(state, f).state_dict()[name], value), name


def test_before_the_first_snapshot_the_live_model_counts():
    f, swa = net(), Swa(start=0.5)
    state = state_of(swa, f, steps=10, epochs=10)
    for t in range(5):
        step(f, t)
        swa.update(state, f)
        assert swa.averaged(state, f) is f
    step(f, 5)
    swa.update(state, f)
    assert swa.averaged(state, f) is state.module


def test_the_state_dict_is_a_checkpoint():
    f, swa = net(), Swa(start=0.2, every=1.5)
    state, fresh = (state_of(swa, f, steps=20, epochs=10) for _ in range(2))
    for t in range(11):
        step(f, t)
        swa.update(state, f)
    fresh.load_state_dict(state.state_dict())
    for t in range(11, 20):
        step(f, t)
        for s in (state, fresh):
            swa.update(s, f)
    for (n, a), b in zip(state.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b), n
    assert int(state.count) == 6  # steps 5, 8, 11, 14, 17, 20


# -------------------------------------------------------------------------------------------------------- statistics


def outer_of(name, **fields):
    """A net after three steps with SWA, and its trainer."""
    f = small.net()
    method = small.trainer(name, averaging={"name": "swa", "start": 0.0}, **fields)
    outer, _ = small.steps(f, method, count=3)
    return outer, method


def test_the_refresh_is_the_one_of_torch_for_clean_views():
    outer, method = outer_of("standard")
    batches = [small.batch(8, first=8 * i) for i in range(4)]
    average = outer.averaged()
    theirs = AveragedModel(average)
    update_bn([b["clean"].x for b in batches], theirs)
    live, weights = small.snapshot(outer.f), [p.clone() for p in average.parameters()]
    stale = [m.running_mean.clone() for m in small.norms(average)]
    refresh_statistics(outer, batches, method, Rng(0))
    for a, b in zip(small.norms(average), small.norms(theirs), strict=True):
        torch.testing.assert_close(a.running_mean, b.running_mean)
        torch.testing.assert_close(a.running_var, b.running_var)
        assert int(a.num_batches_tracked) == 4
        assert a.momentum == 0.1
    assert not any(torch.equal(a, m.running_mean) for a, m in zip(stale, small.norms(average), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, average.parameters(), strict=True))
    small.assert_equal(live, small.snapshot(outer.f))
    assert not any(m.training for m in average.modules())
    assert outer.f.training


@pytest.mark.parametrize("attack_bn", ["eval", "train-update"])
def test_the_views_that_update_the_live_model_are_those_that_count(attack_bn):
    """For PGD-AT: adversarial images of the average itself, whatever their attack's mode does to the live model's statistics."""
    outer, method = outer_of("pgd-at", attack_bn=attack_bn)
    batches = [small.batch(8, first=8 * i) for i in range(2)]
    average = outer.averaged()
    refresh_statistics(outer, batches, method, Rng(0))
    assert [int(m.num_batches_tracked) for m in small.norms(average)] == [2, 2]
    means = []
    for i, b in enumerate(batches):
        with bn_mode(average, "train-noupdate"):
            rng = Rng(0).split(1, i)[0].child("inner", 0).at(b["clean"].key)
            x_adv, _ = method.inner[0].attack.run(average, b["clean"].x, b["clean"].y, rng)
            means.append(average[0](x_adv).mean((0, 2, 3)))
    torch.testing.assert_close(small.norms(average)[0].running_mean, torch.stack(means).mean(0).detach(), rtol=1e-5, atol=1e-6)


def test_nothing_to_refresh():
    """The live model, a model without BatchNorm, a trainer that updates no statistics."""
    f = small.net()
    method = small.trainer("standard")
    outer = Outer(f, method, context_of(f, small.CLASSES, 64, small.SHAPE))
    before = small.snapshot(f)
    refresh_statistics(outer, [small.batch()], method, Rng(0))
    small.assert_equal(before, small.snapshot(f))
    outer, method = outer_of("standard", bn_updates=[])
    before = small.snapshot(outer)
    refresh_statistics(outer, [small.batch()], method, Rng(0))
    small.assert_equal(before, small.snapshot(outer))


def test_a_run_exports_refreshed_statistics_and_resumes_bit_for_bit(tmp_path):
    run = small.run_config("pgd-at", epochs=4, checkpoint_every=2, probe=config.Probe(every=3, num_examples=10, steps=1))
    averaging = config.build("averaging", "swa", start=0.25, refresh=2)
    run = dataclasses.replace(run, trainer=dataclasses.replace(run.trainer, averaging=averaging))

    def stop(event):
        if event["kind"] == "step" and event["epoch"] == 3 and event["step"] == 2:
            raise small.Halt

    commands.train(run, tmp_path / "whole")
    with pytest.raises(small.Halt):
        commands.train(run, tmp_path / "cut", progress=stop)
    assert commands.train(run, tmp_path / "cut", resume=True).resumed in (2, 3)
    for name in ("last", "best"):
        assert (tmp_path / "whole" / f"{name}.safetensors").read_bytes() == (tmp_path / "cut" / f"{name}.safetensors").read_bytes()
    small.assert_equal(*(load_file(tmp_path / d / "state.safetensors") for d in ("whole", "cut")))
    f = load_model(tmp_path / "whole" / "last.safetensors")
    layers = [m for m in f.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {int(m.num_batches_tracked) for m in layers} == {2}
