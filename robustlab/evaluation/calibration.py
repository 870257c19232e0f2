"""Does a classifier's confidence say how often it is right? On clean, adversarial or corrupted inputs alike.

With p = softmax(z), confidence c = max_k p_k, correct a = [argmax z = y], over n images:

    ECE        sum_b |B_b| / n |mean_{B_b} a - mean_{B_b} c|         B_b: confidences in ((b-1)/M, b/M], M = 15
               (Naeini, Cooper, Hauskrecht, AAAI 2015; Guo et al., ICML 2017)
    class-wise mean over k of the ECE of p_k as the confidence in [y = k]   (Kull et al., NeurIPS 2019)
    Brier      mean over images of sum_k (p_k - [y = k])^2, in [0, 2]
    NLL        mean of -log p_y, in nats
    selective  accuracy on the share q of the images with the largest confidence; ties by position

On adversarial inputs every figure depends on where the attack stopped: one that goes on after the first success makes wrong answers
confident. The stopping rule is therefore part of the result.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

BINS = 15
SHARES = (0.5, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Calibration:
    """Figures of one set of images.

    Attributes:
        n: images.
        accuracy, confidence: means, in [0, 1].
        ece, classwise_ece: in [0, 1].
        brier: in [0, 2].
        nll: in nats; infinite where a label has probability 0.
        selective: share of the images kept -> accuracy on them.
        bins: for each of the M bins: images, mean confidence, accuracy (0, 0, 0 where empty).
    """

    n: int
    accuracy: float
    confidence: float
    ece: float
    classwise_ece: float
    brier: float
    nll: float
    selective: dict[str, float]
    bins: list[tuple[int, float, float]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibration(z: Tensor, y: Tensor, bins: int = BINS) -> Calibration:
    """Measure the calibration of logits.

    Args:
        z: logits (n, K); computed with in float64.
        y: labels (n,), int64.
        bins: M.

    Raises:
        ValueError: no images, or shapes that do not fit.
    """
    if z.ndim != 2 or y.shape != z.shape[:1] or len(z) == 0:
        raise ValueError(f"expected logits (n, K) and labels (n,) with n > 0, got {tuple(z.shape)} and {tuple(y.shape)}")
    log_p = z.double().log_softmax(1)
    p = log_p.exp()
    hot = torch.zeros_like(p).scatter_(1, y[:, None], 1.0)
    c, guess = p.max(1)
    right = (guess == y).double()
    classwise = [expected_error(p[:, k], hot[:, k], bins) for k in range(z.shape[1])]
    order = c.argsort(descending=True, stable=True)
    kept = {q: max(round(q * len(z)), 1) for q in SHARES}
    return Calibration(
        n=len(z),
        accuracy=float(right.mean()),
        confidence=float(c.mean()),
        ece=expected_error(c, right, bins),
        classwise_ece=sum(classwise) / len(classwise),
        brier=float((p - hot).square().sum(1).mean()),
        nll=float(-log_p.gather(1, y[:, None]).mean()),
        selective={f"{q:g}": float(right[order[:m]].mean()) for q, m in kept.items()},
        bins=[(int(m), float(s / max(m, 1)), float(a / max(m, 1))) for m, s, a in zip(*binned(c, right, bins), strict=True)],
    )


def binned(confidence: Tensor, right: Tensor, bins: int = BINS) -> tuple[Tensor, Tensor, Tensor]:
    """Of each bin ((b-1)/M, b/M]: how many, the sum of their confidences, the sum of ``right``; (M,) each. Zero is in the first."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    which = torch.bucketize(confidence.double().contiguous(), edges[1:-1].to(confidence.device), right=False)
    counts = torch.zeros(3, bins, dtype=torch.float64)
    for row, value in zip(counts, (torch.ones_like(confidence), confidence, right), strict=True):
        row.index_add_(0, which.cpu(), value.double().cpu())
    return counts[0].long(), counts[1], counts[2]


def expected_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """The ECE of confidences (n,) in being right (n,)."""
    _, sure, hits = binned(confidence, right, bins)
    return float((hits - sure).abs().sum() / len(confidence))
