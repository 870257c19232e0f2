"""Single-step trainers and MART beside the authors' code: small vectors of what it gave (scripts/make_golden_single_step.py).

The files in tests/golden name repository and commit. Same net, images and noise (tests/reference/public.py); double precision.
"""

import json
from pathlib import Path

import public
import pytest
import torch

from robustlab import config
from robustlab.modes import bn_mode, frozen
from robustlab.outer import Outer, context_of
from robustlab.rng import Rng
from robustlab.training.step import train_step
from robustlab.types import Threat, View, one_hot, with_threat

GOLDEN = Path(__file__).parents[1] / "golden"
CLOSE = {"rtol": 1e-5, "atol": 1e-7}
THREAT = Threat("linf", public.EPS)


def golden(name):
    values = json.loads((GOLDEN / f"{name}.json").read_text())
    assert len(values["commit"]) == 40
    return values


def tensor(values, like):
    return torch.tensor(values, dtype=torch.float64).view_as(like)


def view(batch=0, reach=0.5):
    x, y = public.images(batch, reach)
    return View(x=x, y=one_hot(y, public.CLASSES, torch.float64), key=torch.arange(public.BATCH) + batch * public.BATCH)


def whole(shape, call):
    return public.unit(shape, call)


def by_channel(shape, call):
    """The programs draw one channel after the other."""
    return torch.stack([public.unit((shape[0], *shape[2:]), 2 * call + c) for c in range(2)], 1)


@pytest.fixture
def noise(monkeypatch):
    """Robustlab's draws become the closed forms that the programs were given."""

    def install(unit=whole):
        calls = [0]

        def uniform(self, shape, low=0.0, high=1.0, dtype=torch.float32):
            calls[0] += 1
            return (low + (high - low) * unit((len(self.tickets), *shape), calls[0] - 1)).to(dtype)

        monkeypatch.setattr(Rng, "uniform", uniform)
        monkeypatch.setattr(Rng, "normal", lambda self, shape, dtype: public.normal((len(self.tickets), *shape)).to(dtype))

    return install


def trained(name, batches, replays=1, reach=0.5):
    f, trainer = public.net(), with_threat(config.build("trainer", name), THREAT)
    context = context_of(f, public.CLASSES, 12, public.SHAPE, batch_size=public.BATCH)
    outer = Outer(f, trainer, context)
    optimizer = torch.optim.SGD(f.parameters(), lr=public.LR, momentum=public.MU, weight_decay=public.DECAY)
    for b in range(batches):
        for _ in range(replays):
            train_step(outer, [{"clean": view(b, reach)}], trainer, optimizer, Rng(0), first=b)
    return f


def assert_weights(f, values):
    start = dict(public.net().named_parameters())
    for name, p in f.named_parameters():
        assert float((p - start[name]).abs().max()) > 1e-3
        torch.testing.assert_close(p.detach(), tensor(values["weights"][name], p), **CLOSE)


def test_fast_at_trains_to_the_weights_of_the_public_program(noise):
    noise(by_channel)
    assert_weights(trained("fast-at", 3), golden("fast_at"))


def test_n_fgsm_trains_to_the_weights_of_the_public_program(noise):
    noise(by_channel)
    assert_weights(trained("n-fgsm", 3), golden("n_fgsm"))


def test_gradalign_trains_to_the_weights_of_the_public_program(noise):
    noise()
    assert_weights(trained("gradalign", 3), golden("gradalign"))


def test_free_at_trains_to_the_weights_of_the_public_program():
    """On images away from black and white: where x + d leaves the pixel range, theirs goes along on the first pass."""
    assert_weights(trained("free-at", 2, replays=4, reach=0.4), golden("free_at"))


def test_rice_at_finds_the_perturbation_of_the_public_program(noise):
    noise()
    f, trainer = public.net(), with_threat(config.build("trainer", "rice-at"), THREAT)
    with frozen(f), bn_mode(f, trainer.attack_bn):
        adv = trainer.inner[0](f, {"clean": view()}, Rng(0))["adv"]
    torch.testing.assert_close(adv.x - view().x, tensor(golden("rice_at")["delta"], adv.x), **CLOSE)


def loss_and_gradient(name, inner):
    """Of one batch, as the trainer sees it; and the adversarial view."""
    f, trainer = public.net(), with_threat(config.build("trainer", name, inner=inner), THREAT)
    with frozen(f), bn_mode(f, trainer.attack_bn):
        views = trainer.inner[0](f, {"clean": view()}, Rng(0))
    outer = Outer(f, trainer, context_of(f, public.CLASSES, 12, public.SHAPE)).train()
    loss, _ = outer.loss((views, Rng(0)), stats=True, sync=False)
    grads = torch.autograd.grad(loss, list(f.parameters()))
    return loss, dict(zip(dict(f.named_parameters()), grads, strict=True)), views["adv"]


def assert_gradient(grads, loss, values):
    assert float(loss.detach()) == pytest.approx(values["loss"], rel=1e-5)
    for name, g in grads.items():
        torch.testing.assert_close(g, tensor(values["gradient"][name], g), **CLOSE)


def test_mart_has_the_loss_and_gradient_of_the_public_code(noise):
    noise()
    attack = {"name": "pgd", "steps": 10, "step": 0.007, "start": "normal"}
    loss, grads, _ = loss_and_gradient("mart", [{"name": "craft", "attack": attack}])
    assert_gradient(grads, loss, golden("mart"))


def test_backward_smoothing_has_the_start_loss_and_gradient_of_the_public_code(noise):
    noise()
    values = golden("backward_smoothing")
    loss, grads, adv = loss_and_gradient("backward-smoothing", ["backward-smoothing"])
    torch.testing.assert_close(adv.info["start"], tensor(values["start"], adv.x), **CLOSE)
    assert float((adv.info["start"] - view().x).abs().max()) > 0.9 * public.EPS
    assert_gradient(grads, loss, values)
