"""3D common corruptions (Kar et al., CVPR 2022): the twelve that RobustBench scores.

They need the scenes' depth, so they exist as published files only: ``files`` is a folder ``<corruption>/<severity>/<wnid>/*``.
mCE is against the AlexNet of RobustBench's 5,000 images.
"""

from __future__ import annotations

from typing import Literal

from robustlab.registry import register
from robustlab.types import CorruptionSuite

NAMES = (
    "near_focus",
    "far_focus",
    "bit_error",
    "color_quant",
    "flash",
    "fog_3d",
    "h265_abr",
    "h265_crf",
    "iso_noise",
    "low_light",
    "xy_motion_blur",
    "z_motion_blur",
)


@register("3dcc", cite="Kar, Yeo, Atanov, Zamir, CVPR 2022, arXiv:2203.01441")
class Common3D(CorruptionSuite):
    """Twelve corruptions that follow the geometry of the scene, from the published files; ``files`` is needed.

    Costs 60 forwards per sample.
    """

    published: tuple[str, ...] = NAMES
    baselines: tuple[Literal["alexnet-50k", "alexnet-5k"], ...] = ("alexnet-5k",)
