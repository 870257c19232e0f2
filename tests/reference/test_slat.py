"""SLAT: latent gradients against finite differences, the perturbed forward written out, layers of many nets, no traces."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustlab import config
from robustlab.attacks.fgsm import FGSM
from robustlab.latent.slat import SLAT, adding, gradients
from robustlab.models import create_model
from robustlab.outer import Outer, Precise, context_of
from robustlab.rng import Rng
from robustlab.taps import layer_names, tapped
from robustlab.training.step import train_step
from robustlab.types import Tap, Threat, UserError, View, one_hot, with_threat

N, K = 5, 4


class Small(nn.Module):
    """A net that works in place, and whose last layers see tokens and a vector."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(inplace=True))
        self.mix, self.hidden, self.fc = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, K)

    def forward(self, x):
        h = self.block(self.act(self.bn(self.conv(x))))
        return self.fc(torch.tanh(self.hidden(torch.tanh(self.mix(h.flatten(2).mT)).mean(1))))


SITES = ("conv", "bn", "block", "mix", "hidden", "features")


@pytest.fixture
def f():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        f = Small()
        f(torch.rand(32, 1, 7, 7))
        return f.double().eval()


@pytest.fixture
def view():
    return images((1, 7, 7), torch.float64)


def images(shape, dtype=torch.float32, n=N, k=K):
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return View(x=x, y=one_hot(torch.arange(n) % k, k, dtype), key=torch.arange(n), index=torch.arange(n), weight=torch.ones(n))


def value(f, view):
    with torch.no_grad(), tapped(f, view.taps):
        return F.cross_entropy(f(view.x).to(view.x.dtype), view.y, reduction="none")


def hooks(f):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in f.modules())


def crafted(f, view, **fields):
    fields = {"norm": "linf", "eps": 0.1, "eta": 0.1, **fields}
    return SLAT(**fields)(f, {"clean": view}, Rng(0).at(view.key))["adv"]


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("site", SITES)
def test_latent_gradients_are_finite_differences(site, f, view):
    g, latent = gradients(f, view, SITES)
    assert list(latent) == list(SITES)
    torch.manual_seed(0)
    for _ in range(4):
        v = torch.randn_like(latent[site])
        up, down = (value(f, dataclasses.replace(view, taps=(Tap(site, lambda h, s=s, v=v: h + s * v),))) for s in (1e-5, -1e-5))
        torch.testing.assert_close((up - down) / 2e-5, (latent[site] * v).flatten(1).sum(1), atol=1e-8, rtol=1e-5)
    w = torch.randn_like(g)
    up, down = (value(f, dataclasses.replace(view, x=view.x + s * w)) for s in (1e-5, -1e-5))
    torch.testing.assert_close((up - down) / 2e-5, (g * w).flatten(1).sum(1), atol=1e-8, rtol=1e-5)


def test_one_forward_and_one_backward(f, view):
    calls = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = f

        def forward(self, x):
            calls.append("forward")
            z = self.net(x)
            if z.requires_grad:
                z.register_hook(lambda g: calls.append("backward"))
            return z

    crafted(Watched(), view, sites=("conv", "net.block"))
    assert calls == ["forward", "backward"]


# ------------------------------------------------------------------------------------------------- the perturbed forward


def test_the_perturbed_forward_written_out(f, view):
    """The image and two layers at once; the second layer's range is that of what the first one's perturbation made."""
    adv = crafted(f, view, sites=("conv", "block"), eps=0.05, eta=0.02, latent_alpha=0.6)
    x = view.x.clone().requires_grad_()
    h1 = f.conv(x)
    h2 = f.block[1](f.block[0](F.relu(f.bn(h1))))
    tail = lambda h: f.fc(torch.tanh(f.hidden(torch.tanh(f.mix(h.flatten(2).mT)).mean(1))))  # noqa: E731
    g0, g1, g2 = torch.autograd.grad(F.cross_entropy(tail(h2), view.y), [x, h1, h2])

    x_adv = (view.x + 0.9 * 0.05 * g0.sign()).clamp(0, 1)
    torch.testing.assert_close(adv.x, x_adv)
    assert not adv.x.requires_grad

    def moved(h, g):
        out = torch.empty_like(h)
        for i in range(h.shape[0]):
            for c in range(h.shape[1]):
                out[i, c] = (h[i, c] + 0.6 * 0.02 * g[i, c].sign()).clamp(h[i, c].min(), h[i, c].max())
        return out

    with torch.no_grad():
        h1 = moved(f.conv(x_adv), g1)
        z = tail(moved(f.block[1](f.block[0](F.relu(f.bn(h1)))), g2))
        with tapped(f, adv.taps):
            torch.testing.assert_close(f(adv.x), z)
            torch.testing.assert_close(f(adv.x), z)  # again, as under AWP
    assert (z - f(x_adv)).abs().max().item() > 1e-4


