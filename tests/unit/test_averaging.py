"""EMA against its recurrence, its identities and its state."""

import pytest
import torch
from torch import nn

from robustlab.averaging.ema import Ema
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


def state_of(ema, f):
    return ema.init_state(Context(f=f, num_classes=2, num_samples=8, image_shape=(1, 4, 4)))


def test_it_starts_at_the_weights_it_is_given():
    f = net()
    state = state_of(Ema(), f)
    for name, value in f.state_dict().items():
        assert torch.equal(Ema().averaged(state, f).state_dict()[name], value)


@pytest.mark.parametrize("ramp", [False, True])
@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_recurrence(decay, ramp):
    f, ema = net().double(), Ema(decay=decay, ramp=ramp)
    state = state_of(ema, f)
    expected = {n: p.detach().clone() for n, p in f.named_parameters()}
    for t in range(20):
        step(f, t)
        ema.update(state, f)
        d = min(decay, (1 + t) / (10 + t)) if ramp else decay
        expected = {n: d * expected[n] + (1 - d) * p.detach() for n, p in f.named_parameters()}
    for n, p in ema.averaged(state, f).named_parameters():
        torch.testing.assert_close(p.detach(), expected[n], rtol=1e-13, atol=1e-13)
    assert int(state.steps) == 20


@pytest.mark.parametrize("ramp", [False, True])
def test_zero_decay_is_the_live_model_bit_for_bit(ramp):
    f, ema = net(), Ema(decay=0.0, ramp=ramp)
    state = state_of(ema, f)
    for t in range(3):
        step(f, t)
        ema.update(state, f)
        for name, value in f.state_dict().items():
            assert torch.equal(ema.averaged(state, f).state_dict()[name], value), name


def test_buffers_are_those_of_the_live_model():
    f, ema = net(), Ema(decay=0.99)
    state = state_of(ema, f)
    step(f, 0)
    ema.update(state, f)
    assert torch.equal(state.module[1].running_mean, f[1].running_mean)
    assert int(state.module[1].num_batches_tracked) == 1


def test_the_state_dict_is_a_checkpoint():
    f, ema = net(), Ema(decay=0.9)
    state = state_of(ema, f)
    for t in range(5):
        step(f, t)
        ema.update(state, f)
    copy = state_of(ema, net())
    copy.load_state_dict(state.state_dict())
    step(f, 9)
    for s in (state, copy):
        ema.update(s, f)
    for (n, a), b in zip(state.state_dict().items(), copy.state_dict().values(), strict=True):
        assert torch.equal(a, b), n


def test_it_is_no_trainable_part_and_ignores_the_mode_of_its_parent():
    f = net()
    state = state_of(Ema(), f)
    assert not any(p.requires_grad for p in state.parameters())
    assert all(p.requires_grad for p in f.parameters())
    parent = nn.ModuleDict({"f": f, "average": state}).train()
    assert f.training
    assert not any(m.training for m in parent["average"].modules())
    parent.eval()
    assert not any(m.training for m in state.modules())


def test_the_live_model_is_left_alone():
    f, ema = net(), Ema()
    state = state_of(ema, f)
    before = {n: v.clone() for n, v in f.state_dict().items()}
    step(f, 0)
    after = {n: v.clone() for n, v in f.state_dict().items()}
    ema.update(state, f)
    assert f.training
    assert all(torch.equal(after[n], v) for n, v in f.state_dict().items())
    assert not torch.equal(before["0.weight"], after["0.weight"])
    assert state.module[0].weight.data_ptr() != f[0].weight.data_ptr()


def test_shared_weights_are_averaged_once():
    f = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    f[1].weight = f[0].weight
    ema = Ema(decay=0.5, ramp=False)
    state = state_of(ema, f)
    w0 = f[0].weight.detach().clone()
    with torch.no_grad():
        f[0].weight.add_(1.0)
    ema.update(state, f)
    torch.testing.assert_close(state.module[1].weight.detach(), w0 + 0.5)
