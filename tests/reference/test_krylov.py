"""Krylov steps: dense solutions of trust-region problems, known spectra, Hessians by finite differences, real nets on digits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import nn

from robustlab import losses
from robustlab.attacks.fgsm import FGSM
from robustlab.attacks.krylov import Krylov, curvature
from robustlab.attacks.pgd import PGD
from robustlab.attacks.quadratic import lanczos, trust_region
from robustlab.evaluation.counting import Counter
from robustlab.rng import Rng
from robustlab.types import one_hot
from scripts import bench_krylov

N, K, SHAPE = 6, 5, (2, 4, 4)
D = int(np.prod(SHAPE))


def symmetric(n: int, size: int, seed: int) -> torch.Tensor:
    a = torch.randn(n, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (a + a.mT) / 2


def dense(h: np.ndarray, g: np.ndarray, radius: float) -> np.ndarray:
    """The maximiser of <g, d> + d'Hd/2 on the sphere: eigenvalues, and a root of the secular equation in log(lambda - theta)."""
    theta, u = np.linalg.eigh(h)
    c = u.T @ g

    def length(t: float) -> float:
        return float(np.sqrt(((c / (np.exp(t) + (theta[-1] - theta))) ** 2).sum()))

    t = brentq(lambda t: np.log(length(t) / radius), -60, 60, xtol=1e-15, rtol=1e-15)
    return u @ (c / (np.exp(t) + (theta[-1] - theta)))


