"""The fifteen common corruptions of Hendrycks and Dietterich (ICLR 2019) at ImageNet severities.

Made from the test images here, or with ``files`` read from the published ImageNet-C (Zenodo 2235448), whose mCE and relative mCE
are then given against both AlexNets. Tiny-ImageNet-C has its own layout of the same kind: give ``baselines: []`` for it.
"""

from __future__ import annotations

from typing import Literal

from robustlab.registry import register
from robustlab.suites.cifar_c import COMMON, named
from robustlab.types import Corruption, CorruptionSuite


@register("imagenet-c", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class ImageNetC(CorruptionSuite):
    """Fifteen common corruptions at severities 1 to 5 of ImageNet-C, made here or read from the published files.

    Costs 75 forwards per sample.
    """

    corruptions: tuple[Corruption, ...] = named(COMMON, "imagenet")
    baselines: tuple[Literal["alexnet-50k", "alexnet-5k"], ...] = ("alexnet-50k", "alexnet-5k")
