"""Laws 1 and 2, for every registered attack under every norm it knows."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from robustlab import geometry, registry
from robustlab.attacks.craft import Craft
from robustlab.attacks.pgd import PGD
from robustlab.rng import Rng
from robustlab.types import Threat, View, one_hot, with_threat

N, K, SHAPE = 8, 5, (2, 8, 8)
EPS = {"linf": 0.06, "l2": 0.6, "l1": 4.0, "l0": 5.0}
CHEAP = {"steps": 6, "queries": 60, "attacks": ("apgd-ce", "fab-t")}  # of the fields of these names

CASES = [(name, norm) for name, cls in registry.entries("attack").items() for norm in cls.norms]
CASES += [("pgd:restarts", "linf"), ("pgd:best", "l2"), ("pgd:dlr", "linf"), ("pgd:normal", "l2"), ("pgd:targeted", "linf")]
CASES += [("apgd:dlr", "linf"), ("apgd:restarts", "l2"), ("autoattack-reference:all", "linf")]
VARIANTS = {
    "restarts": {"restarts": 3},
    "best": {"keep": "best"},
    "dlr": {"loss": "dlr"},
    "normal": {"start": "normal", "loss": "kl"},
    "targeted": {"targeted": True},
    "all": {"attacks": ("apgd-dlr", "apgd-t", "fab")},
}
each_attack = pytest.mark.parametrize(("name", "norm"), CASES)


def make(name: str, norm: str, eps: float | None = None):
    name, _, variant = name.partition(":")
    if name == "torchattacks":
        pytest.importorskip("torchattacks")
    cls = registry.lookup("attack", name)
    known = {f.name for f in dataclasses.fields(cls)}
    if name == "best-of":
        known -= {"attacks"}
    fields = {k: v for k, v in CHEAP.items() if k in known} | VARIANTS.get(variant, {})
    return cls(norm=norm, eps=EPS[norm] if eps is None else eps, **fields)


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    f = nn.Sequential(
        nn.Conv2d(SHAPE[0], 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(72, K),
    )  # fmt: skip
    f(torch.rand(64, *SHAPE))  # running statistics that are not the defaults
    return f.to(dtype).eval()


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


def problem(dtype: torch.dtype):
    """A network and images with active bounds; half of the labels are the predicted ones, half are not."""
    f = network(dtype)
    x = (torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(1)) * 1.4 - 0.2).clamp(0, 1).to(dtype)
    with torch.no_grad():
        y = (f(x).argmax(1) + (torch.arange(N) % 4 == 3)) % K
    return f, x, y


@each_attack
def test_stays_in_ball_and_box_and_keeps_the_type(name, norm, dtype):
    f, x, y = problem(dtype)
    x_adv = make(name, norm)(f, x, y, seed=0)
    assert x_adv.dtype == dtype
    assert x_adv.shape == x.shape
    assert not x_adv.requires_grad
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    slack = 2e-6 if dtype == torch.float32 else 1e-12
    assert float(geometry.norm_of(x_adv - x, norm).max()) <= EPS[norm] * (1 + slack) + slack
    assert not torch.equal(x_adv, x)


@each_attack
def test_a_radius_of_zero_is_the_identity(name, norm, dtype):
    f, x, y = problem(dtype)
    assert torch.equal(make(name, norm, eps=0.0)(f, x, y, seed=0), x)


@each_attack
def test_leaves_no_trace(name, norm):
    f, x, y = problem(torch.float32)
    f[0].weight.requires_grad_(False)  # a flag of the user's, to be kept
    f[3].weight.grad = torch.ones_like(f[3].weight)
    state = copy.deepcopy(f.state_dict())
    flags = [(m.training, m) for m in f.modules()]
    x_before, y_before, random = x.clone(), y.clone(), torch.get_rng_state()

    make(name, norm)(f, x, y, seed=0)

    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)
    for key, value in f.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert [(m.training, m) for m in f.modules()] == flags
    assert [p.requires_grad for p in f.parameters()] == [False] + [True] * (len(list(f.parameters())) - 1)
    assert torch.equal(f[3].weight.grad, torch.ones_like(f[3].weight))
    assert all(p.grad is None for p in f.parameters() if p is not f[3].weight)
    assert x.grad is None


@each_attack
def test_run_and_callables_leave_no_gradients_either(name, norm):
    """`run` is what training calls, and a callable hides its parameters: nothing is frozen from outside here."""
    f, x, y = problem(torch.float32)
    attack = make(name, norm)
    rng = Rng(0).child("attack", attack.name).at(torch.arange(N))
    through_run, info = attack.run(f, x, one_hot(y, K), rng)
    assert isinstance(info, dict)
    through_callable = attack(lambda z: f(z), x, y, seed=0)
    assert torch.equal(through_run, through_callable)
    assert torch.equal(through_run, attack(f, x, y, seed=0))
    assert all(p.grad is None for p in f.parameters())
    assert all(p.requires_grad for p in f.parameters())


@each_attack
def test_never_calls_backward(name, norm, monkeypatch):
    """pyautoattack's FAB does, on its own images; its classifier passes nothing on to the weights (see the tests above)."""
    if registry.lookup("attack", name.partition(":")[0]).__module__ == "robustlab.attacks.autoattack_reference":
        pytest.skip("a package that is run as it is")
    f, x, y = problem(torch.float32)

    def refuse(*args, **kwargs):
        raise AssertionError("backward was called")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "backward", refuse)
    make(name, norm)(f, x, y, seed=0)


