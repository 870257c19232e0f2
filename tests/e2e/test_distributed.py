"""Law 10: several processes train as one. Two gloo processes on this machine, float64, a net without BatchNorm.

Ranks stay bit-identical; one process and two agree to 1e-6; one synchronisation of gradients per step, a global weight perturbation
costs one more.
"""

import dataclasses
import functools
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from processes import Command, at_write, context, free_port, ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from robustlab import config
from robustlab.data.digits import Digits
from robustlab.files import exclusive
from robustlab.models.checkpoint import load_model
from robustlab.outer import Outer, context_of
from robustlab.registry import entries
from robustlab.rng import Rng
from robustlab.training import distributed
from robustlab.training.loop import Plan, loader
from robustlab.training.step import train_step
from robustlab.types import Alone, Threat, walk, with_threat

STEPS, BATCH = 3, 32
TRAINERS = sorted(entries("trainer"))
COUPLED = {n for n in TRAINERS if any(getattr(p, "coupled", False) for p in walk(config.build("trainer", n)))}
CASES = [*((name, 1) for name in TRAINERS), ("awp", 2), ("engm", 2), ("trades", 2)]  # with their micro-batches per process
GRADIENT = 1000  # a message this long is a gradient; loss terms are shorter


class Doubles:
    """Images in float64."""

    def __init__(self, images):
        self.images, self.labels = images, images.labels

    def __len__(self):
        return len(self.images)

    def batches(self, index_batches, device="cpu"):
        for x, y, index in self.images.batches(index_batches, device):
            yield x.double(), y, index


def train(name, world, parts=1, norm="none", before_step=lambda step: None):
    """Three steps of a trainer with an average of the weights; the weights after each, and what was trained."""
    splits = Digits(size=8).load()
    splits = dataclasses.replace(splits, train=Doubles(splits.train))
    torch.manual_seed(0)
    f = config.build("model", "small_cnn", width=8, norm=norm, num_classes=10, in_channels=1).build().double()
    method = with_threat(config.build("trainer", name, averaging="ema"), Threat("linf", 0.1))
    outer = Outer(f, method, context_of(f, 10, len(splits.train), (1, 8, 8)), world=world)
    optimizer = config.build("optimizer", "sgd", lr=0.05).build(outer.parameters())
    distributed.wrap(outer)
    plan, rng = Plan(len(splits.train), BATCH, parts, world), Rng(0)
    batches = loader(splits, plan, rng, 0, torch.device("cpu"))
    after = []
    for step in range(STEPS):
        before_step(step)
        micro = [next(batches) for _ in range(parts)]
        train_step(outer, micro, method, optimizer, rng.child("step"), first=plan.first(step), stride=world.size)
        after.append({k: v.detach().clone() for k, v in outer.state_dict().items()})
    return after, outer


def rank(env, folder):
    """One of two processes: every case, its weights after each step, and the messages that each step sent."""
    os.environ.update(env)
    torch.set_num_threads(1)
    dist = torch.distributed
    sent = []
    for call in ("all_reduce", "all_gather", "broadcast", "reduce", "all_gather_into_tensor", "reduce_scatter"):
        true = getattr(dist, call)

        def counted(tensor, *args, _call=call, _true=true, **kwargs):
            first = tensor[0] if isinstance(tensor, list) else tensor
            sent[-1][f"{_call} of gradients" if first.numel() > GRADIENT else f"{_call} of numbers"] += 1
            return _true(tensor, *args, **kwargs)

        setattr(dist, call, counted)
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    wrap = distributed.wrap

    def hooked(outer):  # the wrapper's messages go through all_reduce above too
        sent.append(Counter())
        wrap(outer)
        outer.loss.wrapped.register_comm_hook(None, allreduce_hook)

    distributed.wrap = hooked
    with distributed.joined(torch.device("cpu")) as world:
        found, counts = {}, {}
        for name, parts in CASES:
            after, _ = train(name, world, parts, before_step=lambda step: sent.append(Counter()))
            found |= {f"{name}.{parts}.{step}.{k}": v.contiguous() for step, state in enumerate(after) for k, v in state.items()}
            counts[f"{name}.{parts}"] = [dict(c) for c in sent[-STEPS:]]
        sent.append(Counter())
        after, outer = train("pgd-at", world, norm="batch")
        found |= {f"bn.{k}": v.contiguous() for k, v in after[-1].items()}
        distributed.average_buffers(outer, world)
        found |= {f"averaged.{k}": v.detach().clone().contiguous() for k, v in outer.state_dict().items()}
        mine = torch.arange(3) + 10 * world.rank
        found["gather"] = world.gather(mine)
        pair = [mine.double(), mine.float().view(3, 1)]
        world.mean_(pair)
        found |= {"mean.double": pair[0], "mean.float": pair[1]}
    save_file(found, Path(folder) / f"{world.rank}.safetensors")
    (Path(folder) / f"{world.rank}.json").write_text(json.dumps(counts))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The two ranks' tensors and counts."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [context.Process(target=rank, args=(env, str(folder))) for env in ranks(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(200)
        if p.exitcode is None:
            p.kill()
    assert [p.exitcode for p in processes] == [0, 0]
    return [(load_file(folder / f"{r}.safetensors"), json.loads((folder / f"{r}.json").read_text())) for r in range(2)]


