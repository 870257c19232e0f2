"""Common corruptions: one file each, batched, seeded for each image, on the device of the images."""

from __future__ import annotations

import functools
from typing import get_args, get_type_hints

import torch
from torch import Tensor

from robustlab.registry import lookup, nearest
from robustlab.rng import Rng
from robustlab.types import Corruption, UserError, check_images

TABLES = ("cifar", "imagenet")


@functools.cache
def tables(corruption: type[Corruption]) -> tuple[str, ...]:
    """The severity tables that a corruption has, of ``"cifar"`` and ``"imagenet"``."""
    return get_args(get_type_hints(corruption)["table"])


def corrupt(x: Tensor, name: str, severity: int, table: str = "cifar", seed: int = 0, index: Tensor | None = None) -> Tensor:
    """Corrupt a batch of images.

    Args:
        x: images (N, C, H, W) in [0, 1], floating point.
        name: of a corruption, such as ``"gaussian_noise"``; ``rl.list_corruptions()`` lists them.
        severity: 1 (mild) to 5.
        table: the severities of ``"cifar"`` (CIFAR-10-C, for small images) or of ``"imagenet"`` (ImageNet-C).
        seed: of all draws.
        index: (N,) identities of the images, by which draws are keyed; 0, 1, 2, ... if not given.

    Returns:
        Images (N, C, H, W), float32, on the levels k/255.

    Raises:
        UserError: an unknown name, severity or table, one that the corruption does not have, or an index of another length.
        ValueError: images outside [0, 1] or not four-dimensional.
    """
    corruption = lookup("corruption", name)
    if table not in TABLES:
        raise UserError(f"unknown table '{table}'{nearest(table, TABLES)}; expected one of {', '.join(TABLES)}")
    if table not in tables(corruption):
        raise UserError(f"'{name}' has no severities for the table '{table}', only for '{tables(corruption)[0]}'")
    if severity not in (1, 2, 3, 4, 5):
        raise UserError(f"severity must be 1, 2, 3, 4 or 5, got {severity}")
    check_images(x)
    tickets = torch.arange(len(x), device=x.device) if index is None else torch.as_tensor(index, device=x.device)
    if tickets.shape != (len(x),):
        raise UserError(f"index must name each of the {len(x)} images, got shape {tuple(tickets.shape)}")
    severity = int(severity)
    return corruption(table=table)(x.float(), severity, Rng(seed).child("corruption", name, severity).at(tickets))
