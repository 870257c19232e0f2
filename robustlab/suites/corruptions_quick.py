"""Five of the fifteen common corruptions of Hendrycks and Dietterich (ICLR 2019), one or more of each family, at CIFAR severities.

Noise: Gaussian, impulse. Blur: defocus. Weather and digital: brightness, contrast. The figures do not compare with the mean over
all fifteen of CIFAR-10-C, whose images are fixed files.
"""

from __future__ import annotations

from robustlab.corruptions.brightness import Brightness
from robustlab.corruptions.contrast import Contrast
from robustlab.corruptions.defocus_blur import DefocusBlur
from robustlab.corruptions.gaussian_noise import GaussianNoise
from robustlab.corruptions.impulse_noise import ImpulseNoise
from robustlab.registry import register
from robustlab.types import Corruption, CorruptionSuite


@register("corruptions-quick", cite="Hendrycks, Dietterich, ICLR 2019, arXiv:1903.12261")
class CorruptionsQuick(CorruptionSuite):
    """Five common corruptions at severities 1 to 5, made on the device from the clean images, or read from CIFAR-10-C (``files``).

    Costs 25 forwards per sample.
    """

    corruptions: tuple[Corruption, ...] = (GaussianNoise(), ImpulseNoise(), DefocusBlur(), Brightness(), Contrast())
