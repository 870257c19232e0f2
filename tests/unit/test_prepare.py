"""The model that attacks search on: the same function, faster; the classifier itself where that is not certain."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from robustlab import config
from robustlab.attacks.apgd import APGD
from robustlab.attacks.square import Square
from robustlab.evaluation import prepare as module
from robustlab.evaluation.copies import graph, packed
from robustlab.evaluation.prepare import Prepared, prepare
from robustlab.evaluation.runner import evaluate
from robustlab.modes import bn_mode, native_bf16
from robustlab.suites.autoattack import AutoAttack
from robustlab.taps import tapped
from robustlab.types import Attack, Suite, Tap, Threat

SHAPE = (3, 16, 16)


def build(name: str, **fields) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        f = config.build("model", name, num_classes=10, **fields).build()
        for m in f.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 2)
                m.weight.data.uniform_(0.5, 2)
                m.bias.data.normal_(0, 0.3)
    return f.eval()


def small(**fields) -> nn.Module:
    return build("small_cnn", in_channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3), **fields)


def images(n: int = 6, shape=SHAPE, seed: int = 1) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def gradient(f, x: Tensor) -> Tensor:
    v = x.clone().requires_grad_()
    return torch.autograd.grad(f(v).float()[:, 0].sum(), v)[0]


def norms(f: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in f.modules())


MODELS = {
    "small_cnn": (small, SHAPE, 0),
    "silu": (lambda: small(activation="silu"), SHAPE, 0),
    "preact_resnet18": (lambda: build("preact_resnet18", in_channels=3, mean=(0.5,) * 3, std=(0.2,) * 3), SHAPE, 9),
    "torchvision:resnet18": (lambda: build("torchvision:resnet18"), (3, 64, 64), 0),
    "timm:resnet18": (lambda: build("timm:resnet18"), (3, 64, 64), 0),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n", [1, 5])
def test_the_copy_computes_the_same(name, n):
    make, shape, left = MODELS[name]
    f, x = make(), images(n, shape)
    before = {k: v.clone() for k, v in f.state_dict().items()}
    g = prepare(f, images(4, shape, seed=9), "fp32")
    assert isinstance(g, Prepared)
    assert norms(g.fast) == left, "the others are folded"
    with torch.no_grad():
        torch.testing.assert_close(g(x), f(x), rtol=1e-4, atol=1e-4 * float(f(x).abs().max()))
    a, b = gradient(g, x), gradient(f, x)
    assert ((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).median() < 1e-2
    assert all(torch.equal(v, before[k]) for k, v in f.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in f.parameters()), "the original is as it was"


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 28, 28)])
def test_gradients_come_through_a_flattening_channels_last(shape):
    """The pooling in front of it gets them in the layout that it computed in; curvature passes too."""
    f = small()
    g, x = prepare(f, images(4, shape)), images(5, shape)
    seen = []
    g.fast.pool.register_full_backward_hook(
        lambda m, into, out: seen.append(out[0].is_contiguous(memory_format=torch.channels_last))
    )
    gradient(g, x)
    assert seen == [True]
    v, products = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)), []
    for h in (build("small_cnn", in_channels=3, activation="silu"), None):
        f = h if h is not None else f
        h = f if h is not None else prepare(f, x).fast
        u = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(h(u).logsumexp(1).sum(), u, create_graph=True)
        products.append(torch.autograd.grad((first * v).sum(), u)[0])
    torch.testing.assert_close(products[1], products[0], rtol=1e-3, atol=1e-3 * float(products[0].abs().max()))


@pytest.mark.parametrize("flatten", ["module", "function", "method", "view"])
def test_every_flattening_is_seen(flatten):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.pool = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AvgPool2d(3)
            self.flatten, self.head = nn.Flatten(), nn.Linear(8 * 16, 10)

        def forward(self, x):
            x = self.pool(torch.relu(self.b(torch.relu(self.a(x)))))
            how = {"module": self.flatten, "function": lambda v: torch.flatten(v, 1), "method": lambda v: v.flatten(1)}
            return self.head(how[flatten](x) if flatten in how else x.view(x.shape[0], -1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        f = Net().eval()
    g = prepare(f, images(4))
    assert isinstance(g, Prepared), "torch refuses to view what is channels last"
    assert sum(n.target is graph.laid_out for n in g.fast.graph.nodes) == 1
    torch.testing.assert_close(gradient(g, images(5)), gradient(f, images(5)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:vit_tiny_patch16_224"])
def test_low_precision_on_foreign_models(name):
    f = build(name)
    x = images(2, (3, 64, 64) if "resnet" in name else (3, 224, 224))
    g = prepare(f, x, "bf16")
    assert isinstance(g, Prepared)
    with torch.no_grad():
        z, low = f(x), g(x)
    assert 0 < (z - low).abs().max() < 0.1 * z.abs().max()


def test_convolutions_are_packed():
    f = small()
    g = prepare(f, images())
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no packed convolutions")
    assert not any(isinstance(m, nn.ReLU | nn.Conv2d) for m in g.fast.modules())
    with torch.no_grad():
        for n in (1, 3, 64):
            torch.testing.assert_close(g(images(n)), f(images(n)), rtol=1e-4, atol=1e-5)


class Function(nn.Module):
    """Two convolutions and something odd between them."""

    def __init__(self, odd):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 10, 3)
        self.odd, self.calls = odd, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.b(self.odd(self, self.norm(self.a(x)))).mean((2, 3))


def blocked(self, x):
    with torch.no_grad():
        return x.relu()


def branch(self, x):
    return x.relu() if x.mean() > -10 else x


ODD = {
    "random": (lambda self, x: x + 0.1 * torch.randn_like(x), False),
    "draws while traced": (lambda self, x: x + torch.randn(1), False),
    "alternating": (lambda self, x: x * (1 + self.calls % 2), False),
    "a detached gradient that tracing does not see": (lambda self, x: 0.1 * x + blocked(self, x), False),
    "quantised": (lambda self, x: (50 * x.relu()).round() / 50, None),
    "gradients decide": (lambda self, x: x.relu() if torch.is_grad_enabled() else x.relu() + 1, False),
    "not a number": (lambda self, x: x / 0, False),
    "control flow": (branch, True),
    "plain": (lambda self, x: x.relu(), True),
}


@pytest.mark.parametrize("name", ODD)
def test_what_cannot_be_trusted_is_used_as_it_is(name):
    odd, prepared = ODD[name]
    f, x = Function(odd).eval(), images()
    state = torch.get_rng_state()
    g = prepare(f, x)
    assert torch.equal(torch.get_rng_state(), state)
    if prepared is not None:
        assert (g is not f) == prepared
    if g is not f:
        assert torch.allclose(g(x), f(x), atol=1e-4)


def test_who_is_never_copied():
    f, x = small(), images()
    double = small().double()
    compiled = torch.compile(small())
    hooked = small()
    hooked.get_submodule("act1").register_forward_hook(lambda m, a, out: out)
    parametrized = small()
    nn.utils.parametrizations.weight_norm(parametrized.get_submodule("conv2"))
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten()))
    plain = lambda x: f(x)  # noqa: E731
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 10))
    for g in (plain, compiled, hooked, parametrized, scripted, linear):
        assert prepare(g, x) is g
    assert prepare(double, x.double()) is double
    assert prepare(f, x[:0]) is f


def test_a_copy_that_raises_is_not_made(monkeypatch):
    f, x = small(), images()
    monkeypatch.setattr(module.copy, "deepcopy", lambda f: 1 / 0)
    assert prepare(f, x) is f


@pytest.mark.parametrize("wrong", ["raises", "forward", "gradient"])
def test_a_packing_that_is_wrong_is_dropped(wrong, monkeypatch):
    f, x = small(), images()
    if wrong == "gradient":
        monkeypatch.setattr(packed.Packed, "adjoint", lambda self, g, shape, own=packed.Packed.adjoint: own(self, g, shape) * 1.1)
    else:
        monkeypatch.setattr(packed.Packed, "forward", lambda self, x: 1 / 0 if wrong == "raises" else self.fused(x, None) * 1.1)
    g = prepare(f, x)
    assert isinstance(g, Prepared)
    assert not any(isinstance(m, packed.Packed) for m in g.fast.modules())
    with torch.no_grad():
        torch.testing.assert_close(g(x), f(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(g, x), gradient(f, x), rtol=1e-3, atol=1e-5)


def test_taps_and_modes_of_the_original_count():
    f, x = small(), images()
    g = prepare(f, x)
    with torch.no_grad():
        plain = f(x)
        with tapped(g, [Tap("act2", lambda out: out * 0)]):
            assert torch.equal(g(x), f(x))
            assert not torch.allclose(g(x), plain)
        with bn_mode(g, "train-noupdate"):
            assert torch.equal(g(x), f(x))
        assert torch.allclose(g(x), plain, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ low precision


def test_float32_first_layers_see_small_perturbations():
    """The gradient's signs at eps = 1/255: a bfloat16 input loses many of them, a float32 first layer few."""
    f = build("preact_resnet18", in_channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    x = (images(96) + (images(96, seed=2) > 0.5).to(torch.float32).mul(2).sub(1) / 255).clamp(0, 1)
    exact = gradient(f, x)

    def plain(x):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return f(x)

    def agreement(g):
        return float((gradient(g, x).sign() == exact.sign()).float().mean())

    good, bad = agreement(prepare(f, x, "bf16")), agreement(plain)
    assert good > bad
    assert good > 0.9
    moved = (x + 0.9 / 512).clamp(0, 1)  # less than one step of bfloat16
    with torch.no_grad():
        true, low, cast = f(moved) - f(x), prepare(f, x, "bf16")(moved) - prepare(f, x, "bf16")(x), plain(moved) - plain(x)
    assert (low - true).norm() < (cast - true).norm()


class Coarse(nn.Module):
    """Class 0 where the mean is above 0.51. In bfloat16 values above 4 have steps of 1/32: means below 0.5156 count as 0.5."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1), nn.Linear(16, 2)
        with torch.no_grad():
            self.first.weight.fill_(1.0)
            self.inner.weight.fill_(1.0)
            self.inner.bias.fill_(4.0)
            self.last.weight.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 16) / 16)
            self.last.bias.copy_(torch.tensor([-4.51, 4.51]))

    def forward(self, x):
        return self.last(self.inner(self.first(x)).flatten(1))


@dataclass(frozen=True)
class Climb(Attack):
    """Darkens by 0.05 at a time until what it is given is fooled."""

    name, norms = "climb", ("linf",)
    norm: str | None = None
    eps: float | None = None
    speculate: bool = False
    lookahead: int | None = None
    told: ClassVar[list[tuple[int, bool, int | None]]] = []

    def run(self, f, x, y, rng):
        self.told.append((len(x), self.speculate, self.lookahead))
        out = x.clone()
        for k in range(1, 5):
            with torch.no_grad():
                left = f(out).argmax(1) == y.argmax(1)
            out = torch.where(left.view(-1, 1, 1, 1), x - k * 0.05, out)
        return out, {}


def test_a_false_success_saves_no_sample(tmp_path, monkeypatch):
    level = torch.tensor([0.9, 0.85, 0.95, 0.9, 0.613, 0.8, 0.613])  # 0.613 - 0.1 = 0.513: above the threshold, but not in bfloat16
    x, y = level.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(), torch.zeros(7, dtype=torch.long)
    suite, threat = Suite(attacks=(Climb(),)), Threat("linf", 0.2)
    f = Coarse()
    assert isinstance(prepare(f, x, "bf16"), Prepared)
    high = evaluate(f, (x, y), suite, threat=threat)
    Climb.told.clear()
    low = evaluate(f, (x, y), suite, threat=threat, precision="bf16", out=tmp_path)
    assert Climb.told == [(7, False, None), (2, True, None)], "few are searched again, and the attack is told so"
    assert high.robust.tolist() == low.robust.tolist() == [True] * 4 + [False, True, False]
    line = json.loads((tmp_path / "ledger.jsonl").read_text().splitlines()[-1])
    assert line["unverified"] == 2
    assert line["forwards"] == 7 * 4 + 2 * 4 + 7, "both runs, and a look at what float32 calls robust"
    monkeypatch.setattr(
        "robustlab.evaluation.search.Search._false_successes", lambda self, f, c, x, y, z: (torch.zeros(0).long(),) * 2
    )
    blind = evaluate(f, (x, y), suite, threat=threat, precision="bf16")
    assert bool(blind.robust[4]), "without the second run the sample would pass for robust"


def test_few_samples_fill_a_pass_in_bfloat16_with_several_proposals_each():
    level = torch.tensor([0.9, 0.85, 0.95, 0.9, 0.8, 0.8, 0.9])
    x, y = level.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(), torch.zeros(7, dtype=torch.long)
    for n, attack, precision, told in (
        *((7, Climb(), "bf16", (False, None)), (6, Climb(), "bf16", (True, 2)), (1, Climb(), "bf16", (True, 12))),
        *((1, Climb(), "fp32", (False, None)), (3, Climb(speculate=True, lookahead=16), "bf16", (True, 16))),
    ):
        Climb.told.clear()
        evaluate(Coarse(), (x[:n], y[:n]), Suite(attacks=(attack,)), threat=Threat("linf", 0.2), precision=precision)
        assert Climb.told == [(n, *told)]


def test_autoattack_searched_in_bfloat16_gives_the_verdicts_of_float32():
    f, x = small(), images(12)
    y = f(x).argmax(1)
    suite = AutoAttack(attacks=(APGD(steps=10), Square(queries=50)))
    high, low = (evaluate(f, (x, y), suite, threat=Threat("linf", 2 / 255), precision=p) for p in ("fp32", "bf16"))
    assert 0 < high.robust_accuracy < 1
    assert int((high.robust != low.robust).sum()) <= 1


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bfloat16_where_the_hardware_has_it(native, monkeypatch):
    monkeypatch.setattr("robustlab.evaluation.runner.native_bf16", lambda device: native)
    f, x = small(), images(4)
    result = evaluate(f, (x, f(x).argmax(1)), Suite(attacks=(APGD(steps=2),)), threat=Threat("linf", 0.01), precision="auto")
    assert result.precision == ("bf16" if native else "fp32")


def test_what_the_hardware_has_is_what_torch_finds(monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        for other in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            monkeypatch.setattr(torch.cpu, other, lambda found=other == name: found, raising=False)
        assert native_bf16(torch.device("cpu"))
        monkeypatch.delattr(torch.cpu, name)
        assert not native_bf16(torch.device("cpu"))
        monkeypatch.undo()
    assert not native_bf16(torch.device("meta"))
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert native_bf16(torch.device("cuda")) == expected
