"""Corruptions against independent per-image references in float64, and the laws of draws."""

import colorsys
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from robustlab import image_ops
from robustlab.corruptions import corrupt, jpeg_compression, tables
from robustlab.image_ops import at_severity, disk_kernel, filter2d, gaussian_kernel, mirrored, quantize
from robustlab.registry import entries, lookup
from robustlab.rng import Rng
from robustlab.types import UserError

TABLES = ("cifar", "imagenet")
BRIGHTNESS = {"cifar": (0.05, 0.1, 0.15, 0.2, 0.3), "imagenet": (0.1, 0.2, 0.3, 0.4, 0.5)}
CONTRAST = {"cifar": (0.75, 0.5, 0.4, 0.3, 0.15), "imagenet": (0.4, 0.3, 0.2, 0.1, 0.05)}
DEFOCUS = {
    "cifar": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "imagenet": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
}
SIGMA = {"cifar": (0.04, 0.06, 0.08, 0.09, 0.1), "imagenet": (0.08, 0.12, 0.18, 0.26, 0.38)}
IMPULSE = {"cifar": (0.01, 0.02, 0.03, 0.05, 0.07), "imagenet": (0.03, 0.06, 0.09, 0.17, 0.27)}
# Where the published tables do not grow: (name, table).
NOT_MONOTONE = {
    ("defocus_blur", "cifar"),
    ("elastic_transform", "cifar"),
    ("fog", "imagenet"),
    *((name, table) for name in ("frost", "glass_blur", "saturate", "spatter") for table in ("cifar", "imagenet")),
}


def images(n, c, side, seed=0):
    """Smooth random images with black, white and grey pixels among them, as (N, H, W, C) uint8 and as (N, C, H, W) floats."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(n, side, side, c)), (0, side / 8, side / 8, 0))
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    raw = np.uint8(np.clip(smooth * 1.3 - 0.15, 0, 1) * 255)
    raw[:, 0, 0], raw[:, 0, 1], raw[:, 1, 0] = 0, 255, 100
    return raw, torch.from_numpy(raw).permute(0, 3, 1, 2).float() / 255


def brightness_reference(x, c):
    def one(pixel):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb(h, s, min(max(v + c, 0), 1))

    if x.shape[-1] == 1:
        return x + c
    return np.array([[one(p) for p in row] for row in x])


def contrast_reference(x, c):
    m = x.mean(axis=(0, 1), keepdims=True)
    return (x - m) * c + m


def defocus_reference(x, radius, blur):
    half, reach = (8, 1) if radius <= 8 else (radius, 2)
    t = np.arange(-half, half + 1)
    disk = (t[:, None] ** 2 + t[None, :] ** 2 <= radius**2).astype(float)
    disk /= disk.sum()
    window = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * blur**2))
    window /= window.sum()
    disk = ndimage.correlate1d(ndimage.correlate1d(disk, window, 0, mode="mirror"), window, 1, mode="mirror")
    return np.stack([ndimage.correlate(x[:, :, k], disk, mode="mirror") for k in range(x.shape[-1])], -1)


def assert_agree(ours, raw, reference):
    """Equal levels wherever the reference's exact value is not at the edge between two levels, and never more than one apart."""
    exact = np.stack([np.clip(reference(image / 255.0), 0, 1) * 255 for image in raw])
    levels = ours.permute(0, 2, 3, 1).double().numpy() * 255
    assert np.abs(levels - np.round(levels)).max() < 1e-4
    apart = np.abs(np.round(levels) - np.floor(exact))
    edge = np.abs(exact - np.round(exact)) < 1e-3
    assert apart.max() <= 1
    assert not apart[~edge].any()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("side", [16, 32])
