"""BIM, R+FGSM, MI-FGSM with its switches and ACG: closed forms on a linear classifier, identities, straight-line recomputation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustlab.attacks.acg import ACG, conjugacy
from robustlab.attacks.bim import BIM
from robustlab.attacks.fgsm import FGSM
from robustlab.attacks.mi_fgsm import MIFGSM, resize_and_pad, smooth
from robustlab.attacks.pgd import PGD
from robustlab.attacks.r_fgsm import RFGSM
from robustlab.rng import Rng
from robustlab.types import one_hot

N, SHAPE, K, EPS = 10, (2, 6, 7), 4, 0.1


class Linear(nn.Module):
    """Two classes, logits (0, <w, x>)."""

    def __init__(self):
        super().__init__()
        self.w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        self.eval()

    def forward(self, x):
        s = (x * self.w).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(s), s], 1)


@pytest.fixture
def f():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(2, 6, 3), nn.SiLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, K)
        return nn.Sequential(*layers).double().eval()


@pytest.fixture
def x():
    return (torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.2 - 0.1).clamp(0, 1)


@pytest.fixture
def y(f, x):
    return f(x).argmax(1)


def grad(f, x, y):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(f(x), y, reduction="sum"), x)[0]


# ----------------------------------------------------------------------------------------------------- closed forms

REACHES = [
    BIM(norm="linf", eps=EPS),
    MIFGSM(norm="linf", eps=EPS),
    MIFGSM(norm="linf", eps=EPS, nesterov=True),
    RFGSM(norm="linf", eps=EPS, share=0.0),
    ACG(norm="linf", eps=EPS, steps=5),
    ACG(norm="linf", eps=EPS, steps=5, loss="ce"),
]


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("attack", REACHES, ids=lambda a: f"{a.name}-{a.loss}")
def test_the_corner_of_the_ball_on_a_linear_classifier(attack, targeted, x):
    """max <v, d> over |d| <= eps and the box: the sign of v, clipped; v = w for label 0, -w for label 1, and back when targeted."""
    attack = dataclasses.replace(attack, targeted=targeted)
    label = torch.arange(N) % 2
    v = Linear().w * (1 - 2.0 * label.view(-1, 1, 1, 1)) * (-1 if targeted else 1)
    expected = np.clip(x.numpy() + EPS * np.sign(v.numpy()), 0, 1)
    np.testing.assert_allclose(attack(Linear(), x, label).numpy(), expected, atol=1e-12)


def test_the_two_sign_steps_of_r_fgsm(x):
    """alpha = eps / 2: a value goes to +-eps where the random sign agrees with the gradient's, and comes back to x where not."""
    x = x.clamp(0.2, 0.8)
    d = (RFGSM(norm="linf", eps=EPS)(Linear(), x, torch.zeros(N).long(), seed=4) - x) * Linear().w.sign()
    at_eps, at_zero = (d - EPS).abs() < 1e-12, d.abs() < 1e-12
    assert bool((at_eps | at_zero).all())
    assert float(at_eps.double().mean()) == pytest.approx(0.5, abs=0.08)  # 840 fair bits: 4.6 standard deviations


def test_r_fgsm_takes_the_gradient_at_the_random_point(f, x, y):
    x = 0.2 + 0.6 * x
    start = RFGSM(norm="linf", eps=EPS / 2, share=1.0)(f, x, y, seed=4)  # the random step alone
    assert float(((start - x).abs() - EPS / 2).abs().max()) < 1e-12
    expected = start + EPS / 2 * grad(f, start, y).sign()
    assert not torch.equal(grad(f, start, y).sign(), grad(f, x, y).sign())
    torch.testing.assert_close(RFGSM(norm="linf", eps=EPS)(f, x, y, seed=4), expected)


def test_bim_in_l2_reaches_the_closest_point_of_the_sphere_on_a_linear_classifier(x):
    x = 0.3 + 0.4 * x
    w = Linear().w
    expected = x + 0.2 * w / np.linalg.norm(w)
    torch.testing.assert_close(BIM(norm="l2", eps=0.2)(Linear(), x, torch.zeros(N).long()), expected)
    torch.testing.assert_close(MIFGSM(norm="l2", eps=0.2)(Linear(), x, torch.zeros(N).long()), expected)


