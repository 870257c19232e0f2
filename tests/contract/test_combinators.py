"""Combinators: early exit per sample, passes to the row, keeping the best, composition, targets in the order they promise."""

import dataclasses

import pytest
import torch
from torch import nn

from robustlab import config, geometry
from robustlab.attacks.apgd import APGD
from robustlab.attacks.best_of import BestOf
from robustlab.attacks.bim import BIM
from robustlab.attacks.eot import EOT
from robustlab.attacks.fgsm import FGSM
from robustlab.attacks.pgd import PGD
from robustlab.attacks.restarts import Restarts
from robustlab.attacks.targeted_all import TargetedAll, ranked_targets
from robustlab.evaluation.runner import evaluate
from robustlab.losses import cross_entropy
from robustlab.rng import Rng
from robustlab.types import Attack, Suite, Threat, UserError, one_hot, with_threat

N, K, SHAPE = 24, 6, (2, 6, 6)
EPS = 0.06
HERE = {"norm": "linf", "eps": EPS}


def problem(seed=0):
    torch.manual_seed(seed)
    f = nn.Sequential(nn.Conv2d(2, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(128, K)).double().eval()
    x = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return f, x, f(x).argmax(1)


def run(attack, f, x, y, seed=0):
    return attack.run(f, x, one_hot(y, K, x.dtype), Rng(seed).at(torch.arange(len(x))))


class Recorder(Attack):
    """Fools the samples whose ticket is in ``hits`` by going to ``there``; writes down whom it was given."""

    norms = ("linf", "l2")


def recorder(hits, seen, there, label, norm=None, eps=None):
    def search(self, f, x, y, rng):
        seen.append(rng.tickets.tolist())
        hit = torch.tensor([t in hits for t in rng.tickets.tolist()])
        return torch.where(hit.view(-1, 1, 1, 1), torch.full_like(x, there), x + 0.001 * label), {}

    fields = [("norm", str | None, norm), ("eps", float | None, eps)]
    cls = dataclasses.make_dataclass("R", fields, bases=(Recorder,), frozen=True, kw_only=True, namespace={"run": search})
    cls.name = f"r{label}"
    return cls()


def brightness(z):
    """Class 0 below 0.5 on average, class 1 above."""
    s = z.flatten(1).mean(1) - 0.5
    return torch.stack([-s, s], 1)


# ------------------------------------------------------------------------------------------------------- early exit


def test_a_fooled_sample_is_not_attacked_by_the_next():
    x, y = torch.full((6, *SHAPE), 0.2), torch.zeros(6, dtype=torch.long)
    seen = [[], [], []]
    attacks = tuple(recorder(h, s, 0.9, i) for i, (h, s) in enumerate(zip([{1, 4}, {0}, set()], seen, strict=True)))
    attack = BestOf(norm="linf", eps=1.0, attacks=attacks)
    x_adv, info = attack.run(brightness, x, one_hot(y, 2), Rng(0).at(torch.arange(6)))
    assert seen == [[[0, 1, 2, 3, 4, 5]], [[0, 2, 3, 5]], [[2, 3, 5]]]
    assert (brightness(x_adv).argmax(1) == 1).tolist() == [True, True, False, False, True, False]
    assert info == {}  # these attacks do not count their passes
    # the largest cross-entropy of class 0 is the brightest point: that of the last attack
    torch.testing.assert_close(x_adv[2], x[2] + 0.002)


def test_the_rest_is_not_called_when_all_are_fooled():
    x, y = torch.full((3, *SHAPE), 0.2), torch.zeros(3, dtype=torch.long)
    first, second = [], []
    attack = BestOf(norm="linf", eps=1.0, attacks=(recorder({0, 1, 2}, first, 0.9, 0), recorder(set(), second, 0.9, 1)))
    attack.run(brightness, x, one_hot(y, 2), Rng(0).at(torch.arange(3)))
    assert (len(first), len(second)) == (1, 0)


@pytest.mark.parametrize(
    "attack",
    [
        Restarts(attack=PGD(steps=3), n=4, **HERE),
        BestOf(attacks=(FGSM(), PGD(steps=2), APGD(steps=4)), **HERE),
        TargetedAll(attack=PGD(steps=3), num_targets=3, **HERE),
        TargetedAll(attack=PGD(steps=3), order="logits", **HERE),
        EOT(attack=PGD(steps=3), n=3, **HERE),
        Restarts(attack=EOT(attack=PGD(steps=2), n=2), n=2, **HERE),
        BestOf(attacks=(Restarts(n=2), TargetedAll(num_targets=2)), **HERE),
    ],
    ids=lambda a: f"{a.name}-{getattr(a, 'order', '')}",
)
def test_passes_are_counted_to_the_row(attack):
    f, x, y = problem()
    rows, back = [], []

    def counted(v):
        rows.append(len(v))
        z = f(v)
        if z.requires_grad:
            z.register_hook(lambda _: back.append(len(v)))
        return z

    x_adv, info = run(attack, counted, x, y)
    assert info["passes"].shape == (N, 2)
    assert info["passes"].sum(0).tolist() == [sum(rows), sum(back)]
    fooled = f(x_adv).argmax(1) != y
    assert 0 < int(fooled.sum()) < N
    if attack.name != "eot":
        assert int(info["passes"][fooled, 0].min()) < int(info["passes"][~fooled, 0].min())  # they left early


# ------------------------------------------------------------------------------------------------------ what is kept


def test_one_restart_is_the_attack_and_more_are_never_worse():
    f, x, y = problem()
    inner = PGD(steps=3, **HERE)
    one, _ = run(Restarts(attack=inner, n=1, **HERE), f, x, y)
    alone, _ = inner.run(f, x, one_hot(y, K, x.dtype), Rng(0).at(torch.arange(N)).child("run", 0))
    assert torch.equal(one, alone)
    many, _ = run(Restarts(attack=inner, n=6, **HERE), f, x, y)
    losses = [cross_entropy(f(v), one_hot(y, K, x.dtype)) for v in (one, many)]
    fooled = [f(v).argmax(1) != y for v in (one, many)]
    assert bool((fooled[1] >= fooled[0]).all())
    same = fooled[0] == fooled[1]
    assert bool((losses[1][same] >= losses[0][same]).all())
    assert bool((losses[1] > losses[0]).any())


def test_best_of_keeps_the_point_of_the_largest_loss_whatever_the_order():
    f, x, y = problem()
    attacks = (FGSM(), PGD(steps=10, rel_step=0.25, start="zero"), APGD(steps=3))
    alone = [run(with_threat(a, Threat(**HERE)), f, x, y)[0] for a in attacks[:2]]
    target = one_hot(y, K, x.dtype)
    points = torch.stack([cross_entropy(f(v), target) for v in alone])
    robust = torch.stack([f(v).argmax(1) == y for v in alone]).all(0)
    assert bool(robust.any())
    for order in (attacks[:2], attacks[1::-1]):
        x_adv, _ = run(BestOf(attacks=order, **HERE), f, x, y)
        torch.testing.assert_close(cross_entropy(f(x_adv), target)[robust], points.amax(0)[robust])


def test_a_targeted_attack_inside_restarts_goes_on_until_it_hits():
    f, x, y = problem()
    goal = (y + 1) % K
    x_adv, info = run(Restarts(attack=PGD(steps=3, targeted=True), n=5, norm="linf", eps=0.12), f, x, goal)
    hit = f(x_adv).argmax(1) == goal
    assert 0 < int(hit.sum()) < N
    assert info["passes"][~hit].tolist() == [[20, 15]] * int((~hit).sum())
    assert int(info["passes"][hit, 1].max()) < 15


# -------------------------------------------------------------------------------------------------------- targets


def linear(norm):
    """Logits W x: every distance is known."""
    torch.manual_seed(4)
    w = torch.randn(K, 72, dtype=torch.float64) * torch.linspace(0.2, 3, K)[torch.randperm(K)][:, None]
    x = torch.rand(N, *SHAPE, dtype=torch.float64)
    z = x.flatten(1) @ w.T
    y = z.argmax(1)
    dual = {"linf": 1, "l2": 2, "l1": torch.inf}[norm]
    gap = z.gather(1, y[:, None]) - z
    distance = gap / (w[y][:, None] - w[None]).norm(dual, dim=2).clamp_min(1e-9)
    distance[torch.arange(N), y] = torch.inf
    return lambda v: v.flatten(1) @ w.T, x, y, distance


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_malt_orders_the_targets_of_a_linear_model_by_distance(norm):
    f, x, y, distance = linear(norm)
    order, spent = ranked_targets(f, x, one_hot(y, K, x.dtype), norm, "malt", 9)
    assert order.shape == (N, K - 1)
    assert torch.equal(order, distance.argsort(1)[:, : K - 1])
    assert spent.tolist() == [[1, K - 1]] * N
    by_logit, spent = ranked_targets(f, x, one_hot(y, K, x.dtype), norm, "logits", 3)
    z = f(x).scatter(1, y[:, None], -torch.inf)
    assert torch.equal(by_logit, z.argsort(1, descending=True)[:, :3])
    assert spent.tolist() == [[1, 0]] * N
    assert not torch.equal(order[:, :3], by_logit)


def test_the_first_target_of_malt_breaks_what_can_be_broken():
    f, x, y, distance = linear("linf")
    x, eps = x * 0.4 + 0.3, 0.01  # away from the box, at which the distance would no longer be exact
    z = f(x)
    y = z.argmax(1)
    order, _ = ranked_targets(f, x, one_hot(y, K, x.dtype), "linf", "malt", 1)
    one = TargetedAll(attack=PGD(steps=20, start="zero"), num_targets=1, norm="linf", eps=eps)
    everything = dataclasses.replace(one, num_targets=9)
    broken = [f(run(a, f, x, y)[0]).argmax(1) != y for a in (one, everything)]
    assert 0 < int(broken[0].sum()) < N
    assert torch.equal(broken[0], broken[1])
    del order, distance


def test_two_classes_have_one_target():
    f = lambda v: torch.stack([v.flatten(1).sum(1), -v.flatten(1).sum(1) + 20], 1)  # noqa: E731
    x = torch.full((2, 1, 4, 4), 0.7, dtype=torch.float64)
    x_adv, info = TargetedAll(attack=PGD(steps=5, start="zero"), norm="linf", eps=0.2).run(
        f, x, one_hot(torch.zeros(2, dtype=torch.long), 2, x.dtype), Rng(0).at(torch.arange(2))
    )
    assert bool((f(x_adv).argmax(1) == 1).all())
    assert info["passes"].tolist() == [[1 + 5 + 1, 5 + 1]] * 2


# -------------------------------------------------------------------------------------------------------------- EOT


class Noisy(nn.Module):
    """Logits with multiplicative noise that flips the sign of single gradients; the mean is linear."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        return (x.flatten(1) @ self.w) * (1 + 3 * torch.randn(len(x), 1, dtype=x.dtype))


def test_eot_finds_the_sign_that_single_gradients_miss():
    torch.manual_seed(0)
    w = torch.randn(36, 3, dtype=torch.float64)
    x, y = torch.rand(64, 1, 6, 6, dtype=torch.float64) * 0.4 + 0.3, torch.randint(0, 3, (64,))
    f, eps = Noisy(w), 0.1
    step = PGD(steps=1, step=eps, start="zero", loss="margin")
    exact = geometry.linear_max  # the best first-order answer on the mean classifier
    mean = x.clone().requires_grad_()
    z = mean.flatten(1) @ w
    c = one_hot(y, 3, x.dtype)
    best = (z.masked_fill(c.bool(), -torch.inf).amax(1) - (z * c).sum(1)).sum()
    g = torch.autograd.grad(best, mean)[0]
    right = exact(g, x, "linf", eps)

    def agreement(n):
        x_adv, _ = EOT(attack=step, n=n, norm="linf", eps=eps).run(f, x, c, Rng(0).at(torch.arange(64)))
        return float(((x_adv - x).sign() == (right - x).sign()).double().mean())

    few, many = agreement(1), agreement(400)
    assert few < 0.85
    assert many > 0.97


def test_eot_of_a_deterministic_classifier_is_the_attack():
    f, x, y = problem()
    inner = PGD(steps=4, **HERE)
    averaged, info = run(EOT(attack=inner, n=4, **HERE), f, x, y)
    alone, _ = inner.run(f, x, one_hot(y, K, x.dtype), Rng(0).at(torch.arange(N)).child("attack"))
    torch.testing.assert_close(averaged, alone)
    assert info["passes"].tolist() == [[16, 16]] * N


def test_the_draws_of_a_random_classifier_come_from_the_seed():
    torch.manual_seed(0)
    f, x, y = (
        Noisy(torch.randn(36, 3).double()).eval(),
        torch.rand(5, 1, 6, 6, dtype=torch.float64),
        torch.eye(3)[[0, 1, 2, 0, 1]].double(),
    )
    attack = EOT(attack=PGD(steps=3), n=2, **HERE)
    state = torch.get_rng_state()
    first = attack(f, x, y, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(attack(f, x, y, seed=1), first)
    assert not torch.equal(attack(f, x, y, seed=2), first)


# ---------------------------------------------------------------------------------------------------- composition


def test_open_threats_are_filled_all_the_way_down():
    open_ = Restarts(attack=BestOf(attacks=(EOT(attack=PGD()), TargetedAll())))
    closed = with_threat(open_, Threat("l2", 0.4))
    assert closed == Restarts(attack=BestOf(attacks=(EOT(attack=PGD()), TargetedAll())), norm="l2", eps=0.4)
    for a in (closed, closed.attack, *closed.attack.attacks, closed.attack.attacks[0].attack):
        assert (a.norm, a.eps) == ("l2", 0.4)
    assert config.build("attack", config.dump(closed)) == closed
    assert config.build("attack", config.dump(open_)) == open_


def test_norms_and_coupling_are_those_of_the_attacks_inside():
    assert Restarts().norms == ("linf", "l2", "l1")
    assert Restarts(attack=BIM()).norms == ("linf", "l2")
    assert BestOf(attacks=(PGD(), BIM())).norms == ("linf", "l2")
    assert not BestOf().coupled
    assert Restarts(attack=config.build("attack", "call")).coupled
    with pytest.raises(ValueError, match="restarts: norm 'l1' is not supported; expected one of linf, l2"):
        Restarts(attack=BIM(), norm="l1")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "restarts", "attack": {"name": "pgd", "eps": 0.1}, "eps": 0.2}, "attack: the attack 'pgd' has its own eps, 0.1"),
        ({"name": "best-of", "attacks": []}, "attacks: give at least one attack"),
        ({"name": "targeted-all", "attack": "apgd"}, r"attack: 'apgd' has no targeted mode \(no field 'targeted'\)"),
        ({"name": "best-of", "attacks": ["pgd", "agpd"]}, r"unknown attack 'agpd' \(did you mean 'apgd'\?\)"),
    ],
)
def test_mistakes_are_one_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        config.build("attack", spec)
    assert len(error.value.lines) == 1


def test_under_the_evaluator():
    f, x, y = problem()
    plain = {"name": "pgd", "steps": 3}
    attacks = ({"name": "restarts", "attack": plain, "n": 2}, {"name": "targeted-all", "attack": plain, "num_targets": 2})
    attacks = tuple(config.build("attack", a) for a in attacks)
    suite = type("Toy", (Suite,), {"name": "toy"})(attacks=attacks)
    results = [evaluate(f, (x.float(), y), suite, threat=Threat("linf", 0.04), batch_size=b) for b in (24, 5)]
    assert torch.equal(results[0].robust, results[1].robust)
    assert 0 < int(results[0].robust.sum()) < N
    assert results[0].cost["forwards"] == results[1].cost["forwards"]
    assert results[0].per_attack["restarts"]["outside"] == 0
