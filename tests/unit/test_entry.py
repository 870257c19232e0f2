"""The input gradient of a strided convolution as a convolution: against autograd."""

import pytest
import torch
from torch import nn

from robustlab.evaluation.copies.entry import Entry, suits
from robustlab.evaluation.prepare import prepare


def gradients(f, x, weight):
    """dL/dx and a Hessian-vector product of the sum of sines of what f returns, weighted."""
    v = x.clone().requires_grad_()
    (g,) = torch.autograd.grad((f(v).sin() * weight).sum(), v, create_graph=True)
    (product,) = torch.autograd.grad((g * x.cos()).sum(), v)
    return g.detach(), product


@pytest.mark.parametrize("kernel", [1, 2, 3, (4, 3), 5, 7])
@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("padding", [0, 1, (2, 0), 3])
@pytest.mark.parametrize("shape", [(9, 12), (10, 7)])
def test_the_gradient_is_autograd_s(kernel, stride, padding, shape):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 5, kernel, stride, padding).double().requires_grad_(False)
    assert suits(layer)
    x = torch.rand(3, 2, *shape, dtype=torch.float64)
    weight = torch.randn(layer(x).shape, dtype=torch.float64)
    for ours, theirs in zip(gradients(Entry(layer), x, weight), gradients(layer, x, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert torch.equal(Entry(layer)(x), layer(x))


@pytest.mark.parametrize(
    "fields",
    [
        {"stride": 1},
        {"stride": (2, 1)},
        {"dilation": 2},
        {"groups": 2},
        {"padding": "same", "stride": 1},
        {"padding_mode": "circular"},
    ],
)
def test_other_convolutions_are_left_alone(fields):
    assert not suits(nn.Conv2d(2, 4, 3, **{"stride": 2, **fields}))
    assert not suits(nn.Conv2d(16, 4, 3, stride=2)), "with many channels there is nothing to gain"
    assert not suits(nn.ConvTranspose2d(2, 4, 3, stride=2))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_prepared_models_use_it_for_their_first_layer(precision):
    torch.manual_seed(0)
    f = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)),
    ).eval()
    x = torch.rand(4, 3, 16, 16)
    g = prepare(f, x, precision)
    assert sum(isinstance(m, Entry) for m in g.full.modules()) == 1
    assert not any(isinstance(m, Entry) for m in g.packed.modules()), "without gradients there is no need"
    near = 1e-4 if precision == "fp32" else 0.1
    ours, theirs = (torch.autograd.grad(h(v := x.clone().requires_grad_()).logsumexp(1).sum(), v)[0] for h in (g, f))
    assert float((ours - theirs).norm()) < near * float(theirs.norm())
