"""Per-sample losses: closed forms, gradients, edge cases, invariances."""

import math

import pytest
import torch
from scipy import special, stats

from robustlab.losses import cross_entropy, dlr, dlr_targeted, kl, kl_logits, margin
from robustlab.types import one_hot


def logits(n=6, k=5, scale=3.0, seed=0):
    return scale * torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n=6, k=5):
    return one_hot(torch.arange(n) % k, k, torch.float64)


def test_cross_entropy_is_minus_log_softmax_of_the_label():
    z = logits()
    expected = -special.log_softmax(z.numpy(), axis=1)[range(6), [i % 5 for i in range(6)]]
    torch.testing.assert_close(cross_entropy(z, labels()), torch.from_numpy(expected))
    soft = logits(seed=1).softmax(-1)
    expected = -(soft.numpy() * special.log_softmax(z.numpy(), axis=1)).sum(1)
    torch.testing.assert_close(cross_entropy(z, soft), torch.from_numpy(expected))


def test_cross_entropy_gradient_is_softmax_minus_target():
    z, y = logits().requires_grad_(), logits(seed=1).softmax(-1)
    (g,) = torch.autograd.grad(cross_entropy(z, y).sum(), z)
    torch.testing.assert_close(g, z.detach().softmax(-1) - y)


def test_kl_is_the_relative_entropy():
    p, z = logits(seed=1).softmax(-1), logits()
    expected = torch.tensor([stats.entropy(a, b) for a, b in zip(p.numpy(), z.softmax(-1).numpy(), strict=True)])
    torch.testing.assert_close(kl(p, z), expected)
    torch.testing.assert_close(kl_logits(p.log(), z), expected)
    torch.testing.assert_close(kl(z.softmax(-1), z), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)


def test_kl_of_one_hot_targets_is_cross_entropy():
    z, y = logits(), labels()
    torch.testing.assert_close(kl(y, z), cross_entropy(z, y))
    assert torch.equal(torch.isfinite(kl(y.float(), 1e4 * z.float())), torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_kl_is_finite_where_probabilities_underflow(dtype):
    z_p = torch.tensor([[0.0, -2000.0, 1.0], [5000.0, 0.0, -5000.0]], dtype=dtype, requires_grad=True)
    z = torch.tensor([[0.3, 0.2, 0.1], [0.0, 1.0, 2.0]], dtype=dtype, requires_grad=True)
    p = z_p.softmax(-1)
    assert bool((p == 0).any())
    for value in (kl(p, z), kl_logits(z_p, z)):
        assert bool(torch.isfinite(value).all())
        for g in torch.autograd.grad(value.sum(), (z_p, z), retain_graph=True):
            assert bool(torch.isfinite(g).all())
    a = torch.autograd.grad(kl(p, z).sum(), z_p, retain_graph=True)[0]
    b = torch.autograd.grad(kl_logits(z_p, z).sum(), z_p)[0]
    torch.testing.assert_close(a, b)


def test_margin_is_the_best_other_class_minus_the_label():
    z = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    assert margin(z, one_hot(torch.tensor([0, 1, 0]), 3)).tolist() == [-1.0, 2.0, 0.0]
    wrong = margin(logits(), labels()) > 0
    assert torch.equal(wrong, logits().argmax(1) != labels().argmax(1))


def test_dlr_is_the_ratio():
    z = torch.tensor([[4.0, 1.0, 3.0, 0.0], [4.0, 1.0, 3.0, 0.0]], dtype=torch.float64)
    y = one_hot(torch.tensor([0, 1]), 4, torch.float64)
    torch.testing.assert_close(dlr(z, y), torch.tensor([-(4 - 3) / (4 - 1), -(1 - 4) / (4 - 1)], dtype=torch.float64))
    target = torch.tensor([3, 0])
    expected = torch.tensor([-(4 - 0) / (4 - 0.5), -(1 - 4) / (4 - 0.5)], dtype=torch.float64)
    torch.testing.assert_close(dlr_targeted(z, y, target), expected)


@pytest.mark.parametrize(("a", "c"), [(1.0, 7.0), (50.0, 0.0), (0.02, -3.0)])
def test_dlr_ignores_scale_and_shift_of_the_logits(a, c):
    z, y, t = logits(), labels(), (torch.arange(6) + 1) % 5
    torch.testing.assert_close(dlr(a * z + c, y), dlr(z, y))
    torch.testing.assert_close(dlr_targeted(a * z + c, y, t), dlr_targeted(z, y, t))


def test_dlr_has_the_sign_of_the_margin_and_at_most_one():
    z, y = logits(200), labels(200)
    d = dlr(z, y)
    assert torch.equal(d.sign(), margin(z, y).sign())
    assert float(d[d < 0].min()) >= -1
    flat = torch.zeros(2, 4)
    assert dlr(flat, labels(2, 4).float()).tolist() == [0.0, 0.0]


def test_too_few_classes():
    with pytest.raises(ValueError, match="at least 3 classes"):
        dlr(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least 4 classes"):
        dlr_targeted(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))


def test_gradients_match_finite_differences():
    z, q = logits().requires_grad_(), logits(seed=2).requires_grad_()
    y, t = labels(), (torch.arange(6) + 1) % 5
    soft = logits(seed=1).softmax(-1)
    for loss in (
        lambda a, b: cross_entropy(a, soft),
        lambda a, b: kl(b.softmax(-1), a),
        lambda a, b: kl_logits(b, a),
        lambda a, b: margin(a, y),
        lambda a, b: dlr(a, y),
        lambda a, b: dlr_targeted(a, y, t),
    ):
        assert torch.autograd.gradcheck(loss, (z, q))


def test_nothing_couples_the_samples():
    z, y = logits(), labels()
    for loss in (cross_entropy, kl_of_labels, margin, dlr):
        assert torch.equal(loss(z, y)[2:3], loss(z[2:3], y[2:3]))
        assert loss(z[:0], y[:0]).shape == (0,)


def kl_of_labels(z, y):
    return kl(y, z)


def test_confident_logits_do_not_overflow():
    z = torch.tensor([[1e4, -1e4, 0.0, 0.0]])
    y = one_hot(torch.tensor([1]), 4)
    assert float(cross_entropy(z, y)) == pytest.approx(2e4)
    assert math.isfinite(float(dlr(z, y)))