@each_attack
def test_the_seed_decides(name, norm):
    f, x, y = problem(torch.float32)
    attack = make(name, norm)
    first = attack(f, x, y, seed=7)
    torch.rand(3)
    assert torch.equal(attack(f, x, y, seed=7), first)


def random_starts() -> list[tuple[str, str]]:
    return [(n, p) for n, p in CASES if n.partition(":")[0] in ("pgd", "apgd", "apgd-t", "square")]


@pytest.mark.parametrize(("name", "norm"), random_starts())
def test_another_seed_is_another_draw(name, norm):
    f, x, y = problem(torch.float64)
    attack = make(name, norm)
    assert not torch.equal(attack(f, x, y, seed=0), attack(f, x, y, seed=1))
    twins = x[:1].expand(2, *SHAPE)
    pair = attack(f, twins, y[:1].expand(2), seed=0)
    assert not torch.equal(pair[0], pair[1])  # the same image under two tickets


@each_attack
def test_a_sample_does_not_depend_on_its_batch(name, norm):
    f, x, y = problem(torch.float64)
    attack = make(name, norm)
    if attack.coupled:
        pytest.skip("coupled: it says so itself")
    index = torch.arange(100, 100 + N)
    whole = attack(f, x, y, seed=0, index=index)
    order = torch.randperm(N)
    permuted = attack(f, x[order], y[order], seed=0, index=index[order])
    alone = torch.cat([attack(f, x[i : i + 1], y[i : i + 1], seed=0, index=index[i : i + 1]) for i in range(N)])
    torch.testing.assert_close(permuted, whole[order], atol=1e-9, rtol=0)
    torch.testing.assert_close(alone, whole, atol=1e-9, rtol=0)


@each_attack
def test_says_no_to_a_threat_model_that_cannot_be(name, norm):
    for eps in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="eps must be a finite number"):
            make(name, norm, eps=eps)
    cls = registry.lookup("attack", name.partition(":")[0])
    with pytest.raises(ValueError, match="norm 'l7' is not supported"):
        cls(norm="l7", eps=0.1)
    if "linf" in cls.norms:
        with pytest.raises(ValueError, match="did you mean 8/255"):
            cls(norm="linf", eps=8)
    f, x, y = problem(torch.float32)
    with pytest.raises(ValueError, match="norm and eps"):
        cls()(f, x, y)
    with pytest.raises(ValueError, match="norm and eps"):
        cls().run(f, x, one_hot(y, K), Rng(0).at(torch.arange(N)))


@each_attack
def test_an_open_threat_model_is_filled(name, norm):
    attack = make(name, norm)
    blank = dataclasses.replace(attack, norm=None, eps=None)
    assert with_threat(blank, Threat(norm, EPS[norm])) == attack


