"""A board is what its ledgers say: it verifies, and every kind of tampering is found."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from robustlab.evaluation.rederive import rederive
from robustlab.evaluation.runner import evaluate
from robustlab.files import sha256
from robustlab.results import leaderboard
from robustlab.results.changes import changes
from robustlab.results.record import read_record, record_from, write_record
from robustlab.results.verify import verify
from robustlab.types import Threat, UserError

BOARD = Path(__file__).resolve().parents[2] / "leaderboards"
SUITE = {
    "name": "pgd-20",
    "attacks": [{"name": "fgsm"}, {"name": "pgd", "steps": 3}],
    "corruptions": [{"name": "contrast"}],
    "severities": [1, 3],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A repository with a configuration, a checkpoint and a board of one entry, and the evaluation behind it."""
    root = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    f = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    x = torch.rand(10, 1, 8, 8)
    y = f(x).argmax(1)
    y[0] = (y[0] + 1) % 4
    (root / "configs").mkdir()
    (root / "configs" / "a.yaml").write_text("trainer: standard\n")
    (root / "a.safetensors").write_bytes(b"weights")
    result = evaluate(f, (x, y), SUITE, threat=Threat("linf", 0.02), seed=3, batch_size=4, out=root / "run")
    record = record_from(
        result,
        model={"name": "a.safetensors", "label": "a", "checkpoint": sha256(root / "a.safetensors")},
        data={"name": "made", "split": "test"},
        config="configs/a.yaml",
        config_hash=sha256(root / "configs" / "a.yaml"),
    )
    write_record(root / "run" / "record.json", record)
    (root / "board").mkdir()
    leaderboard.add(root / "board", root / "run" / "record.json")
    leaderboard.build(root / "board")
    return root


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "made"))


def wrongs(root):
    return [f.text for f in verify(root / "board", lambda path: rederive(path).to_dict())[1] if f.wrong]


def files(root):
    (entry,), (ledger,) = ((root / "board" / name).iterdir() for name in ("entries", "ledgers"))
    return entry, ledger


def edit_record(root, *path, value):
    entry, _ = files(root)
    raw = json.loads(entry.read_text())
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value(place[path[-1]]) if callable(value) else value
    entry.write_text(json.dumps(raw))


def edit_ledger(root, change):
    """Change the lines of the ledger and put the new hash into the record, as somebody careful would."""
    entry, ledger = files(root)
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    lines = change(lines)
    ledger.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    raw = json.loads(entry.read_text())
    raw["provenance"]["ledger"] = sha256(ledger)
    entry.write_text(json.dumps(raw))


def test_a_fresh_board_verifies(made):
    derived, found = verify(made / "board", lambda path: rederive(path).to_dict())
    assert derived == 1
    assert not found


@pytest.mark.parametrize("board", sorted(p.name for p in BOARD.iterdir() if (p / "entries").is_dir()))
def test_the_boards_of_the_repository_verify(board):
    """But for checkpoints: `make demo` makes some of the same names, which need not be the same bytes on another machine."""
    derived, found = verify(BOARD / board, lambda path: rederive(path).to_dict())
    wrong = [f for f in found if f.wrong]
    here = [f for f in wrong if f.text.startswith("the checkpoint ")]
    assert wrong == here
    assert derived + len(here) == len(list((BOARD / board / "entries").iterdir())) > 0


def number(root):
    edit_record(root, "metrics", "threats", 0, "per_attack", "fgsm", "broken", value=lambda v: v + 1)


def robust_number(root):
    for path in (("metrics", "robust", "k"), ("metrics", "threats", 0, "k")):
        edit_record(root, *path, value=lambda v: v + 1)
    for path in (("metrics", "robust", "accuracy"), ("metrics", "threats", 0, "robust_accuracy")):
        edit_record(root, *path, value=lambda v: v + 0.1)


def interval(root):
    edit_record(root, "metrics", "threats", 0, "interval", value=[0.0, 1.0])


def curve(root):
    edit_record(root, "metrics", "threats", 0, "curve", 0, value=[0, 1.0])


def images(root):
    entry, _ = files(root)
    raw = json.loads(entry.read_text())
    raw["data"]["n"] = raw["metrics"]["clean"]["n"] = raw["metrics"]["robust"]["n"] = 20
    raw["metrics"]["clean"]["accuracy"] = raw["metrics"]["clean"]["k"] / 20
    for place, key in ((raw["metrics"]["robust"], "accuracy"), (raw["metrics"]["threats"][0], "robust_accuracy")):
        place[key] = place["k"] / 20
    entry.write_text(json.dumps(raw))


def radius(root):
    edit_record(root, "threat", "eps", value=0.03)
    edit_record(root, "metrics", "threats", 0, "eps", value=0.03)


def corruption(root):
    edit_record(root, "metrics", "corruptions", "contrast", "1", value=lambda v: v / 2)


