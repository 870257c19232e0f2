"""Where the events of a run go: a JSON line each, and the trackers named. Optional packages are imported when named."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from robustlab.types import UserError

Event = dict[str, Any]


class Tracker(Protocol):
    """Takes events: plain dicts with ``kind``, ``epoch``, ``step`` and numbers."""

    def log(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Jsonl:
    """``metrics.jsonl``: one event a line, appended; cut back to its length at the checkpoint when a run resumes."""

    def __init__(self, path: Path, keep: int = 0):
        self.path = path
        path.touch()
        if path.stat().st_size > keep:
            os.truncate(path, keep)
        self._file = open(path, "ab")  # noqa: SIM115 - open for the whole run

    @property
    def length(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def log(self, event: Event) -> None:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()}
        self._file.write(json.dumps(clean).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard, in the folder ``tensorboard`` of the run."""

    def __init__(self, folder: Path):
        writer = _needs("torch.utils.tensorboard", "tensorboard")
        self._writer = writer.SummaryWriter(str(folder / "tensorboard"))

    def log(self, event: Event) -> None:
        for name, value in _scalars(event):
            self._writer.add_scalar(name, value, event["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases; the run's name is its folder, so a resumed run goes on in the same one."""

    def __init__(self, folder: Path, config: Any):
        wandb = _needs("wandb", "wandb")
        self._run = wandb.init(
            project="robustlab", name=folder.name, id=folder.name, resume="allow", dir=str(folder), config=config
        )

    def log(self, event: Event) -> None:
        self._run.log(dict(_scalars(event)), step=event["step"])

    def close(self) -> None:
        self._run.finish()


def _scalars(event: Event) -> list[tuple[str, float]]:
    skipped = ("kind", "epoch", "step")
    return [(k, float(v)) for k, v in event.items() if k not in skipped and isinstance(v, int | float)]


def _needs(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"logging: '{extra}' is not installed; pip install 'robustlab[{extra}]'") from None


def open_trackers(names: Sequence[str], folder: Path, config: Any, keep: int) -> tuple[Jsonl, list[Tracker]]:
    """The metrics file, which every run has, and the other trackers named."""
    others: list[Tracker] = []
    if "tensorboard" in names:
        others.append(TensorBoard(folder))
    if "wandb" in names:
        others.append(Wandb(folder, config))
    return Jsonl(folder / "metrics.jsonl", keep), others