def test_ranks_are_bit_identical_after_every_step(two):
    (one, _), (other, _) = two
    keys = [k for k in one if not k.startswith("bn.")]
    assert len(keys) > len(CASES) * STEPS * 8
    for key in keys:
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize(("name", "parts"), [c for c in CASES if c[0] not in COUPLED])
def test_one_process_and_two_agree(two, name, parts):
    after, _ = train(name, Alone())
    start, _ = train_start()
    for step, state in enumerate(after):
        for key, value in state.items():
            theirs = two[0][0][f"{name}.{parts}.{step}.{key}"]
            torch.testing.assert_close(theirs, value, rtol=1e-6, atol=1e-12 if key.endswith("bias") else 0)
    moved = max(float((after[-1][k] - start[k]).abs().max()) for k in start)
    assert moved > 1e-3


@pytest.mark.parametrize("name", sorted(COUPLED))
def test_trainers_that_couple_the_batch_move_on_two_processes(two, name):
    start, _ = train_start()
    moved = max(float((two[0][0][f"{name}.1.{STEPS - 1}.{k}"] - start[k]).abs().max()) for k in start)
    assert moved > 1e-3


def train_start():
    torch.manual_seed(0)
    f = config.build("model", "small_cnn", width=8, norm="none", num_classes=10, in_channels=1).build().double()
    return {f"f.{k}": v for k, v in f.state_dict().items()}, f


@pytest.mark.parametrize(("name", "parts"), CASES)
def test_gradients_are_synchronised_once_a_step(two, name, parts):
    """However many micro-batches there are; a shared weight perturbation costs one more, a carried one of images a gather."""
    method = config.build("trainer", name)
    messages = {"all_reduce of gradients": 2 if method.gradient.name in ("awp", "wt-awp") else 1}
    if name == "free-at":  # places and perturbations
        messages |= {"all_gather of numbers": 1, "all_gather of gradients": 1}
    for _, counts in two:
        gradients = [{k: n for k, n in step.items() if "gradients" in k} for step in counts[f"{name}.{parts}"]]
        numbers = [{k: n for k, n in step.items() if "numbers" in k} for step in counts[f"{name}.{parts}"]]
        assert gradients == [{k: n for k, n in messages.items() if "gradients" in k}] * STEPS
        if method.gradient.name in ("engm", "engm-approx"):  # the mean length is that of all samples, and a fit is made together
            assert [sum(n.values()) for n in numbers] == ([1, 1, 1] if method.gradient.name == "engm" else [2, 1, 1])
        else:
            assert numbers == [{k: n for k, n in messages.items() if "numbers" in k}] * STEPS


def test_batchnorm_statistics_differ_until_they_are_averaged(two):
    (one, _), (other, _) = two
    floating = [k for k in one if k.startswith("bn.f.") and "running" in k]
    assert floating
    for key in floating:
        assert not torch.equal(one[key], other[key])
        mean = (one[key] + other[key]) / 2
        torch.testing.assert_close(one[key.replace("bn.", "averaged.", 1)], mean)
    for key in (k for k in one if k.startswith("bn.") and k.endswith(("weight", "bias"))):
        assert torch.equal(one[key], other[key])


def test_gather_and_mean_over_processes(two):
    for found, _ in two:
        assert found["gather"].tolist() == [0, 1, 2, 10, 11, 12]
        assert found["mean.double"].tolist() == [5, 6, 7]
        assert found["mean.float"].tolist() == [[5], [6], [7]]


# ------------------------------------------------------------------------------------------------------- the command

RUN = """
trainer: {name: awp, averaging: {name: ema, decay: 0.9}, inner: [{name: craft, attack: {name: pgd, steps: 2}}]}
model: {name: small_cnn, width: 4}
data: {name: digits, size: 8}
threat: {norm: linf, eps: 0.1}
optimizer: {name: sgd, lr: 0.05}
training: {epochs: 4, batch_size: 128, device: cpu, threads: 1, probe: {num_examples: 40, steps: 2}}
"""


