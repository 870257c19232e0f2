"""Models on the Hugging Face hub, in timm's layout: ``config.json``, ``model.safetensors``, ``README.md`` in one repository.

``config.json`` holds what timm reads (``architecture num_classes pretrained_cfg``) and, under ``robustlab``, the checkpoint's
metadata block, from which the classifier is rebuilt. Of a timm model the tensors have timm's own names, so that
``timm.create_model("hf-hub:user/name")`` loads them too; the normalisation is in ``pretrained_cfg`` then, as timm has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustlab.files import atomic_write, write_json
from robustlab.models.checkpoint import FORMAT, VERSION, first_line, load_checkpoint, load_weights
from robustlab.types import UserError

PREFIX = "hf:"
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def write_folder(checkpoint: str | Path, folder: str | Path, card: str) -> Path:
    """Write a checkpoint in the hub's layout.

    Args:
        checkpoint: of ours.
        folder: to write into; made if it is not there.
        card: the content of ``README.md``.

    Raises:
        UserError: not a checkpoint of ours, or the place cannot be written.
    """
    from safetensors.torch import save

    f, target = load_checkpoint(checkpoint), Path(folder)
    meta: dict[str, Any] = f.robustlab_meta  # type: ignore[assignment]
    model = meta["model"]
    mean, std = ([float(v) for v in getattr(f.normalize, name).flatten()] for name in ("mean", "std"))  # type: ignore[union-attr]
    is_timm = model["name"] == "timm"
    state = f.net.state_dict() if is_timm else f.state_dict()  # type: ignore[union-attr]
    tensors = {name: value.detach().clone().contiguous() for name, value in state.items()}
    block = {**meta, "model": {**model, "mean": mean, "std": std, "init": None}}
    config = {
        "architecture": model["arch"] if is_timm else model["name"],
        "num_classes": meta["num_classes"],
        "pretrained_cfg": {
            "input_size": meta["image_shape"],
            "mean": mean,
            "std": std,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": meta["num_classes"],
            "label_names": list(meta.get("class_names", ())),
        },
        FORMAT: block,
    }
    atomic_write(target / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_json(target / CONFIG, config)
    atomic_write(target / CARD, card)
    return target


def load_folder(folder: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The classifier in a folder of the hub's layout, in eval mode; one that only timm knows is loaded through timm.

    Raises:
        UserError: no such folder or files, or weights that do not fit.
    """
    from robustlab import config

    place = Path(folder)
    told = _config(place)
    block = told.get(FORMAT)
    if block is None:
        return config.build("model", f"timm:local-dir:{place}", init="pretrained").build().to(device).eval()
    if not isinstance(block, Mapping) or block.get("version", VERSION) > VERSION:
        raise UserError(f"{place / CONFIG}: the '{FORMAT}' block is damaged or newer than this robustlab reads; update robustlab")
    try:
        fields = {**block["model"], "num_classes": block["num_classes"], "init": None}
        module = config.build("model", fields).build()
    except (KeyError, ValueError) as error:
        raise UserError(f"{place / CONFIG}: cannot rebuild the model: {first_line(error)}") from None
    load_weights(module.net if fields["name"] == "timm" else module, place / WEIGHTS)
    module.robustlab_meta = dict(block)
    return module.to(device).eval()


def fetch(spec: str) -> Path:
    """The local folder of ``hf:user/name`` or ``hf:user/name@revision``, downloaded if needed.

    Raises:
        UserError: a malformed name, no ``huggingface_hub``, or the download fails.
    """
    name, _, revision = spec.removeprefix(PREFIX).partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"{spec}: expected hf:user/name or hf:user/name@revision")
    hub = _hub(spec)
    try:
        return Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the hub raises many unrelated types
        raise UserError(f"{spec}: cannot be downloaded: {first_line(error)}") from None


def upload(folder: str | Path, spec: str, *, private: bool = False) -> str:
    """Put a folder into the repository ``hf:user/name``, which is made if it is not there; returns its address.

    Raises:
        UserError: as :func:`fetch`.
    """
    name = spec.removeprefix(PREFIX)
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"{spec}: expected hf:user/name")
    hub = _hub(spec)
    try:
        hub.create_repo(name, exist_ok=True, private=private)
        return str(hub.upload_folder(repo_id=name, folder_path=str(folder), allow_patterns=[CONFIG, WEIGHTS, CARD]))
    except Exception as error:
        raise UserError(f"{spec}: cannot be uploaded: {first_line(error)}") from None


def _hub(spec: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{spec}: needs the package huggingface_hub: pip install robustlab[hub]") from None
    return huggingface_hub


def _config(place: Path) -> dict[str, Any]:
    path = place / CONFIG
    if not (place / WEIGHTS).is_file() or not path.is_file():
        raise UserError(f"{place}: expected a folder with {CONFIG} and {WEIGHTS}")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(told, dict):
        raise UserError(f"{path}: expected a JSON object")
    return told