def model(h: torch.Tensor, g: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    return (g * d).sum(-1) + 0.5 * (d * (h @ d[..., None])[..., 0]).sum(-1)


# ------------------------------------------------------------------------------------------- the trust-region problem


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0], ids=["indefinite", "positive", "negative"])
@pytest.mark.parametrize("radius", [1e-3, 0.5, 30.0])
def test_the_solver_agrees_with_a_dense_one(shift, radius):
    t = symmetric(20, 7, 0) + shift * torch.eye(7, dtype=torch.float64)
    b = torch.randn(20, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q = trust_region(t, b, radius)
    for i in range(20):
        expected = dense(t[i].numpy(), b[i].numpy(), radius)
        np.testing.assert_allclose(q[i].numpy(), expected, atol=1e-8 * radius)


@given(
    st.integers(0, 10_000), st.integers(1, 9), st.floats(-8, 8), st.floats(-6, 3), st.sampled_from([1.0, 1e-3, 1e-9, 1e-16, 0.0])
)
@settings(max_examples=150, deadline=None)
def test_the_solution_meets_the_optimality_conditions(seed, size, log_scale, log_radius, top):
    """(lambda I - T) q = b, lambda >= lambda_max(T), ||q|| = r: sufficient and necessary; ``top`` scales b's top component."""
    radius = 10.0**log_radius
    t = symmetric(3, size, seed) * 10.0**log_scale
    theta, u = torch.linalg.eigh(t)
    c = torch.randn(3, size, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    c[:, -1] *= top
    b = (u @ c[..., None])[..., 0]
    q = trust_region(t, b, radius)
    torch.testing.assert_close(q.norm(dim=1), torch.full((3,), radius, dtype=torch.float64), rtol=1e-12, atol=0)
    tq = (t @ q[..., None])[..., 0]
    lam = (q * (tq + b)).sum(1) / radius**2
    size_of = b.norm(dim=1) + theta.abs().amax(1) * radius
    assert float(((lam[:, None] * q - tq - b).norm(dim=1) / size_of).max()) < 1e-11
    assert float(((theta[:, -1] - lam) * radius / size_of).max()) < 1e-11


def test_the_hard_case():
    """No component along the top eigenvector and too short without it: the rest of the length goes there."""
    t = torch.diag_embed(torch.tensor([[-1.0, 0.5, 2.0], [2.0, 0.0, 2.0], [3.0, 1.0, 3.0]], dtype=torch.float64))
    b = torch.tensor([[0.3, -0.6, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    q = trust_region(t, b, 2.0)
    torch.testing.assert_close(q.norm(dim=1), torch.full((3,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(q[0, :2], torch.tensor([0.3 / 3, -0.6 / 1.5], dtype=torch.float64))
    torch.testing.assert_close(q[1, 1], torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(model(t, b, q)[2], torch.tensor(0.5 * 3 * 4, dtype=torch.float64))
    points = torch.randn(100_000, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = 2.0 * points / points.norm(dim=2, keepdim=True)
    assert bool((model(t, b, points).amax(0) <= model(t, b, q) + 1e-12).all())


def test_a_radius_of_zero_is_no_step():
    assert torch.equal(trust_region(symmetric(2, 3, 0), torch.ones(2, 3, dtype=torch.float64), 0.0), torch.zeros(2, 3).double())


# ---------------------------------------------------------------------------------------------------------- the basis


def spectrum(values: list[float], seed: int, size: int = 24) -> torch.Tensor:
    """A symmetric matrix with these eigenvalues, the last one repeated."""
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u = torch.linalg.qr(a).Q
    return u @ torch.diag(torch.tensor(values + values[-1:] * (size - len(values)), dtype=torch.float64)) @ u.T


def times(h: torch.Tensor):
    return lambda v: (h @ v[..., None])[..., 0]


def test_the_basis_is_orthonormal_and_reduces_the_matrix():
    h, g = symmetric(4, 24, 3), torch.randn(4, 24, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    v, t, size = lanczos(g, times(h), 12)
    torch.testing.assert_close(v @ v.mT, torch.eye(12, dtype=torch.float64).expand(4, 12, 12), atol=1e-13, rtol=0)
    torch.testing.assert_close(v @ h @ v.mT, t[:, :12], atol=1e-12, rtol=0)
    torch.testing.assert_close(size[:, None] * v[:, 0], g)
    left = h @ v.mT - v.mT @ t[:, :12]
    torch.testing.assert_close(left[..., :-1], torch.zeros_like(left[..., :-1]), atol=1e-12, rtol=0)
    torch.testing.assert_close(left[..., -1].norm(dim=1), t[:, 12, 11])
    krylov = torch.stack([g, times(h)(g), times(h)(times(h)(g))], 1)
    torch.testing.assert_close(krylov @ v[:, :3].mT @ v[:, :3], krylov)


def test_the_basis_stays_orthonormal_when_eigenvalues_spread():
    """Once a dominant eigenvector has converged, its rounding errors grow back if they are not taken out twice."""
    h = torch.stack([spectrum([10.0**-i for i in range(0, 24)], seed) for seed in range(20)])
    g = torch.randn(20, 24, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    v, _, _ = lanczos(g, times(h), 12)
    alive = v.norm(dim=2) > 0
    assert int(alive.sum(1).min()) >= 4
    assert float((v @ v.mT - torch.diag_embed(alive.double())).abs().max()) < 1e-14


def test_each_sample_stops_by_itself_where_its_space_ends():
    """1, 2, 4 and 9 distinct eigenvalues: so many vectors, the others zero."""
    values = [[1.5], [2.0, -1.0], [3.0, 2.0, 1.0, 0.0], [float(i) for i in range(9)]]
    h = torch.stack([spectrum(v, seed) for seed, v in enumerate(values)])
    g = torch.randn(4, 24, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    v, t, _ = lanczos(g, times(h), 14)
    assert (v.norm(dim=2) > 0.5).sum(1).tolist() == [1, 2, 4, 9]
    assert bool(((v.norm(dim=2) == 0) | ((v.norm(dim=2) - 1).abs() < 1e-12)).all())
    assert bool(torch.isfinite(t).all())


@pytest.mark.parametrize("radius", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("shift", [0.0, -4.0], ids=["indefinite", "negative"])
def test_steps_on_a_quadratic_with_few_eigenvalues_are_the_dense_solution(radius, shift):
    h = torch.stack([spectrum([3.0 + shift, 1.0 + shift, -2.0 + shift, shift], seed) for seed in range(5)])
    g = torch.randn(5, 24, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for m in (4, 5, 24):
        d = Krylov(m=m).direction(g, times(h), radius)
        for i in range(5):
            np.testing.assert_allclose(d[i].numpy(), dense(h[i].numpy(), g[i].numpy(), radius), atol=1e-6 * radius)
    gains = [model(h, g, Krylov(m=m).direction(g, times(h), radius)) for m in (1, 2, 3, 4)]
    for small, large in itertools.pairwise(gains):
        assert bool((large >= small - 1e-12).all())
    assert bool((gains[1] > gains[0]).all())


def test_newton_is_the_least_squares_solution():
    h, g = symmetric(3, 24, 5), torch.randn(3, 24, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    whole = Krylov(m=24, mode="newton").direction(g, times(h), 1.0)
    expected = -torch.linalg.solve(h, g)
    torch.testing.assert_close(whole, expected / expected.norm(dim=1, keepdim=True), atol=1e-7, rtol=0)
    part = Krylov(m=6, mode="newton").direction(g, times(h), 1.0)
    columns = [g]
    for _ in range(5):
        columns.append(times(h)(columns[-1]))
    basis = torch.linalg.qr(torch.stack(columns, 2)).Q
    q = torch.linalg.lstsq(h @ basis, -g[..., None]).solution
    expected = (basis @ q)[..., 0]
    torch.testing.assert_close(part, expected / expected.norm(dim=1, keepdim=True), atol=1e-8, rtol=0)


class Quadratic(nn.Module):
    """Logits (0, <g, x - c> + (x - c)'H(x - c)/2): the margin loss of label 0 is a quadratic in the image."""

    def __init__(self, h, g, c):
        super().__init__()
        self.h, self.g, self.c = h, g, c
        self.eval()

    def forward(self, x):
        d = (x - self.c).flatten(1)
        s = model(self.h, self.g, d)
        return torch.stack([torch.zeros_like(s), s], 1)


def test_the_attack_on_a_quadratic_classifier():
    h = spectrum([3.0, 1.0, -2.0, 0.0], 2, D)
    g = torch.randn(D, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = torch.full((1, *SHAPE), 0.5, dtype=torch.float64)
    out = Krylov(norm="l2", eps=0.4, m=4, loss="margin")(Quadratic(h, g, x), x, torch.tensor([0]))
    np.testing.assert_allclose((out - x).flatten().numpy(), dense(h.numpy(), g.numpy(), 0.4), atol=1e-7)
    corner, inner = (np.sign(dense(h.numpy(), g.numpy(), r)) for r in (0.2 * np.sqrt(D), 0.2))
    assert not np.array_equal(corner, inner)
    out = Krylov(norm="linf", eps=0.2, m=4, loss="margin")(Quadratic(h, g, x), x, torch.tensor([0]))
    np.testing.assert_allclose((out - x).flatten().numpy(), 0.2 * corner, atol=1e-12)
    down = Krylov(norm="l2", eps=0.4, m=4, loss="margin", targeted=True)(Quadratic(h, g, x), x, torch.tensor([0]))
    np.testing.assert_allclose((down - x).flatten().numpy(), dense(-h.numpy(), -g.numpy(), 0.4), atol=1e-7)


# ------------------------------------------------------------------------------------------------------------ networks


def network(activation: type[nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), activation(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), activation()
        f = nn.Sequential(*body, nn.Flatten(), nn.Linear(48, K))
        f(torch.rand(64, *SHAPE))
        with torch.no_grad():
            f[-1].weight *= 4
    return f.to(dtype).eval()


@pytest.fixture
def x():
    return torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.6 + 0.2


@pytest.fixture
def y():
    return torch.arange(N) % K


def hessians(f, x, y):
    """Of each sample's cross-entropy: (N, D, D), by central differences of the gradient."""
    step, rows = 1e-5, []
    for i in range(D):
        e = torch.zeros(D, dtype=x.dtype)
        e[i] = step

        def grad(z):
            z = z.detach().requires_grad_()
            return torch.autograd.grad(nn.functional.cross_entropy(f(z), y, reduction="sum"), z)[0].flatten(1)

        rows.append((grad(x + e.view(SHAPE)) - grad(x - e.view(SHAPE))) / (2 * step))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_products_are_those_of_each_sample_s_own_hessian(activation, x, y):
    f = network(activation)
    h = hessians(f, x, y)
    _, product = curvature(f, x, one_hot(y, K, x.dtype), losses.cross_entropy)
    v = torch.randn(N, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(product(v), times(h)(v), atol=1e-6, rtol=1e-5)


def test_a_relu_net_has_rank_k_minus_1_and_as_many_vectors_are_exact(x, y):
    f = network(nn.ReLU)
    g, product = curvature(f, x, one_hot(y, K, x.dtype), losses.cross_entropy)
    h = torch.stack([product(e.expand(N, D)) for e in torch.eye(D, dtype=torch.float64)], 2)
    theta = torch.linalg.eigvalsh(h)
    assert bool((theta > -1e-12).all())
    assert bool(((theta > 1e-10 * theta[:, -1:]).sum(1) <= K - 1).all())
    assert int((theta > 1e-10 * theta[:, -1:]).sum(1).max()) == K - 1
    v, _, _ = lanczos(g, product, K + 4)
    assert bool(((v.norm(dim=2) > 0).sum(1) <= K - 1).all())
    d = Krylov(m=K - 1).direction(g, product, 0.5)
    for i in range(N):
        np.testing.assert_allclose(d[i].numpy(), dense(h[i].numpy(), g[i].numpy(), 0.5), atol=1e-6)
    torch.testing.assert_close(Krylov(m=K + 4).direction(g, product, 0.5), d, atol=1e-10, rtol=0)
    newton = Krylov(m=K - 1, mode="newton").direction(g, product, 0.05)
    with torch.no_grad():
        before, after = (nn.functional.cross_entropy(f(z), y, reduction="none") for z in (x, x + newton.view_as(x)))
    assert bool((after < before).all())  # the paper's text makes images easier


def test_one_vector_is_the_gradient_step(x, y):
    f = network(nn.SiLU)
    linf = Krylov(norm="linf", eps=0.05, m=1)(f, x, y)
    torch.testing.assert_close(linf, FGSM(norm="linf", eps=0.05)(f, x, y), atol=1e-15, rtol=0)
    l2 = Krylov(norm="l2", eps=0.3, m=1, steps=3)(f, x, y)
    torch.testing.assert_close(l2, PGD(norm="l2", eps=0.3, steps=3, start="zero")(f, x, y), atol=1e-14, rtol=0)
    assert float((Krylov(norm="l2", eps=0.3, m=2)(f, x, y) - x).flatten(1).norm(dim=1).sub(0.3).abs().max()) < 1e-12


@pytest.mark.parametrize("mode", ["trust-region", "newton"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_samples_do_not_meet_however_many_vectors(mode, norm, x, y):
    attack, f = Krylov(norm=norm, eps=0.2, m=9, steps=2, mode=mode), network(nn.ReLU)
    whole = attack(f, x, y)
    alone = torch.cat([attack(f, x[i : i + 1], y[i : i + 1]) for i in range(N)])
    torch.testing.assert_close(alone, whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("fields", "forwards", "backwards"), [({}, 1, 3), ({"m": 1}, 1, 1), ({"m": 4, "steps": 3}, 3, 15)])
def test_counts_its_passes(fields, forwards, backwards, x, y):
    f = Counter(network(nn.SiLU))
    _, info = Krylov(norm="l2", eps=0.2, **fields).run(f, x, one_hot(y, K, x.dtype), Rng(0).at(torch.arange(N)))
    assert info["passes"].tolist() == [[forwards, backwards]] * N
    assert (f.forwards, f.backwards) == (N * forwards, N * backwards)
    assert info["grad"].shape == x.shape


def test_attention_is_differentiated_twice():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, K)

        def forward(self, x):
            q, k, v = self.qkv(x.flatten(2).mT.reshape(len(x), 1, 4, 8)).chunk(3, -1)
            return self.head(nn.functional.scaled_dot_product_attention(q, k, v).mean((1, 2)))

    torch.manual_seed(0)
    f, x, y = Attention().eval(), torch.rand(N, *SHAPE), torch.arange(N) % K
    attack = Krylov(norm="l2", eps=0.5, m=3)
    assert float((attack(f, x, y) - x).flatten(1).norm(dim=1).min()) > 0.1
    torch.testing.assert_close(attack(f, x, y), attack(f.double(), x.double(), y).float(), atol=1e-3, rtol=0)


def test_no_gradient_is_no_step_and_no_curvature_is_the_gradient_step(x, y):
    still = Krylov(norm="l2", eps=0.3)(lambda z: (z * 0).flatten(1)[:, :K], x, y)
    assert torch.equal(still, x)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(D, K)).double().eval()
    straight = Krylov(norm="l2", eps=0.1, m=5, loss="margin")(linear, x, y)
    torch.testing.assert_close(straight, Krylov(norm="l2", eps=0.1, m=1, loss="margin")(linear, x, y), atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_gradients_of_any_size(scale, x, y):
    f = network(nn.SiLU, torch.float32)
    scaled = lambda z, t: scale * losses.cross_entropy(z, t)  # noqa: E731
    target, x = one_hot(y, K), x.float()
    plain = Krylov(m=3).direction(*curvature(f, x, target, losses.cross_entropy), 0.5)
    step = Krylov(m=3).direction(*curvature(f, x, target, scaled), 0.5)
    torch.testing.assert_close(step, plain, atol=2e-3, rtol=0)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_on_digits_the_second_order_raises_the_loss_at_least_as_much(activation):
    """A small version of scripts/bench_krylov.py: a smaller net, 200 digits of 8 px."""
    from robustlab.data.digits import Digits

    splits = Digits(size=8).load()
    f = bench_krylov.train(splits.train, activation, 0.0, epochs=6, width=8)
    x, y, _ = next(iter(splits.test.batches([torch.arange(200)])))
    rows = bench_krylov.measure(f, x, y, 0.5)
    assert [r.label for r in rows] == ["gradient", "m = 1", "m = 2", "m = 5", "m = 9", "newton, m = 9"]
    assert bench_krylov.met(rows)
    gains = [float((r.free - rows[0].free).mean()) for r in rows]
    assert min(gains[2:5]) > 0.003
    assert gains[5] < -0.1
    assert "lower" in bench_krylov.describe(rows)
