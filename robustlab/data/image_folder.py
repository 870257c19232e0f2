"""Images in folders: ``train/<class>/*``, and if there are any ``val/<class>/*`` and ``test/<class>/*``."""

from __future__ import annotations

from pathlib import Path

import torch

from robustlab.data.folders import FolderDataset, class_folders, list_images
from robustlab.data.images import stratified_split
from robustlab.registry import register
from robustlab.types import Splits, UserError


@register("image-folder")
class ImageFolder(FolderDataset):
    """Image files in ``train/<class>``, ``val/<class>``, ``test/<class>`` under ``root``, read as they are needed.

    Without ``test`` the images of ``val`` are the test set; without both, 10 % of train (at least one image) are. Validation
    images come from ``val`` if it is not the test set, else from train. A folder with ``test`` alone can be scored
    but not trained on.
    """

    def load(self) -> Splits:
        if self.root is None:
            raise UserError("image-folder: give root, the folder that holds train/<class>/*")
        base = Path(self.root).expanduser()
        folders = {split: base / split for split in ("train", "val", "test")}
        present = {split: class_folders(folder) for split, folder in folders.items()}
        names = present["train"] or present["test"] or present["val"]
        if not names:
            raise UserError(f"image-folder: expected train/<class>/* or test/<class>/* in {base}")
        train, val, test = (list_images(folder, names, self.name) for folder in folders.values())
        if not test:
            test, val = val, []
        if not test and len(train) > 1:
            carved, rest = stratified_split(torch.tensor([y for _, y in train]), [max(1, len(train) // 10)])
            train, test = [train[i] for i in rest.tolist()], [train[i] for i in carved.tolist()]
        return self.splits(base, names, train, val, test)