def test_deterministic_corruptions_match_their_definitions(side, severity, table, channels):
    raw, x = images(2, channels, side)
    s = severity - 1
    assert_agree(corrupt(x, "brightness", severity, table), raw, lambda i: brightness_reference(i, BRIGHTNESS[table][s]))
    assert_agree(corrupt(x, "contrast", severity, table), raw, lambda i: contrast_reference(i, CONTRAST[table][s]))
    assert_agree(corrupt(x, "defocus_blur", severity, table), raw, lambda i: defocus_reference(i, *DEFOCUS[table][s]))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_gaussian_noise_is_normal_with_the_sigma_of_the_table(severity, table):
    sigma = SIGMA[table][severity - 1]
    x = torch.full((4, 3, 64, 64), 128 / 255)
    levels = (corrupt(x, "gaussian_noise", severity, table) * 255).round().numpy().ravel()
    cells = np.arange(0, 256, 8)  # P(level < a) of the truncated, clipped normal
    expected = np.diff(np.concatenate([[0.0], stats.norm(128, 255 * sigma).cdf(cells[1:]), [1.0]]))
    observed = np.histogram(levels, bins=np.append(cells, 256))[0]
    keep = expected * len(levels) > 10
    assert observed[~keep].sum() <= 60 + 3 * expected[~keep].sum() * len(levels)
    pvalue = stats.chisquare(observed[keep], expected[keep] / expected[keep].sum() * observed[keep].sum()).pvalue
    assert pvalue > 1e-4


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_impulse_noise_has_the_share_of_the_table_half_salt_half_pepper(severity, table):
    p, n = IMPULSE[table][severity - 1], 4 * 3 * 64 * 64
    x = torch.full((4, 3, 64, 64), 128 / 255)
    out = corrupt(x, "impulse_noise", severity, table)
    salt, pepper = int((out == 1).sum()), int((out == 0).sum())
    assert stats.binomtest(salt + pepper, n, p).pvalue > 1e-4
    assert stats.binomtest(salt, salt + pepper, 0.5).pvalue > 1e-4
    assert int((out == x).sum()) == n - salt - pepper
    hit = out.ne(x).float()
    both = float((hit[:, 0] * hit[:, 1]).mean())  # channels are hit independently
    assert abs(both - p * p) < 5 * math.sqrt(p * p / (n / 3)) + 1e-3


@pytest.mark.parametrize("name", sorted(entries("corruption")))
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 16, 16), (3, 20, 33), (3, 1, 1)])
def test_every_corruption_at_every_size_stays_on_the_grid(name, shape):
    x = (torch.rand(3, *shape) * 255).floor() / 255
    for table in tables(lookup("corruption", name)):
        for severity in (1, 5):
            before = x.clone()
            out = corrupt(x, name, severity, table)
            assert out.shape == x.shape
            assert out.dtype == torch.float32
            levels = out * 255
            assert torch.equal(levels.round() / 255, out)
            assert float(out.min()) >= 0
            assert float(out.max()) <= 1
            assert torch.equal(x, before)
    assert corrupt(x[:0], name, 1, table).shape == (0, *shape)


@pytest.mark.parametrize("name", sorted(entries("corruption")))
def test_the_result_for_an_image_depends_on_seed_and_index_only(name):
    for table in tables(lookup("corruption", name)):
        _, x = images(6, 3, 32)
        torch.manual_seed(1)
        whole = corrupt(x, name, 3, table, seed=7)
        state = torch.get_rng_state()
        part = corrupt(x[2:5], name, 3, table, seed=7, index=torch.arange(2, 5, dtype=torch.int32))
        assert torch.equal(whole[2:5], part)
        one = torch.cat([corrupt(x[i : i + 1], name, 3, table, seed=7, index=torch.tensor([i])) for i in range(6)])
        assert torch.equal(whole, one)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", sorted(entries("corruption")))
def test_the_chunks_of_a_large_batch_do_not_show(name, monkeypatch):
    table = tables(lookup("corruption", name))[0]
    _, x = images(5, 3, 24)
    whole = corrupt(x, name, 5, table)
    monkeypatch.setattr(image_ops, "CHUNK", {"cpu": 2 * 3 * 24 * 24})
    assert torch.equal(corrupt(x, name, 5, table), whole)


@pytest.mark.parametrize("name", sorted(set(entries("corruption")) - {"saturate"}))
def test_one_channel_is_corrupted_too(name):
    _, x = images(4, 1, 32)
    for table in tables(lookup("corruption", name)):
        assert float((corrupt(x, name, 5, table) - x).abs().mean()) > 0.5 / 255


@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise"])
def test_draws_differ_by_seed_index_and_severity(name):
    x = torch.full((2, 1, 16, 16), 128 / 255)
    out = corrupt(x, name, 5)
    assert not torch.equal(out[0], out[1])
    assert not torch.equal(out, corrupt(x, name, 5, seed=1))
    a, b = corrupt(x, name, 4, "imagenet") < x - 0.1, corrupt(x, name, 5, "imagenet") < x - 0.1
    assert int((a & ~b).sum()) > 5  # severity 5 is not the draws of severity 4, scaled up


