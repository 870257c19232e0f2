"""The corrupted images of a suite: made here, batch by batch, or looked up in the published files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustlab.evaluation.cascade import unique
from robustlab.evaluation.judge import check_returned
from robustlab.evaluation.official import Official, clean_of, open_official
from robustlab.evaluation.threats import corruption_threat
from robustlab.modes import ambient
from robustlab.rng import Rng
from robustlab.types import Attack, Corruption, CorruptionSuite, Suite, Threat, UserError


class Corrupted:
    """A suite's corruptions, each at every severity.

    Args:
        suite: any.
        threat: that of the caller, for the attack on corrupted images.
        data, size: what is corrupted, and how many of it; published files have to belong to it.
        seed: of the draws.

    Attributes:
        corruptions: by label; None for what exists only as files.
        official: the published files, if the suite names them.
        attack, threat: on corrupted images, where the suite asks for that; or None.

    Raises:
        UserError: files that are missing, or not those of these data; not one threat model for the attack.
    """

    def __init__(self, suite: Suite, threat: Threat | None, data: Any, size: int | None, seed: int):
        named = zip(unique([c.name for c in suite.corruptions]), suite.corruptions, strict=True)
        self.corruptions: dict[str, Corruption | None] = dict(named)
        self.official: Official | None = None
        self.attack: Attack | None = None
        self.threat, self.seed = corruption_threat(suite, threat), seed
        self.size: int | None = None
        if not isinstance(suite, CorruptionSuite):
            return
        self.size, self.attack = suite.size, suite.attack
        self.corruptions |= dict.fromkeys(suite.published)
        if suite.files is not None:
            self.official = open_official(suite.files, list(self.corruptions), suite.severities, clean_of(data, size))
        elif suite.published:
            raise UserError(f"suite '{suite.name}': {suite.published[0]} exists only as published files: give files, their folder")

    def images(self, label: str, severity: int, x: Tensor, index: Tensor, batch: int) -> Tensor:
        """The images ``x`` (n, C, H, W), corrupted.

        Args:
            label: of the corruption.
            severity: 1 to 5.
            x, index: the images and their positions (n,).
            batch: their batch's number.

        Raises:
            UserError: the corruption returns anything but images in [0, 1].
        """
        if self.official is not None:
            return self.official.at(label, severity, index).to(x)
        corruption, who = self.corruptions[label], f"the corruption '{label}/{severity}'"
        assert corruption is not None
        rng = Rng(self.seed).child("corruption", corruption.name, severity).at(index.to(x.device))
        with torch.no_grad(), ambient(rng.split(1, first=batch)[0].batch_seed()):
            given = x.clone() if self.size is None else enlarged(x, self.size)
            x_c = corruption(given, severity, rng)
        check_returned(x_c, given, who)
        if float(x_c.amin()) < 0 or float(x_c.amax()) > 1:
            raise UserError(f"{who} returned values outside [0, 1]")
        return x_c if self.size is None else torch.nn.functional.avg_pool2d(x_c, self.size // x.shape[-1])


def enlarged(x: Tensor, size: int) -> Tensor:
    """Images (N, C, H, W) with every pixel repeated, so that they have ``size`` pixels a side.

    Raises:
        UserError: they are not square, or ``size`` is no multiple of theirs.
    """
    h, w = x.shape[2:]
    if h != w or size % w:
        raise UserError(f"size: {size} is no multiple of the images' {h}x{w} px")
    return x.repeat_interleave(size // h, 2).repeat_interleave(size // w, 3)
