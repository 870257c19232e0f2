"""What the tests of the laws share: a small net, batches, one training step, a tiny data set."""

import contextlib
import dataclasses

import torch
from torch import nn

from robustlab import config
from robustlab.data.digits import Digits
from robustlab.data.images import memory_splits
from robustlab.outer import Outer, context_of
from robustlab.registry import entries
from robustlab.rng import Rng
from robustlab.training.step import train_step
from robustlab.types import GradientRule, Threat, View, one_hot, rebuild, walk, with_threat

THREAT = Threat("linf", 0.1)
CLASSES, SHAPE = 5, (1, 8, 8)
TRAINERS = sorted(entries("trainer"))
COUPLED = {n for n in TRAINERS if any(getattr(p, "coupled", False) for p in walk(config.build("trainer", n)))}


def net(bn=True, dropout=0.0, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norm = nn.BatchNorm2d if bn else (lambda channels: nn.GroupNorm(2, channels))
        return nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1, bias=False), norm(4), nn.ReLU()),
            *(nn.Conv2d(4, 6, 3, stride=2, bias=False), norm(6), nn.ReLU()),
            *(nn.Flatten(), nn.Dropout(dropout), nn.Linear(54, CLASSES)),
        )


def batch(n=8, first=0, dtype=torch.float32):
    """The samples with tickets first .. first + n - 1 of an endless stream."""
    rng = Rng(3).at(torch.arange(first, first + n))
    x = rng.child("x").uniform(SHAPE, dtype=dtype)
    label = rng.child("y").integers((), CLASSES)
    key = torch.arange(first, first + n)
    return {"clean": View(x=x, y=one_hot(label, CLASSES, dtype), key=key, index=key)}


def trainer(name, **fields):
    return with_threat(config.build("trainer", name, **fields), THREAT)


def quick(name, **fields):
    """The trainer with at most two steps in its attacks."""
    return rebuild(trainer(name, **fields), lambda field, v: min(v, 2) if field == "steps" else v)


def outer_of(f, method, precision="fp32", batch_size=None):
    return Outer(f, method, context_of(f, CLASSES, 64, SHAPE, batch_size=batch_size), precision)


def sgd(outer, lr=0.05):
    return torch.optim.SGD([p for p in outer.parameters() if p.requires_grad], lr=lr, momentum=0.9, weight_decay=5e-3)


def steps(f, method, count=2, n=8, shards=1, precision="fp32", clip_grad=None, seed=5):
    """Train ``f`` for some steps; returns the outer module and the terms of the last step."""
    outer = outer_of(f, method, precision, batch_size=n)
    optimizer, terms = sgd(outer), {}
    dtype = next(f.parameters()).dtype
    for s in range(count):
        micro = [batch(n // shards, first=s * n + i * (n // shards), dtype=dtype) for i in range(shards)]
        terms = train_step(outer, micro, method, optimizer, Rng(seed), first=s * shards, clip_grad=clip_grad)
    return outer, terms


def snapshot(f):
    return {name: value.detach().clone() for name, value in f.state_dict().items()}


def assert_equal(a, b, only=None):
    """State dicts agree bit for bit; ``only`` names what to compare: all, or the parameters."""
    assert a.keys() == b.keys()
    for name in a if only is None else only:
        assert torch.equal(a[name], b[name]), name


def weights(f):
    return [name for name, _ in f.named_parameters()]


def norms(f):
    """The BatchNorm layers."""
    return [m for m in f.modules() if isinstance(m, nn.BatchNorm2d)]


def updates(f):
    """How many forward passes have updated the running statistics."""
    counts = {int(m.num_batches_tracked) for m in norms(f)}
    assert len(counts) == 1
    return counts.pop()


class Halt(Exception):
    """Raised by a test inside the step."""


@dataclasses.dataclass(frozen=True)
class Watch(GradientRule):
    """Keeps the shards that the inner stages made, then stops or goes on with another rule."""

    seen: list
    then: GradientRule | None = None

    def __call__(self, f, loss, shards, rng):
        self.seen.append(shards)
        if self.then is None:
            raise Halt
        return loss.outer.call(self.then, f, loss, shards, rng)


@contextlib.contextmanager
def counted(f):
    """Counts the forward passes of ``f`` inside."""
    count = [0]

    def hook(module, args, out):
        count[0] += 1

    handle = f.register_forward_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


class TinyDigits(Digits):
    """The first 96 training digits at 8 px, 40 for validation, 40 for test."""

    def load(self):
        full = super().load()
        pick = []
        for part, n in ((full.train, 96), (full.test, 40), (full.validation, 40)):
            x, y, _ = part.at(torch.arange(n))
            pick.append(((x * 255).round().to(torch.uint8), y))
        return memory_splits(pick[0], pick[1], list(full.class_names), validation=pick[2], source="digits")


def run_config(method="standard", **training):
    """A run of seconds."""
    training = {"epochs": 2, "batch_size": 32, "device": "cpu", "threads": 1, **training}
    return config.Config(
        trainer=method if not isinstance(method, str) else trainer(method),
        model=config.build("model", "small_cnn", width=4),
        data=TinyDigits(size=8),
        threat=THREAT,
        optimizer=config.build("optimizer", "sgd", lr=0.05),
        schedule=config.build("schedule", "cosine", warmup=1),
        training=dataclasses.replace(config.Training(probe=config.Probe(num_examples=20, steps=2)), **training),
    )
