"""Shards: put together they are the single run, whatever was killed on the way; what does not fit is refused in one line."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from robustlab import config
from robustlab.cli import run
from robustlab.evaluation import shards
from robustlab.evaluation.ledger import read
from robustlab.evaluation.runner import evaluate
from robustlab.models.checkpoint import save_checkpoint
from robustlab.results.record import read_record
from robustlab.types import Suite, Threat, UserError

N, K, BATCH = 32, 5, 3
HERE = Threat("linf", 0.07)


def keyed_suite():
    """Attacks that draw, restart and leave early, and a corruption that draws."""
    attacks = (
        {"name": "spsa", "queries": 60, "pairs": 8},
        {"name": "pgd", "steps": 1, "restarts": 2},
        {"name": "apgd", "steps": 6, "restarts": 2},
        {"name": "targeted-all", "attack": {"name": "pgd", "steps": 3}, "num_targets": 2},
    )
    parts = {
        "attacks": tuple(config.build("attack", a) for a in attacks),
        "corruptions": (config.build("corruption", "gaussian_noise"),),
    }
    return type("Toy", (Suite,), {"name": "toy"})(severities=(2, 5), **parts)


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    f = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Flatten(), nn.Linear(216, K))
    f(torch.rand(64, 1, 8, 8))
    f = f.double().eval()
    x = torch.rand(N, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = f(x.double()).argmax(1)
    y[::7] = (y[::7] + 1) % K
    return f, x, y


def go(problem, out, **options):
    f, x, y = problem
    return evaluate(f, (x, y), keyed_suite(), threat=HERE, **{"batch_size": BATCH, "out": out, "seed": 3, **options})


@pytest.fixture(scope="module")
def whole(problem, tmp_path_factory):
    """The single run: its folder and result."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, go(problem, folder)


def timeless(path):
    return [json.loads(line) | {"seconds": 0} for line in Path(path).read_text().splitlines()]


def plain(result):
    """A result without what depends on the clock and the folder."""

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if "seconds" not in k and k not in ("ledger", "environment")}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(result.to_dict())


class Killed(Exception):
    pass


def killing(moment, how=None):
    """Takes the runner's events and ends it at the one of that number."""
    seen = 0

    def progress(event):
        nonlocal seen
        seen += 1
        if seen == moment and how is not None:
            how()
        if seen == moment:
            raise Killed

    return progress


def run_shards(problem, folder, n, kill=None):
    """All shards; ``kill``: each is stopped again and again, every so many lines, and resumed until it ends."""
    results = []
    for i in range(1, n + 1):
        out = folder / f"shard-{i}-of-{n}"
        while True:
            before = len(timeless(out / "ledger.jsonl")) - 1 if (out / "ledger.jsonl").exists() else 0
            try:
                stop = killing(None if kill is None else before + kill)
                results.append(go(problem, out, shard=(i, n), resume=True, progress=stop))
                break
            except Killed:
                continue
    return [folder / f"shard-{i}-of-{n}" / "ledger.jsonl" for i in range(1, n + 1)], results


# ------------------------------------------------------------------------------------------------------ put together


@pytest.mark.parametrize(("n", "kill"), [(1, None), (2, None), (5, None), (11, None), (1, 7), (2, 5), (5, 3)])
def test_merged_shards_are_the_single_run(problem, whole, tmp_path, n, kill):
    ledgers, results = run_shards(problem, tmp_path, n, kill)
    header, entries = shards.merge(ledgers[::-1])  # in any order
    merged = shards.write(tmp_path / "all", header, entries)
    single = whole[0] / "ledger.jsonl"
    assert timeless(merged) == timeless(single)  # verdicts, passes, seeds, positions, order
    again = shards.result_of(header, entries, fingerprint=results[0].fingerprint)
    assert plain(again) == plain(whole[1])
    assert torch.equal(again.clean, whole[1].clean)
    assert torch.equal(again.robust, whole[1].robust)
    assert sum(r.n for r in results) == N
    assert {r.fingerprint for r in results} == {whole[1].fingerprint}
    assert sum(r.threats[0]["k"] for r in results) == whole[1].threats[0]["k"]


def test_the_single_run_has_something_to_lose(whole):
    result = whole[1]
    assert 0 < int(result.robust.sum()) < int(result.clean.sum()) < N
    assert sum(row["broken"] > 0 for row in result.per_attack.values()) >= 2
    assert result.n == N


