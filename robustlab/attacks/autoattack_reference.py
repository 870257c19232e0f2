"""The official AutoAttack (Croce and Hein, ICML 2020; l1: ICML 2021), as the package ``pyautoattack`` runs it.

    standard   apgd-ce, apgd-t, fab-t, square
    plus       apgd-ce, apgd-dlr, fab, square, apgd-t, fab-t, with five restarts
    rand       apgd-ce, apgd-dlr, with gradients averaged over 20 passes, for classifiers that draw at random

Nothing of it is reimplemented here. Around it: the global generators are forked, and come back untouched; the classifier only ever
passes gradients on to the images (the package's FAB calls ``backward``); its log goes to ``info["flags"]`` from level
WARNING up; with fewer than ten classes its targeted attacks take every other class.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from robustlab.attacks.shield import ImagesOnly
from robustlab.attacks.steps import threat_of
from robustlab.geometry import project
from robustlab.modes import ambient
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, NonNegative, Norm

NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}
LEAST_CLASSES = {"apgd-ce": 2, "apgd-dlr": 3, "apgd-t": 4, "fab": 2, "fab-t": 2, "square": 2}


@register("autoattack-reference", cite="Croce, Hein, ICML 2020, arXiv:2003.01690")
class AutoAttackReference(Attack):
    """The official AutoAttack, run by the package pyautoattack: four attacks in turn, each on the samples that are left.

    About 7,850 forward and 1,910 backward passes per sample that stays robust (standard, ten classes). It computes in float32,
    and its random searches share draws within a batch. A sample it cannot fool comes back as it was.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        version: ``standard``, ``plus`` or ``rand``.
        attacks: run these instead of the version's own: ``apgd-ce``, ``apgd-dlr``, ``apgd-t``, ``fab``, ``fab-t``, ``square``.
        batch_size: samples attacked together.
    """

    coupled = True
    norms = ("linf", "l2", "l1")

    norm: Norm | None = None
    eps: NonNegative | None = None
    version: Literal["standard", "plus", "rand"] = "standard"
    attacks: tuple[Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"], ...] = ()
    batch_size: Count = 250

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        """As every attack; of y only the most probable class counts. ``info``: ``flags``, the package's warnings about the model.

        Raises:
            ValueError: an attack that needs more classes than the classifier has.
        """
        norm, eps = threat_of(self)
        x, labels = x.detach(), y.argmax(-1)
        flags: list[str] = []
        if eps == 0 or len(x) == 0:
            return x.clone(), {"flags": flags}
        seed = rng.child("pyautoattack").key % 2**31

        def shielded(z: Tensor) -> Tensor:
            return ImagesOnly.apply(z, lambda v: f(v.to(x.dtype)).float())

        with ambient(seed), _listening(flags):
            run = self._set_up(shielded, y.shape[-1], norm, eps, seed, x.device)
            x_adv, y_adv = run.run_standard_evaluation(x.float(), labels, batch_size=self.batch_size)
        broken = (y_adv != labels).view(-1, 1, 1, 1)
        return torch.where(broken, project(x_adv.to(x.dtype), x, norm, eps), x), {"flags": flags}

    def _set_up(self, f: Classifier, num_classes: int, norm: str, eps: float, seed: int, device: torch.device) -> Any:
        from pyautoattack import AutoAttack

        run = AutoAttack(f, norm=NAMES[norm], eps=eps, seed=seed, version=self.version, device=device)
        if self.attacks:
            run.attacks_to_run = list(self.attacks)
        for name in run.attacks_to_run:
            if name not in LEAST_CLASSES:
                raise ValueError(f"{self.name}: unknown attack '{name}'; expected some of {', '.join(LEAST_CLASSES)}")
            if num_classes < LEAST_CLASSES[name]:
                raise ValueError(
                    f"{self.name}: '{name}' needs at least {LEAST_CLASSES[name]} classes and the classifier has {num_classes}; "
                    f"choose others with attacks=(...), such as apgd-ce, fab-t, square"
                )
        for targeted in (run.apgd_targeted, run.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, num_classes - 1)
        return run


class _Collect(logging.Handler):
    def __init__(self, messages: list[str]):
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() not in self.messages:
            self.messages.append(record.getMessage())


@contextlib.contextmanager
def _listening(messages: list[str]) -> Iterator[None]:
    """Send the package's log to a list instead of the screen, and keep the tracer (debugger, coverage) that it removes."""
    logger, handler, tracer = logging.getLogger("auto-attack"), _Collect(messages), sys.gettrace()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        sys.settrace(tracer)