def test_steps_beyond_the_radius_are_cut(f, view):
    one = crafted(f, view, sites=("conv",), alpha=1.0, latent_alpha=1.0)
    cut = crafted(f, view, sites=("conv",), alpha=7.0, latent_alpha=1.8)
    assert torch.equal(one.x, cut.x)
    assert torch.equal(value(f, one), value(f, cut))


@pytest.mark.parametrize(
    ("shape", "dims"), [((3, 4, 5, 5), (2, 3)), ((3, 6, 4), (1,)), ((3, 7), (1,)), ((3, 2, 2, 3, 3), (2, 3, 4))]
)
def test_the_range_is_that_of_each_sample_s_channel(shape, dims):
    h = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    delta = 0.8 * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).sign()
    low, high = h.amin(dims, keepdim=True), h.amax(dims, keepdim=True)
    expected = torch.where(h + delta > high, high, torch.where(h + delta < low, low, h + delta))
    assert bool((expected == high).any() & (expected == h + delta).any())
    torch.testing.assert_close(adding(delta)(h), expected)
    h.requires_grad_()
    (g,) = torch.autograd.grad(adding(delta)(h).sum(), h)
    assert torch.equal(g, torch.ones_like(h))  # a constant, also where it is cut


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_no_sites_is_fgsm(norm, f, view):
    plain = crafted(f, view, norm=norm, eps=0.2, alpha=1.0)
    assert torch.equal(plain.x, FGSM(norm=norm, eps=0.2)(f, view.x, view.y))
    assert plain.taps == ()
    assert (plain.y is view.y) & (plain.key is view.key) & (plain.weight is view.weight)


def test_a_radius_of_zero_changes_nothing(f, view):
    still = crafted(f, view, eps=0.0, eta=0.0, sites=SITES)
    assert torch.equal(still.x, view.x)
    torch.testing.assert_close(value(f, still), value(f, view), atol=1e-12, rtol=0)


def test_taps_that_a_view_already_has_stay_and_are_part_of_the_loss(f, view):
    noisy = dataclasses.replace(view, taps=(Tap("conv", lambda h: 3 * h + 1),))
    adv = crafted(f, noisy, sites=("block",))
    assert adv.taps[:1] == noisy.taps
    assert len(adv.taps) == 2
    g, _ = gradients(f, noisy, ("block",))
    assert not torch.allclose(g, gradients(f, view, ("block",))[0])
    assert torch.equal(adv.info["grad"], g)


# ------------------------------------------------------------------------------------------------------- real networks

NETS = {
    "small_cnn": (lambda: create_model("small_cnn", num_classes=K, width=8), (3, 16, 16), ("conv1", "act2", "fc")),
    "preact_resnet18": (lambda: create_model("preact_resnet18", num_classes=K), (3, 8, 8), ("conv1", "layer1.0", "layer2")),
    "timm resnet": (lambda: create_model("timm:resnet10t", num_classes=K, fit=False), (3, 32, 32), ("layer1.0.bn1", "net.layer2")),
    "timm vit": (lambda: vit(), (3, 16, 16), ("patch_embed", "blocks.0.attn.proj", "blocks.1", "features")),
}


def vit():
    import timm

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=K, **sizes)


@pytest.mark.parametrize("name", NETS)
def test_it_raises_the_loss_of_networks_by_the_names_of_their_layers(name):
    make, shape, sites = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        f = make().eval()
    view = images(shape)
    image = crafted(f, view, eps=0.01)
    adv = crafted(f, view, eps=0.01, eta=0.02, sites=sites)
    assert torch.equal(image.x, adv.x)
    assert [t.site for t in adv.taps] == list(sites)
    assert float(value(f, adv).mean()) > float(value(f, image).mean()) > float(value(f, view).mean())
    assert hooks(f) == 0
    with pytest.raises(UserError, match=r"no layer 'blocks.9'.*layers: ") as error:
        crafted(f, view, sites=("blocks.9",))
    assert str(error.value).endswith("layers: " + ", ".join(layer_names(f)))
    assert hooks(f) == 0


