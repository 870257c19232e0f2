"""The measuring functions of ``scripts/effects_digits.py`` against closed forms, and its rows without a run."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from robustlab import losses
from robustlab.attacks.backward_smoothing import BackwardSmoothing
from robustlab.rng import Rng
from robustlab.types import View, one_hot
from scripts import effects_digits as effects

torch_double = torch.float64


def flat(*rows):
    """A linear classifier of images (1, 1, D) with the given rows as weights."""
    w = torch.tensor(rows, dtype=torch_double)
    f = nn.Sequential(nn.Flatten(), nn.Linear(w.shape[1], len(w), bias=False)).double()
    with torch.no_grad():
        f[1].weight.copy_(w)
    return f.eval()


def test_the_rise_of_a_linear_loss():
    """sum_l <a_l, w_l> rises by gamma sum_l ||w_l|| ||a_l||; the weights come back bit for bit."""
    a = [torch.randn(3, 2, dtype=torch_double), torch.randn(5, 1, dtype=torch_double)]
    w = [torch.randn_like(v).requires_grad_() for v in a]
    before = [v.detach().clone() for v in w]
    found = effects.loss_rise(lambda: sum((p * v).sum() for p, v in zip(a, w, strict=True)), w, 0.3)
    assert found == pytest.approx(0.3 * sum(float(v.norm() * p.norm()) for p, v in zip(a, before, strict=True)), rel=1e-9)
    assert all(torch.equal(v, old) for v, old in zip(w, before, strict=True))


def test_the_rise_of_a_quadratic_needs_its_steps():
    """1/2 w' diag(1, 9) w around (1, 0.1): the maximum over the circle, to 1 %; a single step stays well below it."""
    w, scale, gamma = torch.tensor([[1.0, 0.1]], dtype=torch_double, requires_grad=True), torch.tensor([1.0, 9.0]), 0.5
    angle = torch.linspace(0, 2 * math.pi, 100_001, dtype=torch_double)
    circle = w.detach() + gamma * w.detach().norm() * torch.stack([angle.cos(), angle.sin()], 1)
    most = float(((circle**2 - w.detach() ** 2) @ scale.double()).max()) / 2
    one, many = (effects.loss_rise(lambda: (scale * w**2).sum() / 2, [w], gamma, steps) for steps in (1, 20))
    assert one < 0.95 * most
    assert 0.99 * most < many <= most * (1 + 1e-6)


def test_no_radius_no_rise():
    w = torch.ones(2, 2, dtype=torch_double, requires_grad=True)
    assert effects.loss_rise(lambda: w.square().sum(), [w], 0.0) == 0.0


def test_gradients_of_two_linear_classes_are_aligned():
    """p_y - 1 times one fixed vector wherever it is taken; with three classes the gradients turn."""
    x, y = torch.rand(7, 1, 1, 2, dtype=torch_double), torch.arange(7) % 2
    eta = torch.rand(7, 1, 1, 2, dtype=torch_double) - 0.5
    two, three = flat([1.0, 2.0], [-1.0, 0.5]), flat([1.0, 2.0], [-1.0, 0.5], [3.0, -2.0])
    assert effects.gradient_cosine(two, x, one_hot(y, 2, x.dtype), eta) == pytest.approx(1, abs=1e-12)
    assert effects.gradient_cosine(three, x, one_hot(y, 3, x.dtype), eta) < 1 - 1e-6
    assert effects.gradient_cosine(three, x, one_hot(y, 3, x.dtype), 0 * eta) == pytest.approx(1, abs=1e-12)