def test_a_shard_reports_its_own_images(problem, whole, tmp_path):
    events = []
    result = go(problem, tmp_path, shard=(2, 5), progress=events.append)
    rows = [i for i in range(N) if i // BATCH % 5 == 1]
    assert result.n == len(rows) == events[-1]["n"]
    assert torch.equal(result.robust, whole[1].robust[rows])
    assert torch.equal(result.clean, whole[1].clean[rows])
    header, entries = read(tmp_path / "ledger.jsonl")
    assert header["shard"] == [2, 5]
    assert header["n"] == N
    assert [e["index"] for e in entries if e["attack"] == "clean"] == [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]


def test_sigkill_and_resume_of_a_shard(problem, tmp_path):
    """A real kill, in a process of its own, between two lines."""
    torch.set_num_threads(1)
    out = tmp_path / "shard-1-of-2"
    for moment in (2, 9, 17):
        pid = os.fork()
        if pid == 0:
            try:
                kill = killing(moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
                go(problem, out, shard=(1, 2), resume=True, progress=kill)
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status)
    go(problem, out, shard=(1, 2), resume=True)
    go(problem, tmp_path / "straight", shard=(1, 2))
    assert timeless(out / "ledger.jsonl") == timeless(tmp_path / "straight/ledger.jsonl")


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def three(problem, tmp_path_factory):
    return run_shards(problem, tmp_path_factory.mktemp("three"), 3)[0]


def refused(paths):
    with pytest.raises(UserError) as error:
        shards.merge(paths)
    assert len(error.value.lines) == 1
    assert "\n" not in str(error.value)
    return str(error.value)


def edited(path, target, change):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = change(lines)
    target.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    return target


def test_merge_refuses_what_does_not_fit(problem, whole, three, tmp_path):
    a, b, c = three
    assert refused([a, b]) == "merge: shard 3/3 missing"
    assert refused([b]) == "merge: shards 1/3, 3/3 missing"
    assert refused([a, b, c, a]) == f"{a}: shard 1/3 overlaps with {a}, the same shard"
    assert refused([]) == "merge: give the ledgers of all shards"
    single = whole[0] / "ledger.jsonl"
    assert refused([a, b, single]) == f"{single}: not the ledger of a shard; it is a whole evaluation"
    other = tmp_path / "other"
    go(problem, other, shard=(3, 3), seed=4)
    assert refused([a, b, other / "ledger.jsonl"]) == (f"{other}/ledger.jsonl: a shard of another evaluation: seed is 4, in {a} 3")
    two = tmp_path / "two"
    go(problem, two, shard=(2, 2))
    assert (
        refused([a, b, two / "ledger.jsonl"]) == f"{two}/ledger.jsonl: a shard of another evaluation: a shard of 2, the others of 3"
    )
    assert "cannot read the ledger" in refused([a, tmp_path / "nothing.jsonl"])


def test_merge_refuses_what_is_not_finished(three, tmp_path):
    a, b, c = three
    changes = {
        "no attack on the last batch": lambda lines: lines[:-1],
        "no last batch": lambda lines: [line for line in lines if line.get("batch") != 9],
        "nothing but a header": lambda lines: lines[:1],
        "one line twice": lambda lines: [*lines, lines[-1]],
        "one line less inside": lambda lines: lines[:3] + lines[4:],
        "clean passes only": lambda lines: [line for line in lines if line.get("attack", "clean") == "clean"],
    }
    for name, change in changes.items():
        said = refused([edited(a, tmp_path / "cut.jsonl", change), b, c])
        assert "shard 1/3 is not finished (batch" in said, name
        assert said.endswith("go on with it: --resume")
    moved = edited(
        a, tmp_path / "moved.jsonl", lambda lines: lines[:1] + [line | {"batch": line["batch"] + 1} for line in lines[1:]]
    )
    assert "batch 1 is not shard 1/3's, or not whole" in refused([moved, b, c])
    short = edited(
        a,
        tmp_path / "short.jsonl",
        lambda lines: [
            line | {k: line[k][:-1] for k in ("index", "verdict")} if line.get("attack") == "clean" else line for line in lines
        ],
    )
    assert "batch 0 is not shard 1/3's, or not whole" in refused([short, b, c])


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ((0, 3), r"--shard 0/3: expected i/n with 1 <= i <= n, such as 2/5"),
        ((4, 3), r"--shard 4/3: expected i/n"),
        ((12, 12), r"--shard 12/12: 32 images are only 11 batches of 3; give fewer shards or a smaller --batch-size"),
    ],
)
def test_shards_that_cannot_be(problem, tmp_path, shard, message):
    with pytest.raises(UserError, match=message):
        go(problem, tmp_path / "out", shard=shard)
    assert not (tmp_path / "out").exists()


