"""What the accuracies under corruptions come to (Hendrycks and Dietterich, ICLR 2019).

    mean accuracy      mean over corruptions of the mean over severities; error = 1 - mean is the unnormalised mean error, which
                       is what is reported for CIFAR-10-C
    mCE                mean over c of  sum_s E(c, s) / sum_s A(c, s)                  E: the model's error, A: AlexNet's
    relative mCE       mean over c of  sum_s (E(c, s) - E0) / sum_s (A(c, s) - A0)    E0, A0: errors on clean images
    ECE                of the confidences, for each corruption and severity; see ``calibration``

Two AlexNets are in use, and the figures differ in the first decimal, so a score carries the name of its own:

    alexnet-50k   all 50,000 images: the constants that github.com/hendrycks/robustness and scripts derived from AugMix's carry;
                  clean error 43.5 % (Table 1 of the paper)
    alexnet-5k    RobustBench's 5,000 images: means over severities of the row ``AlexNet`` in its
                  model_info/imagenet/corruptions/unaggregated_results.csv and _3d.csv; clean error 43.76 %

Both were measured on the published files. For images that are made here there is no baseline, and mCE is not given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from robustlab.evaluation.calibration import expected_error
from robustlab.evaluation.result import Tally
from robustlab.registry import nearest
from robustlab.types import UserError

GENERATED, OFFICIAL = "generated", "official files"
Z = 1.959963984540054  # of a 95 % interval


@dataclass(frozen=True)
class Baseline:
    """Errors of an AlexNet in [0, 1]: on clean images, and for each corruption the mean over the five severities."""

    clean: float
    errors: Mapping[str, float]


BASELINES = {
    "alexnet-50k": Baseline(
        0.435,
        {
            "gaussian_noise": 0.886428,
            "shot_noise": 0.894468,
            "impulse_noise": 0.922640,
            "defocus_blur": 0.819880,
            "glass_blur": 0.826268,
            "motion_blur": 0.785948,
            "zoom_blur": 0.798360,
            "snow": 0.866816,
            "frost": 0.826572,
            "fog": 0.819324,
            "brightness": 0.564592,
            "contrast": 0.853204,
            "elastic_transform": 0.646056,
            "pixelate": 0.717840,
            "jpeg_compression": 0.606500,
        },
    ),
    "alexnet-5k": Baseline(
        0.4376,
        {
            "gaussian_noise": 0.8816,
            "shot_noise": 0.8883,
            "impulse_noise": 0.9172,
            "defocus_blur": 0.8220,
            "glass_blur": 0.8308,
            "motion_blur": 0.7872,
            "zoom_blur": 0.7957,
            "snow": 0.8680,
            "frost": 0.8315,
            "fog": 0.8236,
            "brightness": 0.5585,
            "contrast": 0.8543,
            "elastic_transform": 0.6480,
            "pixelate": 0.7186,
            "jpeg_compression": 0.6068,
            "near_focus": 0.6107,
            "far_focus": 0.6515,
            "bit_error": 0.6834,
            "color_quant": 0.5962,
            "flash": 0.8012,
            "fog_3d": 0.7736,
            "h265_abr": 0.5674,
            "h265_crf": 0.5252,
            "iso_noise": 0.9315,
            "low_light": 0.8225,
            "xy_motion_blur": 0.8248,
            "z_motion_blur": 0.7959,
        },
    ),
}


def mce(errors: Mapping[str, Sequence[float]], baseline: str = "alexnet-50k", *, clean: float | None = None) -> float:
    """The mean corruption error, or with ``clean`` the relative one; 1 is AlexNet's.

    Args:
        errors: for each corruption the errors in [0, 1] at the five severities.
        baseline: ``alexnet-50k`` or ``alexnet-5k``.
        clean: the model's error on clean images.

    Raises:
        UserError: an unknown baseline, one without a corruption, or other than five severities.
    """
    if baseline not in BASELINES:
        raise UserError(f"unknown baseline '{baseline}'{nearest(baseline, BASELINES)}; expected one of {', '.join(BASELINES)}")
    alexnet = BASELINES[baseline]
    if not errors:
        raise UserError("mce: no corruptions")
    ratios = []
    for name, values in errors.items():
        if name not in alexnet.errors:
            raise UserError(f"the baseline {baseline} has no '{name}'{nearest(name, alexnet.errors)}")
        if len(values) != 5:
            raise UserError(f"mce: expected the errors of '{name}' at five severities, got {len(values)}")
        ours, theirs = sum(values), 5 * alexnet.errors[name]
        ratios.append(ours / theirs if clean is None else (ours - 5 * clean) / (theirs - 5 * alexnet.clean))
    return sum(ratios) / len(ratios)


def scores(
    n: int,
    clean: Tally,
    corrupted: Mapping[tuple[str, int], Tally],
    attacked: Mapping[tuple[str, int], Tally],
    suite: Mapping[str, Any],
    threat: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What a corruption suite measured.

    Args:
        n: images.
        clean, corrupted, attacked: tallies; of each corruption and severity, and of the attack there, if there was one.
        suite: its parameters, as the header of the ledger has them: ``files`` is None for images made here.
        threat: norm and radius of that attack.

    Returns:
        ``source`` (generated or official files); ``mean`` accuracy with its 95 % ``interval``, normal, over the images' own means;
        ``error``; ``worst`` cell; ``mce`` and ``relative_mce`` by baseline, where they are defined; ``ece`` of clean images
        (``clean``), of each corruption by severity, and their ``mean``; ``robust``: norm, eps, mean accuracy and
        accuracies by corruption and severity under attack, or None.
    """
    names = list(dict.fromkeys(name for name, _ in corrupted))
    accuracy = {name: {s: t.correct / n for (other, s), t in corrupted.items() if other == name} for name in names}
    cells = [(value, name, s) for name, row in accuracy.items() for s, value in row.items()]
    low, name, severity = min(cells)
    error0, official = 1 - clean.correct / n, suite.get("files") is not None
    errors = {name: [1 - v for v in row.values()] for name, row in accuracy.items()}
    usable = [b for b in suite.get("baselines", ()) if official and _defined(b, errors)]
    return {
        "source": OFFICIAL if official else GENERATED,
        "mean": _mean([_mean(list(row.values())) for row in accuracy.values()]),
        "interval": _interval(list(corrupted.values()), n),
        "error": 1 - _mean([_mean(list(row.values())) for row in accuracy.values()]),
        "worst": {"corruption": name, "severity": severity, "accuracy": low},
        "mce": {b: mce(errors, b) for b in usable},
        "relative_mce": {b: mce(errors, b, clean=error0) for b in usable},
        "ece": _calibration(clean, corrupted),
        "robust": _robust(n, attacked, threat) if threat is not None else None,
    }


