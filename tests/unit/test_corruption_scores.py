"""Corruption suites: published files in their exact layout, the scores by hand, attacks on corrupted images, boards."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from robustlab.config import load_suite
from robustlab.evaluation.calibration import calibration
from robustlab.evaluation.corrupted import enlarged
from robustlab.evaluation.corruption_scores import BASELINES, mce
from robustlab.evaluation.rederive import rederive
from robustlab.evaluation.runner import evaluate
from robustlab.results.leaderboard import add, build, sections
from robustlab.results.record import record_from, write_record
from robustlab.types import UserError

CHECKOUT = os.environ.get("ROBUSTLAB_ROBUSTBENCH")  # a checkout of RobustBench's repository
NAMES = ("brightness", "contrast")
N, K = 24, 3


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (N, 3, 8, 8), generator=generator).float() / 255
    return x, torch.arange(N) % K


@pytest.fixture(scope="module")
def f():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, K))


def corrupted(x, name, severity):
    import robustlab as rl

    return rl.corrupt(x, name, severity)


@pytest.fixture
def arrays(tmp_path, data):
    """CIFAR-10-C's layout: five blocks of the test images, in order."""
    x, y = data
    np.save(tmp_path / "labels.npy", np.tile(y.numpy(), 5))
    for name in NAMES:
        blocks = [(corrupted(x, name, s) * 255).round().byte().permute(0, 2, 3, 1).numpy() for s in range(1, 6)]
        np.save(tmp_path / f"{name}.npy", np.concatenate(blocks))
    return tmp_path


def suite(folder, **fields):
    return load_suite(json.dumps({"name": "mine", "corruptions": list(NAMES), "files": str(folder), **fields}))


def test_files_in_cifar_layout_score_as_the_images_they_hold(arrays, data, f, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    result = evaluate(f, data, suite(arrays), batch_size=7, out=out)
    for name in NAMES:
        for s in range(1, 6):
            right = (f(corrupted(data[0], name, s)).argmax(1) == data[1]).float().mean()
            assert result.corruptions[name][str(s)] == pytest.approx(float(right))
    assert result.corruption_scores["source"] == "official files"
    assert rederive(out / "ledger.jsonl").corruption_scores == result.corruption_scores
    assert str(arrays) not in (out / "ledger.jsonl").read_text()
    assert evaluate(f, data, suite(arrays), batch_size=7, out=out, resume=True).corruptions == result.corruptions


def _replace(folder, name, change):
    x = np.load(folder / f"{name}.npy")
    np.save(folder / f"{name}.npy", change(x))


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        ("contrast", lambda x: x.astype(np.float32), "expected uint8, got float32"),
        ("contrast", lambda x: x[:-1], "expected 120 images, 5 x 24, got 119"),
        ("contrast", lambda x: x.transpose(0, 3, 1, 2), "expected images of 8x8x3"),
        ("contrast", lambda x: x.reshape(5, N, 8, 8, 3)[::-1].reshape(x.shape), "the severities are not in order"),
        ("contrast", lambda x: x.reshape(5, N, 8, 8, 3)[:, ::-1].reshape(x.shape), "not in the order of the clean ones"),
        ("labels", lambda y: y[::-1], "another order or another data set: row 0 has label 2, test image 0 has 0"),
        ("labels", lambda y: np.repeat(y[:N], 5), "another order or another data set"),
        ("labels", lambda y: y[:N], "expected 120 labels"),
    ],
)
def test_wrong_files_are_refused_in_one_line(arrays, data, f, name, change, line):
    _replace(arrays, name, change)
    with pytest.raises(UserError) as error:
        evaluate(f, data, suite(arrays))
    assert line in str(error.value)
    assert len(error.value.lines) == 1


def test_a_missing_corruption_is_refused(arrays, data, f):
    (arrays / "contrast.npy").unlink()
    with pytest.raises(UserError, match=r"contrast\.npy is missing.*here are: brightness"):
        evaluate(f, data, suite(arrays))
    with pytest.raises(UserError, match="no such folder"):
        evaluate(f, data, suite(arrays / "nowhere"))


@pytest.fixture
def folders(tmp_path, data):
    """ImageNet-C's layout, the images of each class in order."""
    x, y = data
    for name in NAMES:
        for s in range(1, 6):
            for i, image in enumerate((corrupted(x, name, s) * 255).round().byte().permute(0, 2, 3, 1).numpy()):
                folder = tmp_path / "digital" / name / str(s) / f"n{int(y[i]):08d}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / f"val_{i:05d}.JPEG", format="PNG")  # without loss, so scores are exact
    return tmp_path


def test_files_in_imagenet_layout(folders, data, f):
    order = data[1].argsort(stable=True)
    x, y = data[0][order], data[1][order]
    result = evaluate(f, (x, y), suite(folders, severities=[1, 5]))
    right = (f(corrupted(x, "contrast", 5)).argmax(1) == y).float().mean()
    assert result.corruptions["contrast"]["5"] == pytest.approx(float(right))
    with pytest.raises(UserError, match="another order"):
        evaluate(f, data, suite(folders))
    next((folders / "digital/contrast/3/n00000001").iterdir()).unlink()
    with pytest.raises(UserError, match=r"contrast/3: expected 24 images, got 23"):
        evaluate(f, (x, y), suite(folders))
    with pytest.raises(UserError, match="a folder fog is missing"):
        evaluate(f, (x, y), suite(folders, corruptions=["fog"]))


