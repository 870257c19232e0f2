"""Foreign attacks under our roof: torchattacks and anybody's function, with the evaluator that trusts neither."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from robustlab import config, geometry
from robustlab.attacks.shield import Shielded, quarantine
from robustlab.evaluation.runner import evaluate
from robustlab.rng import Rng
from robustlab.types import Suite, Threat, UserError, one_hot, walk

N, K, SHAPE = 8, 5, (3, 8, 8)
SEEN = {}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, K)).eval()


@pytest.fixture
def problem():
    f, x = network(), torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(1))
    return f, x, f(x).argmax(1)


def suite_of(*attacks):
    return type("Toy", (Suite,), {"name": "toy"})(attacks=tuple(config.build("attack", a) for a in attacks))


# What users write.


def careless(model, x, y, seed):
    """Everything that a guest should not do: backward, global draws in three libraries, steps out of the ball and the box."""
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    SEEN.update(seed=seed, module=model, labels=y.clone())
    x.requires_grad_()
    nn.functional.cross_entropy(model(x), y).backward()
    x_adv = x + 9 * x.grad.sign()
    x.data.zero_()
    y.zero_()
    return x_adv


def noise(model, x, y, *, eps, scale=1.0):
    return (x + scale * eps * (2 * torch.rand_like(x) - 1) + float(np.random.rand() + random.random()) * 0).clamp(0, 1)


def shapeless(model, x, y):
    return x[:, :1]


def wordless(model, x, y):
    return None


NOT_A_FUNCTION = 3


# ---------------------------------------------------------------------------------------------------------- callables


def test_a_careless_function_is_contained(problem):
    f, x, y = problem
    before = {k: v.clone() for k, v in f.state_dict().items()}
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    attack = config.build("attack", "call:test_bridges:careless", norm="linf", eps=0.05)
    x_before = x.clone()
    x_adv, info = attack.run(f, x, one_hot(y, K), Rng(0).at(torch.arange(N)))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert all(p.grad is None and p.requires_grad for p in f.parameters())
    assert all(torch.equal(v, before[k]) for k, v in f.state_dict().items())
    assert torch.equal(x, x_before)
    assert info["flags"] == [f"call:test_bridges:careless left ball or box for {N} of {N} images; they were projected"]
    g = torch.autograd.grad(nn.functional.cross_entropy(f(x.requires_grad_()), y), x)[0]
    torch.testing.assert_close(x_adv, (x + 0.05 * g.sign()).clamp(0, 1).detach())
    assert torch.equal(SEEN["labels"], y)
    assert list(SEEN["module"].buffers()) == []
    assert [p.numel() for p in SEEN["module"].parameters()] == [0]


def test_the_seed_of_a_function_is_ours(problem):
    f, x, y = problem
    attack = config.build("attack", "call:test_bridges:noise", norm="linf", eps=0.05)
    first, torch_draw = attack(f, x, y, seed=1), torch.rand(1)
    assert torch_draw.numel() == 1
    assert torch.equal(first, attack(f, x, y, seed=1))
    assert not torch.equal(first, attack(f, x, y, seed=2))
    half = config.build("attack", {"name": "call:test_bridges:noise", "options": {"scale": 0.5}}, norm="linf", eps=0.05)
    assert float((half(f, x, y, seed=1) - x).abs().max()) <= 0.025 + 1e-6 < float((first - x).abs().max())


def test_what_a_function_may_not_return(problem):
    f, x, y = problem
    for name, got in (("shapeless", r"got shape \(8, 1, 8, 8\)"), ("wordless", "got a NoneType")):
        with pytest.raises(ValueError, match=f"must return images of shape .*, {got}"):
            config.build("attack", f"call:test_bridges:{name}", norm="linf", eps=0.05)(f, x, y)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("call:test_bridges:nois", r"has no 'nois' \(did you mean 'noise'\?\)"),
        ("call:no_such_module_here:f", "cannot import 'no_such_module_here'"),
        ("call:test_bridges", "arch: 'test_bridges' names no function; write package.module:function"),
        ("call:test_bridges:NOT_A_FUNCTION", "is int, not a function"),
        ({"name": "call:test_bridges:noise", "options": {"scael": 1}}, r"takes no 'scael' \(did you mean 'scale'\?\)"),
        ({"name": "call:test_bridges:noise", "options": 3}, "options: expected a mapping, got 3"),
        ("torchattacks:PDG", r"torchattacks has no 'PDG' \(did you mean 'PGD'\?\); it has APGD, "),
        ({"name": "torchattacks:PGD", "options": {"stesp": 3}}, r"takes no 'stesp' \(did you mean 'steps'\?\); it takes alpha"),
        ({"name": "torchattacks:PGD", "options": {"eps": 3}}, "takes no 'eps'"),
        ({"name": "torchattacks:PGD", "norm": "l2"}, "norm 'l2' is not supported; expected one of linf"),
    ],
)
def test_mistakes_are_one_line(spec, message):
    if "torchattacks" in str(spec):
        pytest.importorskip("torchattacks")
    with pytest.raises(UserError, match=message) as error:
        config.build("attack", spec)
    assert len(error.value.lines) == 1
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- torchattacks


def test_what_fails_inside_is_one_line(problem):
    f, x, y = problem
    with pytest.raises(ValueError, match=r"torchattacks:EADL1 failed: ZeroDivisionError: integer modulo by zero$"):
        build("EADL1", "l1", 3.0, max_iterations=5)(f, x, y)


def build(name, norm, eps=0.05, **options):
    pytest.importorskip("torchattacks")
    return config.build("attack", {"name": f"torchattacks:{name}", "options": options}, norm=norm, eps=eps)


def test_a_bridged_attack_is_the_attack(problem):
    """torchattacks' own PGD, beside it under the same generator: the same images."""
    f, x, y = problem
    bridged = build("PGD", "linf", steps=7)
    import torchattacks

    with quarantine(Rng(3).child("attack", "torchattacks").child("torchattacks").key % 2**31):
        own = torchattacks.PGD(f, eps=0.05, alpha=0.05 / 4, steps=7)(x, y)
    assert torch.equal(bridged(f, x, y, seed=3), geometry.project(own, x, "linf", 0.05))
    fixed = build("PGD", "linf", steps=7, alpha=0.001, random_start=False)
    assert float((fixed(f, x, y) - x).abs().max()) == pytest.approx(0.007, rel=1e-3)