def test_what_cannot_be_perturbed_is_named(f, view):
    with pytest.raises(UserError, match=r"no layer 'convv' \(did you mean 'conv'\?\); layers: conv, bn, act, block, block.0"):
        crafted(f, view, sites=("convv",))
    with pytest.raises(ValueError, match="the image is perturbed anyway"):
        SLAT(sites=("input",))
    with pytest.raises(ValueError, match="stands twice in sites: conv, conv"):
        SLAT(sites=("conv", "conv"))
    with pytest.raises(ValueError, match="give norm and eps"):
        SLAT()(f, {"clean": view}, Rng(0))
    with pytest.raises(UserError, match=r"'layer1.0.relu' runs 2 times"):
        crafted(create_model("preact_resnet18", num_classes=K).eval(), images((3, 8, 8)), sites=("layer1.0.relu",))
    f.spare = nn.Linear(2, 2)
    with pytest.raises(UserError, match="'spare' runs 0 times"):
        crafted(f, view, sites=("spare",))
    pair = nn.Sequential(nn.Flatten(), Pair(), First())
    with pytest.raises(UserError, match="the layer '1' returns a tuple, not a tensor"):
        crafted(pair, images((1, 2, 2)), sites=("1",))
    with pytest.raises(UserError, match="plain callable"):
        crafted(lambda x: f(x), view, sites=("conv",))
    assert hooks(f) == hooks(pair) == 0


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class First(nn.Module):
    def forward(self, pair):
        return pair[0]


def test_taps_are_gone_after_an_exception(f, view):
    class Stop(Exception):
        pass

    def refuse(*args):
        raise Stop

    handle = f.mix.register_forward_pre_hook(refuse)
    with pytest.raises(Stop):
        crafted(f, view, sites=("conv", "block"))
    handle.remove()
    assert hooks(f) == 0
    adv = crafted(f, view, sites=("conv", "block"))
    handle = f.fc.register_forward_hook(refuse)
    with pytest.raises(Stop), tapped(f, adv.taps):
        f(adv.x)
    handle.remove()
    assert hooks(f) == 0


def test_leaves_no_gradients_and_no_modes(f, view):
    flags = [m.training for m in f.modules()]
    crafted(f, view, sites=SITES)
    assert all(p.grad is None and p.requires_grad for p in f.parameters())
    assert view.x.grad is None
    assert [m.training for m in f.modules()] == flags


def test_a_sample_does_not_depend_on_its_batch(f, view):
    whole = value(f, crafted(f, view, sites=SITES))
    for i in range(N):
        one = View(x=view.x[i : i + 1], y=view.y[i : i + 1], key=view.key[i : i + 1])
        torch.testing.assert_close(value(f, crafted(f, one, sites=SITES)), whole[i : i + 1], atol=1e-12, rtol=0)


def test_under_bfloat16_layers_are_perturbed_in_float32():
    f = create_model("small_cnn", num_classes=K, width=8).eval()
    view, seen = images((3, 16, 16)), []
    precise = Precise(f, "bf16")
    adv = crafted(precise, view, sites=("conv1",), eps=0.0, eta=1e-3)
    inner = adv.taps[0].fn
    watch = Tap("conv1", lambda h: (seen.append((h, inner(h))), h)[1])
    with torch.no_grad(), tapped(precise, (watch,)):
        precise(view.x)
    before, after = seen[0]
    assert before.dtype == after.dtype == torch.float32
    change = (after - before).abs()
    assert float((change > 0.9e-3).double().mean()) > 0.2  # the rest has no gradient (ReLU), or is at the end of its range
    assert float(change.max()) < 1.01e-3
    assert float(value(precise, adv).mean()) > float(value(precise, view).mean())


# ---------------------------------------------------------------------------------------------------------- in training


def test_training_with_it():
    """The step trains on the perturbed forward, twice under AWP; afterwards the model is bare."""
    inner = [{"name": "slat", "sites": ["conv1", "conv2"], "eta": 0.05}]
    method = with_threat(config.build("trainer", "pgd-at", inner=inner), Threat("linf", 0.05))
    assert method.inner[0] == SLAT(sites=("conv1", "conv2"), eta=0.05, norm="linf", eps=0.05)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        f = create_model("small_cnn", num_classes=K, in_channels=1, width=8)
    reference = create_model("small_cnn", num_classes=K, in_channels=1, width=8)
    reference.load_state_dict(f.state_dict())
    view = images((1, 16, 16), n=16)
    outer = Outer(f, method, context_of(f, K, 16, (1, 16, 16)))
    optimizer = torch.optim.SGD(f.parameters(), lr=0.1)
    terms = train_step(outer, [{"clean": view}], method, optimizer, Rng(0))
    assert hooks(f) == 0

    reference.train()
    adv = crafted(reference, view, sites=("conv1", "conv2"), eta=0.05, eps=0.05)
    with tapped(reference, adv.taps):
        loss = F.cross_entropy(reference(adv.x), view.y)
    loss.backward()
    torch.testing.assert_close(terms["loss"], loss.detach())
    for p, q in zip(f.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad)
