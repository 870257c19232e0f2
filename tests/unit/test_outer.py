"""The loss as a whole: reduction, memory of one evaluation, features, second passes, gradients at other leaves."""

import dataclasses

import pytest
import torch
from torch import nn

from robustlab import config
from robustlab.outer import Forward, Outer, Precise, backward, context_of, gradient_at, paths, reduce, total
from robustlab.rng import Rng
from robustlab.training.step import train_step
from robustlab.types import Objective, Regularizer, Tap, Term, UserError, View, one_hot


def net(dropout=0.0):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(64, 3)
    ).double()


def views(n=6, start=0):
    g = torch.Generator().manual_seed(start)
    x = torch.rand(n, 1, 4, 4, dtype=torch.float64, generator=g)
    y = one_hot(torch.randint(3, (n,), generator=g), 3, torch.float64)
    clean = View(x=x, y=y, key=torch.arange(n) + start, index=torch.arange(n))
    return {"clean": clean, "adv": dataclasses.replace(clean, x=x.flip(3))}


def outer_of(f, *losses, **fields):
    method = config.build("trainer", "trades", **fields)
    if losses:
        method = dataclasses.replace(method, objective=losses[0], regularizers=tuple(losses[1:]))
    return Outer(f, method, context_of(f, 3, 64, (1, 4, 4)))


def shard(n=6, start=0, number=0):
    return views(n, start), Rng(0).split(1, number)[0]


class Made(Objective):
    """A loss made of a function."""

    name = "made"

    def __init__(self, fn, features=()):
        object.__setattr__(self, "fn", fn)
        object.__setattr__(self, "features", features)

    def __call__(self, forward, views):
        return self.fn(forward, views)


# ---------------------------------------------------------------------------------------------------------- reduction


def test_a_term_is_its_coefficient_times_the_weighted_mean():
    value, weight = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 0.0, 3.0])
    assert reduce(Term(value)) == 3
    assert reduce(Term(value, coef=0.5)) == 1.5
    assert reduce(Term(value, coef=0.5, weight=weight)) == pytest.approx(0.5 * 19 / 3)  # weights are not renormalised
    assert reduce(Term(torch.tensor(4.0), coef=2.0)) == 8
    assert total({"a": Term(value), "b": Term(torch.tensor(4.0), coef=-1.0)}) == -1
    with pytest.raises(UserError, match="no terms"):
        total({})


def test_two_losses_cannot_share_the_name_of_a_term():
    same = Made(lambda forward, views: {"ce": Term(forward("clean").sum(1))})
    with pytest.raises(UserError, match="'ce'"):
        outer_of(net(), same, same)(views(), Rng(0), False)


# ------------------------------------------------------------------------------------------------------------ forward


def counting(f):
    count = [0]
    f.register_forward_hook(lambda *a: count.__setitem__(0, count[0] + 1))
    return count


def test_a_view_runs_once_however_often_it_is_asked_for():
    f = net()
    count = counting(f)
    kept = []

    def fn(forward, views):
        kept.append((forward("clean"), forward("clean"), forward("adv")))
        return {"a": Term(kept[0][0].sum(1))}

    outer_of(f, Made(fn), Made(lambda forward, views: {"b": Term(forward("adv").sum(1))}))(views(), Rng(0), True)
    assert count == [2]
    assert kept[0][0] is kept[0][1]
    assert int(f[1].num_batches_tracked) == 2  # trades: bn_updates = clean, adv


def test_features_come_from_the_same_pass():
    f = net()
    count = counting(f)
    seen = {}

    def fn(forward, views):
        seen["features"], seen["logits"] = forward.features("clean"), forward("clean")
        return {"a": Term(seen["logits"].sum(1))}

    outer_of(f, Made(fn, features=("clean",)))(views(), Rng(0), False)
    assert count == [1]
    assert seen["features"].shape == (6, 64)
    torch.testing.assert_close(f[-1](seen["features"]), seen["logits"])