def _defined(baseline: str, errors: Mapping[str, Sequence[float]]) -> bool:
    """All of either benchmark's corruptions at all severities: a mean over some of them is another score."""
    known = list(BASELINES[baseline].errors)
    return set(errors) in (set(known[:15]), set(known[15:])) and all(len(v) == 5 for v in errors.values())


def _calibration(clean: Tally, corrupted: Mapping[tuple[str, int], Tally]) -> dict[str, Any] | None:
    if not all(t.confidence for t in (clean, *corrupted.values())):
        return None
    out: dict[str, Any] = {}
    for (name, severity), tally in corrupted.items():
        out.setdefault(name, {})[str(severity)] = _ece(tally)
    for row in out.values():
        row["mean"] = _mean(list(row.values()))
    return {"clean": _ece(clean), "mean": _mean([row["mean"] for row in out.values()]), "corruptions": out}


def _ece(tally: Tally) -> float:
    sure = torch.tensor([tally.confidence[i] for i in tally.survived], dtype=torch.float64)
    return expected_error(sure, torch.tensor(list(tally.survived.values()), dtype=torch.float64))


def _robust(n: int, attacked: Mapping[tuple[str, int], Tally], threat: Mapping[str, Any]) -> dict[str, Any]:
    rows: dict[str, dict[str, float]] = {}
    for (name, severity), tally in attacked.items():
        rows.setdefault(name, {})[str(severity)] = tally.correct / n
    for row in rows.values():
        row["mean"] = _mean(list(row.values()))
    mean = _mean([row["mean"] for row in rows.values()])
    return {"norm": threat["norm"], "eps": threat["eps"], "mean": mean, "corruptions": rows}


def _interval(tallies: Sequence[Tally], n: int) -> list[float]:
    """Of the mean over all cells: an image is right in some share of the cells, and the images are the sample."""
    right: dict[int, int] = {}
    for tally in tallies:
        for i, verdict in tally.survived.items():
            right[i] = right.get(i, 0) + verdict
    share = torch.tensor(list(right.values()), dtype=torch.float64) / len(tallies)
    mean, half = float(share.mean()), Z * float(share.std()) / math.sqrt(n) if n > 1 else 1.0
    return [max(mean - half, 0.0), min(mean + half, 1.0)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
