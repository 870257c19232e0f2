"""Checkpoints: safetensors with one block of JSON from which the classifier is rebuilt; nothing pickled is ever executed.

The block stands under the metadata key ``robustlab``. It has at least ``format``, ``version``, ``model`` (name and fields of the
architecture), ``image_shape`` and ``num_classes``; the training loop adds ``class_names threat config metrics epoch``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlab.files import atomic_write
from robustlab.registry import import_callable, nearest
from robustlab.types import UserError

FORMAT, VERSION = "robustlab", 1
PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
_REQUIRED: dict[str, type] = {"model": dict, "image_shape": list, "num_classes": int}
_PREFIXES = ("module.", "model.", "net.", "_orig_mod.")
_OPTIONAL = ("normalize.mean", "normalize.std", "num_batches_tracked")  # foreign weights may lack these


# ------------------------------------------------------------------------------------------------------------- saving


def to_bytes(module: nn.Module, meta: Mapping[str, Any]) -> bytes:
    """The content of a checkpoint; equal weights and equal ``meta`` give equal bytes. Tied weights are stored once.

    Args:
        module: its ``state_dict`` is stored, bit for bit.
        meta: JSON-able; ``model``, ``image_shape`` and ``num_classes`` at least. Format and version are added.

    Raises:
        ValueError: ``meta`` lacks a key, or holds NaN, infinity or something that is no JSON.
    """
    from safetensors.torch import save

    for key in _REQUIRED:
        if key not in meta:
            raise ValueError(f"checkpoint metadata needs '{key}'; it has {', '.join(meta) or 'nothing'}")
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in module.state_dict().items():
        place = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and place in seen:
            tied[name] = seen[place]
        else:
            seen[place] = name
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    block = {"format": FORMAT, "version": VERSION, **meta} | ({"tied": tied} if tied else {})
    return save(tensors, metadata={FORMAT: json.dumps(block, allow_nan=False)})


def save_checkpoint(path: str | Path, module: nn.Module, meta: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all; arguments and errors as for :func:`to_bytes`.

    Raises:
        UserError: the file cannot be written; an older one stays as it was.
    """
    atomic_write(path, to_bytes(module, meta))


# ------------------------------------------------------------------------------------------------------------ reading


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.safetensors"))
        hint = f" (did you mean '{path / inside[0]}'?)" if inside else ""
        raise UserError(f"{path}: expected a .safetensors file, got a folder{hint}")
    if not path.is_file():
        known = {str(p) for p in path.parent.glob("*.safetensors")} if path.parent.is_dir() else set()
        raise UserError(f"{path}: no such file{nearest(str(path), known)}")
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if is_pickled(path):
            raise UserError(
                f"{path}: pickled checkpoints are not loaded, since they can run code; name the architecture and start "
                "from its tensors with 'model.init' (torch.load with weights_only=True), or convert it to safetensors"
            ) from None
        raise UserError(f"{path}: not a safetensors file, or a damaged one: {first_line(error)}") from None


def is_pickled(path: Path) -> bool:
    """Whether a file looks like one that torch.save or pickle wrote."""
    with open(path, "rb") as file:
        head = file.read(4)
    return head == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05") or path.suffix in PICKLED


def _block(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if FORMAT not in metadata:
        raise UserError(
            f"{path}: these weights come without the '{FORMAT}' metadata block, so their architecture is unknown; "
            "name it and start from them with 'model.init'"
        )
    try:
        meta = json.loads(metadata[FORMAT])
    except ValueError:
        meta = None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or not isinstance(meta.get("version"), int):
        raise UserError(f"{path}: the '{FORMAT}' metadata block is damaged")
    if meta["version"] > VERSION:
        raise UserError(
            f"{path}: checkpoint version {meta['version']} is newer than this robustlab reads ({VERSION}); update robustlab"
        )
    for key, kind in _REQUIRED.items():
        if not isinstance(meta.get(key), kind):
            raise UserError(f"{path}: the '{FORMAT}' metadata block is damaged: no valid '{key}'")
    return meta


def read_meta(path: str | Path) -> dict[str, Any]:
    """The metadata block of a checkpoint.

    Raises:
        UserError: no file, not safetensors, truncated, pickled, without the block, or from a newer version.
    """
    return _block(path, _read(path)[0])


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """Rebuild the classifier of a checkpoint, in eval mode; its metadata is attached as ``robustlab_meta``.

    Raises:
        UserError: as :func:`read_meta`; or the architecture is unknown here, or the weights do not fit it.
    """
    from robustlab import config

    metadata, tensors = _read(path)
    meta = _block(path, metadata)
    try:
        fields = {**meta["model"], "num_classes": meta["model"].get("num_classes") or meta["num_classes"], "init": None}
        part = config.build("model", fields)
        module = part.build()
    except ValueError as error:
        raise UserError(f"{path}: cannot rebuild the model: {first_line(error)}") from None
    tensors.update({name: tensors[kept] for name, kept in meta.get("tied", {}).items() if kept in tensors})
    _fill(module, tensors, str(path))
    module.robustlab_meta = meta
    return module.to(device).eval()


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Start from the weights in a file: a checkpoint, foreign safetensors, or a ``.pt`` state dict (``weights_only=True``).

    Prefixes such as ``module.`` and ``model.`` are ignored; a foreign file may lack the normalisation layer.

    Raises:
        UserError: unreadable, or keys or shapes that do not fit; the module is then as it was.
    """
    path = Path(path)
    if path.is_file() and is_pickled(path):
        tensors, own = _unpickle(path), False
    else:
        metadata, tensors = _read(path)
        own = FORMAT in metadata
        if own:
            tied = _block(path, metadata).get("tied", {})
            tensors.update({name: tensors[kept] for name, kept in tied.items() if kept in tensors})
    wanted = {_bare(name): name for name in module.state_dict()}
    tensors = {wanted.get(_bare(name), name): value for name, value in tensors.items()}
    if not own:
        state = module.state_dict()
        tensors = {n: v for n, v in state.items() if n.endswith(_OPTIONAL) and n not in tensors} | tensors
    _fill(module, tensors, str(path))


def _unpickle(path: Path) -> dict[str, Tensor]:
    """The state dict in a ``.pt`` file, read without running code."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises several unrelated types here
        raise UserError(f"{path}: holds pickled objects other than tensors, or is damaged; only state dicts are loaded") from None
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path}: expected a state dict (names to tensors), got {type(content).__name__}")
    return {str(k): v for k, v in content.items()}


