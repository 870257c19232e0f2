"""A float64 classifier of 8 px digits for tests in several processes: ``digits64:net`` reads what ``save`` has trained."""

import os

import torch
from safetensors.torch import load_file, save_file

from robustlab import config

PATH = "ROBUSTLAB_DIGITS64"


def empty():
    return config.build("model", "small_cnn", width=4, num_classes=10, in_channels=1).build().double().eval()


def net():
    f = empty()
    f.load_state_dict(load_file(os.environ[PATH]))
    return f


def save(path, steps=60):
    """Train for a second, save the weights and let ``net`` know where they are."""
    (x, y, _), *_ = config.build("dataset", "digits", size=8).load().train.batches([torch.arange(1024)])
    x, f = x.double(), empty()
    torch.manual_seed(0)
    for p in f.parameters():
        p.requires_grad_()
        if p.ndim > 1:
            torch.nn.init.kaiming_normal_(p)
    optimizer = torch.optim.Adam(f.parameters(), lr=1e-2)
    for step in range(steps):
        rows = torch.arange(64) + 64 * step % 1024
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(f.train()(x[rows]), y[rows]).backward()
        optimizer.step()
    save_file(f.state_dict(), path)
    os.environ[PATH] = str(path)
