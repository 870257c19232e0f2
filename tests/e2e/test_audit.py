"""Upper bounds from the command line: evaluate, audit, shards, board, verify."""

import pytest
import torch

from robustlab import config
from robustlab.cli import run
from robustlab.models.checkpoint import save_checkpoint
from robustlab.results.record import read_record

SUITE = """\
name: autoattack-fast
exact: pgd-20
attacks:
  - {name: screen, steps: 2, targets: 1}
  - {name: pgd, steps: 20, keep: best}
near: 1.0e-9
audit: 3
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of an untrained net on digits of 8 px."""
    f = config.build("model", "small_cnn", width=4, num_classes=10, in_channels=1, mean=[0.3], std=[0.4])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net = f.build()
    meta = {
        "model": config.dump(f),
        "image_shape": [1, 8, 8],
        "num_classes": 10,
        "threat": {"norm": "linf", "eps": 0.0001},
        "config": {"data": {"name": "digits", "size": 8}},
    }
    path = tmp_path_factory.mktemp("model") / "net.safetensors"
    save_checkpoint(path, net, meta)
    return str(path)


@pytest.fixture
def command(model, tmp_path):
    (tmp_path / "suite.yaml").write_text(SUITE)
    suite, out = str(tmp_path / "suite.yaml"), str(tmp_path / "e")
    return [
        "evaluate",
        model,
        "--suite",
        suite,
        "-n",
        "60",
        "--batch-size",
        "20",
        "--device",
        "cpu",
        "--out",
        out,
        "--no-reliability",
    ]


def test_evaluate_audit_board_and_verify(command, tmp_path, capsys):
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert "an upper bound on robust accuracy" in shown
    assert "audit   3 of" in shown
    (path,) = (tmp_path / "e").rglob("record.json")
    audit = read_record(path).metrics.threats[0].audit
    assert audit.audited == 3 < audit.survivors
    assert audit.left > 0
    assert run([*command, "--resume", "--audit-bound", "0"]) == 0
    audit = read_record(path).metrics.threats[0].audit
    assert (audit.audited, audit.left) == (audit.survivors, 0)
    board = str(tmp_path / "board")
    assert run(["leaderboard", "add", str(path), "--board", board]) == 0
    assert run(["leaderboard", "build", board]) == 0
    assert run(["leaderboard", "verify", board]) == 0
    assert "upper bounds" in (tmp_path / "board" / "index.md").read_text()


def test_shards_are_audited_after_the_merge(command, tmp_path, capsys):
    for i in (1, 2):
        assert run([*command, "--shard", f"{i}/2"]) == 0
    assert run([*command, "--shard", "1/2", "--resume", "--audit", "5"]) == 2
    folders = sorted((tmp_path / "e").rglob("shard-*-of-*"))
    capsys.readouterr()
    assert run(["merge", *map(str, folders)]) == 0
    assert "audit   none" in capsys.readouterr().out
    record = folders[0].parent / "record.json"
    assert not read_record(record).metrics.threats[0].bounded
    assert run([*command, "--resume"]) == 0
    merged = read_record(record).metrics
    assert merged.threats[0].audit.audited == 3
    single = [*command[:-2], str(tmp_path / "s"), command[-1]]
    assert run(single) == 0
    (path,) = (tmp_path / "s").rglob("record.json")
    assert read_record(path).metrics.robust == merged.robust


def test_an_audit_of_an_exact_suite_is_one_line(command, capsys):
    exact = [part if not part.endswith(".yaml") else "pgd-20" for part in command]
    assert run([*exact, "--audit", "5"]) == 2
    assert capsys.readouterr().err == "robustlab: --audit: pgd-20: nothing is spared any attack here, so nothing to audit\n"
