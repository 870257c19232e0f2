"""Calibration against torchmetrics and scikit-learn on random inputs, and against closed forms."""

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from robustlab.evaluation.calibration import calibration


def inputs(seed, n=500, k=7, scale=2.0):
    torch.manual_seed(seed)
    z = scale * torch.randn(n, k, dtype=torch.float64)
    y = torch.where(torch.rand(n) < 0.5, z.argmax(1), torch.randint(k, (n,)))
    return z, y


def sklearns(confidence, right, bins):
    """The ECE from scikit-learn's reliability curve and numpy's counts."""
    rate, mean = calibration_curve(right, confidence, n_bins=bins)
    counts = np.histogram(confidence, np.linspace(0, 1, bins + 1))[0]
    return float((counts[counts > 0] * np.abs(rate - mean)).sum() / len(right))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bins", [10, 15])
def test_figures_are_those_of_independent_libraries(seed, bins):
    z, y = inputs(seed, k=2 + seed)
    p, found = z.softmax(1).numpy(), calibration(z, y, bins)
    right = (z.argmax(1) == y).numpy()
    assert found.ece == pytest.approx(sklearns(p.max(1), right, bins), abs=1e-9)
    assert found.classwise_ece == pytest.approx(np.mean([sklearns(p[:, k], y == k, bins) for k in range(p.shape[1])]), abs=1e-9)
    assert found.nll == pytest.approx(log_loss(y.numpy(), p, labels=range(p.shape[1])), abs=1e-9)
    both = sum(brier_score_loss((y == k).numpy(), p[:, k]) for k in range(p.shape[1]))
    assert found.brier == pytest.approx(both, abs=1e-9)
    assert found.accuracy == pytest.approx(right.mean())


def test_a_sure_and_right_model_has_no_error():
    found = calibration(torch.eye(4) * 1000, torch.arange(4))
    assert (found.ece, found.classwise_ece, found.brier, found.nll, found.accuracy) == (0, 0, 0, 0, 1)


def test_a_sure_and_wrong_model():
    found = calibration(torch.eye(4) * 1e4, (torch.arange(4) + 1) % 4)
    assert (found.ece, found.brier, found.accuracy) == (1, 2, 0)
    assert found.nll == pytest.approx(1e4)


def test_a_constant_model_at_the_base_rate_is_calibrated():
    """Confidence 1/2 in two classes, half of them each: no ECE, Brier 1/2, NLL log 2."""
    found = calibration(torch.zeros(10, 2), torch.arange(10) % 2)
    assert found.ece == pytest.approx(0, abs=1e-12)
    assert (found.brier, found.nll) == (pytest.approx(0.5), pytest.approx(np.log(2)))


def test_selection_keeps_the_most_confident():
    z = torch.tensor([[4.0, 0], [3, 0], [2, 0], [1, 0]])
    found = calibration(z, torch.tensor([0, 0, 1, 1]))
    assert found.selective == {"0.5": 1.0, "0.8": pytest.approx(2 / 3), "0.9": 0.5, "1": 0.5}


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin():
    found = calibration(torch.zeros(3, 2), torch.tensor([0, 0, 1]), bins=2)
    assert [m for m, _, _ in found.bins] == [3, 0]


@pytest.mark.parametrize(
    ("z", "y"), [(torch.zeros(0, 3), torch.zeros(0)), (torch.zeros(2, 3), torch.zeros(3)), (torch.zeros(2), torch.zeros(2))]
)
def test_bad_shapes(z, y):
    with pytest.raises(ValueError, match="expected logits"):
        calibration(z, y.long())
