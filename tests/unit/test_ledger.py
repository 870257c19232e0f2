"""The ledger under kills, torn lines, full disks and foreign runs."""

import json

import pytest

from robustlab.evaluation.ledger import Ledger, first_difference, read
from robustlab.types import Threat, UserError

HEADER = {"ledger": 1, "model": "abc", "suite": {"name": "s", "attacks": [{"name": "pgd", "steps": 20}]}, "seed": 0}
LINF = Threat("linf", 0.1)


def entry(batch, attack="pgd", threat=LINF):
    return {
        "threat": None if threat is None else {"norm": threat.norm, "eps": threat.eps},
        "attack": attack,
        "batch": batch,
        "index": [2 * batch, 2 * batch + 1],
        "verdict": [1, 0],
        "forwards": 40,
        "backwards": 38,
        "seed": 0,
        "seconds": 0.25,
    }


ENTRIES = [entry(0, "clean", None), entry(0), entry(0, "pgd#2"), entry(1, "clean", None), entry(1), entry(1, "pgd#2")]


def write_all(path, entries=ENTRIES, resume=False):
    with Ledger(path, HEADER, resume=resume) as ledger:
        for e in entries:
            threat = Threat(**e["threat"]) if e["threat"] else None
            if ledger.get(threat, e["attack"], e["batch"]) is None:
                ledger.append(e)


def test_lines_come_back_in_order(tmp_path):
    write_all(tmp_path / "deep" / "ledger.jsonl")
    assert read(tmp_path / "deep" / "ledger.jsonl") == (HEADER, ENTRIES)


def test_a_kill_at_any_byte_of_a_line_then_resume_gives_the_same_file(tmp_path):
    whole = tmp_path / "whole.jsonl"
    write_all(whole)
    raw = whole.read_bytes()
    torn = tmp_path / "torn.jsonl"
    ends = [i + 1 for i, c in enumerate(raw) if c == 10]
    around = {e + d for e in ends for d in (-2, -1, 0, 1) if e + d <= len(raw)}
    for cut in sorted({*range(0, ends[0], 9), *around, *range(ends[-2], ends[-1])}):
        torn.write_bytes(raw[:cut])
        write_all(torn, resume=True)
        assert torn.read_bytes() == raw, f"cut at byte {cut}"


def test_garbage_after_a_power_cut_is_dropped(tmp_path):
    """Some file systems leave zeros, or a mixed-up block, where the last line should be."""
    path = tmp_path / "ledger.jsonl"
    write_all(path)
    raw = path.read_bytes()
    last = raw[:-1].rindex(b"\n") + 1
    for tail in (b"\0" * 50, b"\0" * 50 + b"\n", b'{"threat":null}\n', b"[1,2]\n"):
        path.write_bytes(raw[:last] + tail)
        write_all(path, resume=True)
        assert path.read_bytes() == raw


def test_a_damaged_line_before_the_last_is_an_error(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write_all(path)
    lines = path.read_bytes().split(b"\n")
    lines[2] = b"{" + lines[2]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match="line 3 is damaged"):
        Ledger(path, HEADER, resume=True)
    assert path.read_bytes() == b"\n".join(lines)


def test_a_file_that_is_no_ledger_is_left_alone(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for text in ("my notes", "my notes\n", '{"a": 1}'):
        path.write_text(text)
        for resume in (False, True):
            with pytest.raises(UserError):
                Ledger(path, HEADER, resume=resume)
        with pytest.raises(UserError, match="not a ledger"):
            read(path)
        assert path.read_text() == text


def test_another_run_is_refused_with_the_first_differing_key(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write_all(path)
    other = json.loads(json.dumps(HEADER))
    other["suite"]["attacks"][0]["steps"] = 50
    other["seed"] = 1
    with pytest.raises(UserError, match=r"suite\.attacks\[0\]\.steps is 20 there and 50 here"):
        Ledger(path, other, resume=True)
    with pytest.raises(UserError, match="extra is absent there and 3 here"):
        Ledger(path, {**HEADER, "extra": 3}, resume=True)


def test_an_existing_ledger_needs_resume(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write_all(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"--resume or choose another --out"):
        Ledger(path, HEADER)
    assert path.read_bytes() == before


def test_resume_without_a_ledger_starts_one(tmp_path):
    write_all(tmp_path / "ledger.jsonl", resume=True)
    assert read(tmp_path / "ledger.jsonl")[1] == ENTRIES


class Disk:
    """A raw file that takes ``room`` bytes and then fails, or writes a part of the line."""

    def __init__(self, file, room, raises):
        self.file, self.room, self.raises = file, room, raises

    def fileno(self):
        return self.file.fileno()

    def close(self):
        self.file.close()

    def write(self, data):
        part = data[: self.room]
        self.room -= len(part)
        if self.raises and len(part) < len(data):
            self.file.write(part)
            raise OSError(28, "No space left on device")
        return self.file.write(part)


@pytest.mark.parametrize("raises", [True, False])
def test_a_full_disk_is_one_line_and_leaves_whole_lines(tmp_path, raises):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, HEADER)
    ledger.append(ENTRIES[0])
    before = path.read_bytes()
    ledger._file = Disk(ledger._file, 30, raises)
    with pytest.raises(UserError, match="No space left"):
        ledger.append(ENTRIES[1])
    ledger.close()
    assert path.read_bytes() == before
    write_all(path, resume=True)
    assert read(path)[1] == ENTRIES


def test_a_real_full_device():
    from pathlib import Path

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(UserError, match="cannot write the ledger"):
        Ledger("/dev/full", HEADER)


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the ledger"):
        Ledger(tmp_path / "file" / "ledger.jsonl", HEADER)


def test_no_path_keeps_nothing():
    with Ledger(None, HEADER) as ledger:
        ledger.append(ENTRIES[0])
        assert ledger.get(None, "clean", 0) is None


def test_first_difference():
    assert first_difference({"a": 1, "b": [1, {"c": 2}]}, {"a": 1, "b": [1, {"c": 2}]}) is None
    assert first_difference({"a": 1}, {"a": True}) == ("a", "1", "true")
    assert first_difference({"a": [1]}, {"a": [1, 2]}) == ("a", "[1]", "[1, 2]")
