"""The resume state: one safetensors file, replaced atomically, that holds everything a run needs to go on bit for bit.

Tensors: ``outer.*`` (weights, buffers, the parts' memory) and ``optimizer.<parameter>.<name>``. Metadata: one JSON
block with the position in the run, the best result so far and the configuration. There is no generator state: draws
are keyed by position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robustlab.files import atomic_write
from robustlab.outer import Outer
from robustlab.types import UserError

VERSION = 1


def save_state(path: Path, outer: Outer, optimizer: torch.optim.Optimizer, meta: dict[str, Any]) -> None:
    """Write the state; ``meta`` is JSON."""
    tensors: dict[str, Tensor] = {f"outer.{k}": v for k, v in outer.state_dict().items()}
    numbers: dict[str, Any] = {}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers[f"{index}.{name}"] = value
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    block = {"format": "robustlab-state", "version": VERSION, "optimizer": numbers, **meta}
    atomic_write(path, save(tensors, metadata={"robustlab": json.dumps(block)}))


def read_state_meta(path: Path) -> dict[str, Any]:
    """The JSON block of a resume state.

    Raises:
        UserError: the file is damaged, foreign, or of a newer version.
    """
    try:
        with safe_open(path, "pt") as file:
            raw = (file.metadata() or {}).get("robustlab")
        meta = json.loads(raw) if raw else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged resume state ({error}); delete it to start the run anew") from None
    if meta.get("format") != "robustlab-state":
        raise UserError(f"{path}: not a resume state of robustlab")
    if meta["version"] > VERSION:
        raise UserError(f"{path}: written by a newer robustlab (state version {meta['version']}, this one reads {VERSION})")
    return meta


def load_state(path: Path, outer: Outer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put the state back; returns the JSON block.

    Raises:
        UserError: as :func:`read_state_meta`, or the tensors do not fit the model.
    """
    meta = read_state_meta(path)
    outer_state: dict[str, Tensor] = {}
    slots: dict[int, dict[str, Any]] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            owner, rest = key.split(".", 1)
            if owner == "outer":
                outer_state[rest] = file.get_tensor(key)
            else:
                index, name = rest.split(".", 1)
                slots.setdefault(int(index), {})[name] = file.get_tensor(key)
    for key, value in meta["optimizer"].items():
        index, name = key.split(".", 1)
        slots.setdefault(int(index), {})[name] = value
    try:
        outer.load_state_dict(outer_state)
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
        _lay_out(optimizer)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: does not fit this configuration: {str(error).splitlines()[0]}") from None
    return meta


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer's tensors the memory format of their weights: where both differ a GPU updates them one by one."""
    for p, slots in optimizer.state.items():
        for name, value in slots.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                slots[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)
