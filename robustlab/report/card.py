"""The model card: the README of a shared model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robustlab.report.page import environment


def model_card(meta: Mapping[str, Any], records: Sequence[Mapping[str, Any]], name: str) -> str:
    """The card as Markdown, with the front matter that the hub reads.

    Args:
        meta: the checkpoint's metadata.
        records: results of this very checkpoint, as dicts.
        name: how to load it, such as ``hf:user/name``.
    """
    env = environment().overlay(autoescape=False)
    threat = meta.get("threat")
    model = meta["model"]
    arch = f"{model['name']}:{model['arch']}" if model.get("arch") else model["name"]
    config = meta.get("config", {})
    return str(
        env.get_template("card.md.j2").render(
            name=name, meta=meta, threat=threat, arch=arch, data=config.get("data", {}).get("name"), records=records
        )
    )
