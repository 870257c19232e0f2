"""AugMix's operations against Pillow's, its mixture against the formula; ResizeMix and RandomMix against theirs."""

import dataclasses

import pytest
import torch
from PIL import Image, ImageOps

from robustlab.augment.augmix import COLOUR, AugMix, affine, operate
from robustlab.mixing.mixup import Mixup
from robustlab.mixing.random_mix import RandomMix
from robustlab.mixing.resize_mix import ResizeMix
from robustlab.rng import Rng
from robustlab.types import View, one_hot


def images(n=6, size=24, seed=0):
    """Smooth images on the grid of 8 bits."""
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.interpolate(torch.rand(n, 3, 4, 4, generator=g), (size, size), mode="bicubic").clamp(0, 1)
    return (x * 255).round() / 255


def view(n=6, size=12, **fields):
    x = images(n, size)
    return View(x=x, y=one_hot(torch.arange(n) % 4, 4), key=torch.arange(n) + 50, index=torch.arange(n), **fields)


def pillow(x, op):
    out = []
    for image in x:
        array = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        out.append(torch.from_numpy(__import__("numpy").array(op(Image.fromarray(array)))).permute(2, 0, 1) / 255)
    return torch.stack(out)


OPERATIONS = [
    lambda image, level: ImageOps.autocontrast(image),
    lambda image, level: ImageOps.equalize(image),
    lambda image, level: ImageOps.posterize(image, 4 - int(level * 4 / 10)),
    lambda image, level: ImageOps.solarize(image, 256 - int(level * 256 / 10)),
]


@pytest.mark.parametrize("level", [0.1, 1.4, 2.9, 6.0])
@pytest.mark.parametrize("k", range(4))
def test_colours_are_pillows(k, level):
    x = images()
    mine = operate(x, torch.full((6,), k), torch.full((6,), level, dtype=torch.float64), torch.ones(6, dtype=torch.float64))
    theirs = pillow(x, lambda image: OPERATIONS[k](image, level))
    assert float((mine - theirs).abs().max()) <= (1.01 / 255 if k == 0 else 1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("k", range(5))
def test_affine_operations_are_pillows(k, sign):
    level, x = 5.0, images()
    shear, shift = sign * level * 0.03, sign * int(level * 24 / 30)
    matrix = {1: (1, shear, 0, 0, 1, 0), 2: (1, 0, 0, shear, 1, 0), 3: (1, 0, shift, 0, 1, 0), 4: (1, 0, 0, 0, 1, shift)}
    bilinear = Image.Resampling.BILINEAR

    def op(image):
        if k == 0:
            return image.rotate(sign * level * 3, resample=bilinear)
        return image.transform((24, 24), Image.Transform.AFFINE, matrix[k], resample=bilinear)

    full = lambda v: torch.full((6,), v, dtype=torch.float64)  # noqa: E731
    mine = affine(x, torch.full((6,), k), full(level), full(sign))
    inside = (slice(None), slice(None), slice(9, 15), slice(9, 15))  # at the border Pillow has its own ways
    torch.testing.assert_close(mine[inside], pillow(x, op)[inside], rtol=0, atol=1.5 / 255)
    assert not torch.allclose(mine[inside], x[inside], atol=0.02)


def test_one_operation_for_each_image():
    x = images()
    which = torch.tensor([-1, 0, 2, 4, 7, 8])
    level, sign = torch.full((6,), 3.0, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    whole = operate(x, which, level, sign)
    assert torch.equal(whole[0], x[0])
    for i in range(6):
        assert torch.equal(whole[i], operate(x[i : i + 1], which[i : i + 1], level[:1], sign[:1])[0])


def test_the_mixture_is_the_formula_and_keyed_by_ticket():
    v, stage, rng = view(), AugMix(), Rng(3)
    out = stage(None, {"clean": v}, rng)["clean"].x
    source = rng.at(v.key).child("augmix")
    d = source.child("dirichlet").gamma((3,), 1.0)
    d, m = d / d.sum(1, keepdim=True), source.child("beta").beta((), 1.0, 1.0)
    for i in range(6):
        chains = [stage._chain(v.x, source.child("chain", c))[i] for c in range(3)]
        mixture = sum(float(d[i, c]) * chains[c] for c in range(3))
        torch.testing.assert_close(out[i], float(m[i]) * v.x[i] + (1 - float(m[i])) * mixture)
    part = stage(None, {"clean": dataclasses.replace(v, x=v.x[2:4], y=v.y[2:4], key=v.key[2:4])}, rng)["clean"].x
    assert torch.equal(out[2:4], part)
    assert float(out.amin()) >= 0
    assert float(out.amax()) <= 1
    assert float((out - v.x).abs().mean()) > 0.01


def test_a_channel_of_one_level_stays():
    flat = torch.full((2, 1, 4, 4), 0.4)
    for operation in COLOUR[:2]:
        assert torch.equal(operation((flat * 255).round(), torch.ones(2, dtype=torch.float64)), (flat * 255).round())


def test_resize_mix_is_the_formula():
    v = view(weight=torch.rand(6))
    for number in range(5):
        rng = Rng(1).split(1, number)[0]
        out = ResizeMix()(None, {"clean": v}, rng)["clean"]
        lam, j = out.info["lam"], out.info["partner"]
        inside = (out.x != v.x).any(0).any(0)
        side = int(inside.any(0).sum()), int(inside.any(1).sum())
        assert side[0] == side[1]
        torch.testing.assert_close(lam, torch.full((6,), 1 - side[0] * side[1] / 144))
        torch.testing.assert_close(out.y, lam[:, None] * v.y + (1 - lam[:, None]) * v.y[j])
        torch.testing.assert_close(out.weight, lam * v.weight + (1 - lam) * v.weight[j])
        rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
        box = out.x[:, :, rows : rows + side[0], columns : columns + side[0]]
        torch.testing.assert_close(box.mean((2, 3)), v.x[j].mean((2, 3)), rtol=0, atol=0.1)
        assert out.index is None
        assert torch.equal(out.key, v.key)
    assert ResizeMix(low=0.0, high=0.0)(None, {"clean": v}, Rng(1))["clean"] is v
    with pytest.raises(ValueError, match="low must not be above high"):
        ResizeMix(low=0.5, high=0.4)


def test_random_mix_draws_one_of_its_methods_for_each_batch():
    v, stage, found = view(), RandomMix(to="mix"), []
    for number in range(40):
        rng = Rng(2).split(1, number)[0]
        out = stage(None, {"clean": v}, rng)
        assert out["clean"] is v
        each = [
            dataclasses.replace(s, to="mix")(None, {"clean": v}, rng.child("stage", k))["mix"] for k, s in enumerate(stage.stages)
        ]
        found.append([torch.equal(out["mix"].x, e.x) for e in each].index(True))
    assert set(found) == set(range(len(stage.stages)))
    assert RandomMix(stages=(Mixup(alpha=0.0),))(None, {"clean": v}, Rng(0))["clean"] is v
    with pytest.raises(ValueError, match="at least one way"):
        RandomMix(stages=())
