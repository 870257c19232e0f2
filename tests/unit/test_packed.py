"""Convolutions in oneDNN's layout, with what is taken into them, and their gradients: against autograd and PyTorch's own."""

import pytest
import torch
from torch import fx, nn

from robustlab.evaluation.copies.entry import Phases
from robustlab.evaluation.copies.packed import Packed
from robustlab.evaluation.copies.packing import pack
from robustlab.evaluation.prepare import prepare

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("kernel", [1, 2, 3, (4, 3), 5, 7])
@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("padding", [0, 1, (2, 0), 3])
@pytest.mark.parametrize("shape", [(9, 12), (10, 7)])
def test_phases_are_the_input_gradient(kernel, stride, padding, shape):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 5, kernel, stride, padding).double().requires_grad_(False)
    assert Phases.suit(layer)
    x = torch.rand(3, 2, *shape, dtype=torch.float64)
    g = torch.randn(layer(x).shape, dtype=torch.float64)
    theirs = nn.grad.conv2d_input(x.shape, layer.weight, g, layer.stride, layer.padding)
    torch.testing.assert_close(Phases(layer)(g, x.shape), theirs, rtol=1e-10, atol=1e-10)


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
def test_other_convolutions_have_no_phases(fields):
    assert not Phases.suit(nn.Conv2d(2, 4, 3, **{"stride": 2, **fields}))
    assert not Phases.suit(nn.Conv2d(16, 4, 3, stride=2)), "with many channels there is nothing to gain"


def gradients(f, x, z, weight):
    """What f returns; its gradients at x and z, of the weighted sum of its sines; and a Hessian-vector product."""
    v, u = x.clone().requires_grad_(), None if z is None else z.clone().requires_grad_()
    y = f(v, u)
    g = torch.autograd.grad((y.sin() * weight).sum(), [v] if u is None else [v, u], create_graph=True)
    (product,) = torch.autograd.grad((g[0] * x.cos()).sum(), v)
    return [t.detach() for t in (y, *g, product)]


@needs_onednn
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kernel_size": 1},
        {"kernel_size": 5, "padding": 2},
        {"stride": 2},
        {"stride": (2, 3), "padding": (1, 0)},
        {"stride": 3, "padding": 2, "bias": False},
        {"dilation": 2},
        {"groups": 4},
        {"groups": 8, "out_channels": 8, "stride": 2},
        {"in_channels": 3, "stride": 2, "padding": 1},
    ],
)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_a_packed_convolution_is_the_convolution(fields, added, relu):
    torch.manual_seed(0)
    fields = {"in_channels": 8, "out_channels": 16, "kernel_size": 3, **fields}
    layer = nn.Conv2d(**fields).requires_grad_(False)
    mine = Packed(layer, torch.Size((4, fields["in_channels"], 11, 12)), torch.float32)
    mine.relu = relu

    def plain(x, z):
        y = layer(x) if z is None else layer(x) + z
        return y.relu() if relu else y

    for shape in ((5, 11, 12), (1, 14, 9)):
        x = torch.rand(shape[0], fields["in_channels"], *shape[1:])
        z = torch.randn(layer(x).shape) if added else None
        weight = torch.randn(layer(x).shape)
        for ours, theirs in zip(gradients(mine, x, z, weight), gradients(plain, x, z, weight), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(mine(x, z), plain(x, z), rtol=1e-5, atol=1e-5)


class Blocks(nn.Module):
    """Additions and ReLUs in every position: only those whose convolution nothing else sees may be taken in."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f, self.g, self.h = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(8))
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.relu(self.a(x))
        y = self.relu(self.b(x) + x)  # taken in
        y = torch.relu(y + self.c(y))  # taken in, the other way round
        z = self.d(y)
        w = z + y  # z is seen by others
        t = self.e(w).relu() + z  # the ReLU is, what comes behind it is not
        t = self.f(y) + t.tanh()  # not: it runs before what is added is there
        t = self.g(t) + self.h(y)  # the later one takes in the earlier one's
        return (t + t * 2).mean((2, 3))


@needs_onednn
def test_what_is_taken_in():
    torch.manual_seed(0)
    f, x = Blocks().eval().requires_grad_(False), torch.rand(3, 8, 6, 7)
    g = pack(fx.symbolic_trace(f), x)
    taken = {n.target: (len(n.args) == 2, g.get_submodule(n.target).relu) for n in g.graph.nodes if n.op == "call_module"}
    assert taken == {
        **{"a": (False, True), "b": (True, True), "c": (True, True), "d": (False, False), "e": (False, True)},
        **{"f": (False, False), "g": (False, False), "h": (True, False)},
    }
    torch.testing.assert_close(g(x), f(x))
    ours, theirs = (torch.autograd.grad(h(v := x.clone().requires_grad_()).logsumexp(1).sum(), v)[0] for h in (g, f))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@needs_onednn
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_prepared_models_use_phases_for_their_first_layer(precision):
    torch.manual_seed(0)
    f = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)),
    ).eval()
    x = torch.rand(4, 3, 16, 16)
    g = prepare(f, x, precision)
    assert [m.phases is not None for m in g.fast.modules() if isinstance(m, Packed)] == [True, False]
    near = 1e-4 if precision == "fp32" else 0.1
    ours, theirs = (torch.autograd.grad(h(v := x.clone().requires_grad_()).logsumexp(1).sum(), v)[0] for h in (g, f))
    assert float((ours - theirs).norm()) < near * float(theirs.norm())