def seed(root):
    edit_record(root, "seed", value=4)


def weights(root):
    edit_record(root, "model", "hash", value="0" * 64)


def suite(root):
    edit_record(root, "suite", "resolved", "attacks", 1, "steps", value=50)


def cost(root):
    edit_record(root, "cost", "forwards", value=lambda v: v - 1)


def dropped(root):
    edit_ledger(root, lambda lines: [line for i, line in enumerate(lines) if i != 3])


def last_dropped(root):
    edit_ledger(root, lambda lines: lines[:-1])


def doubled(root):
    edit_ledger(root, lambda lines: [*lines[:4], lines[3], *lines[4:]])


def flip(attack):
    def change(lines):
        found = next(line for line in lines[1:] if line["attack"] == attack)
        found["verdict"][0] = 1 - found["verdict"][0]
        return lines

    return change


def flipped_first(root):
    edit_ledger(root, flip("clean"))


def flipped_last(root):
    edit_ledger(root, flip("contrast/3"))


def image_dropped(root):
    def change(lines):
        last = [line for line in lines[1:] if line["attack"] == "pgd" and line["index"]][-1]
        last["index"], last["verdict"] = last["index"][1:], last["verdict"][1:]
        return lines

    edit_ledger(root, change)


def other_ledger(root):
    _, ledger = files(root)
    ledger.write_text(ledger.read_text().replace('"seconds":0', '"seconds":1', 1))


def no_ledger(root):
    files(root)[1].unlink()


def checkpoint(root):
    (root / "a.safetensors").write_bytes(b"other weights")


def configuration(root):
    (root / "configs" / "a.yaml").write_text("trainer: pgd-at\n")


def table(root):
    path = root / "board" / "index.md"
    path.write_text(path.read_text().replace("| a |", "| b |"))


def renamed(root):
    files(root)[0].rename(root / "board" / "entries" / "b.json")


TAMPERINGS = {
    number: "broken",
    robust_number: "metrics.robust.k",
    interval: "interval",
    curve: "metrics.threats.0.curve.0.1: the record says 1.0, its ledger 0.9",
    images: "data.n: the record says 20, its ledger 10",
    radius: "threat.eps: the record says 0.03, its ledger 0.02",
    corruption: "corruptions.contrast.1",
    seed: "seed: the record says 4, its ledger 3",
    weights: "model.hash",
    suite: "suite.resolved.attacks.1.steps: the record says 50, its ledger 3",
    cost: "cost.forwards",
    dropped: "found the line of",
    last_dropped: "is missing",
    doubled: "found the line of",
    flipped_first: "images, not the",
    flipped_last: "the record says",
    image_dropped: "images, not the",
    other_ledger: "not the ledger that the record was made from",
    no_ledger: "cannot be derived",
    checkpoint: "the checkpoint a.safetensors is another one",
    configuration: "the configuration configs/a.yaml is another one",
    table: "is not what the entries give",
    renamed: "the file name says something else",
}


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda t: t.__name__)
def test_tampering_is_found(copy, tamper):
    tamper(copy)
    if tamper not in (table, renamed):
        leaderboard.build(copy / "board")  # the forger renders the tables again
    found = wrongs(copy)
    assert any(TAMPERINGS[tamper] in text for text in found), found


def test_a_record_of_before_the_curve_verifies(copy):
    edit_record(copy, "metrics", "threats", 0, "curve", value=None)
    edit_record(copy, "metrics", "threats", 0, "per_attack", "fgsm", "spent", value=None)
    assert wrongs(copy) == []


def test_a_shard_or_a_broken_header_is_refused(copy):
    _, ledger = files(copy)
    lines = ledger.read_text().splitlines(keepends=True)
    header = json.loads(lines[0])
    ledger.write_text(json.dumps({**header, "shard": [1, 2]}) + "\n" + "".join(lines[1:]))
    with pytest.raises(UserError, match="merge it first"):
        rederive(ledger)


def test_rederiving_gives_the_record(made):
    record, told = read_record(made / "run" / "record.json"), rederive(made / "run" / "ledger.jsonl")
    assert told.robust_accuracy == record.metrics.robust.accuracy
    assert told.corruption_accuracy == record.metrics.corruption_accuracy


def test_a_new_entry_is_described_before_it_is_added(made, tmp_path):
    raw = json.loads((made / "run" / "record.json").read_text())
    raw["model"] |= {"label": "b", "hash": "1" * 64}
    (tmp_path / "record.json").write_text(json.dumps(raw))
    (change, *rest) = [c for c in changes(made / "board", tmp_path / "record.json") if c.model == "b"]
    assert str(change).startswith("new: b:")
    assert change.place_after == 2
    assert not rest
    assert changes(made / "board", made / "board") == []
    assert len(list((made / "board" / "entries").iterdir())) == 1, "nothing is written"
