"""The reliability report: whether a robust accuracy can be believed, by what is known to fool attacks.

Athalye, Carlini, Wagner (ICML 2018) and Carlini et al. (arXiv:1902.06705) list the signs of gradients that mislead; AutoAttack's
flags (Croce, Hein, ICML 2020; Croce et al., ICML 2022) watch for some of them and missed thresholded activations (MeanSparse). The
checks run on a few dozen images that the model classifies correctly, in full precision and eval mode, and leave weights, buffers,
modes and the global generators as they were. They look for what is wrong; that they find nothing proves no robustness.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustlab.evaluation.reliability.checks import CHECKS, STEPS, WHITE_BOX, Check
from robustlab.evaluation.reliability.subject import Subject
from robustlab.modes import ambient, bn_mode, frozen, unwrap
from robustlab.types import Classifier, Threat

Verdict = Literal["pass", "warn", "fail"]
IMAGES = 48  # wanted
FEWEST = 16  # below it checks are dropped rather than images
LEAST = 4  # below it nothing is said
SHARE = 0.1  # of the suite's passes
NORMS = ("linf", "l2", "l1")


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        name: of the check.
        verdict: pass, warn or fail.
        figure: the measured figure; larger is worse. None if it is not a number, which is a failure.
        measure: what the figure is.
        advice: one sentence.
    """

    name: str
    verdict: Verdict
    figure: float | None
    measure: str
    advice: str


@dataclass(frozen=True)
class Report:
    """All findings.

    Attributes:
        n: images examined.
        norm, eps: the threat model.
        checks: the findings, in order.
        skipped: checks that were left out, and why.
        forwards, backwards: passes spent.
    """

    n: int
    norm: str
    eps: float
    checks: tuple[Finding, ...]
    skipped: dict[str, str]
    forwards: int
    backwards: int

    @property
    def verdict(self) -> Verdict | None:
        """The worst verdict; None if nothing was examined."""
        found = {c.verdict for c in self.checks}
        return next((v for v in ("fail", "warn", "pass") if v in found), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values."""
        return {"verdict": self.verdict, **asdict(self), "checks": [asdict(c) for c in self.checks]}


def examine(f: Classifier, x: Tensor, labels: Tensor, threat: Threat, *, seed: int = 0, passes: float = math.inf) -> Report:
    """Run the checks.

    Args:
        f: the classifier.
        x: images (n, C, H, W) in [0, 1] that it classifies correctly; at most 48 are used.
        labels: (n,), int64.
        threat: where robustness is claimed.
        seed: of all draws.
        passes: forwards and backwards to spend at most. Fewer images are used to stay below it, then fewer checks.
    """
    wanted = [c for c in CHECKS if not c.attack or (threat.norm in NORMS and threat.eps > 0)]
    skipped = {c.name: f"no PGD in {threat.norm} {threat.eps:g}" for c in CHECKS if c not in wanted}
    n = min(len(x), IMAGES, max(_affordable(wanted, passes), min(FEWEST, _affordable(wanted[:5], passes))))
    if n < LEAST:
        few = "too few images are classified correctly" if len(x) < LEAST else "the suite spends too few passes"
        return Report(0, threat.norm, threat.eps, (), dict.fromkeys((c.name for c in wanted), few) | skipped, 0, 0)
    s = Subject.of(f, x[:n], labels[:n], threat, seed)
    found: list[Finding] = []
    with _untouched(f, s), torch.enable_grad():
        for check in wanted:
            cost = check.cost + (WHITE_BOX if check.white_box and not s.knows(STEPS) else 0)
            if s.f.forwards + s.f.backwards + n * cost > passes:
                skipped[check.name] = "the suite spends too few passes"
                continue
            try:
                found.append(_judged(check, check.figure(s)))
            except RuntimeError as error:
                skipped[check.name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    return Report(n, threat.norm, threat.eps, tuple(found), skipped, s.f.forwards, s.f.backwards)


def _affordable(checks: list[Check], passes: float) -> int:
    """How many images all the checks can have."""
    each = sum(c.cost for c in checks) + (WHITE_BOX if any(c.white_box for c in checks) else 0)
    return int(min(passes / each, IMAGES))


def _judged(check: Check, figure: float) -> Finding:
    bad = not math.isfinite(figure)
    verdict: Verdict = "fail" if bad or figure > check.fail else "warn" if figure > check.warn else "pass"
    return Finding(check.name, verdict, None if bad else figure, check.measure, check.advice)


@contextlib.contextmanager
def _untouched(f: Classifier, s: Subject) -> Iterator[None]:
    """Full precision and eval mode inside; modes, flags, buffers and generators as before afterwards."""
    module = unwrap(f)
    buffers = list(module.buffers()) if isinstance(module, nn.Module) else []
    saved = [b.detach().clone() for b in buffers]
    try:
        with frozen(f), bn_mode(f, "eval"), ambient(s.rng.batch_seed()), torch.autocast(s.x.device.type, enabled=False):
            yield
    finally:
        with torch.no_grad():
            for b, old in zip(buffers, saved, strict=True):
                b.copy_(old)