@pytest.mark.parametrize("wanted", [("clean",), ("clean", "adv")])
def test_features_of_a_joint_pass_are_split(wanted):
    f, seen = net(), {}

    def fn(forward, views):
        seen.update({n: (forward.features(n), forward(n)) for n in wanted})
        return {"a": Term(forward("clean").sum(1))}

    outer_of(f, Made(fn, features=wanted), joint=[["clean", "adv"]])(views(), Rng(0), False)
    for h, z in seen.values():
        torch.testing.assert_close(f[-1](h), z)


def test_features_that_nobody_announced_are_an_error():
    part = Made(lambda forward, views: {"a": Term(forward.features("clean").sum(1))})
    with pytest.raises(ValueError, match="list the view in the part's `features`"):
        outer_of(net(), part)(views(), Rng(0), False)


def test_views_that_the_loss_makes_update_no_statistics():
    f = net()

    def fn(forward, views):
        other = dataclasses.replace(views["clean"], x=1 - views["clean"].x)
        params = {k: 2 * p for k, p in f.named_parameters()}
        z = forward("clean", params=params)
        with torch.no_grad():
            twice = {k: 2 * p for k, p in f.named_parameters()}
            assert torch.equal(z, torch.func.functional_call(f, twice, (views["clean"].x,)))
        return {"a": Term(forward(other).sum(1) + z.sum(1))}

    before = f[1].running_mean.clone()
    f.train()
    momentum = f[1].momentum
    f[1].momentum = 0.0  # the call beside the loss must not move the statistics either
    outer_of(f, Made(fn))(views(), Rng(0), True)
    f[1].momentum = momentum
    assert torch.equal(f[1].running_mean, before)


def test_taps_of_a_view_act_in_its_pass_alone():
    f, seen = net(), {}
    both = views()
    both["adv"] = dataclasses.replace(both["clean"], taps=(Tap("5", lambda z: z + 10),))

    def fn(forward, views):
        seen.update(clean=forward("clean"), adv=forward("adv"))
        return {"a": Term(seen["clean"].sum(1))}

    outer_of(f, Made(fn))(both, Rng(0), False)
    torch.testing.assert_close(seen["adv"], seen["clean"] + 10)
    with pytest.raises(UserError, match="taps cannot share a pass: clean, adv"):
        outer_of(f, Made(fn), joint=[["clean", "adv"]])(both, Rng(0), False)


def test_a_missing_view_is_named():
    part = Made(lambda forward, views: {"a": Term(forward("mixed").sum(1))})
    with pytest.raises(UserError, match="asks for the view 'mixed', but the stages made only: clean, adv"):
        outer_of(net(), part)(views(), Rng(0), False)


def test_the_randomness_of_losses_is_not_that_of_stages():
    forward = Forward(Precise(net()), views(), Rng(0).child("loss"), config.build("trainer", "trades"), False)
    key = torch.arange(3)
    assert not torch.equal(forward.rng.at(key).bits((4,)), Rng(0).at(key).bits((4,)))


# --------------------------------------------------------------------------------------------------- loss, re-evaluated


def test_a_second_evaluation_has_the_same_dropout():
    f = net(dropout=0.5)
    outer = outer_of(f).train()
    state = torch.get_rng_state()
    values = [float(outer.loss(shard(), stats=False, sync=False)[0].detach()) for _ in range(3)]
    assert values[0] == values[1] == values[2]
    other = float(outer.loss(shard(number=1), stats=False, sync=False)[0].detach())
    assert other != values[0]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("stats", [False, True])
def test_stats_says_whether_running_statistics_move(stats):
    f = net()
    outer = outer_of(f)
    outer.loss(shard(), stats=stats, sync=False)
    assert int(f[1].num_batches_tracked) == (2 if stats else 0)


def test_gradient_at_is_the_mean_over_shards_and_touches_nothing():
    f = net()
    outer = outer_of(f, bn_updates=["clean", "adv"])
    shards = [shard(4, 0), shard(4, 10, 1), shard(4, 20, 2)]
    leaves = [p for p in f.parameters() if p.ndim > 1]
    before = {k: v.clone() for k, v in f.state_dict().items()}
    found = gradient_at(outer.loss, shards, leaves)
    expected = [
        torch.stack(g).mean(0)
        for g in zip(*(torch.autograd.grad(outer.loss(s, stats=False, sync=False)[0], leaves) for s in shards), strict=True)
    ]
    torch.testing.assert_close(found, expected)
    assert all(p.grad is None for p in f.parameters())
    assert all(torch.equal(v, before[k]) for k, v in f.state_dict().items())

    natural = gradient_at(outer.loss, shards[:1], leaves, only=["natural"])
    _, terms = outer.loss(shards[0], stats=False, sync=False)
    torch.testing.assert_close(natural, list(torch.autograd.grad(terms["natural"].value.mean(), leaves)))