# ------------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_switched_off_leaves_no_bit_behind(norm, dtype, f, x, y):
    f, x = f.to(dtype), x.to(dtype)
    mi = MIFGSM(norm=norm, eps=EPS)(f, x, y)
    assert torch.equal(MIFGSM(norm=norm, eps=EPS, diversity=0.0, resize=0.5)(f, x, y), mi)
    assert torch.equal(MIFGSM(norm=norm, eps=EPS, translation=1)(f, x, y), mi)
    assert torch.equal(MIFGSM(norm=norm, eps=EPS, diversity=1.0, resize=1.0)(f, x, y), mi)  # nothing to shrink
    bim = BIM(norm=norm, eps=EPS)(f, x, y)
    still = MIFGSM(norm=norm, eps=EPS, decay=0.0)(f, x, y)
    if norm == "linf":
        assert torch.equal(still, bim)
    torch.testing.assert_close(still, bim)
    assert torch.equal(MIFGSM(norm=norm, eps=EPS, decay=0.0, nesterov=True)(f, x, y), still)
    assert not torch.equal(mi, bim)
    for changed in ({"nesterov": True}, {"diversity": 1.0, "resize": 0.7}, {"translation": 3}):
        assert not torch.equal(MIFGSM(norm=norm, eps=EPS, **changed)(f, x, y), mi), changed


def test_bim_is_pgd_from_the_image_and_one_step_is_fgsm(f, x, y):
    ours = BIM(norm="l2", eps=0.4, steps=7)(f, x, y)
    torch.testing.assert_close(ours, PGD(norm="l2", eps=0.4, steps=7, step=0.4 / 7, start="zero")(f, x, y))
    fgsm = FGSM(norm="linf", eps=EPS)(f, x, y)
    torch.testing.assert_close(BIM(norm="linf", eps=EPS, steps=1)(f, x, y), fgsm)
    torch.testing.assert_close(RFGSM(norm="linf", eps=EPS, share=0.0)(f, x, y), fgsm)


def test_targets_are_approached(f, x, y):
    target = (y + 1) % K
    before = F.cross_entropy(f(x), target).item()
    for cls in (BIM, MIFGSM, RFGSM, ACG):
        toward, away = (cls(norm="linf", eps=EPS, targeted=t)(f, x, target) for t in (True, False))
        assert F.cross_entropy(f(toward), target).item() < before < F.cross_entropy(f(away), target).item(), cls


# ----------------------------------------------------------------------------------------- straight-line recomputation


def clip(z, x, eps):
    return torch.max(torch.min(z, x + eps), x - eps).clamp(0, 1)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("side", [1, 3])
