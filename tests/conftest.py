"""Shared by all tests: one thread per process, float32 by default, a clean global generator."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
