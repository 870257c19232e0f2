"""Seven broken defences in three strengths each are flagged by the check that is meant for them; honest nets are let through.

The thresholds were set on digits at 16 px with small_cnn (scripts/calibrate_reliability.py). Here they meet other images and other
nets: digits at 8 px with a smooth, narrow net always, Fashion-MNIST where ``ROBUSTLAB_TEST_DATA`` names a folder that has it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch import nn

from scripts.calibrate_reliability import MEANT, broken, digits, fashion, honest, report

pytestmark = pytest.mark.timeout(900)  # the zoo is trained in a fixture


class Zoo:
    """Honest nets by name, images, and the findings on the broken defences around the first."""

    def __init__(self, data, **fields):
        self.data, self.honest = data, honest(data, **fields)
        robust = self.honest["robust, batch norm"]
        self.found = {(kind, strength): report(f, data) for kind, strength, f in broken(robust, data.x[:500])}


@pytest.fixture(scope="module")
def small():
    return Zoo(digits(8), width=8, activation="silu")


@pytest.fixture(scope="module")
def clothes():
    folder = os.environ.get("ROBUSTLAB_TEST_DATA")
    if not folder or not Path(folder, "fashion-mnist").is_dir():
        pytest.skip("ROBUSTLAB_TEST_DATA names no folder with fashion-mnist/*.gz")
    return Zoo(fashion(Path(folder)))


def flagged(zoo):
    """(defence, strength) -> whether the check that is meant for it warns or fails."""
    verdicts = {key: {c.name: c.verdict for c in found.checks} for key, found in zoo.found.items()}
    return {key: verdicts[key][MEANT[key[0]]] != "pass" for key in verdicts}


def unfair(data, nets: dict[str, nn.Module]):
    """What is said against honest nets beyond one warning each."""
    against = {}
    for name, f in nets.items():
        bad = [(c.name, c.verdict, c.figure) for c in report(f, data).checks if c.verdict != "pass"]
        if len(bad) > 1 or any(verdict == "fail" for _, verdict, _ in bad):
            against[name] = bad
    return against


def test_broken_defences_are_flagged(small):
    hits = flagged(small)
    assert len(hits) == 21
    assert len({kind for kind, _ in hits}) == 7
    assert sum(hits.values()) >= 20, [key for key, hit in hits.items() if not hit]


def test_honest_nets_are_let_through(small):
    assert len(small.honest) == 4
    assert unfair(small.data, small.honest) == {}


def test_the_gradients_path_sees_what_no_attack_here_does(small):
    """Sparsified activations: the attacks find little, their gradients' tale is far from the truth."""
    for alpha in (0.25, 0.5):
        figures = {c.name: c.figure for c in small.found["sparsified", alpha].checks}
        assert figures["gradient_path"] > 0.15
        assert figures["gradients"] == 0


@pytest.mark.slow
def test_broken_defences_are_flagged_on_fashion_mnist(clothes):
    hits = flagged(clothes)
    assert len(hits) == 21
    assert sum(hits.values()) >= 20, [key for key, hit in hits.items() if not hit]


@pytest.mark.slow
def test_eight_honest_nets_are_let_through(clothes):
    data = digits(16)
    nets = honest(data)
    assert len(nets) + len(clothes.honest) == 8
    assert unfair(data, nets) == {}
    assert unfair(clothes.data, clothes.honest) == {}