def test_mce_by_hand():
    """Two corruptions, the published AlexNet rows written out again."""
    errors = {"gaussian_noise": [0.3, 0.4, 0.5, 0.6, 0.7], "fog": [0.2] * 5}
    assert mce(errors) == pytest.approx((2.5 / (5 * 0.886428) + 1.0 / (5 * 0.819324)) / 2)
    assert mce(errors, "alexnet-5k") == pytest.approx((2.5 / 4.408 + 1.0 / 4.118) / 2)
    relative = (2.5 - 0.5) / (5 * 0.886428 - 5 * 0.435), (1.0 - 0.5) / (5 * 0.819324 - 5 * 0.435)
    assert mce(errors, clean=0.1) == pytest.approx(sum(relative) / 2)
    relative = (2.5 - 0.5) / (4.408 - 5 * 0.4376), (1.0 - 0.5) / (4.118 - 5 * 0.4376)
    assert mce(errors, "alexnet-5k", clean=0.1) == pytest.approx(sum(relative) / 2)


@pytest.mark.parametrize("name", BASELINES)
def test_alexnet_is_one(name):
    errors = {c: [e] * 5 for c, e in BASELINES[name].errors.items()}
    assert mce(errors, name) == pytest.approx(1)
    assert mce(errors, name, clean=BASELINES[name].clean) == pytest.approx(1)


def test_mce_of_resnet_50():
    """RobustBench's rows of its standard ResNet-50 (5,000 images), summed over the severities, and its mCE, 76.38."""
    accuracy = {
        "shot_noise": 1.4548,
        "motion_blur": 1.9066,
        "snow": 1.6076,
        "pixelate": 2.243,
        "gaussian_noise": 1.5732,
        "defocus_blur": 1.9452,
        "brightness": 3.3922,
        "fog": 2.275,
        "zoom_blur": 1.8158,
        "frost": 1.8658,
        "glass_blur": 1.3384,
        "impulse_noise": 1.2994,
        "contrast": 1.9552,
        "jpeg_compression": 2.6922,
        "elastic_transform": 2.2478,
    }
    errors = {name: [1 - total / 5] * 5 for name, total in accuracy.items()}
    assert 100 * mce(errors, "alexnet-5k") == pytest.approx(76.38, abs=0.011)
    assert 100 * mce(errors, "alexnet-50k") == pytest.approx(76.38, abs=0.05), "the two baselines are of one network"


@pytest.mark.skipif(CHECKOUT is None, reason="set ROBUSTLAB_ROBUSTBENCH to a checkout of RobustBench")
def test_mce_of_all_of_robustbench():
    folder = Path(CHECKOUT) / "model_info" / "imagenet" / "corruptions"
    names, _, *rows = csv.reader((folder / "unaggregated_results.csv").read_text().splitlines())
    seen = 0
    for label, *cells in (row for row in rows if row and row[0]):
        errors: dict[str, list[float]] = {}
        for name, cell in zip(names[1:], cells, strict=True):
            if name in BASELINES["alexnet-5k"].errors:
                errors.setdefault(name, []).append(1 - float(cell))
        published = json.loads((folder / f"{label}.json").read_text())["corruptions_mce"]
        assert 100 * mce(errors, "alexnet-5k") == pytest.approx(float(published), abs=0.015), label
        seen += 1
    assert seen == 12


def test_ece_of_each_corruption_is_that_of_its_logits(data, f):
    result = evaluate(f, data, load_suite("{name: corruptions-quick, severities: [2]}"), batch_size=5)
    told = result.corruption_scores["ece"]
    with torch.no_grad():
        assert told["clean"] == pytest.approx(calibration(f(data[0]), data[1]).ece, abs=1e-4)
        z = f(corrupted(data[0], "contrast", 2))
    assert told["corruptions"]["contrast"]["2"] == pytest.approx(calibration(z, data[1]).ece, abs=1e-4)
    assert result.corruption_scores["mce"] == {}


def test_attacked_corrupted_images(data, f, tmp_path):
    attack = {"name": "pgd", "steps": 3, "norm": "linf", "eps": 0.03}
    spec = {"name": "corruptions-quick", "severities": [1, 3], "attack": attack}
    result = evaluate(f, data, spec, batch_size=7, out=tmp_path)
    told = result.corruption_scores["robust"]
    for name, row in result.corruptions.items():
        assert all(told["corruptions"][name][s] <= row[s] for s in ("1", "3"))
    assert told["mean"] < result.corruption_accuracy
    assert rederive(tmp_path / "ledger.jsonl").corruption_scores == result.corruption_scores


def test_enlarging_is_undone():
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(nn.functional.avg_pool2d(enlarged(x, 32), 2), x)
    with pytest.raises(UserError, match="32 is no multiple"):
        enlarged(torch.rand(1, 1, 28, 28), 32)


def test_files_only_suites_say_so(data, f):
    with pytest.raises(UserError, match="near_focus exists only as published files"):
        evaluate(f, data, "3dcc")


def test_generated_and_official_never_share_a_section(arrays, data, f, tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    generated = load_suite(json.dumps({"name": "mine", "corruptions": list(NAMES), "severities": [1, 2, 3, 4, 5]}))
    for i, plan in enumerate((generated, suite(arrays))):
        record = record_from(evaluate(f, data, plan), model={"name": "m"}, data={"name": "noise"})
        add(folder, write_record(folder / f"r{i}.json", record))
    found = sections(folder)
    assert sorted([row.source for row in s.rows] for s in found) == [["generated"], ["official files"]]
    page = build(folder)[0].read_text()
    assert "noise, mine, generated" in page
    assert "noise, mine, official files" in page