# ------------------------------------------------------------------------------------------- by-products, craft


@pytest.mark.parametrize("name", ["fgsm", "pgd", "pgd:restarts", "pgd:best", "apgd", "apgd:restarts", "apgd-t"])
def test_counts_its_passes(name):
    f, x, y = problem(torch.float64)
    calls = []

    def counted(z):
        calls.append(len(z))
        return f(z)

    _, info = make(name, "linf").run(counted, x, one_hot(y, K, x.dtype), Rng(0).at(torch.arange(N)))
    assert info["passes"].shape == (N, 2)
    assert int(info["passes"][:, 0].sum()) == sum(calls)
    assert info["grad"].shape == x.shape


def test_the_gradient_it_reports_is_the_last_one():
    f, x, y = problem(torch.float64)
    target = one_hot(y, K, x.dtype)
    rng = Rng(0).at(torch.arange(N))
    before, _ = PGD(norm="linf", eps=0.05, steps=4, step=0.01).run(f, x, target, rng)
    _, info = PGD(norm="linf", eps=0.05, steps=5, step=0.01).run(f, x, target, rng)
    before.requires_grad_()
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(f(before), y, reduction="sum"), before)
    torch.testing.assert_close(info["grad"], g)


def test_step_wins_over_rel_step_and_both_over_the_default():
    f, x, y = problem(torch.float64)

    def moved(**fields):
        return float(
            (PGD(norm="linf", eps=0.2, steps=1, start="zero", **fields)(f, x.clamp(0.4, 0.6), y) - x.clamp(0.4, 0.6)).abs().max()
        )

    assert moved(step=0.03, rel_step=0.5) == pytest.approx(0.03)
    assert moved(rel_step=0.5) == pytest.approx(0.1)
    assert moved() == pytest.approx(0.2)  # 2.5 eps / 1, projected


def test_best_is_never_worse_than_last_and_restarts_never_worse_than_one():
    f, x, y = problem(torch.float64)

    def value(**fields):
        x_adv = PGD(norm="linf", eps=0.2, steps=7, rel_step=0.9, **fields)(f, x, y)
        z = f(x_adv).detach()
        return z.argmax(1) != y, nn.functional.cross_entropy(z, y, reduction="none")

    (last, loss), (best, loss_best), (many, loss_many) = value(), value(keep="best"), value(restarts=4)
    for fooled, new in ((best, loss_best), (many, loss_many)):
        assert bool((fooled >= last).all())
        same = fooled == last
        assert bool((new[same] >= loss[same]).all())
    assert bool((loss_best > loss).any())


def test_a_gradient_that_is_no_number_leaves_the_image_valid():
    def broken(z):
        s = (z.flatten(1).sum(1) - 1e9).sqrt()
        return torch.stack([s, -s, torch.zeros_like(s)], 1)

    x, y = torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.long)
    for name, norm in CASES:
        if name in ("fgsm", "pgd", "pgd:best", "apgd"):
            x_adv = make(name, norm)(broken, x, y)
            assert bool(((x_adv >= 0) & (x_adv <= 1)).all()), (name, norm)


def test_half_precision_logits_are_compared_in_the_type_of_the_images():
    f, x, y = problem(torch.float32)
    x_adv = PGD(norm="linf", eps=0.05)(lambda z: f(z).bfloat16(), x, y)
    assert x_adv.dtype == torch.float32


def view(x, y):
    return View(x=x, y=one_hot(y, K, x.dtype), key=torch.arange(50, 50 + N), weight=torch.ones(N))


def test_craft_makes_the_view_that_the_attack_makes():
    f, x, y = problem(torch.float64)
    attack = PGD(norm="linf", eps=0.1, steps=3)
    views = {"clean": view(x, y)}
    made = Craft(attack=attack)(f, views, Rng(3))
    assert set(made) == {"clean", "adv"}
    assert made["clean"] is views["clean"]
    expected, _ = attack.run(f, x, one_hot(y, K, x.dtype), Rng(3).at(torch.arange(50, 50 + N)))
    assert torch.equal(made["adv"].x, expected)
    assert not made["adv"].x.requires_grad
    assert made["adv"].y is views["clean"].y
    assert made["adv"].weight is views["clean"].weight
    assert made["adv"].info["grad"].shape == x.shape
    assert set(Craft(attack=attack, on="adv", to="again")(f, made, Rng(3))) == {"clean", "adv", "again"}


