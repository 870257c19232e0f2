"""The 19 corruptions against statistics of the reference implementations, which ``scripts/parity_corruptions.py --golden`` wrote.

The images are crops of the two photographs in scikit-learn. Deterministic corruptions: means over quarters of two images, in
levels. Random ones: mean absolute change and standard deviation of the change over 24 draws of all six.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from robustlab.augment.corruption import Corrupted
from robustlab.corruptions import corrupt
from robustlab.corruptions.fog import Fog
from robustlab.corruptions.frost import Frost
from robustlab.corruptions.glass_blur import sources
from robustlab.rng import Rng
from robustlab.types import UserError, View, one_hot
from scripts.parity_corruptions import DETERMINISTIC, array, blocks, golden_images, statistics, tensor

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "corruptions.json").read_text())
CASES = [(table, name) for table in ("cifar", "imagenet") for name in GOLDEN[table] if name != "clean"]
LOOSE = {"spatter": 0.25, "snow": 0.08, "motion_blur": 0.08, "fog": 0.1, "elastic_transform": 0.08}  # few images, rare events


def corrupted(table, name, severity, draws=1):
    x = tensor(golden_images(table))
    batch = corrupt(x.repeat(draws, 1, 1, 1), name, severity, table)
    return [array(part) for part in batch.split(len(x))]


@pytest.mark.parametrize(("table", "name"), CASES)
def test_statistics_are_those_of_the_reference(table, name):
    images = golden_images(table)
    if np.abs(np.subtract(blocks(images), GOLDEN[table]["clean"])).max() > 0.2:
        pytest.skip("the photographs decode differently here")
    for severity in range(1, 6):
        expected = GOLDEN[table][name][severity - 1]
        if name in DETERMINISTIC:
            (ours,) = corrupted(table, name, severity)
            np.testing.assert_allclose(blocks(ours), expected, atol=0.75)
        else:
            ours = statistics(corrupted(table, name, severity, 24), images)
            np.testing.assert_allclose(ours, expected, rtol=LOOSE.get(name, 0.05), err_msg=f"severity {severity}")


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_glass_is_the_sequential_copy(reach):
    height, width, rng = 11, 14, Rng(3).at(torch.arange(2))
    bits = rng.bits((height * width,)).view(2, height, width)
    ours = sources(height, width, reach, rng, torch.device("cpu")).view(2, height, width)
    for n in range(2):
        x = np.arange(height * width).reshape(height, width)
        for h in range(height - reach, reach, -1):
            for w in range(width - reach, reach, -1):
                b = int(bits[n, h, w])
                dx, dy = ((b & 0xFFFF) * 2 * reach >> 16) - reach, (((b >> 16) & 0xFFFF) * 2 * reach >> 16) - reach
                x[h, w] = x[h + dy, w + dx]
        assert np.array_equal(ours[n].numpy(), x)


@pytest.mark.parametrize(("table", "severity", "photons"), [("imagenet", 5, 3), ("imagenet", 1, 60), ("cifar", 1, 500)])
@pytest.mark.parametrize("level", [0, 1, 100, 255])
def test_shot_noise_is_poisson(table, severity, photons, level):
    from scipy import stats

    x = torch.full((4, 3, 64, 64), level / 255)
    out = corrupt(x, "shot_noise", severity, table).flatten()
    rate = level * photons / 255
    k = np.arange(photons)  # white is clipped
    p = stats.poisson(rate).pmf(k)
    p = np.append(p, 1 - p.sum())
    counts = np.array([int((out == q).sum()) for q in np.append(np.floor(255 * k / photons + 2**-12), 255) / np.float32(255)])
    if photons > 255:  # several numbers share a level
        assert abs(float(out.mean()) * 255 - np.dot(p, np.append(np.floor(255 * k / photons), 255))) < 0.05
        return
    assert counts.sum() == out.numel()
    keep = p * out.numel() > 5
    if keep.sum() > 1:
        f = p[keep] / p[keep].sum() * counts[keep].sum()
        assert stats.chisquare(counts[keep], f).pvalue > 1e-4
    else:
        assert counts[keep].sum() == out.numel()


def test_frost_takes_photographs_from_a_folder(tmp_path):
    from PIL import Image

    x, rng = torch.zeros(3, 3, 40, 24), Rng(0).at(torch.arange(3))
    with pytest.raises(UserError, match=r"no \.png, \.jpg or \.jpeg files in the folder"):
        Frost(folder=str(tmp_path))(x, 1, rng)
    Image.new("RGB", (30, 20), (100, 150, 200)).save(tmp_path / "a.png")
    out = Frost(table="imagenet", folder=str(tmp_path))(x, 1, rng)
    assert (out[:, :, 5, 5] * 255).round().tolist() == [[40, 60, 80]] * 3  # 0.4 of the photograph
    assert not torch.equal(Frost(table="imagenet")(x, 1, rng), out)


@pytest.mark.parametrize("severity", [None, 4])
def test_the_stage_corrupts_its_share_of_the_images(severity):
    n = 200
    x = torch.rand(n, 3, 8, 8).mul(255).floor() / 255
    view = View(x, one_hot(torch.arange(n) % 10, 10), key=torch.arange(n) * 7, index=torch.arange(n))
    stage = Corrupted(corruption=Fog(), severity=severity, probability=0.4)
    out = stage(None, {"clean": view}, Rng(1))["clean"].x
    hit = (out != x).flatten(1).any(1)
    assert 50 < int(hit.sum()) < 110
    i = int(hit.nonzero()[0])
    alone = View(x[i : i + 1], view.y[i : i + 1], key=view.key[i : i + 1])
    assert torch.equal(stage(None, {"clean": alone}, Rng(1))["clean"].x[0], out[i])
    again = [
        (stage(None, {"clean": view}, Rng(1))["clean"].x == out).all(),
        (stage(None, {"clean": view}, Rng(2))["clean"].x == out).all(),
    ]
    assert again == [True, False]
    if severity:
        rng = Rng(1).at(view.key).child("corruption", "fog").select(hit)
        assert torch.equal(out[hit], Fog()(x[hit], severity, rng))
