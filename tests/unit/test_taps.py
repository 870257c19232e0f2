"""Taps: what they act on, in which precision, and that they are gone afterwards."""

import pytest
import torch
from torch import nn

from robustlab.outer import Precise
from robustlab.taps import find_layer, layer_names, tapped
from robustlab.types import Tap, UserError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x, *, scale=1.0):
        return self.conv(x) * scale


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = Block(), Block()
        self.middle = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        h = self.body(self.stem(x), scale=2.0)
        return self.head(self.middle(h.flatten(1)).relu())


@pytest.fixture
def f():
    return Net()


@pytest.fixture
def x():
    return torch.rand(4, 2, 2, 2)


def hooks(f):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in f.modules())


def test_sites(f):
    assert find_layer(f, "body.conv") is f.body.conv
    assert find_layer(f, "head") is f.head
    assert find_layer(nn.Sequential(f), "stem.conv") is f.stem.conv
    assert find_layer(f, "features") is f.head
    assert "body.conv" in layer_names(f)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("conv", "the layer name 'conv' is ambiguous: stem.conv, body.conv"),
        ("haed", r"no layer 'haed' \(did you mean 'head'\?\); layers: stem, stem.conv"),
    ],
)
def test_wrong_sites_are_one_line_with_the_candidates(f, site, message):
    with pytest.raises(UserError, match=message) as error:
        find_layer(f, site)
    assert len(error.value.lines) == 1


def test_features_need_a_linear_layer():
    with pytest.raises(UserError, match="no linear layer"):
        find_layer(nn.Conv2d(1, 1, 1), "features")


@pytest.mark.parametrize(
    ("site", "where", "expected"),
    [
        ("input", "output", lambda f, x: f(x + 1)),
        ("stem", "output", lambda f, x: f.head(f.middle(f.body(f.stem(x) + 1, scale=2.0).flatten(1)).relu())),
        ("body", "input", lambda f, x: f.head(f.middle(f.body(f.stem(x) + 1, scale=2.0).flatten(1)).relu())),
        ("middle", "output", lambda f, x: f.head((f.middle(f.body(f.stem(x), scale=2.0).flatten(1)) + 1).relu())),
        ("features", "output", lambda f, x: f.head(f.middle(f.body(f.stem(x), scale=2.0).flatten(1)).relu() + 1)),
        ("head", "output", lambda f, x: f(x) + 1),
    ],
)
def test_a_tap_acts_where_it_says(f, x, site, where, expected):
    with tapped(f, [Tap(site, lambda h: h + 1, where)]):
        inside = f(x)
    assert torch.equal(inside, expected(f, x))
    assert hooks(f) == 0


def test_a_tap_on_keyword_arguments(f, x):
    with tapped(f, [Tap("body", lambda args, kwargs: (args, {**kwargs, "scale": 5.0}), "kwargs")]):
        inside = f(x)
    assert torch.equal(inside, f.head(f.middle(f.body(f.stem(x), scale=5.0).flatten(1)).relu()))


def test_taps_act_in_order_and_nest(f, x):
    with tapped(f, [Tap("head", lambda h: h + 1), Tap("head", lambda h: 2 * h)]), tapped(f, [Tap("head", lambda h: h - 3)]):
        inside = f(x)
    assert torch.equal(inside, 2 * (f(x) + 1) - 3)
    assert hooks(f) == 0


def test_gradients_flow_through_a_tap(f, x):
    delta = torch.zeros(4, 2, 2, 2, requires_grad=True)
    with tapped(f, [Tap("stem", lambda h: h + delta)]):
        (g,) = torch.autograd.grad(f(x).sum(), delta)
    assert float(g.abs().max()) > 0


def test_taps_are_gone_when_something_raises(f, x):
    def explode(h):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), tapped(f, [Tap("stem", lambda h: h), Tap("head", explode)]):
        f(x)
    assert hooks(f) == 0
    with pytest.raises(UserError), tapped(f, [Tap("stem", lambda h: h), Tap("nowhere", lambda h: h)]):
        f(x)
    assert hooks(f) == 0


@pytest.mark.parametrize("where", ["output", "input"])
def test_tap_functions_see_float32_under_bf16(f, x, where):
    """A perturbation of 1e-5 that bfloat16 would swallow is seen by the function and by its autocast-free arithmetic."""
    seen = []

    def note(h):
        seen.append((h.dtype, (h @ h.mT).dtype, bool(((h + 1e-5) != h).any())))
        return h

    with tapped(f, [Tap("middle", note, where)]):
        z = Precise(f, "bf16")(x)
    assert seen == [(torch.float32, torch.float32, True)]
    assert torch.equal(z, Precise(f, "bf16")(x))


def test_double_precision_stays(f, x):
    seen = []
    with tapped(f.double(), [Tap("middle", lambda h: (seen.append(h.dtype), h)[1])]):
        f(x.double())
    assert seen == [torch.float64]


def test_a_plain_callable_cannot_be_tapped(x):
    with pytest.raises(UserError, match="plain callable"), tapped(lambda x: x, [Tap("input", lambda h: h)]):
        pass
    with tapped(lambda x: x, []):
        pass


def test_a_wrapped_model_is_tapped_inside(f, x):
    with tapped(Precise(f), [Tap("head", lambda h: h + 1)]):
        inside = Precise(f)(x)
    assert torch.equal(inside, f(x) + 1)


def test_the_stem_is_the_first_convolution_unless_a_layer_is_called_so():
    f = nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (4, 4)), nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1))
    assert find_layer(f, "stem") is f[2]
    f.add_module("stem", nn.Identity())
    assert find_layer(f, "stem") is f.stem
    assert find_layer(nn.Sequential(f), "stem") is f.stem
    with pytest.raises(UserError, match="no layer 'stem'"):
        find_layer(nn.Sequential(nn.Linear(2, 2)), "stem")
