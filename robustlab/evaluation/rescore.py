"""A file of adversarial images scored again: projected on ball and box, classified in eval mode and full precision.

A claim that comes with its images can be checked without the attack: whatever made them, the robust accuracy is at most what this
says.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlab.evaluation.adversarial import Images
from robustlab.evaluation.runner import _device, _dtype, trusted
from robustlab.evaluation.sources import open_source
from robustlab.evaluation.statistics import Interval, wilson
from robustlab.modes import bn_mode, full_precision
from robustlab.types import Classifier, Threat, UserError


@dataclass(frozen=True)
class Rescored:
    """What a file of adversarial images shows.

    Attributes:
        n: images in the file.
        threat: the ball on which they were projected.
        clean, robust: how many of their clean images are classified correctly, and of these how many still are as saved.
        outside: how many lay outside ball or box by more than rounding.
        reached: the largest norm among them after the projection.
        changed: how many verdicts differ from the file's; None if it holds none.
        positions: of the images in the data set.
    """

    n: int
    threat: Threat
    clean: int
    robust: int
    outside: int
    reached: float
    changed: int | None
    positions: frozenset[int]

    @property
    def robust_accuracy(self) -> float:
        return self.robust / self.n

    @property
    def interval(self) -> Interval:
        """Wilson's, 95 %."""
        return wilson(self.robust, self.n)

    def __add__(self, other: Rescored) -> Rescored:
        """Of two files together, such as those of two shards.

        Raises:
            UserError: they share an image, or were projected on different balls.
        """
        if shared := self.positions & other.positions:
            raise UserError(f"rescore: two of the files hold the image {min(shared)}")
        if self.threat != other.threat:
            raise UserError(f"rescore: the files have different threat models, {self.threat} and {other.threat}")
        changed = None if self.changed is None or other.changed is None else self.changed + other.changed
        sums = {k: getattr(self, k) + getattr(other, k) for k in ("n", "clean", "robust", "outside")}
        return Rescored(
            **sums,
            threat=self.threat,
            reached=max(self.reached, other.reached),
            changed=changed,
            positions=self.positions | other.positions,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "threat": {"norm": self.threat.norm, "eps": self.threat.eps},
            "clean_accuracy": self.clean / self.n,
            "robust_accuracy": self.robust_accuracy,
            "interval": list(self.interval),
            "outside": self.outside,
            "reached": self.reached,
            "changed": self.changed,
        }


def rescore(
    f: Classifier,
    data: Any,
    path: str | Path,
    *,
    threat: Threat | None = None,
    batch_size: int = 128,
    device: torch.device | str | None = None,
) -> Rescored:
    """Score a classifier on a file of adversarial images.

    Args:
        f: the classifier.
        data: what the images were made from, as for ``runner.evaluate``, in the same order.
        path: ``.npz`` or ``.safetensors`` with ``x_adv`` (n, C, H, W), and perhaps ``y``, ``index``, ``verdict``, ``meta``.
        threat: None takes the one that the file names.
        batch_size: images in one forward pass.
        device: where to compute; None: where the model is.

    Raises:
        UserError: a file that cannot be read or does not fit the data: other shapes, other labels, positions beyond its end.
    """
    images = Images(path)
    threat = threat or images.threat()
    if threat is None:
        raise UserError(f"{path}: names no threat model; give --norm and --eps")
    where, dtype = _device(f, device), _dtype(f)
    if device is not None and isinstance(f, nn.Module):
        f.to(where)
    robust, clean = torch.zeros(len(images.x), dtype=torch.bool), torch.zeros(len(images.x), dtype=torch.bool)
    outside, reached, seen = 0, 0.0, 0
    for x, y in open_source(data).batches(batch_size, int(images.index[-1]) + 1):
        rows, x_adv = images.between(seen, seen + len(x))
        pick = images.index[rows] - seen
        seen += len(x)
        if len(pick) == 0:
            continue
        x, y = _fitting(path, images, rows, x[pick], y[pick], x_adv)
        x, y, x_adv = x.to(where, dtype), y.to(where), x_adv.to(where, dtype)
        x_adv, norm, out = trusted(x_adv, x, threat, str(path))
        clean[rows] = _correct(f, x, y, where).cpu()
        robust[rows] = clean[rows] & _correct(f, x_adv, y, where).cpu()
        outside, reached = outside + out, max(reached, norm)
    if seen <= int(images.index[-1]):
        raise UserError(f"{path}: holds an image of position {int(images.index[-1])}, and the data ends after {seen}")
    changed = None if images.verdict is None else int((images.verdict.bool() != robust).sum())
    positions = frozenset(images.index.tolist())
    return Rescored(len(robust), threat, int(clean.sum()), int(robust.sum()), outside, reached, changed, positions)


def _fitting(path: str | Path, images: Images, rows: slice, x: Tensor, y: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor]:
    """The clean images and labels, after a check that the file was made from them."""
    if x.shape != x_adv.shape:
        raise UserError(f"{path}: images of shape {tuple(x_adv.shape[1:])}, but the data has {tuple(x.shape[1:])}")
    if not bool(x_adv.isfinite().all()):
        raise UserError(f"{path}: values that are not finite numbers")
    if images.y is not None and not torch.equal(images.y[rows].long(), y):
        first = int((images.y[rows].long() != y).nonzero()[0]) + rows.start
        raise UserError(f"{path}: the label of image {int(images.index[first])} is not the data's; another data set or split?")
    return x, y


@torch.no_grad()
def _correct(f: Classifier, x: Tensor, y: Tensor, device: torch.device) -> Tensor:
    with torch.autocast(device.type, enabled=False), full_precision(), bn_mode(f, "eval"):
        z = f(x)
    return (z.argmax(1) == y) & ~z.isnan().any(1)