@pytest.mark.parametrize("name", sorted(entries("corruption")))
def test_more_severe_is_further_away(name):
    x = images(4, 3, 32)[1].repeat(8, 1, 1, 1)
    for table in tables(lookup("corruption", name)):
        change = [float((corrupt(x, name, s, table) - x).abs().mean()) for s in range(1, 6)]
        assert change[0] > 0
        if (name, table) not in NOT_MONOTONE:
            assert all(b > 0.93 * a for a, b in itertools.pairwise(change)), (table, change)  # a table's steps are small, draws few
            assert change[4] > change[0]


def test_bad_input_is_one_line():
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(UserError, match=r"unknown corruption 'gausian_noise' \(did you mean 'gaussian_noise'\?\)"):
        corrupt(x, "gausian_noise", 1)
    for severity in (0, 6, -1, 2.5):
        with pytest.raises(UserError, match="severity must be"):
            corrupt(x, "contrast", severity)
    with pytest.raises(UserError, match=r"unknown table 'imagnet' .*imagenet"):
        corrupt(x, "contrast", 1, table="imagnet")
    with pytest.raises(UserError, match="'ripple' has no severities for the table 'imagenet', only for 'cifar'"):
        corrupt(x, "ripple", 1, table="imagenet")
    with pytest.raises(UserError, match="index must name each of the 2 images"):
        corrupt(x, "contrast", 1, index=torch.arange(3))
    with pytest.raises(ValueError, match="divide by 255"):
        corrupt(x * 255, "contrast", 1)
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        corrupt(x[0], "contrast", 1)
    with pytest.raises(ValueError, match="severity must be"):
        lookup("corruption", "contrast")()(x, 0, Rng(0).at(torch.arange(2)))


# ------------------------------------------------------------------------------------------------------ image operations


def test_quantize_truncates_and_keeps_every_level():
    levels = torch.arange(256)
    assert torch.equal((quantize(levels.float() / 255) * 255).round().long(), levels)
    assert torch.equal((quantize((levels + 0.999).clamp_max(255) / 255) * 255).round().long(), levels)
    assert quantize(torch.tensor([-3.0, 2.0])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("by", [0, 1, 7, 30])
def test_mirrored_positions_are_numpys_reflection(n, by):
    assert mirrored(n, by, torch.device("cpu")).tolist() == np.pad(np.arange(n), by, mode="reflect").tolist()


def test_filter2d_correlates_with_an_asymmetric_kernel():
    x, kernel = torch.rand(2, 3, 9, 14, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    expected = np.stack([[ndimage.correlate(c, kernel.numpy(), mode="mirror") for c in image] for image in x.numpy()])
    np.testing.assert_allclose(filter2d(x, kernel).numpy(), expected, atol=1e-12)


def test_filter2d_keeps_its_precision_under_autocast():
    x, kernel = torch.rand(1, 1, 16, 16), disk_kernel(3, 0.1)
    plain = filter2d(x, kernel)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(filter2d(x, kernel), plain)


def test_kernels():
    assert float(gaussian_kernel(5, 0.7).sum()) == pytest.approx(1, abs=1e-12)
    assert disk_kernel(0.3, 0.4).shape == (3, 3)
    assert disk_kernel(10, 0.5).shape == (21, 21)
    five = disk_kernel(1, 0.01)  # almost no smoothing: the centre and its four neighbours
    expected = torch.tensor([[0, 0.2, 0], [0.2, 0.2, 0.2], [0, 0.2, 0]], dtype=torch.float64)
    torch.testing.assert_close(five, expected, atol=1e-12, rtol=0)


def test_at_severity_counts_from_one():
    assert [at_severity("abcde", s) for s in range(1, 6)] == list("abcde")


def test_corrupt_is_what_a_suite_draws():
    x = torch.rand(3, 1, 8, 8)
    rng = Rng(5).child("corruption", "gaussian_noise", 2).at(torch.arange(3))
    assert torch.equal(corrupt(x, "gaussian_noise", 2, seed=5), lookup("corruption", "gaussian_noise")()(x, 2, rng))


@pytest.mark.parametrize("channels", [1, 3])
def test_both_jpeg_codecs_give_the_same_levels(channels):
    levels = (torch.rand(channels, 37, 50, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    levels[:, :20] = torch.arange(50, dtype=torch.uint8) * 5
    for quality in (7, 25, 80):
        assert torch.equal(jpeg_compression.codec()(levels, quality), jpeg_compression.by_pillow(levels, quality))