def test_a_shard_is_not_resumed_as_another(problem, tmp_path):
    go(problem, tmp_path, shard=(1, 5))
    with pytest.raises(UserError, match=r"made by another evaluation: shard\[0\] is 1 there and 2 here"):
        go(problem, tmp_path, shard=(2, 5), resume=True)
    with pytest.raises(UserError, match=r"made by another evaluation: shard is .* there and absent here"):
        go(problem, tmp_path, resume=True)


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of an untrained net on digits of 8 px."""
    f = config.build("model", "small_cnn", width=4, num_classes=10, in_channels=1, mean=[0.3], std=[0.4])
    torch.manual_seed(2)
    meta = {
        "model": config.dump(f),
        "image_shape": [1, 8, 8],
        "num_classes": 10,
        "threat": {"norm": "linf", "eps": 0.02},
        "config": {"data": {"name": "digits", "size": 8}},
    }
    path = tmp_path_factory.mktemp("model") / "net.safetensors"
    save_checkpoint(path, f.build(), meta)
    return str(path)


def shards_of(model, out, n, *more):
    common = ["evaluate", model, "--suite", "pgd-20", "-n", "25", "--batch-size", "4", "--device", "cpu", "--out", str(out), *more]
    for i in range(1, n + 1):
        assert run([*common, "--shard", f"{i}/{n}"]) == 0
    return sorted(out.rglob("shard-*-of-*"))


def test_merge_from_the_command_line(model, tmp_path, capsys):
    folders = shards_of(model, tmp_path / "e", 3)
    assert [sorted(p.name for p in f.iterdir() if p.name != ".lock") for f in folders] == [["ledger.jsonl", "shard.json"]] * 3
    capsys.readouterr()
    assert run(["merge", *map(str, folders)]) == 0
    shown = capsys.readouterr().out
    assert "digits, 25 images, seed 0, fp32" in shown
    whole = folders[0].parent
    assert shown.splitlines()[-1] == f"  {whole / 'record.json'}"
    single = [
        "evaluate",
        model,
        "--suite",
        "pgd-20",
        "-n",
        "25",
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "s"),
        "--no-reliability",  # shards have no report
    ]
    assert run(single) == 0
    (beside,) = (tmp_path / "s").rglob("record.json")
    mine, theirs = read_record(whole / "record.json"), read_record(beside)
    assert timeless(whole / "ledger.jsonl") == timeless(beside.with_name("ledger.jsonl"))
    different = ("provenance", "cost", "metrics")
    assert mine.model_dump(exclude=set(different)) == theirs.model_dump(exclude=set(different))
    assert mine.metrics.robust == theirs.metrics.robust
    assert mine.metrics.clean == theirs.metrics.clean
    # a piece is never taken for a result
    board = tmp_path / "board"
    assert run(["leaderboard", "add", str(tmp_path / "e"), "--board", str(board)]) == 0
    assert len(list((board / "entries").glob("*.json"))) == 1


def test_what_merge_says_on_the_command_line(model, tmp_path, capsys):
    folders = shards_of(model, tmp_path / "e", 2)
    capsys.readouterr()
    assert run(["merge", str(folders[0])]) == 2
    assert capsys.readouterr().err == "robustlab: merge: shard 2/2 missing\n"
    assert run(["merge", *map(str, folders), "--out", str(tmp_path / "m")]) == 0
    capsys.readouterr()
    assert run(["merge", *map(str, folders), "--out", str(tmp_path / "m")]) == 2
    assert "there is an evaluation here already; choose another --out" in capsys.readouterr().err
    assert run(["evaluate", model, "--suite", "pgd-20", "--shard", "3/2"]) == 2
    assert capsys.readouterr().err == "robustlab: --shard 3/2: expected i/n with 1 <= i <= n, such as 2/5\n"


def test_images_of_shards_are_scored_together(model, tmp_path, capsys):
    files = [tmp_path / "one.npz", tmp_path / "two.safetensors"]
    for i, file in enumerate(files, 1):
        common = ["evaluate", model, "--suite", "pgd-20", "-n", "25", "--batch-size", "4", "--device", "cpu", "--shard", f"{i}/2"]
        assert run([*common, "--out", str(tmp_path / "e"), "--save-adversarial", str(file)]) == 0
    folders = sorted((tmp_path / "e").rglob("shard-*-of-2"))
    capsys.readouterr()
    assert run(["merge", *map(str, folders), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert run(["rescore", *map(str, files), "--model", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 25
    assert found["robust_accuracy"] == record["metrics"]["robust"]["accuracy"]
    assert found["interval"] == record["metrics"]["robust"]["interval"]
    assert (found["changed"], found["outside"]) == (0, 0)
    assert run(["rescore", str(files[0]), str(files[0]), "--model", model]) == 2
    assert "two of the files hold the image 0" in capsys.readouterr().err
