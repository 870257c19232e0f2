"""The fifteen common corruptions of Hendrycks and Dietterich (ICLR 2019) at CIFAR severities.

Made from the test images here, or with ``files`` read from the published CIFAR-10-C or CIFAR-100-C (Zenodo 2535967 and 3555552).
The figure is the mean accuracy over all corruptions and severities; for CIFAR the authors do not divide by a baseline
(github.com/hendrycks/robustness, issue 28). The four further corruptions of the authors are not scored.
"""

from __future__ import annotations

from robustlab.registry import lookup, register
from robustlab.types import Corruption, CorruptionSuite

COMMON = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)


def named(names: tuple[str, ...], table: str) -> tuple[Corruption, ...]:
    """The corruptions of these names, at the severities of a table."""
    return tuple(lookup("corruption", name)(table=table) for name in names)


@register("cifar-c", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class CifarC(CorruptionSuite):
    """Fifteen common corruptions at severities 1 to 5 of CIFAR-10-C, made here or read from the published files.

    Costs 75 forwards per sample.
    """

    corruptions: tuple[Corruption, ...] = named(COMMON, "cifar")
