"""AutoAttack is one computation: in float64 no batch size, shard, process or kill changes a verdict, a pass or a seed of a sample.

Shortened budgets here, on 32 digits, weakest attack first so that each has something to break; the full version for two batch sizes
is marked slow. scripts/identity_autoattack.py prints the same for float32.
"""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import digits64
import pytest
import torch
from processes import Command, free_port, ranks

from robustlab import create_attack
from robustlab.cli import run
from robustlab.config import load_suite
from robustlab.evaluation import shards
from robustlab.evaluation.ledger import by_sample, read
from robustlab.evaluation.runner import evaluate
from robustlab.files import sha256
from robustlab.results.record import read_record
from robustlab.types import Threat

N, EPS = 32, 0.06
SHORT = """
attacks:
  - {name: square, queries: 25}
  - {name: apgd-t, steps: 3, n_targets: 3}
  - {name: fab, targeted: true, steps: 2, n_targets: 2}
  - {name: apgd, steps: 12, restarts: 2}
"""


class Problem:
    def __init__(self, base):
        self.base, self.suite = base, base / "short.yaml"
        digits64.save(base / "net.safetensors")
        self.f = digits64.net()
        self.suite.write_text(SHORT)

    @functools.cached_property
    def data(self):
        from robustlab import config

        (x, y, _), *_ = config.build("dataset", "digits", size=8).load().test.batches([torch.arange(N)])
        return x, y

    def evaluate(self, out, **options):
        """By the Python interface; the ledger's samples."""
        options = {"suite": load_suite(str(self.suite)), "seed": 3, **options}
        result = evaluate(self.f, self.data, threat=Threat("linf", EPS), out=out, **options)
        return result, by_sample(read(out / "ledger.jsonl")[1])

    @functools.cached_property
    def whole(self):
        return self.evaluate(self.base / "whole", batch_size=N)

    def command(self, out, *more, batch_size=7):
        """The same evaluation, as words of a command line."""
        words = ["evaluate", "digits64:net", "--suite", self.suite, "--data", "{name: digits, size: 8}", "-n", N, "--seed", 3]
        words += ["--norm", "linf", "--eps", EPS, "--device", "cpu", "--batch-size", batch_size, "--out", out, *more]
        return [str(w) for w in words]


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return Problem(tmp_path_factory.mktemp("identity"))


def timeless(path):
    return [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]


def folder(out):
    """Where the command line puts what it found."""
    return out / "digits64-net" / f"short-linf-{EPS}"


def test_there_is_something_to_lose(problem):
    result, found = problem.whole
    assert 0 < int(result.robust.sum()) < int(result.clean.sum()) <= N
    assert sum(row["broken"] > 0 for row in result.per_attack.values()) >= 3
    passes = {name: {value[2] for (_, attack, _), value in found.items() if attack == name} for name in result.per_attack}
    assert all(None not in values for values in passes.values())
    assert sum(len(values) > 1 for values in passes.values()) >= 3  # samples leave at different times


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_sizes(problem, tmp_path, batch_size):
    result, found = problem.evaluate(tmp_path, batch_size=batch_size)
    assert found == problem.whole[1]
    assert result.threats[0]["curve"] == problem.whole[0].threats[0]["curve"]


def test_another_seed_is_seen(problem, tmp_path):
    """What is compared above can differ."""
    _, found = problem.evaluate(tmp_path, batch_size=N, seed=4)
    assert found != problem.whole[1]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_takes_no_rounding_for_progress(problem, norm):
    """A classifier that sees nothing of the image, but for the last bits of its sums."""
    noise = torch.Generator().manual_seed(0)

    def blind(x):
        z = torch.zeros(len(x), 10, dtype=x.dtype)
        z[:, 0] = 8.0
        return z + 1e-14 * torch.rand(z.shape, generator=noise, dtype=x.dtype)

    x, y = problem.data[0].double(), torch.zeros(N, dtype=torch.long)
    start, end = (create_attack("square", norm=norm, eps=0.1, queries=q)(blind, x, y, seed=0) for q in (1, 60))
    assert torch.equal(start, end)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_shards(problem, tmp_path, n):
    for i in range(1, n + 1):
        problem.evaluate(tmp_path / f"{i}", batch_size=3, shard=(i, n))
    _, entries = shards.merge([tmp_path / f"{i}" / "ledger.jsonl" for i in range(1, n + 1)])
    assert by_sample(entries) == problem.whole[1]