def test_backward_adds_to_the_gradients_and_reports_the_mean():
    f = net()
    outer = outer_of(f)
    shards = [shard(4, 0), shard(4, 10, 1)]
    params = list(f.parameters())
    g = gradient_at(outer.loss, shards, params)
    terms = backward(outer.loss, shards, scale=0.5)
    torch.testing.assert_close([p.grad for p in params], [0.5 * v for v in g])
    backward(outer.loss, shards, scale=0.5)
    torch.testing.assert_close([p.grad for p in params], g)
    each = [outer.loss(s, stats=False, sync=False) for s in shards]
    for name in ("natural", "robust"):
        assert float(terms[name]) == pytest.approx(sum(float(reduce(t[name]).detach()) for _, t in each) / 2)
    assert float(terms["loss"]) == pytest.approx(float(terms["natural"]) + float(terms["robust"]))
    assert not any(t.requires_grad for t in terms.values())


# --------------------------------------------------------------------------------------------------------- Outer itself


@dataclasses.dataclass(frozen=True)
class Store(Regularizer):
    """Remembers every sample's last loss; stages it in the loss, writes it in commit."""

    name = "store"

    def init_state(self, ctx):
        state = nn.Module()
        state.register_buffer("seen", torch.zeros(ctx.num_samples, dtype=torch.float64))
        state.register_buffer("commits", torch.zeros((), dtype=torch.int64))
        state.helper = nn.Linear(2, 1, dtype=torch.float64)
        state.pending = None
        return state

    def __call__(self, forward, views, state):
        value = forward("clean").logsumexp(1)
        state.pending = views["clean"].index, value.detach()
        return {"store": Term(value, coef=0.01), "helper": Term(state.helper.weight.square().sum())}

    def commit(self, state, world):
        index, value = (world.gather(t) for t in state.pending)
        state.seen[index] = value
        state.commits += 1


def test_memory_lives_in_outer_and_is_written_once_a_step():
    f = net()
    method = dataclasses.replace(config.build("trainer", "standard", gradient="awp"), regularizers=(Store(),))
    outer = Outer(f, method, context_of(f, 3, 64, (1, 4, 4)))
    assert {k for k in outer.state_dict() if k.startswith("state.")} == {
        *("state.regularizers_0.seen", "state.regularizers_0.commits"),
        *("state.regularizers_0.helper.weight", "state.regularizers_0.helper.bias"),
    }
    helper = outer.state["regularizers_0"].helper
    before = helper.weight.detach().clone()
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.1)
    for step in range(3):  # schedules resolve to another tree each step: the memory stays
        train_step(outer, [views()], dataclasses.replace(method), optimizer, Rng(0), first=step)
    assert int(outer.state["regularizers_0"].commits) == 3
    assert int((outer.state["regularizers_0"].seen != 0).sum()) == 6
    assert not torch.equal(helper.weight, before)  # extra networks are trained too
    again = Outer(net(), method, context_of(f, 3, 64, (1, 4, 4)))
    again.load_state_dict(outer.state_dict())
    assert torch.equal(again.state["regularizers_0"].seen, outer.state["regularizers_0"].seen)


def test_paths_do_not_depend_on_values():
    """A scheduled number and its value lead to the same paths below every part with memory."""
    method = config.build("trainer", "awp", averaging="ema", regularizers=["logit-variation"])
    names = [at for at, _ in paths(method)]
    assert names == ["", "inner_0", "inner_0_attack", "objective", "regularizers_0", "gradient", "averaging"]


def test_precise_hands_out_float32():
    f = net().float()
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(Precise(f.eval())(x), f(x))
    low = Precise(f, "bf16")(x)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, f(x), rtol=0.05, atol=0.05)
    assert not torch.equal(low, f(x))
