"""Architectures, one file each, and checkpoints."""

from __future__ import annotations

from typing import Any

from torch import nn


def create_model(name: str, **fields: Any) -> nn.Module:
    """A new classifier, with random weights unless the fields say otherwise.

    Args:
        name: of the architecture, such as ``"preact_resnet18"`` or ``"timm:resnet18"``.
        fields: of the architecture; ``num_classes`` at least.

    Raises:
        UserError: no such name or field, or a value out of range.
        ValueError: ``num_classes`` is missing.
    """
    from robustlab import config

    return config.build("model", name, **fields).build()