def forked(words):
    """The command in a process of its own; its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
            code = run(words)
        finally:
            os._exit(code)
    return pid


def test_twenty_kills(problem, tmp_path):
    """SIGKILL at random moments, and on from there until the run ends; then the next run."""
    straight = tmp_path / "straight"
    begun = time.monotonic()
    assert os.waitpid(forked(problem.command(straight, "--no-reliability")), 0)[1] == 0
    seconds = time.monotonic() - begun
    assert by_sample(read(folder(straight) / "ledger.jsonl")[1]) == problem.whole[1]
    moments, hits, lengths, number = random.Random(0), 0, set(), 0
    while hits < 20:
        out, number, ended = tmp_path / f"run{number}", number + 1, False
        ledger = folder(out) / "ledger.jsonl"
        while not ended:
            pid = forked(problem.command(out, "--no-reliability", "--resume"))
            if hits < 20:
                time.sleep(moments.uniform(0.1, 0.7) * seconds)
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            ended = status == 0
            assert ended or os.WTERMSIG(status) == signal.SIGKILL
            hits += not ended
            lengths.add(ledger.read_bytes().count(b"\n") if ledger.exists() else 0)
        assert timeless(ledger) == timeless(folder(straight) / "ledger.jsonl")
    assert len(lengths) > 3  # they hit in different places


# ------------------------------------------------------------------------------------------------------ two processes


@pytest.fixture
def together(problem):
    """Starts the command on two ranks, as torchrun would; as there, the processes meet in a store that outlives them."""
    stores = []

    def start(out, *more, prepare=(None, None), batch_size=7):
        words, both = problem.command(out, *more, batch_size=batch_size), ranks(2)
        stores.append(torch.distributed.TCPStore("127.0.0.1", int(both[0]["MASTER_PORT"]), is_master=True, wait_for_workers=False))
        torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        return [Command(words, f"{out}.{e['RANK']}.log", e | torchrun, p) for e, p in zip(both, prepare, strict=True)]

    return start


def dying(line):
    """In this process: die before that line of the ledger."""
    from robustlab.evaluation.ledger import Ledger

    append, count = Ledger.append, 0

    def counted(self, entry):
        nonlocal count
        count += 1
        if count == line:
            os._exit(9)
        append(self, entry)

    Ledger.append = counted


def test_two_processes(problem, together, tmp_path):
    single, out = tmp_path / "single", tmp_path / "both"
    assert run(problem.command(single)) == 0
    both = together(out)
    assert [c.wait() for c in both] == [0, 0], both[0].said() + both[1].said()
    assert both[1].said() == ""
    assert both[0].said().count("robust ") == 1
    assert both[0].said().splitlines()[-1] == f"  {folder(out)}/record.json"
    assert timeless(folder(out) / "ledger.jsonl") == timeless(folder(single) / "ledger.jsonl")
    mine, theirs = (read_record(folder(o) / "record.json") for o in (out, single))
    different = {"provenance", "cost", "metrics", "environment"}  # the last has the number of threads
    assert mine.model_dump(exclude=different) == theirs.model_dump(exclude=different)  # the reliability report too
    assert mine.reliability.verdict is not None
    assert mine.metrics.robust == theirs.metrics.robust
    assert mine.metrics.threats[0].curve == theirs.metrics.threats[0].curve
    # again: refused, or nothing to do
    before = {p: p.read_bytes() for p in folder(out).rglob("*.json*")}
    again = together(out)
    assert [c.wait() for c in again] == [2, 2]
    said = [c.said() for c in again if c.said()]
    assert said == [
        f"robustlab: {folder(out)}: there is an evaluation here already; continue it with --resume or choose another --out\n"
    ]
    resumed = together(out, "--resume")
    assert [c.wait() for c in resumed] == [0, 0], resumed[0].said()
    assert resumed[0].said().count("robust ") == 1
    assert {p: p.read_bytes() for p in folder(out).rglob("*.json*")} == before


def test_a_killed_process_of_two(problem, together, tmp_path):
    """One dies and takes the other along, with one line; resumed, the result is that of an undisturbed run."""
    out = tmp_path / "both"
    both = together(out, prepare=(None, functools.partial(dying, 4)))
    assert [c.wait() for c in both] == [2, 9]
    assert both[0].complaint() == "robustlab: process 0: another process of this run has ended; see what it said"
    assert not (folder(out) / "ledger.jsonl").exists()
    rest = together(out, "--resume")
    assert [c.wait() for c in rest] == [0, 0], rest[0].said() + rest[1].said()
    assert by_sample(read(folder(out) / "ledger.jsonl")[1]) == problem.whole[1]


def test_what_two_processes_refuse_is_said_once(problem, together, tmp_path):
    def refused(message, out, *more, batch_size=7):
        both = together(out, *more, batch_size=batch_size)
        assert [c.wait() for c in both] == [2, 2], both[0].said() + both[1].said()
        said = both[0].said() + both[1].said()
        assert said.count("\n") == 1, said
        assert message in said

    refused("--shard 1/2: 2 processes share out the batches themselves", tmp_path / "a", "--shard", "1/2")
    refused(
        "2 processes: 32 images are only 1 batch of 32; start fewer or give a smaller --batch-size", tmp_path / "b", batch_size=N
    )
    refused("unknown suite 'shor'", tmp_path / "c", "--suite", "shor")
    assert not list(tmp_path.glob("[abc]/*/*"))
    few = ("-n", "6", "--no-reliability")
    assert run(problem.command(tmp_path / "d", *few)) == 0
    refused("holds an evaluation by one process, these are 2; choose another --out", tmp_path / "d", "--resume")
    for i in (1, 2, 3):
        assert run(problem.command(tmp_path / "e", *few, "--shard", f"{i}/3", batch_size=2)) == 0
    refused("begun by 3 processes, these are 2; start as many as then or choose another --out", tmp_path / "e", "--resume")
    assert [c.wait() for c in together(tmp_path / "f", *few, batch_size=3)] == [0, 0]
    refused("made by another evaluation: seed is 3 there and 4 here", tmp_path / "f", *few, "--resume", "--seed", "4", batch_size=3)


@pytest.mark.slow  # once in a while a process that has finished its work aborts inside torch while it exits
def test_torchrun(problem, tmp_path):
    """The real launcher, once."""
    here = Path(__file__).parents[2]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", str(free_port()), "-m", "robustlab.cli"),
        *problem.command(tmp_path / "both", "--json", "--save-adversarial", tmp_path / "adv.npz"),
    ]
    path = f"{here}:{here / 'tests/e2e'}"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)
    assert record["metrics"]["robust"]["k"] == int(problem.whole[0].robust.sum())
    assert record["data"]["n"] == N
    assert record["provenance"]["ledger"] == sha256(folder(tmp_path / "both") / "ledger.jsonl")
    assert by_sample(read(folder(tmp_path / "both") / "ledger.jsonl")[1]) == problem.whole[1]
    files = sorted(tmp_path.glob("adv*"))
    assert [p.name for p in files] == ["adv-1-of-2.npz", "adv-2-of-2.npz"]


# ---------------------------------------------------------------------------------------------------------- full budget


@pytest.mark.slow
def test_the_full_version_in_two_batch_sizes(problem, tmp_path):
    one, two = (problem.evaluate(tmp_path / f"{b}", suite="autoattack", batch_size=b) for b in (N, 7))
    assert one[1] == two[1]
    assert 0 < int(one[0].robust.sum()) < int(one[0].clean.sum())
    assert {value[2] for (_, name, _), value in one[1].items() if name == "apgd-t"} >= {(910, 909)}