def test_three_steps_of_mi_fgsm_written_out(nesterov, side, f, x, y):
    mu, alpha = 0.7, 0.04
    t = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    bell = torch.exp(-t.square() / (2 * (1 / 3) ** 2))
    kernel = torch.outer(bell, bell) / torch.outer(bell, bell).sum() if side == 3 else torch.ones(1, 1, dtype=torch.float64)

    def direction(z):
        g = grad(f, z, y)
        out = torch.zeros_like(g)
        padded = F.pad(g, [side // 2] * 4)
        for i in range(side):
            for j in range(side):
                out += kernel[i, j] * padded[..., i : i + SHAPE[1], j : j + SHAPE[2]]
        return out / out.abs().sum((1, 2, 3), keepdim=True) * out[0].numel()

    ahead = mu if nesterov else 0.0
    m1 = direction(x)
    x1 = clip(x + alpha * m1.sign(), x, EPS)
    m2 = mu * m1 + direction(x1 + alpha * ahead * m1)
    x2 = clip(x1 + alpha * m2.sign(), x, EPS)
    m3 = mu * m2 + direction(x2 + alpha * ahead * m2)
    x3 = clip(x2 + alpha * m3.sign(), x, EPS)
    attack = MIFGSM(norm="linf", eps=EPS, steps=3, step=alpha, decay=mu, nesterov=nesterov, translation=side)
    torch.testing.assert_close(attack(f, x, y), x3)


@pytest.mark.parametrize(("beta_of", "sign"), [("hestenes-stiefel", -1), ("authors-code", 1)])
def test_four_steps_of_acg_written_out(beta_of, sign, f, x, y):
    """Up to the first checkpoint (after 22 steps of 100) the step is 2 eps and the directions are conjugate."""
    label = y[:, None]

    def margin_grad(z):
        z = z.clone().requires_grad_()
        out = f(z)
        other = out.masked_fill(F.one_hot(y, K).bool(), -1e9).max(1).values
        return torch.autograd.grad((other - out.gather(1, label)[:, 0]).sum(), z)[0]

    points = [((x - EPS).clamp(min=0) + (x + EPS).clamp(max=1)) / 2]
    g = margin_grad(points[0])
    s = g
    for _ in range(4):
        points.append(clip(points[-1] + 2 * EPS * s.sign(), x, EPS))
        new = margin_grad(points[-1])
        for i in range(N):
            change = (g - new)[i].flatten()
            below = s[i].flatten() @ change
            beta = max(0.0, sign * float(new[i].flatten() @ change / below)) if float(below) else 0.0
            s[i] = new[i] + beta * s[i]
        g = new
    seen = []
    ACG(norm="linf", eps=EPS, beta=beta_of)(lambda z: (seen.append(z.detach()), f(z))[1], x, y)
    seen = [z for z in seen if len(z) == N]
    assert len(seen) == 101
    for ours, expected in zip(seen[:5], points, strict=True):
        torch.testing.assert_close(ours, expected)


def test_conjugacy_makes_directions_conjugate_on_a_quadratic():
    """With exact line searches the directions of Hestenes and Stiefel are H-conjugate: n steps solve n unknowns."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    h, b = -(a @ a.T + torch.eye(6, dtype=torch.float64)), torch.randn(6, generator=generator, dtype=torch.float64)
    x, g_old, s = torch.zeros(3, 6, dtype=torch.float64)
    for k in range(6):
        g = h @ x + b
        if k:
            (beta,) = conjugacy(g[None], g_old[None], s[None])
            s = g + beta * s
        else:
            s = g
        x, g_old = x - (g @ s) / (s @ h @ s) * s, g
    torch.testing.assert_close(h @ x + b, torch.zeros(6, dtype=torch.float64), atol=1e-9, rtol=0)


def test_conjugacy_without_a_value_is_zero():
    g = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    assert conjugacy(g, g, g).tolist() == [0.0, 0.0]
    assert conjugacy(torch.tensor([[3.0, 1.0]]), torch.tensor([[4.0, 1.0]]), torch.tensor([[1.0, 0.0]])).tolist() == [0.0]


def test_acg_halves_its_step_where_the_loss_does_not_rise(f, x, y):
    """A loss that never rises again: after windows of 22, 19, ... steps eta is halved and the search goes back to the start."""
    seen = []

    def jolt(z):
        """The best value is at the start; gradients point up everywhere."""
        seen.append(z.detach()[0].clone())
        s = z.sum((1, 2, 3))
        drop = 0.0 if len(seen) == 1 else 100.0
        return torch.stack([torch.zeros_like(s), s - drop], 1)

    start = torch.full((1, *SHAPE), 0.5, dtype=torch.float64)
    ACG(norm="linf", eps=EPS).run(jolt, start, one_hot(torch.zeros(1).long(), 2, torch.float64), Rng(0).at(torch.arange(1)))
    away = [float((z - start[0]).abs().max()) for z in seen]
    # eta is 2 eps, halved after 22, 41, 57 and 70 steps; with eps it still reaches the corner in one step
    assert away[0] == 0
    assert away[1:42] == pytest.approx([EPS] * 41)
    assert [away[k] for k in (42, 58, 71)] == pytest.approx([EPS / 2, EPS / 4, EPS / 8])


# ------------------------------------------------------------------------------------------------- diversity, smoothing


def test_a_resized_image_is_the_image_sampled_at_the_nearest_pixels():
    """Against torch's nearest interpolation of each size, for every image of a batch and an image that is not square."""
    x = torch.rand(40, 3, 12, 9, generator=torch.Generator().manual_seed(2)) + 0.1
    out = resize_and_pad(x, 1.0, 0.5, Rng(5).at(torch.arange(40)))
    sides = set()
    for before, after in zip(x, out, strict=True):
        lit = after[0] > 0
        rows, columns = lit.any(1).nonzero()[:, 0], lit.any(0).nonzero()[:, 0]
        top, left, height, width = int(rows[0]), int(columns[0]), len(rows), len(columns)
        assert bool((after[:, top : top + height, left : left + width] > 0).all())
        expected = F.interpolate(before[None], size=(height, width), mode="nearest")[0]
        torch.testing.assert_close(after[:, top : top + height, left : left + width], expected)
        assert height == 12 * width // 9
        sides.add(width)
    assert sides == {5, 6, 7, 8, 9}
    share = (resize_and_pad(x, 0.3, 0.5, Rng(6).at(torch.arange(40))) != x).any(3).any(2).any(1).double().mean()
    assert 0.05 < float(share) < 0.5


def test_diversity_is_keyed_by_the_tickets(f, x, y):
    attack = MIFGSM(norm="linf", eps=EPS, diversity=0.7, resize=0.6)
    whole = attack(f, x, y, seed=1, index=torch.arange(N))
    alone = torch.cat([attack(f, x[i : i + 1], y[i : i + 1], seed=1, index=torch.tensor([i])) for i in range(N)])
    torch.testing.assert_close(alone, whole, atol=1e-12, rtol=0)
    assert not torch.equal(attack(f, x, y, seed=2, index=torch.arange(N)), whole)


def test_the_kernel_ends_at_three_sigma():
    point = torch.zeros(1, 1, 15, 15, dtype=torch.float64)
    point[..., 7, 7] = 1
    bell = np.exp(-0.5 * np.linspace(-3, 3, 15) ** 2)
    np.testing.assert_allclose(smooth(point, 15)[0, 0].numpy(), np.outer(bell, bell) / np.outer(bell, bell).sum(), atol=1e-12)


def test_smoothing_keeps_a_constant_inside_and_loses_mass_at_the_border():
    g = torch.ones(1, 2, 9, 9, dtype=torch.float64)
    out = smooth(g, 5)
    torch.testing.assert_close(out[..., 2:-2, 2:-2], g[..., 2:-2, 2:-2])
    assert float(out[..., 0, 0].max()) < 0.7
    with pytest.raises(ValueError, match="odd number; got 4"):
        MIFGSM(norm="linf", eps=EPS, translation=4)


# ------------------------------------------------------------------------------------------------------------ strength


def trained():
    """A SiLU net on digits, 8 px, after a few seconds of FGSM training."""
    from robustlab.data.digits import Digits
    from robustlab.models import create_model

    splits = Digits(size=8).load()
    x, y, _ = next(iter(splits.train.batches([torch.arange(len(splits.train))])))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        f = create_model("small_cnn", num_classes=10, in_channels=1, width=8).train()
        optimizer = torch.optim.SGD(f.parameters(), lr=0.1, momentum=0.9)
        for _ in range(8):
            for rows in torch.randperm(len(x)).split(64):
                x_adv = (x[rows] + 0.1 * grad(f, x[rows], y[rows]).sign()).clamp(0, 1)
                optimizer.zero_grad()
                F.cross_entropy(f(x_adv), y[rows]).backward()
                optimizer.step()
    x, y, _ = next(iter(splits.test.batches([torch.arange(300)])))
    return f.eval(), x, y


def test_acg_is_as_strong_as_pgd_at_equal_passes():
    f, x, y = trained()

    def value(x_adv):
        z = f(x_adv).detach()
        own = z.gather(1, y[:, None])[:, 0]
        return float((z.masked_fill(F.one_hot(y, 10).bool(), -1e9).max(1).values - own).mean())

    for eps in (0.1, 0.2):
        pgd = [value(PGD(norm="linf", eps=eps, steps=30, loss="margin")(f, x, y, seed=s)) for s in range(2)]
        for beta in ("hestenes-stiefel", "authors-code"):
            assert value(ACG(norm="linf", eps=eps, steps=29, beta=beta)(f, x, y)) >= sum(pgd) / 2, (eps, beta)
