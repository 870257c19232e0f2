"""What the data sets that torchvision offers have in common: download, one error line, a validation split carved from train."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from robustlab.data.images import data_root, memory_splits
from robustlab.types import Count, Dataset, Splits, UserError


@dataclass(frozen=True, kw_only=True)
class TorchvisionDataset(Dataset):
    """Fields of every data set that torchvision offers.

    Attributes:
        download: fetch missing files.
        validation: images carved from the official training set, stratified, the same on every machine; test is never touched.
    """

    files: ClassVar[str] = ""  # what stands in the folder, for the error line
    folder: ClassVar[str] = "."  # where under the root it stands

    download: bool = True
    validation: Count = 5000

    def read(self, root: Path, train: bool) -> tuple[Tensor, Tensor, Sequence[str]]:
        """Images (N, C, H, W) uint8, labels (N,) and class names of the official training or test set."""
        raise NotImplementedError

    def load(self) -> Splits:
        root = data_root(self.root)
        x, y, names = self.complete(lambda: self.read(root, True), root)
        x_test, y_test, _ = self.complete(lambda: self.read(root, False), root)
        return memory_splits((x, y), (x_test, y_test), names, validation=self.validation, source=self.name)

    def complete(self, read: Callable[[], Any], root: Path) -> Any:
        """Call ``read``; whatever goes wrong becomes one line that says which files were expected where."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return read()
        except UserError:
            raise
        except Exception as error:  # no network, damaged archives, short files: torchvision raises many types
            reason = (str(error) or type(error).__name__).splitlines()[0]
            tried = "missing or damaged, and the download failed" if self.download else "missing or damaged (download: false)"
            raise UserError(f"{self.name}: files {tried}: expected {self.files} in {root / self.folder}: {reason}") from None
