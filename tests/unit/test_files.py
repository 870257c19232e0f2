"""Files that are whole or absent, under full disks and killed processes."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from robustlab import files
from robustlab.files import atomic_write, exclusive, sha256, write_json
from robustlab.types import UserError

ROOT = Path(__file__).parents[2]


def python(code, *args):
    """Start a Python process on this checkout."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_writes_bytes_and_text_and_makes_folders(tmp_path):
    target = tmp_path / "a" / "b.txt"
    atomic_write(target, "grün")
    assert target.read_bytes() == "grün".encode()
    atomic_write(str(target), b"\x00\x01")
    assert target.read_bytes() == b"\x00\x01"
    assert os.listdir(target.parent) == ["b.txt"]


class Full:
    """A file on a disk that is full."""

    def __init__(self, inner, code):
        self.inner, self.code = inner, code

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.inner.close()

    def write(self, raw):
        self.inner.write(raw[: len(raw) // 2])
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, code):
    target = tmp_path / "a.json"
    atomic_write(target, "old")
    monkeypatch.setattr(files, "open", lambda path, mode: Full(path.open(mode), code), raising=False)
    with pytest.raises(UserError, match=f"a.json: cannot write: {os.strerror(code)}"):
        atomic_write(target, "new and longer")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_whatever_happens_before_the_replacement_nothing_is_half_written(tmp_path, monkeypatch, name, error):
    def fail(*args):
        raise error

    target = tmp_path / "a.json"
    atomic_write(target, "old")
    monkeypatch.setattr(files.os, name, fail)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        atomic_write(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_a_kill_before_the_replacement_keeps_the_old_content(tmp_path, moment):
    target = tmp_path / "a.json"
    atomic_write(target, "old")
    code = """
        import os, signal, sys
        from robustlab import files
        def die(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(files.os, {"write": "fsync", "replace": "replace"}[sys.argv[2]], die)
        files.atomic_write(sys.argv[1], "new" * 100_000)
    """
    process = python(code, target, moment)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    atomic_write(target, "newer")
    assert target.read_text() == "newer"


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        atomic_write(tmp_path / "file" / "below", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        atomic_write(tmp_path / "folder", "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_json_is_readable_and_refuses_what_json_has_not(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 2.5, None, "ä"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, 2.5, None, "ä"]}
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            write_json(tmp_path / "a.json", {"b": bad})
    assert json.loads((tmp_path / "a.json").read_text())["b"][0] == 1


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


HOLD = """
    import sys, time
    from robustlab.files import exclusive
    with exclusive(sys.argv[1]):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
"""


def test_a_second_process_is_refused_and_a_killed_one_lets_go(tmp_path):
    folder = tmp_path / "run"
    holder = python(HOLD, folder, 600)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="run: another process is working in this folder"), exclusive(folder):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=60)
        with exclusive(folder):
            second = python(HOLD, folder, 0)
            out, _ = second.communicate(timeout=120)
            assert second.returncode != 0
            assert out == ""
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_the_hold_ends_with_the_block_also_by_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError), exclusive(tmp_path):
            raise RuntimeError
    with exclusive(tmp_path), pytest.raises(UserError), exclusive(tmp_path):  # nor twice in one process
        pass


def test_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot use this folder"), exclusive(tmp_path / "file"):
        pass