def _bare(name: str) -> str:
    """A key without the prefixes that wrappers add."""
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into the module, after a check that they fit exactly."""
    state = module.state_dict()
    shapes = [
        f"{n} {tuple(tensors[n].shape)} for {tuple(state[n].shape)}"
        for n in state
        if n in tensors and tensors[n].shape != state[n].shape
    ]
    problems = {
        "missing": [n for n in state if n not in tensors],
        "unexpected": [n for n in tensors if n not in state],
        "wrong shape": shapes,
    }
    if any(problems.values()):
        raise UserError(f"{source}: the weights do not fit: " + "; ".join(f"{k}: {_few(v)}" for k, v in problems.items() if v))
    module.load_state_dict(dict(tensors))


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _few(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


# --------------------------------------------------------------------------------------------------- any model by name


def load_model(spec: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """A trained classifier, in eval mode.

    Args:
        spec: a ``.safetensors`` checkpoint; ``hf:user/name`` (or a local folder of that layout); ``timm:NAME`` or
            ``torchvision:NAME`` with their pretrained weights; or ``package.module:callable``, which is a classifier, or makes one
            when called without arguments.
        device: where to put it.

    Raises:
        UserError: one line: no such file, not a checkpoint, no such model, or the import failed.
    """
    from robustlab import config
    from robustlab.models import hub

    name = str(spec)
    head, colon, tail = name.partition(":")
    if name.startswith(hub.PREFIX):
        return hub.load_folder(hub.fetch(name), device)
    if (Path(name) / hub.CONFIG).is_file():
        return hub.load_folder(name, device)
    if colon and head in ("timm", "torchvision"):
        return config.build("model", name, init="pretrained").build().to(device).eval()
    if name.endswith((".safetensors", *PICKLED)) or Path(name).exists():
        return load_checkpoint(name, device)
    if colon and tail.isidentifier() and all(part.isidentifier() for part in head.split(".")):
        return as_module(import_callable(name), name).to(device).eval()
    raise UserError(
        f"{name}: no such model; expected a .safetensors file, hf:user/name, timm:NAME, torchvision:NAME or package.module:callable"
    )


class Wrapped(nn.Module):
    """A plain callable on images as a module."""

    def __init__(self, fn: Any):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


def as_module(thing: Any, spec: str) -> nn.Module:
    """A classifier from a module, a callable on images, or a factory without required arguments.

    Raises:
        UserError: none of these, or the factory fails.
    """
    if isinstance(thing, type) and not _needs_nothing(thing):
        raise UserError(f"{spec}: the class {thing.__name__} needs arguments; name a function that makes the classifier")
    if not isinstance(thing, nn.Module) and callable(thing) and _needs_nothing(thing):
        try:
            thing = thing()
        except Exception as error:  # whatever the user's factory raises
            raise UserError(f"{spec}: calling it failed: {type(error).__name__}: {first_line(error)}") from None
    if isinstance(thing, nn.Module):
        return thing
    if not callable(thing):
        raise UserError(f"{spec}: expected a classifier or a function that returns one, got {type(thing).__name__}")
    return Wrapped(thing)


def _needs_nothing(fn: Any) -> bool:
    try:
        inspect.signature(fn).bind()
    except (TypeError, ValueError):
        return False
    return True