CASES = {
    "linf": "FGSM BIM RFGSM EOTPGD FFGSM TPGD MIFGSM UPGD APGD DIFGSM TIFGSM Jitter NIFGSM PGDRS SINIFGSM VMIFGSM VNIFGSM "
    "SPSA PIFGSM GN PIFGSMPP Square FAB",
    "l2": "CW PGDL2 PGDRSL2 DeepFool APGD Square FAB VANILA",
    "l1": "EADL1",
    "l0": "OnePixel Pixle JSMA SparseFool",
}
OPTIONS = {
    "Square": {"n_queries": 20},
    "PGDRS": {"steps": 2, "noise_batch_size": 2},
    "PGDRSL2": {"steps": 2, "noise_batch_size": 2},
    "EADL1": {"binary_search_steps": 2, "max_iterations": 10},
    "Pixle": {"restarts": 2, "max_iterations": 2, "x_dimensions": [1, 3], "y_dimensions": [1, 3]},
    "JSMA": {"gamma": 0.02},
    "OnePixel": {"steps": 1, "popsize": 4},
    "SPSA": {"nb_sample": 4},
}


@pytest.mark.parametrize(("norm", "name"), [(norm, name) for norm, names in CASES.items() for name in names.split()])
def test_every_attack_runs_and_obeys(problem, norm, name, capfd):
    f, x, y = problem
    eps = {"linf": 0.05, "l2": 0.5, "l1": 3.0, "l0": 3.0}[norm]
    attack = build(name, norm, eps, **OPTIONS.get(name, {}))
    numpy_state = np.random.get_state()[1].copy()
    x_adv = attack(f, x[:4], y[:4], seed=0)
    assert float(geometry.norm_of(x_adv - x[:4], norm).max()) <= eps * (1 + 1e-5)
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    assert torch.equal(attack(f, x[:4], y[:4], seed=0), x_adv)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(p.grad is None and p.requires_grad for p in f.parameters())
    assert capfd.readouterr().out == ""


def test_the_evaluator_counts_and_scores_guests(problem):
    pytest.importorskip("torchattacks")
    f, x, y = problem
    suite = suite_of({"name": "torchattacks:PGD", "options": {"steps": 5}}, "call:test_bridges:careless")
    result = evaluate(f, (x, y), suite, threat=Threat("linf", 0.001))
    row = result.per_attack["torchattacks"]
    assert (row["forwards"], row["backwards"]) == (5 * row["attacked"], 5 * row["attacked"])
    guest = result.per_attack["call"]
    assert (guest["forwards"], guest["backwards"]) == (guest["attacked"], guest["attacked"])
    assert "left ball or box" in guest["flags"][0]
    assert guest["reached"] <= 0.001 * (1 + 1e-5)
    assert all(a.coupled for a in walk(suite.attacks) if hasattr(a, "coupled"))
    assert config.build("suite", config.dump(suite) | {"name": "pgd-20"}).attacks == suite.attacks


def test_a_suite_file_names_guests(tmp_path):
    pytest.importorskip("torchattacks")
    text = "attacks:\n- torchattacks:MIFGSM\n- {name: 'torchattacks:PGD', options: {steps: 3}}\n- call:test_bridges:noise\n"
    (tmp_path / "guests.yaml").write_text(text)
    suite = config.load_suite(str(tmp_path / "guests.yaml"))
    assert [a.arch for a in suite.attacks] == ["MIFGSM", "PGD", "test_bridges:noise"]
    assert suite.attacks[1].options == {"steps": 3}


def test_the_shield_passes_second_calls_and_types():
    f = network().double()
    shielded = Shielded(f, torch.float64, torch.float32, torch.device("cpu"))
    x = torch.rand(2, *SHAPE, requires_grad=True)
    z = shielded(x)
    assert z.dtype == torch.float32
    first = torch.autograd.grad(z[:, 0].sum(), x, retain_graph=True)[0]
    second = torch.autograd.grad(z[:, 1].sum(), x)[0]
    wide = x.detach().double().requires_grad_()
    for k, got in ((0, first), (1, second)):
        expected = torch.autograd.grad(f(wide)[:, k].sum(), wide)[0]
        torch.testing.assert_close(got, expected.float())
