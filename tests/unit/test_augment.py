"""Augmentation: agrees with a per-sample reference, and with itself when a sample stands alone."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad

from robustlab.augment.cutout import Cutout
from robustlab.augment.flip_crop import FlipCrop
from robustlab.rng import Rng
from robustlab.types import View, one_hot


def batch(n=40, channels=3, h=8, w=10):
    x = torch.rand(n, channels, h, w)
    y = one_hot(torch.arange(n) % 10, 10)
    return View(x, y, key=torch.arange(n) * 7 + 1000, index=torch.arange(n), weight=torch.rand(n))


STAGES = [FlipCrop(), FlipCrop(padding=0), FlipCrop(padding=2, flip=False), FlipCrop(padding=11), Cutout(size=4), Cutout(size=3)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_sample_is_changed_as_if_alone(stage):
    view = batch()
    out = stage(None, {"clean": view}, Rng(3))["clean"]
    for i in [0, 7, 39]:
        alone = View(view.x[i : i + 1], view.y[i : i + 1], key=view.key[i : i + 1])
        assert torch.equal(stage(None, {"clean": alone}, Rng(3))["clean"].x, out.x[i : i + 1])


@pytest.mark.parametrize("stage", STAGES)
def test_only_the_images_change(stage):
    view = batch()
    before = view.x.clone()
    out = stage(None, {"clean": view}, Rng(0))["clean"]
    assert torch.equal(view.x, before)
    for name in ("y", "key", "index", "weight"):
        assert getattr(out, name) is getattr(view, name)
    assert out.x.shape == view.x.shape
    assert out.x.dtype == view.x.dtype


def test_reads_on_and_writes_to():
    view = batch()
    stage = replace(FlipCrop(), to="augmented")
    out = stage(None, {"clean": view}, Rng(0))
    assert out["clean"] is view
    assert not torch.equal(out["augmented"].x, view.x)


def test_flip_crop_is_a_crop_of_the_padded_image_and_all_offsets_occur():
    p, h, w = 2, 8, 10
    view = batch(n=600)
    out = FlipCrop(padding=p)(None, {"clean": view}, Rng(0))["clean"].x
    found = torch.zeros(2, 2 * p + 1, 2 * p + 1)
    for x, o in zip(view.x, out, strict=True):
        padded = pad(x, (p,) * 4)
        hits = [
            (m, a, b)
            for a in range(2 * p + 1)
            for b in range(2 * p + 1)
            for m in (0, 1)
            if torch.equal(padded[:, a : a + h, b : b + w].flip(-1) if m else padded[:, a : a + h, b : b + w], o)
        ]
        assert len(hits) == 1
        found[hits[0]] += 1
    # 600 draws in 50 cells of 12 expected: chi-square with 49 degrees of freedom, 99.9 % quantile 85.4
    assert float(((found - 12).square() / 12).sum()) < 85.4


def test_no_padding_and_no_flip_is_the_identity():
    view = batch()
    assert torch.equal(FlipCrop(padding=0, flip=False)(None, {"clean": view}, Rng(0))["clean"].x, view.x)


def test_cutout_erases_the_square_around_every_possible_centre():
    size, h, w = 3, 4, 5
    x = torch.zeros(2000, 1, h, w)
    view = View(x, one_hot(torch.zeros(2000, dtype=torch.long), 2), key=torch.arange(2000))
    out = Cutout(size=size, fill=1.0)(None, {"clean": view}, Rng(0))["clean"].x
    expected = {}
    for a in range(h):
        for b in range(w):
            mask = torch.zeros(h, w)
            mask[max(a - 1, 0) : a + 2, max(b - 1, 0) : b + 2] = 1
            expected[tuple(mask.flatten().tolist())] = 0
    for o in out:
        expected[tuple(o.flatten().tolist())] += 1  # KeyError: not a square of the right size
    counts = torch.tensor(list(expected.values())).float()
    assert float(((counts - 100).square() / 100).sum()) < 43.8  # 19 degrees of freedom, 99.9 %
