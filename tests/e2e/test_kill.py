"""A run that is killed, interrupted, moved or starved of disk goes on where it was, and ends bit for bit like one that was not."""

import functools
import json
import os
import random
import resource
import shutil
import signal
import time

import pytest
from processes import Command, at_write
from safetensors import safe_open

RUN = """
trainer: {name: awp, averaging: {name: ema, decay: 0.9}, inner: [{name: craft, attack: {name: pgd, steps: 2}}]}
model: {name: small_cnn, width: 4}
data: {name: digits, size: 8}
threat: {norm: linf, eps: 0.1}
optimizer: {name: sgd, lr: 0.05}
training: {epochs: 6, batch_size: 256, device: cpu, threads: 1, probe: {num_examples: 40, steps: 2}}
"""
SECOND = 5  # the configuration, best, last and state come first: this write is the first of the second epoch
SHORT = ("--set", "training.epochs=2", "--set", "training.batch_size=512")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The configuration file, and the results of runs that nothing disturbed."""
    return Undisturbed(tmp_path_factory.mktemp("kill"))


class Undisturbed:
    def __init__(self, base):
        self.base, self.config = base, base / "run.yaml"
        self.config.write_text(RUN)

    @functools.lru_cache  # noqa: B019 - lives as long as the module's tests
    def result(self, *settings):
        out = self.base / f"whole{len(settings)}"
        assert self.start(out, *settings).wait() == 0
        return result(out)

    @functools.cached_property
    def seconds(self):
        """How long a run takes, once the process that they are forked from is warm."""
        self.result()
        begun = time.monotonic()
        assert self.start(self.base / "timed").wait() == 0
        return time.monotonic() - begun

    def start(self, out, *settings, **how):
        return Command(["train", self.config, "--out", out, *settings], f"{out}.log", **how)

    def resume(self, out, *settings, **how):
        return self.start(out, "--resume", *settings, **how)

    def assert_finishes(self, out, *settings):
        """Resumed, the run in ``out`` ends like the undisturbed one, and leaves nothing half-written."""
        command = self.resume(out, *settings)
        assert command.wait() == 0, command.said()
        assert result(out) == self.result(*settings)
        assert not list(out.glob(".*.tmp"))


def result(folder):
    """All that a run wrote, but for times: they are the only thing that differs between two runs."""
    out = {name: (folder / f"{name}.safetensors").read_bytes() for name in ("best", "last")}
    with safe_open(folder / "state.safetensors", "pt") as file:
        out["state"] = {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118 - not a dict
        out["meta"] = {k: v for k, v in json.loads(file.metadata()["robustlab"]).items() if k != "metrics_bytes"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    out["metrics"] = [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]
    return out


def test_the_undisturbed_run_has_what_could_get_lost(run):
    whole = run.result()
    assert len(whole["metrics"]) == 6
    names = set(whole["state"])
    assert any(n.startswith("optimizer.") and n.endswith("momentum_buffer") for n in names)
    assert "outer.state.averaging.steps" in names
    assert any(n.endswith("running_mean") for n in names)


# ----------------------------------------------------------------------------------------------------------- SIGKILL


def kill_ten_times(run, folder, seed, chained):
    """SIGKILL at random moments until ten have hit; ``chained``: the same run is killed again and again until it ends."""
    moments, hits, number = random.Random(seed), 0, 0
    while hits < 10:
        out = folder / f"run{number}"
        number += 1
        alive = False
        while not alive and hits < 10:
            command = run.resume(out)
            command.process.join(moments.uniform(0, run.seconds))
            command.kill()
            alive = command.wait() == 0
            hits += not alive
            if not chained:
                break
        run.assert_finishes(out)
        shutil.rmtree(out)
        assert number < 40


def test_killed_at_ten_random_moments(run, tmp_path):
    kill_ten_times(run, tmp_path, seed=0, chained=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_at_ten_random_moments_of_ten_runs(run, tmp_path, seed):
    kill_ten_times(run, tmp_path, seed, chained=False)


def writes(run):
    """How many files two epochs write: the configuration, then best (if it improved), last and state of each epoch."""
    best = [line for line in run.result(*SHORT)["metrics"] if "val_robust" in line]
    improved = 1 + ((best[1]["val_robust"], best[1]["val_clean"]) > (best[0]["val_robust"], best[0]["val_clean"]))
    return 1 + improved + 2 + 2


@pytest.mark.parametrize(
    "moment", [pytest.param("before", marks=pytest.mark.slow), "middle", pytest.param("written", marks=pytest.mark.slow), "after"]
)
def test_killed_around_every_write(run, tmp_path, moment):
    last = writes(run)
    for number in range(1, last + 1):
        out = tmp_path / f"run{number}"
        assert run.start(out, *SHORT, prepare=functools.partial(at_write, number, moment)).wait() == 9
        run.assert_finishes(out, *SHORT)
    assert run.start(tmp_path / "more", *SHORT, prepare=functools.partial(at_write, last + 1, moment)).wait() == 0


def in_metrics_line(number):
    """In this process: die in the middle of the ``number``-th line of metrics.jsonl."""
    from robustlab.training.trackers import Jsonl

    log, count = Jsonl.log, 0

    def dying(self, event):
        nonlocal count
        count += 1
        if count == number:
            self._file.write(json.dumps(event).encode()[:20])
            self._file.flush()
            os._exit(9)
        log(self, event)

    Jsonl.log = dying


@pytest.mark.parametrize("number", [1, 2])
def test_killed_within_a_line_of_metrics(run, tmp_path, number):
    out = tmp_path / "run"
    assert run.start(out, *SHORT, prepare=functools.partial(in_metrics_line, number)).wait() == 9
    assert b"\n" not in (out / "metrics.jsonl").read_bytes()[-20:]
    run.assert_finishes(out, *SHORT)


# -------------------------------------------------------------------------------------------------- other disturbances


def interrupted_run(run, out):
    """A run that died after its first checkpoint."""
    assert run.start(out, prepare=functools.partial(at_write, SECOND, "before")).wait() == 9
    assert (out / "state.safetensors").exists()
    return out


def test_the_second_process_on_a_folder_is_refused(run, tmp_path):
    out = tmp_path / "run"
    first = run.start(out, prepare=functools.partial(at_write, SECOND, "stop", tmp_path / "stopped"))
    first.wait_for((tmp_path / "stopped").exists)
    try:
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        second = Command(["train", run.config, "--out", out, "--resume"], tmp_path / "second.log")
        assert second.wait() == 2
        assert "another process is working in this folder" in second.complaint()
        third = Command(["train", run.config, "--out", out], tmp_path / "third.log")
        assert third.wait() == 2
        assert "holds a run already; add --resume" in third.complaint()
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    finally:
        first.kill(signal.SIGCONT)
    assert first.wait() == 0
    assert result(out) == run.result()


def test_a_moved_folder_resumes(run, tmp_path):
    out = interrupted_run(run, tmp_path / "run")
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    out.rename(moved)
    run.assert_finishes(moved)
    assert not out.exists()


@pytest.mark.parametrize(
    ("setting", "key"),
    [("optimizer.lr=0.06", "optimizer.lr is 0.05 there and 0.06 here"), ("trainer.gradient.gamma=0.02", "trainer.gradient.gamma")],
)
def test_a_folder_of_another_configuration_is_refused(run, tmp_path, setting, key):
    out = interrupted_run(run, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    command = run.resume(out, "--set", setting)
    assert command.wait() == 2
    assert key in command.complaint()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_what_does_not_change_the_numbers_may_change(run, tmp_path):
    out = interrupted_run(run, tmp_path / "run")
    command = run.resume(out, "--set", "evaluation.num_examples=7")
    assert command.wait() == 0, command.said()
    assert result(out)["state"] == run.result()["state"]


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(run, tmp_path):
    """Each write of the second epoch in turn finds the disk full."""
    for number in range(4, writes(run) + 1):
        out = tmp_path / f"run{number}"
        command = run.start(out, *SHORT, prepare=functools.partial(at_write, number, "full"))
        assert command.wait() == 2
        assert "No space left on device" in command.complaint()
        assert ".safetensors" in command.complaint()
        assert not list(out.glob(".*.tmp"))
        with safe_open(out / "last.safetensors", "pt") as file:
            assert file.keys()
        run.assert_finishes(out, *SHORT)


def small_files():
    """In this process: no file may be longer than 1000 bytes (the system refuses with EFBIG)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def test_no_room_for_anything_leaves_nothing(run, tmp_path):
    out = tmp_path / "run"
    command = Command(["train", run.config, "--out", out], tmp_path / "log", prepare=small_files)
    assert command.wait() == 2
    assert "config.yaml: cannot write: File too large" in command.complaint()
    assert not out.exists()


def test_ctrl_c_is_one_line_and_resumable(run, tmp_path):
    out = tmp_path / "run"
    command = run.start(out, prepare=functools.partial(at_write, SECOND, "ctrl-c"))
    assert command.wait() == 130
    assert command.complaint() == "robustlab: interrupted; what is written so far is whole: add --resume to go on"
    run.assert_finishes(out)


def test_a_finished_run_is_left_alone(run, tmp_path):
    out = tmp_path / "run"
    assert run.start(out, *SHORT).wait() == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    command = run.resume(out, *SHORT)
    assert command.wait() == 0
    assert "it was finished already" in command.said()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_damaged_state_is_one_line(run, tmp_path):
    out = interrupted_run(run, tmp_path / "run")
    state = out / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    command = run.resume(out)
    assert command.wait() == 2
    assert "state.safetensors: damaged resume state" in command.complaint()
