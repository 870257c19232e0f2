"""Real command lines in processes of their own, forked from a warm one: an import of torch costs more than a run here."""

import errno
import multiprocessing
import os
import pkgutil
import signal
import socket
import sys
import time
from pathlib import Path

import robustlab

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        *(m.name for m in pkgutil.walk_packages(robustlab.__path__, "robustlab.") if not m.name.endswith("__main__")),
        *("torch._dynamo", "sklearn.datasets", "filelock"),  # what a run imports late
    ]
)


def _main(args, log, env, prepare):
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what they start in the background ignore it
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if prepare is not None:
        prepare()
    from robustlab import cli

    sys.exit(cli.run(args))


class Command:
    """``robustlab ARGS`` in a process; ``prepare`` is called in it first, ``log`` takes what it says."""

    def __init__(self, args, log, env=None, prepare=None):
        self.log = Path(log)
        self.log.unlink(missing_ok=True)
        ours = {k: v for k, v in os.environ.items() if k.startswith("ROBUSTLAB_")}  # set after the warm process began
        arguments = [str(a) for a in args], str(log), ours | dict(env or {}), prepare
        self.process = context.Process(target=_main, args=arguments, daemon=True)
        self.process.start()

    def wait(self, seconds=120):
        """The exit code; minus the signal's number after a kill."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {seconds} s: {self.said()}")
        return self.process.exitcode

    def kill(self, number=signal.SIGKILL):
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def wait_for(self, condition, seconds=60):
        """Until ``condition()`` holds, or the process has ended."""
        end = time.monotonic() + seconds
        while not condition() and self.process.is_alive() and time.monotonic() < end:
            time.sleep(0.002)
        assert condition(), self.said()

    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def complaint(self):
        """The one line of complaint, which is the last that it says."""
        lines = self.said().splitlines()
        assert [line.startswith("robustlab: ") for line in lines] == [False] * (len(lines) - 1) + [True], lines
        assert "Traceback" not in self.said()
        return lines[-1]


class Dying:
    """A file whose first write is cut in half, as the process is."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        os._exit(9)


class Full(Dying):
    """A file on a disk that fills up."""

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def at_write(number, moment, marker=None):
    """In this process: something happens at the ``number``-th atomic write.

    It dies ``before`` the write, in its ``middle``, when the new file is ``written`` beside the old one, or ``after``; finds the
    disk ``full``; is interrupted from the keyboard (``ctrl-c``); or stops (``stop``), once the file ``marker`` exists.
    """
    from robustlab import files

    count, replace = 0, os.replace

    def opening(path, mode):
        nonlocal count
        count += 1
        if count == number and moment == "before":
            os._exit(9)
        if count == number and moment == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
        if count == number and moment == "stop":
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        file = open(path, mode)  # noqa: SIM115 - handed on
        return {"middle": Dying, "full": Full}.get(moment, lambda f: f)(file) if count == number else file

    def replacing(source, target):
        if count == number and moment == "written":
            os._exit(9)
        replace(source, target)
        if count == number and moment == "after":
            os._exit(9)

    files.open = opening
    os.replace = replacing


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ranks(size):
    """The environment that torchrun would give each of ``size`` processes."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    return [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(size)]
