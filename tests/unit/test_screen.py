"""The screen: what nearness is, what it costs, masked gradients, and the suites that it leads, in every norm."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from robustlab import config
from robustlab.attacks.screen import Screen
from robustlab.evaluation.runner import evaluate
from robustlab.rng import Rng
from robustlab.types import Threat, one_hot


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.4), ("l1", 1.5)])
@pytest.mark.parametrize(("classes", "channels"), [(2, 1), (3, 2), (12, 1)])
def test_every_suite_runs_in_every_norm_with_few_and_many_classes(norm, eps, classes, channels):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        f = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 4 * 3, classes)).eval()
    x = torch.rand(6, channels, 6, 5, generator=torch.Generator().manual_seed(0))
    y = f(x).argmax(1)
    results = {}
    for name in ("screen", "autoattack-quick", "autoattack-fast"):
        suite = config.build("suite", name)
        budgets = {"steps": 3, "queries": 20}
        cut = [dataclasses.replace(a, **{k: v for k, v in budgets.items() if hasattr(a, k)}) for a in suite.attacks]
        results[name] = evaluate(
            f, (x, y), dataclasses.replace(suite, attacks=tuple(cut)), threat=Threat(norm, eps), audit=0, batch_size=4
        )
    alone, quick, fast = (r.robust for r in results.values())
    assert bool((fast <= quick).all())
    assert bool((quick <= alone).all())
    assert results["autoattack-fast"].audit["suite"] == "autoattack"


# --------------------------------------------------------------------------------------------------------------- nearness


def run_screen(f, x, y, norm="linf", eps=0.05, **fields):
    attack = Screen(norm=norm, eps=eps, **fields)
    return attack.run(f, x, one_hot(y, f(x[:1]).shape[1], x.dtype), Rng(0).at(torch.arange(len(x))))


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", torch.inf)])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_nearness_is_the_distance_beyond_the_ball_in_radii_whatever_the_scale_of_the_logits(norm, dual, scale):
    """Two linear classes, far from the box: the distance from the best point of the ball is that from its centre minus eps."""
    w = torch.randn(1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = 0.5 + 0.1 * torch.rand(20, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slope = (w * (x - 0.55)).flatten(1).sum(1)
    f = lambda z: scale * torch.stack([0 * slope[: len(z)], (w * (z - 0.55)).flatten(1).sum(1)], 1)  # noqa: E731
    y = (slope > 0).long()
    distance = slope.abs() / torch.linalg.vector_norm(w, dual)
    eps = float(distance.sort().values[7:9].mean())
    x_adv, info = run_screen(f, x, y, norm, eps)
    broken = distance < eps
    assert 0 < int(broken.sum()) < 20
    assert torch.equal(f(x_adv).argmax(1) != y, broken)
    expected = torch.where(broken, 0.0, (distance - eps) / eps)
    torch.testing.assert_close(info["nearness"], expected, atol={"linf": 1e-9, "l2": 2e-2, "l1": 1e-1}[norm], rtol=1e-2)


def test_the_screen_counts_its_passes():
    f = nn.Sequential(nn.Flatten(), nn.Linear(16, 10)).eval()
    with torch.no_grad():
        f[1].bias.zero_()[0] += 50
    calls = []
    counted = lambda z: calls.append(len(z)) or f(z)  # noqa: E731
    _, info = run_screen(counted, torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.long), eps=1e-3)
    assert info["passes"].tolist() == [[211, 219]] * 3
    assert sum(calls) == 1 + 3 * 211  # one to learn the number of classes


class Quantised(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f[2:]((self.f[:2](x) * 4).round() / 4)


class Scaled(nn.Module):
    def __init__(self, f, factor):
        super().__init__()
        self.f, self.factor = f, factor

    def forward(self, x):
        return self.factor * self.f(x)


class Saturated(nn.Module):
    """A hidden sigmoid far out: gradients nearly, not exactly, zero; the decision is the same."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        z = self.f(x)
        return (400 * (z - z.mean(1, keepdim=True))).sigmoid()


@pytest.fixture(scope="module")
def robust_net():
    """Prototypes of images that differ by much more than the radius, and images near them."""
    centre = (torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    f = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 4)).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in (f[1], f[3]):
            layer.reset_parameters()
        optimizer = torch.optim.Adam(f.parameters(), 0.01)
        for _ in range(200):
            y = torch.randint(4, (64,))
            x = (centre[y] * 0.6 + 0.2 + 0.2 * torch.randn(64, 1, 6, 6)).clamp(0, 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(f(x), y).backward()
            optimizer.step()
    y = torch.arange(24) % 4
    noise = torch.rand(24, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    x = (centre[y] * 0.6 + 0.2 + 0.3 * (noise - 0.5)).clamp(0, 1)
    return f, x, y


@pytest.mark.parametrize("mask", [lambda f: Scaled(f, 1e3), Quantised, Saturated], ids=["scaled", "quantised", "saturated"])
def test_masked_gradients_send_every_survivor_on(robust_net, mask):
    f, x, y = robust_net
    attacks = [{"name": "screen", "steps": 10}, {"name": "pgd", "steps": 20, "keep": "best"}]
    suite = config.build("suite", {"name": "autoattack-fast", "exact": "pgd-20", "attacks": attacks, "audit": 0})
    honest = evaluate(f, (x, y), suite, threat=Threat("linf", 0.05))
    assert honest.per_attack["pgd"]["attacked"] < 4
    assert int(honest.robust.sum()) > 16
    masked = evaluate(mask(f).eval(), (x, y), suite, threat=Threat("linf", 0.05))
    survivors = masked.per_attack["screen"]["attacked"] - masked.per_attack["screen"]["broken"]
    assert masked.per_attack["pgd"]["attacked"] == survivors > 16
    assert masked.audit["survivors"] == 0


def test_gradients_that_are_no_numbers_send_every_survivor_on():
    def broken(z):
        s = z.flatten(1).sum(1)
        return torch.stack([3 + (0 * s).sqrt(), s / 100], 1)  # the root's slope at zero is infinite

    x = torch.rand(5, 1, 4, 4)
    _, info = run_screen(broken, x, torch.zeros(5, dtype=torch.long), steps=3)
    assert not bool(info["nearness"].isfinite().any())