def test_divergence_of_a_chosen_start():
    """z = (<a, x>, -<a, x>): the start moves s = 2 <a, x> by -+ 2 eps ||a||_1, and the divergence is that of two Bernoullis."""
    a, eps = torch.tensor([1.5, -2.0], dtype=torch_double), 0.1
    f = flat(a.tolist(), (-a).tolist())
    x = 0.3 + 0.4 * torch.rand(9, 1, 1, 2, dtype=torch_double)  # no pixel meets the border
    view = View(x=x, y=one_hot(torch.zeros(9, dtype=torch.int64), 2, x.dtype), key=torch.arange(9))
    start = BackwardSmoothing(norm="linf", eps=eps)(f, {"clean": view}, Rng(0))["adv"].info["start"]
    s, want = 2 * x.flatten(1) @ a, []
    moved = 2 * start.flatten(1) @ a
    assert (moved - s).abs().sub(2 * eps * float(a.abs().sum())).abs().max() < 1e-9
    for p, q in zip(s.sigmoid().tolist(), moved.sigmoid().tolist(), strict=True):
        want.append(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert effects.divergence(f, x, start) == pytest.approx(sum(want) / 9, rel=1e-9)
    assert effects.divergence(f, x, x) == pytest.approx(0, abs=1e-12)


def test_lengths_of_the_gradients_of_a_linear_model():
    """||(p - y) x'|| = ||p - y|| ||x||."""
    f, x = flat([1.0, 2.0], [-1.0, 0.5], [3.0, -2.0]), torch.rand(6, 1, 1, 2, dtype=torch_double)
    y = one_hot(torch.arange(6) % 3, 3, x.dtype)
    want = (f(x).softmax(1) - y).norm(dim=1) * x.flatten(1).norm(dim=1)
    torch.testing.assert_close(effects.gradient_lengths(f, x, y), want.detach())


def test_latent_length_is_that_of_the_logits_of_a_linear_model():
    """At the logits the gradient is p - y, each sample's own."""
    f, x = flat([1.0, 2.0], [-1.0, 0.5], [3.0, -2.0]), torch.rand(6, 1, 1, 2, dtype=torch_double)
    y = one_hot(torch.arange(6) % 3, 3, x.dtype)
    want = (f(x).softmax(1) - y).abs().sum(1).mean()
    assert effects.latent_length(f, x, y, ["1"]) == pytest.approx(float(want), rel=1e-9)


def test_inner_loss_counts_the_passes():
    f, x = flat([1.0, 2.0], [-1.0, 0.5]), torch.rand(5, 1, 1, 2, dtype=torch_double)
    y = one_hot(torch.arange(5) % 2, 2, x.dtype)
    attack = effects.PGD(norm="linf", eps=0.1, steps=3, start="zero")
    value, passes = effects.inner_loss(f, x, y, attack)
    assert passes == 6
    assert value > float(losses.cross_entropy(f(x), y).mean())


@dataclasses.dataclass
class Known:
    """Runs whose figures are known: label and seed to a number."""

    figures: dict
    costs: dict = dataclasses.field(default_factory=dict)

    def get(self, label, seed):
        return self.figures.get((label, seed))

    def passes(self, label):
        return self.costs.get(label)


def test_a_row_counts_the_seeds_and_names_what_is_missing():
    effect = effects.Effect("m", "figure", "smaller", float, "base")
    row = effects.row_of(effect, Known({("base", 0): 1, ("m", 0): 2, ("base", 1): 5, ("m", 1): 3, ("base", 2): 4}), 3)
    assert (row["of"], row["seen_in"], row["seen"], row["missing"]) == (2, 1, True, ["m of seed 2"])  # the means are 3 and 2.5
    assert row["mean"] == {"against": 3, "method": 2.5}
    assert "yes, in 1 of 2" in effects.line(row)
    assert "1 of 2" in effects.markdown([row])
    nothing = effects.row_of(effect, Known({}), 1)
    assert nothing["of"] == 0
    assert "not measured" in effects.line(nothing)
    assert "base of seed 0" in effects.markdown([nothing])


@pytest.mark.parametrize(
    ("ours", "costs", "seen"), [(66, (25, 8), True), (64, (25, 8), False), (80, (15, 8), False), (80, (), False)]
)
def test_close_is_within_five_points_at_half_the_passes(ours, costs, seen):
    effect = effects.Effect("m", "accuracy", "close", float, "base")
    row = effects.row_of(effect, Known({("base", 0): 70, ("m", 0): ours}, dict(zip(("base", "m"), costs, strict=False))), 1)
    assert row["seen"] is seen


def test_every_label_has_a_configuration():
    for effect in effects.effects():
        for label in (effect.method, effect.against, (effect.on or effect.method)):
            assert (effects.CONFIGS / f"{label.removesuffix(effects.ROOM)}.yaml").exists(), label
