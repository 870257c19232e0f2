"""Small pictures for pages: axes and rows of images as ``data:`` addresses."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from robustlab.report.figures import STYLE
from robustlab.report.page import picture


def draw(paint: Callable[[Any], None], size: tuple[float, float] = (5.2, 3.2)) -> str:
    """What ``paint`` puts on a pair of axes, as a PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=140, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure.add_subplot())
        return _png(figure)


def image_rows(pictures: Mapping[str, Any]) -> str:
    """Clean images, adversarial ones and their difference, scaled to the full range; above each what it is taken for.

    Args:
        pictures: ``clean`` and ``adversarial`` (m, C, H, W) in [0, 1]; ``before`` and ``after``, m names each.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    clean, adversarial = pictures["clean"], pictures["adversarial"]
    change = adversarial - clean
    change = 0.5 + change / (2 * np.abs(change).max(axis=(1, 2, 3), keepdims=True).clip(1e-12))
    with matplotlib.rc_context(STYLE | {"font.size": 8}):
        figure = Figure(figsize=(1.15 * len(clean) + 0.2, 3.9), dpi=140, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(3, len(clean), squeeze=False)
        for row, images in zip(axes, (clean, adversarial, change), strict=True):
            for place, image in zip(row, images, strict=True):
                place.imshow(image[0] if len(image) == 1 else image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1)
                place.set_axis_off()
        for i in range(len(clean)):
            axes[0, i].set_title(str(pictures["before"][i])[:14])
            axes[1, i].set_title(str(pictures["after"][i])[:14])
        return _png(figure)


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return picture(buffer.getvalue())
