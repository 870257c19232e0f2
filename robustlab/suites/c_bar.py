"""C-bar: ten corruptions that are perceptually far from the fifteen common ones (Mintun, Kirillov, Xie, NeurIPS 2021).

CIFAR-10-C-bar and ImageNet-C-bar hold different corruptions; ``table`` chooses. Names are the authors', misspellings included.
"""

from __future__ import annotations

from typing import Literal

from robustlab.registry import register
from robustlab.suites.cifar_c import named
from robustlab.types import CorruptionSuite

NAMES = {
    "cifar": (
        "blue_noise_sample",
        "brownish_noise",
        "checkerboard_cutout",
        "inverse_sparkles",
        "pinch_and_twirl",
        "ripple",
        "circular_motion_blur",
        "lines",
        "sparkles",
        "transverse_chromatic_abberation",
    ),
    "imagenet": (
        "blue_noise_sample",
        "brownish_noise",
        "caustic_refraction",
        "checkerboard_cutout",
        "cocentric_sine_waves",
        "inverse_sparkles",
        "perlin_noise",
        "plasma_noise",
        "single_frequency_greyscale",
        "sparkles",
    ),
}


@register("c-bar", cite="Mintun, Kirillov, Xie, NeurIPS 2021, arXiv:2102.11273")
class CBar(CorruptionSuite):
    """Ten corruptions unlike the common fifteen, at severities 1 to 5, made here or read from the published files.

    Costs 50 forwards per sample.

    Attributes:
        table: the corruptions and severities of CIFAR-10-C-bar (small images) or of ImageNet-C-bar.
    """

    table: Literal["cifar", "imagenet"] = "cifar"

    def __post_init__(self) -> None:
        if not self.corruptions:
            object.__setattr__(self, "corruptions", named(NAMES[self.table], self.table))
        super().__post_init__()
