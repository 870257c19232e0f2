"""``training.channels_last``: the classifier and its images lie in memory as asked, and learn the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustlab import commands, config
from robustlab.types import UserError

YAML = """
trainer: standard
model: {name: small_cnn, width: 8}
data: {name: digits, size: 16, channels: 3}
threat: {norm: linf, eps: 0.1}
training: {epochs: 1, batch_size: 256, threads: 1, channels_last: %s, probe: {num_examples: 8, steps: 1}}
"""


def trained(tmp_path: Path, flag: str, monkeypatch: pytest.MonkeyPatch) -> tuple[set[bool], dict[str, torch.Tensor]]:
    """The formats that the first convolution saw (weights, images), and the last weights."""
    seen: set[bool] = set()
    forward = nn.Conv2d.forward

    def watched(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.in_channels == 3:
            seen.update(t.is_contiguous(memory_format=torch.channels_last) for t in (self.weight, x))
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", watched)
    path = tmp_path / f"{flag}.yaml"
    path.write_text(YAML % flag)
    commands.train(config.load_config(path), tmp_path / flag)
    monkeypatch.undo()
    from robustlab.models.checkpoint import load_model

    f: Any = load_model(tmp_path / flag / "last.safetensors")
    return seen, {k: v for k, v in f.state_dict().items() if v.is_floating_point()}


def test_weights_and_images_have_the_format_and_the_result_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last, w_last = trained(tmp_path, "true", monkeypatch)
    first, w_first = trained(tmp_path, "false", monkeypatch)
    assert last == {True}
    assert first == {False}
    for k, w in w_last.items():
        torch.testing.assert_close(w, w_first[k], rtol=1e-3, atol=1e-3)  # five steps apart by float32 rounding


def test_a_run_does_not_go_on_in_another_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path, "true", monkeypatch)
    path = tmp_path / "true.yaml"
    path.write_text(YAML % "false" + "seed: 0\n")
    with pytest.raises(UserError, match="channels_last"):
        commands.train(config.load_config(path), tmp_path / "true", resume=True)
