"""States that come back exactly (law 3), batch statistics without a trace (law 4), and autocast's cache (law 6)."""

import contextlib

import pytest
import torch
from torch import nn

from robustlab.modes import ambient, bn_mode, frozen, full_precision, perturbed, tf32, unwrap


class Stop(Exception):
    pass


def net():
    torch.manual_seed(0)
    f = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3))
    f.train()(torch.rand(8, 2, 4, 4))
    return f


def snapshot(f):
    return {k: v.clone() for k, v in f.state_dict().items()}


def same(f, before):
    return all(torch.equal(v, before[k]) for k, v in f.state_dict().items())


def leave(context, raises):
    with contextlib.suppress(Stop), context:
        if raises:
            raise Stop


raising = pytest.mark.parametrize("raises", [False, True])


@raising
def test_frozen_gives_back_the_flags_it_found(raises):
    f = net()
    f[0].weight.requires_grad_(False)
    flags = [p.requires_grad for p in f.parameters()]
    with contextlib.suppress(Stop), frozen(f):
        assert not any(p.requires_grad for p in f.parameters())
        with frozen(f):
            pass
        assert not any(p.requires_grad for p in f.parameters())
        if raises:
            raise Stop
    assert [p.requires_grad for p in f.parameters()] == flags


def test_frozen_lets_the_input_gradient_through():
    f = net().eval()
    x = torch.rand(2, 2, 4, 4, requires_grad=True)
    with frozen(f):
        (g,) = torch.autograd.grad(f(x).sum(), x)
    assert float(g.abs().sum()) > 0
    assert all(p.grad is None for p in f.parameters())
    leave(frozen(lambda x: x), False)  # any callable may be a classifier


@raising
@pytest.mark.parametrize("mode", ["eval", "train-noupdate", "train-update"])
@pytest.mark.parametrize("start", [True, False])
def test_bn_mode_restores_the_flag_of_every_module(mode, start, raises):
    f = net().train(start)
    f[1].train(not start)  # a BatchNorm that the user froze, or one that still adapts
    flags = [m.training for m in f.modules()]
    with contextlib.suppress(Stop), bn_mode(f, mode):
        assert all(m.training == (mode != "eval") for m in f.modules())
        if raises:
            raise Stop
    assert [m.training for m in f.modules()] == flags
    assert f[1].track_running_stats


