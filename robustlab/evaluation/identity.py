"""What was evaluated and where: the hash of a model, the versions, the machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import robustlab
from robustlab.modes import unwrap


def model_hash(f: Any) -> str:
    """SHA-256 over the structure and every tensor of a module's state; for a plain callable, over its name."""
    module = unwrap(f)
    digest = hashlib.sha256()
    if not isinstance(module, nn.Module):
        named = module if hasattr(module, "__qualname__") else type(module)
        digest.update(f"{named.__module__}:{named.__qualname__}".encode())
        return digest.hexdigest()
    digest.update(str(module).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """What a number may depend on besides its inputs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "robustlab": robustlab.__version__,
        "pyautoattack": version("pyautoattack"),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": name,
    }


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """Of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
