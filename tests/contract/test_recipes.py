"""What recipes are made of: schedules of eps and of a weight perturbation; every trainer in linf and l2."""

import dataclasses
import math

import pytest
import torch
from small import TRAINERS, Watch, assert_equal, batch, net, outer_of, run_config, sgd, snapshot

from robustlab import config
from robustlab.rng import Rng
from robustlab.training.loop import plan_of, run_epoch
from robustlab.training.step import train_step
from robustlab.types import Alone, Threat, with_threat


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_trains_in_linf_and_l2(name, norm):
    eps = {"linf": 0.1, "l2": 0.5}[norm]
    seen, f = [], net()
    method = with_threat(config.build("trainer", name), Threat(norm, eps))
    watched = (
        dataclasses.replace(method, gradient=Watch(seen, method.gradient)) if not hasattr(method.gradient, "init_state") else method
    )
    outer, before = outer_of(f, watched, batch_size=8), snapshot(f)
    optimizer = sgd(outer)
    for s in range(2):
        terms = train_step(outer, [batch(8, first=8 * s)], watched, optimizer, Rng(0), first=s)
        assert all(math.isfinite(float(v)) for v in terms.values())
    assert any(not torch.equal(before[n], p.detach()) for n, p in f.named_parameters())
    for shards in seen:
        for views, _ in shards:
            if "adv" in views and "clean" in views and name not in ("n-fgsm", "slat", "iat", "manifold-iat"):
                assert float(views["adv"].x.detach().min()) >= 0
                assert float(views["adv"].x.detach().max()) <= 1


def test_eps_may_grow_through_a_run():
    """A linear schedule from 0 to 0.2: the perturbations of every step of the loop are as long as the schedule says."""
    eps, seen = {"name": "linear", "start": 0.0, "end": 0.2}, []
    attack = {"name": "pgd", "steps": 3, "rel_step": 1.0, "eps": eps}
    method = with_threat(config.build("trainer", "pgd-at", inner=[{"name": "craft", "attack": attack}]), Threat("linf", 0.1))
    watched = dataclasses.replace(method, gradient=Watch(seen, method.gradient))
    run, cpu = run_config("pgd-at", epochs=2), torch.device("cpu")
    f = config.build("model", "small_cnn", width=4, in_channels=1, num_classes=10).build()
    splits, outer = run.data.load(), outer_of(f, watched.at(0, 2))
    plan, optimizer = plan_of(run, splits, Alone()), sgd(outer)
    for epoch in range(2):
        run_epoch(run, watched, outer, optimizer, splits, plan, Rng(0), epoch, lambda event: None, cpu)
    assert len(seen) == 6  # 96 images, batches of 32
    for s, shards in enumerate(seen):
        ((views, _),) = shards
        moved = float((views["adv"].x - views["clean"].x).abs().max())
        assert moved == pytest.approx(0.2 * s / 6, abs=1e-6)


def test_awp_may_start_late():
    """TRADES-AWP with gamma 0 in the first half is TRADES there, bit for bit, and something else afterwards."""
    gamma = {"name": "piecewise", "milestones": [0.5], "values": [0.0, 0.05]}
    late = config.build("trainer", "trades-awp", gradient={"name": "awp", "gamma": gamma})
    both = [with_threat(m, Threat("linf", 0.1)) for m in (late, config.build("trainer", "trades"))]
    nets = [net(), net()]
    outers = [outer_of(f, m.at(0, 4)) for f, m in zip(nets, both, strict=True)]
    optimizers = [sgd(o) for o in outers]
    for s in range(4):
        for outer, method, optimizer in zip(outers, both, optimizers, strict=True):
            train_step(outer, [batch(8, first=8 * s)], method.at(s, 4), optimizer, Rng(0), first=s)
        one, other = map(snapshot, nets)
        if s < 2:
            assert_equal(one, other)
        else:
            assert not torch.equal(one["0.weight"], other["0.weight"])