@raising
def test_train_noupdate_uses_the_batch_and_leaves_no_trace(raises):
    f = net()
    f[3].p = 0.0
    before, x = snapshot(f), torch.rand(8, 2, 4, 4) * 3
    with contextlib.suppress(Stop), bn_mode(f.eval(), "train-noupdate"):
        out = f[1](f[0](x))
        f(x)
        torch.testing.assert_close(out.mean((0, 2, 3)), f[1].bias.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(out.var((0, 2, 3), unbiased=False), f[1].weight.detach().square(), atol=1e-3, rtol=0)
        if raises:
            raise Stop
    assert same(f, before)
    with bn_mode(f, "eval"):
        f(x)
    assert same(f, before)
    with bn_mode(f, "train-update"):
        f(x)
    assert int(f[1].num_batches_tracked) == int(before["1.num_batches_tracked"]) + 1
    assert not torch.equal(f[1].running_mean, before["1.running_mean"])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_train_noupdate_holds_for_every_layer_with_running_statistics(layer, momentum):
    if layer is nn.InstanceNorm1d and momentum is None:
        pytest.skip("InstanceNorm has no cumulative average")
    f = layer(3, momentum=momentum, affine=True, track_running_stats=True)
    before, x = snapshot(f), torch.rand(4, 3, 5) * 7
    f.train()
    expected = f(x)
    f.load_state_dict(before)
    with bn_mode(f, "train-noupdate"):
        torch.testing.assert_close(f(x), expected)
    assert same(f, before)
    f(x)
    assert not same(f, before)


def test_batch_norm_without_running_statistics_stays_so():
    f = nn.BatchNorm2d(2, track_running_stats=False)
    with bn_mode(f, "train-noupdate"):
        f(torch.rand(4, 2, 2, 2))
    assert not f.track_running_stats


def test_contexts_nest():
    f = net().eval()
    before = snapshot(f)
    with bn_mode(f, "train-noupdate"):
        with bn_mode(f, "train-noupdate"), frozen(f):
            f(torch.rand(8, 2, 4, 4))
        f(torch.rand(8, 2, 4, 4))
        with bn_mode(f, "eval"):
            assert not f[1].training
        assert f[1].training
    assert same(f, before)
    assert not any(m.training for m in f.modules())


@raising
def test_ambient_is_repeatable_and_leaves_the_global_generator(raises):
    state = torch.get_rng_state()
    draws = []
    for seed in (1, 2, 1):
        with contextlib.suppress(Stop), ambient(seed):
            draws.append(torch.rand(5))
            if raises:
                raise Stop
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(torch.get_rng_state(), state)


@raising
def test_perturbed_weights_come_back_bit_for_bit(raises):
    f = net()
    before = snapshot(f)
    params = dict(f.named_parameters())
    deltas = [torch.full_like(p, 1e8) for p in params.values()]  # adding and subtracting this would lose every bit
    for handle in (params, list(params.values())):
        with contextlib.suppress(Stop), perturbed(handle, deltas):
            for (k, p), d in zip(f.named_parameters(), deltas, strict=True):
                assert torch.equal(p.detach(), before[k] + d)
            if raises:
                raise Stop
        assert same(f, before)
        assert all(p.requires_grad for p in f.parameters())


def test_perturbed_restores_when_the_deltas_do_not_fit():
    f = net()
    before = snapshot(f)
    deltas = [torch.ones_like(p) for p in f.parameters()]
    for wrong in (deltas[:-1], [*deltas[:-1], torch.ones(77)]):
        with pytest.raises((ValueError, RuntimeError)), perturbed(list(f.parameters()), wrong):
            pass
        assert same(f, before)


def test_gradients_are_those_at_the_perturbed_weights():
    f = nn.Linear(1, 1, bias=False)
    with perturbed(list(f.parameters()), [torch.full((1, 1), 2.0)]):
        f(torch.ones(1, 1)).square().sum().backward()
    torch.testing.assert_close(f.weight.grad, 2 * (f.weight.detach() + 2))


def test_a_perturbation_is_seen_under_autocast_although_weights_are_cached():
    f, x = nn.Linear(4, 4), torch.rand(2, 4)
    deltas = [torch.ones_like(p) for p in f.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = f(x).detach()
        with perturbed(list(f.parameters()), deltas):
            moved = f(x).detach()
        again = f(x).detach()
    assert float((moved - plain).abs().min()) > 0.5
    assert torch.equal(again, plain)


def test_unwrap_finds_the_module_behind_a_callable():
    class Wrapper:
        def __init__(self, module):
            self.module = module

        def __call__(self, x):
            return self.module(x)

    f = net()
    assert unwrap(Wrapper(f)) is f
    assert unwrap(f) is f
    with frozen(Wrapper(f)), bn_mode(Wrapper(f), "eval"):
        assert not f.training
        assert not any(p.requires_grad for p in f.parameters())


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("allowed", [False, True])
def test_full_precision_turns_tf32_off_and_back(raises, allowed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    newer = hasattr(torch.backends.cudnn, "conv")
    switches = (
        (torch.backends.cudnn.conv, torch.backends.cuda.matmul) if newer else (torch.backends.cudnn, torch.backends.cuda.matmul)
    )
    name, on, off = ("fp32_precision", "tf32", "ieee") if newer else ("allow_tf32", True, False)
    found = [getattr(s, name) for s in switches]
    try:
        for s in switches:
            setattr(s, name, on if allowed else off)
        with contextlib.suppress(Stop), full_precision():
            assert all(getattr(s, name) == off for s in switches)
            assert not tf32(torch.device("cuda"))
            if raises:
                raise Stop
        assert all(getattr(s, name) == (on if allowed else off) for s in switches)
        assert tf32(torch.device("cuda")) >= allowed
        assert not tf32(torch.device("cpu"))
    finally:
        for s, value in zip(switches, found, strict=True):
            setattr(s, name, value)
