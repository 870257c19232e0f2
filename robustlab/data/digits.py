"""The handwritten digits that come with scikit-learn.

1,797 real images of 8 x 8 px with 17 grey levels (Alpaydin and Kaynak, "Optical Recognition of Handwritten
Digits", UCI 1998, test part). No download. Fixed stratified split: 1,097 train, 200 validation, 500 test.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import interpolate

from robustlab.data.images import memory_splits, stratified_split
from robustlab.registry import register
from robustlab.types import Dataset, Splits


@register("digits", cite="Alpaydin and Kaynak, UCI Machine Learning Repository 1998, doi:10.24432/C50P49")
class Digits(Dataset):
    """1,797 real handwritten digits from scikit-learn, offline: 1,097 train, 200 validation, 500 test.

    Attributes:
        size: height and width in pixels; the originals have 8, larger ones are enlarged bilinearly.
        channels: 1 (grey) or 3 (the grey value repeated).
    """

    size: Literal[8, 16, 32] = 16
    channels: Literal[1, 3] = 1

    def load(self) -> Splits:
        from sklearn.datasets import load_digits

        raw = load_digits()
        levels = torch.from_numpy(raw.images)[:, None].double()  # 0..16
        if self.size != 8:
            levels = interpolate(levels, size=(self.size, self.size), mode="bilinear", align_corners=False)
        x = (levels * (255 / 16) + 0.5).floor().to(torch.uint8)  # every step is exact in binary, so bytes agree everywhere
        x = x.expand(-1, self.channels, -1, -1).contiguous()
        y = torch.from_numpy(raw.target).long()
        test, validation, train = stratified_split(y, [500, 200])
        return memory_splits(
            (x[train], y[train]),
            (x[test], y[test]),
            [str(d) for d in range(10)],
            validation=(x[validation], y[validation]),
            source="digits",
        )