def start(path, out, *more, prepare=(None, None)):
    """The command on two ranks, as torchrun would start it."""
    both = zip(ranks(2), prepare, strict=True)
    return [Command(["train", path, "--out", out, *more], f"{out}.{env['RANK']}.log", env, ready) for env, ready in both]


def state(folder):
    with safe_open(folder / "state.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict


def test_a_killed_run_of_two_processes_resumes_bit_for_bit(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    whole = start(path, tmp_path / "whole")
    assert [c.wait() for c in whole] == [0, 0], whole[0].said() + whole[1].said()
    assert whole[1].said() == ""
    cut = start(path, tmp_path / "cut", prepare=(functools.partial(at_write, 5, "before"), None))
    assert cut[0].wait() == 9  # after the checkpoint of the first epoch
    cut[1].kill()
    assert cut[1].wait() != 0
    rest = start(path, tmp_path / "cut", "--resume")
    assert [c.wait() for c in rest] == [0, 0], rest[0].said() + rest[1].said()
    assert "resumed: went on after epoch 1" in rest[0].said()
    for name in ("last", "best"):
        files = [(tmp_path / d / f"{name}.safetensors").read_bytes() for d in ("whole", "cut")]
        assert files[0] == files[1]
    one, other = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()) == 4


def test_an_average_gets_the_statistics_of_all_processes(tmp_path):
    """SWA on two processes: both ranks refresh on their own batches, and the exported statistics are the mean over them."""
    path, out = tmp_path / "run.yaml", tmp_path / "run"
    average = "averaging: {name: swa, start: 0.0, refresh: 2}"
    path.write_text(RUN.replace("averaging: {name: ema, decay: 0.9}", average).replace("epochs: 4", "epochs: 1"))
    commands = start(path, out)
    assert [c.wait() for c in commands] == [0, 0], commands[0].said() + commands[1].said()
    saved = state(out)
    counts = [v for k, v in saved.items() if k.startswith("outer.state.averaging.module") and k.endswith("num_batches_tracked")]
    assert counts
    assert all(int(v) == 2 for v in counts)
    means = [k for k in saved if k.startswith("outer.f.") and k.endswith("running_mean")]
    assert all(not torch.equal(saved[k], saved[k.replace("outer.f.", "outer.state.averaging.module.")]) for k in means)


def test_parts_that_couple_the_batch_are_refused_on_two_processes(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN.replace("inner: [", "inner: [mixup, "))
    commands = start(path, tmp_path / "run")
    assert [c.wait() for c in commands] == [2, 2]
    assert "mixup couples the samples of a batch, so 2 shards" in commands[0].said()
    assert not (tmp_path / "run").exists()


def no_more_files():
    """In this process: files end at 2000 bytes, so the first checkpoint does not fit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def test_a_process_that_ends_takes_the_others_along_without_a_traceback(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    commands = start(path, tmp_path / "run", prepare=(no_more_files, None))
    assert [c.wait() for c in commands] == [2, 2], commands[1].said()
    assert "File too large" in commands[0].complaint()
    assert commands[1].said() == "robustlab: process 1: another process of this run has ended; see what it said\n"


def test_a_folder_in_use_is_refused_to_both_processes(tmp_path):
    path, out = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(RUN)
    with exclusive(out):
        commands = start(path, out)
        assert [c.wait() for c in commands] == [2, 2], commands[1].said()
    assert "another process is working in this folder" in commands[0].complaint()
    assert commands[1].complaint()
    assert sorted(p.name for p in out.iterdir()) == [".lock"]


def test_torchrun(tmp_path):
    """The real launcher, once: one epoch, one metrics file, checkpoints that load; resumed it has nothing to do."""
    out = tmp_path / "run"
    here = Path(__file__).parents[2]
    settings = ["training.epochs=1", "model.width=4", "data.size=8", "training.device=cpu"]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
        *("--master_addr", "127.0.0.1", "--master_port", str(free_port())),
        *("-m", "robustlab", "train", str(here / "configs" / "digits" / "pgd-at.yaml"), "--out", str(out)),
        *(word for s in settings for word in ("--set", s)),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1]
    assert done.stdout.count("last  epoch") == 1
    for name in ("best", "last"):
        f = load_model(out / f"{name}.safetensors")
        assert f(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    words = command[command.index("train") + 1 :]
    again = [Command(["train", *words, "--resume"], tmp_path / f"{env['RANK']}.log", env) for env in ranks(2)]
    assert [c.wait() for c in again] == [0, 0]
    assert "it was finished already" in again[0].said()