def test_craft_towards_the_clean_prediction_climbs_the_divergence_from_it():
    f, x, y = problem(torch.float64)
    attack = PGD(norm="linf", eps=0.1, steps=1, step=0.01, start="normal", loss="kl")
    made = Craft(attack=attack, toward="clean")(f, {"clean": view(x, y)}, Rng(3))
    start = x + 0.001 * Rng(3).at(torch.arange(50, 50 + N)).child("restart", 0).child("start").normal(x.shape[1:], dtype=x.dtype)
    start.requires_grad_()
    p = f(x).softmax(1).detach()
    divergence = (p * (p.log() - f(start).log_softmax(1))).sum()
    (g,) = torch.autograd.grad(divergence, start)
    expected = (start.detach() + 0.01 * g.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    torch.testing.assert_close(made["adv"].x, expected)
    assert torch.equal(made["adv"].y, one_hot(y, K, x.dtype))


# --------------------------------------------------------------------------------------- the official AutoAttack


def reference(**fields):
    return registry.lookup("attack", "autoattack-reference")(norm="linf", eps=0.06, **fields)


def test_the_reference_names_what_it_cannot_do():
    f = nn.Sequential(nn.Flatten(), nn.Linear(128, 3)).eval()
    x, y = torch.rand(4, *SHAPE), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match="'apgd-t' needs at least 4 classes and the classifier has 3"):
        reference()(f, x, y)
    with pytest.raises(ValueError, match="unknown attack 'apgd'"):
        reference(attacks=("apgd",))(f, x, y)
    two = nn.Sequential(nn.Flatten(), nn.Linear(128, 2)).eval()
    with pytest.raises(ValueError, match="'apgd-dlr' needs at least 3 classes and the classifier has 2"):
        reference(version="rand")(two, x, y.clamp(max=1))


def test_the_reference_is_the_reference():
    """Its verdicts are those of a direct call of the package with the same seed."""
    from pyautoattack import AutoAttack

    f, x, y = problem(torch.float32)
    attack = reference(attacks=("apgd-ce", "fab-t"))
    rng = Rng(0).child("attack", attack.name).at(torch.arange(N))
    direct = AutoAttack(f, norm="Linf", eps=0.06, seed=rng.child("pyautoattack").key % 2**31, version="standard")
    direct.attacks_to_run = ["apgd-ce", "fab-t"]
    direct.fab.n_target_classes = K - 1
    with torch.random.fork_rng():
        expected, _ = direct.run_standard_evaluation(x, y)
    torch.testing.assert_close(attack(f, x, y, seed=0), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("version", ["standard", "rand", pytest.param("plus", marks=pytest.mark.slow)])
def test_the_reference_runs_every_version_with_few_classes(version):
    f, x, y = problem(torch.float32)
    x, y = x[:3], y[:3]
    whole, part = reference(version=version)(f, x, y, seed=0), reference(attacks=("apgd-ce",))(f, x, y, seed=0)
    assert float((whole - x).abs().max()) <= 0.06 + 1e-6
    broken = f(whole).argmax(1) != y
    assert bool(broken[f(part).argmax(1) != y].all())
    assert torch.equal(whole[~broken], x[~broken])


def test_the_reference_is_silent_and_its_warnings_are_kept(capfd):
    f, x, y = problem(torch.float32)
    probabilities = lambda z: f(z).softmax(1)  # noqa: E731
    _, info = reference(attacks=("apgd-ce",)).run(probabilities, x, one_hot(y, K), Rng(0).at(torch.arange(N)))
    assert any("probability distribution" in flag for flag in info["flags"])
    assert capfd.readouterr() == ("", "")
