"""The evaluator trusts nobody (law 9). Here is what it believes: the classifier itself, on images in ball and box.

    right(x) = argmax f(x) = y          f in eval mode and full precision, whatever the caller, an attack or a copy of f did
    trusted(x') = project(x')           what an attack returned, on ball and box; no tensor like x, or no numbers: refused

Every verdict is a ``right``; nothing that an attack or a faster copy of the classifier says enters one.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from robustlab import geometry
from robustlab.modes import bn_mode, full_precision, unwrap
from robustlab.types import Classifier, Threat, UserError, one_hot

SLACK = 1e-5  # relative and absolute: what float32 arithmetic may leave outside the ball


class Judge:
    """The classifier, as it is scored.

    Args:
        f: the classifier.
        device: where to compute; a module is moved there. None: where its parameters are.
        num_classes: K, None if the data do not say.

    Attributes:
        device, dtype: of the images that it takes.
        fits: whether a batch of clean images has shown that the classifier fits the data.

    Raises:
        UserError: no such device, or weights in low precision.
    """

    def __init__(self, f: Classifier, device: torch.device | str | None = None, num_classes: int | None = None):
        self.f, self.device, self.dtype, self.num_classes, self.fits = f, _device(f, device), dtype_of(f), num_classes, False
        if device is not None and isinstance(f, nn.Module):
            f.to(self.device)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Full precision and eval mode, whatever the caller's autocast and whatever an attack did to the modes."""
        with torch.autocast(self.device.type, enabled=False), full_precision(), bn_mode(self.f, "eval"):
            return self.f(x)

    def correct(self, x: Tensor, y: Tensor) -> Tensor:
        """Which images (N, C, H, W) are classified as ``y`` (N,)."""
        return right(self.logits(x), y)

    def clean(self, x: Tensor, y: Tensor, batch: int) -> Tensor:
        """The logits of clean images; from the first that are right in form it knows the number of classes.

        Raises:
            UserError: the model does not take such images, does not return logits (N, K), or not those of the data's classes.
        """
        try:
            z = self.logits(x)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            if self.fits:
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"the model does not accept images of shape {tuple(x.shape[1:])}: {reason}") from error
        self._check(z, y, batch)
        self.fits = True
        return z

    def _check(self, z: Tensor, y: Tensor, batch: int) -> None:
        if not isinstance(z, Tensor) or z.ndim != 2 or len(z) != len(y) or not z.is_floating_point():
            got = f"shape {tuple(z.shape)} of {z.dtype}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
            raise UserError(f"the model must return logits (N, K) for {len(y)} images, got {got}")
        if not bool(z.isfinite().all()):
            raise UserError(f"the model returns logits that are not finite numbers on clean images (batch {batch})")
        k = z.shape[1]
        if self.num_classes is not None and k != self.num_classes:
            raise UserError(f"the model has {k} logits, the data {self.num_classes} classes")
        self.num_classes = k
        if int(y.min()) < 0 or int(y.max()) >= k:
            raise UserError(f"data: labels must lie in 0..{k - 1} (the model has {k} logits), got {int(y.min())}..{int(y.max())}")

    def target(self, y: Tensor) -> Tensor:
        """Labels (N,) as the class probabilities (N, K) that attacks take."""
        assert self.num_classes is not None
        return one_hot(y, self.num_classes, self.dtype)

    def clock(self) -> float:
        """Seconds, when all that was asked for is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def right(z: Tensor, y: Tensor) -> Tensor:
    """Whether each row of logits answers ``y``; logits that are not numbers are no answer."""
    return (z.argmax(1) == y) & ~z.isnan().any(1)


def confidence(z: Tensor) -> list[float]:
    """The largest probability of each row of logits, to five digits; 0 where it is not a number."""
    return [round(c, 5) for c in z.double().softmax(1).amax(1).nan_to_num(0.0).tolist()]


def trusted(x_adv: Any, x: Tensor, threat: Threat, label: str) -> tuple[Tensor, float, int]:
    """What an attack returned, made lawful: projected on ball and box.

    Returns:
        The images, the largest norm among them, and how many had left ball or box by more than rounding.

    Raises:
        UserError: not a tensor like ``x``, or values that are not finite.
    """
    check_returned(x_adv, x, f"the attack '{label}'")
    raw = x_adv.detach()
    size = geometry.norm_of(raw - x, threat.norm)
    low, high = raw.flatten(1).amin(1), raw.flatten(1).amax(1)
    outside = (size > threat.eps * (1 + SLACK) + SLACK) | (low < -SLACK) | (high > 1 + SLACK)
    x_adv = geometry.project(raw, x, threat.norm, threat.eps).clamp(0.0, 1.0)
    return x_adv, float(geometry.norm_of(x_adv - x, threat.norm).max()), int(outside.sum())


def check_returned(new: Any, x: Tensor, who: str) -> None:
    """Raise ``UserError`` unless these are images like ``x``, all of finite numbers."""
    if not isinstance(new, Tensor) or new.shape != x.shape or new.dtype != x.dtype or new.device != x.device:
        got = f"{tuple(new.shape)} of {new.dtype} on {new.device}" if isinstance(new, Tensor) else f"a {type(new).__name__}"
        raise UserError(f"{who} must return images {tuple(x.shape)} of {x.dtype} on {x.device}, got {got}")
    finite = new.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise UserError(f"{who} returned values that are not finite for {int((~finite).sum())} of {len(x)} images")


def dtype_of(f: Any) -> torch.dtype:
    """In which a classifier is scored: float64 where it has such weights, else float32.

    Raises:
        UserError: it has weights in less.
    """
    module = unwrap(f)
    found = {p.dtype for p in module.parameters() if p.is_floating_point()} if isinstance(module, nn.Module) else set()
    if found - {torch.float32, torch.float64}:
        raise UserError(
            f"the model's weights are {', '.join(sorted(map(str, found)))}; scores need full precision: call model.float()"
        )
    return torch.float64 if torch.float64 in found else torch.float32


def _device(f: Any, device: torch.device | str | None) -> torch.device:
    if device is not None:
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise UserError(f"unknown device '{device}': {str(error).splitlines()[0]}") from error
    module = unwrap(f)
    first = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    return first.device if first is not None else torch.device("cpu")
