"""Tiny ImageNet: 64 x 64 photographs of 200 classes: 100,000 for training, and 10,000 published as validation images."""

from __future__ import annotations

from pathlib import Path

from robustlab.data.folders import Files, FolderDataset, class_folders, first_with, list_images
from robustlab.data.images import data_root
from robustlab.registry import register
from robustlab.types import Count, Splits, UserError


@register("tiny-imagenet", cite="Le and Yang, Stanford CS231N 2015")
class TinyImageNet(FolderDataset):
    """Tiny ImageNet from ``tiny-imagenet-200/train`` and ``/val`` under the root, as published or with ``val/<wnid>`` folders.

    The published validation images, whose labels are known, are the test set; validation images are held out from train.
    """

    resize: Count = 64
    size: Count = 64
    validation: Count = 2000

    def load(self) -> Splits:
        root = data_root(self.root)
        base = first_with([root / "tiny-imagenet-200", root], ["train", "val"], self.name)
        wnids = class_folders(base / "train")
        train = list_images(base / "train", wnids, self.name)
        if (base / "val/val_annotations.txt").is_file():
            test = self._annotated(base / "val", wnids)
        else:
            test = list_images(base / "val", wnids, self.name)
        words = self._words(base / "words.txt")
        return self.splits(base, [words.get(wnid, wnid) for wnid in wnids], train, None, test)

    def _annotated(self, folder: Path, wnids: list[str]) -> Files:
        label = {wnid: i for i, wnid in enumerate(wnids)}
        listing, out = folder / "val_annotations.txt", []
        for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1):
            columns = line.split("\t")
            if len(columns) < 2 or columns[1] not in label:
                raise UserError(f"{self.name}: {listing}:{number}: expected a file name and one of {len(wnids)} class ids")
            out.append((folder / "images" / columns[0], label[columns[1]]))
        missing = [path for path, _ in out if not path.is_file()]
        if missing:
            raise UserError(f"{self.name}: {len(missing)} of {len(out)} test images are missing, the first is {missing[0]}")
        return out

    def _words(self, path: Path) -> dict[str, str]:
        if not path.is_file():
            return {}
        pairs = (line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if "\t" in line)
        return {wnid: words.split(",")[0].strip() for wnid, words in pairs}
