"""Contexts that put a model into a state for a while and take it back exactly, also when something raises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# What keeps a layer in train mode from touching its running statistics. InstanceNorm updates whatever buffers it has.
_QUIET: tuple[tuple[type[nn.Module], dict[str, Any]], ...] = (
    (nn.modules.batchnorm._BatchNorm, {"track_running_stats": False}),
    (nn.modules.instancenorm._InstanceNorm, {"running_mean": None, "running_var": None}),
)


def unwrap(f: Any) -> Any:
    """The module behind a callable that wraps one (precision), else the callable itself."""
    return getattr(f, "module", f) if not isinstance(f, nn.Module) else f


@contextlib.contextmanager
def frozen(f: Any) -> Iterator[None]:
    """No parameter of ``f`` requires a gradient inside."""
    f = unwrap(f)
    params = [p for p in f.parameters() if p.requires_grad] if isinstance(f, nn.Module) else []
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)


@contextlib.contextmanager
def bn_mode(f: Any, mode: str) -> Iterator[None]:
    """Run ``f`` in ``eval`` mode, or in train mode with (``train-update``) or without (``train-noupdate``) new statistics.

    ``train-noupdate`` normalises with the batch's own statistics and leaves the running ones untouched, exactly.
    Every module's own training flag is restored.
    """
    f = unwrap(f)
    if not isinstance(f, nn.Module):
        yield
        return
    modules = list(f.modules())
    flags = [m.training for m in modules]
    saved: list[tuple[nn.Module, str, Any]] = []
    try:
        f.train(mode != "eval")
        if mode == "train-noupdate":
            for m in modules:
                for name, value in next((quiet for kind, quiet in _QUIET if isinstance(m, kind)), {}).items():
                    saved.append((m, name, getattr(m, name)))
                    setattr(m, name, value)
        yield
    finally:
        for m, name, value in saved:
            setattr(m, name, value)
        for m, flag in zip(modules, flags, strict=True):
            m.training = flag


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 inside: on a GPU float32 products and convolutions keep their 24 bits, where torch's default leaves convolutions 11.

    The switches are global; they are as before afterwards.
    """
    if not torch.cuda.is_available():
        yield
        return
    switches, name, _, off = _precision_switches()
    saved = [getattr(switch, name) for switch in switches]
    try:
        for switch in switches:
            setattr(switch, name, off)
        yield
    finally:
        for switch, value in zip(switches, saved, strict=True):
            setattr(switch, name, value)


def tf32(device: torch.device) -> bool:
    """Whether float32 convolutions or products may be computed in TF32 there, as things stand."""
    switches, name, on, _ = _precision_switches()
    return device.type == "cuda" and any(getattr(switch, name) == on for switch in switches)


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself: GPUs since Ampere, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in asked)


def _precision_switches() -> tuple[tuple[Any, ...], str, Any, Any]:
    """The switches of TF32, the attribute of each, and its values for on and off."""
    backends = torch.backends
    if hasattr(backends.cudnn, "conv"):  # since torch 2.9; the older ones refuse to be read once these have been used
        return (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul), "fp32_precision", "tf32", "ieee"
    return (backends.cudnn, backends.cuda.matmul), "allow_tf32", True, False


@contextlib.contextmanager
def ambient(seed: int) -> Iterator[None]:
    """The global generators (dropout, drop path) start from ``seed`` inside, and go on outside as if nothing had happened."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def perturbed(params: Mapping[str, Tensor] | list[Tensor], deltas: list[Tensor]) -> Iterator[None]:
    """Weights plus deltas inside; the weights come back by copy, bit for bit.

    The autocast cache is cleared on both edges: a cached low-precision copy of the old weights would make the perturbation
    disappear without a word.
    """
    leaves = list(params.values()) if isinstance(params, Mapping) else params
    saved = [p.detach().clone() for p in leaves]
    try:
        with torch.no_grad():
            for p, d in zip(leaves, deltas, strict=True):
                p.add_(d)
        torch.clear_autocast_cache()
        yield
    finally:
        with torch.no_grad():
            for p, s in zip(leaves, saved, strict=True):
                p.copy_(s)
        torch.clear_autocast_cache()
