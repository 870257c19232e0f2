"""Rows that were not measured here, and RobustBench's files: read without loss, written so that its own script takes them."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_leaderboard import board, record

from robustlab.commands import export_board
from robustlab.results import leaderboard
from robustlab.results.claim import claim_from_card, fraction, norm_of_path, read_card
from robustlab.results.leaderboard import sections
from robustlab.types import UserError

CHECKOUT = os.environ.get("ROBUSTLAB_ROBUSTBENCH")  # a checkout of RobustBench's repository
CARD = {
    "link": "https://arxiv.org/abs/1706.06083",
    "name": "Towards Deep Learning Models",
    "authors": "Madry et al.",
    "additional_data": False,
    "number_forward_passes": 1,
    "dataset": "cifar10",
    "venue": "ICLR 2018",
    "architecture": "WideResNet-34-10",
    "eps": "8/255",
    "clean_acc": "87.14",
    "reported": "47.04",
    "autoattack_acc": "44.04",
    "external": "43.5",
    "unreliable": False,
    "footnote": None,
}


def card(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"card{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps({k: v for k, v in (CARD | changes).items() if v != "absent"}))
    return path


@pytest.mark.parametrize(
    ("given", "number"),
    [("8/255", 8 / 255), ("0.5", 0.5), (0.5, 0.5), (4, 4.0), ("87.14%", 87.14), ("None", None), (None, None), ("", None)],
)
def test_numbers_as_people_write_them(given, number):
    assert fraction(given) == number


@pytest.mark.parametrize("given", ["eight", "1/0", True, "8/255/2"])
def test_what_is_no_number(given):
    with pytest.raises(ValueError, match="expected a number"):
        fraction(given)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clean_acc": 87.14, "eps": 0.031},
        {"eps": None, "autoattack_acc": "absent", "corruptions_acc": "90.15", "external": "absent", "reported": None},
        {"eps": "None", "corruptions_mce": "61.2", "corruptions_acc_3d": "40.46"},
    ],
)
def test_a_card_is_read_without_loss(tmp_path, changes):
    path = card(tmp_path / "Linf", **changes)
    assert read_card(path).dump() == json.loads(path.read_text())
    claim = claim_from_card(read_card(path), "external", None, "linf")
    assert claim.card == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"clean_acc": "absent"}, "clean_acc: missing"),
        ({"clean_acc": "high"}, "expected a number"),
        ({"clean_acc": 871.4}, "clean_acc: expected percent"),
        ({"autoattack_acc": "absent"}, "expected autoattack_acc or corruptions_acc"),
        ({"additional_data": "perhaps"}, "additional_data"),
    ],
)
def test_a_bad_card_is_one_line(tmp_path, changes, says):
    path = card(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        read_card(path)
    (line,) = error.value.lines
    assert says in line
    assert str(path) in line


def test_claims_stand_below_and_have_no_rank(tmp_path):
    folder = board(tmp_path / "board", record("ours", 60, data__name="cifar10", eps=(8 / 255,)))
    path = card(tmp_path / "cifar10" / "Linf")
    leaderboard.add(folder, path, kind="external", link="https://example.org")
    (section,) = sections(folder)
    mine, theirs = section.rows
    assert (mine.rank, theirs.rank) == (1, None)
    assert (theirs.robust, theirs.best_known, theirs.clean) == (0.4404, 0.435, 0.8714)
    assert (theirs.provenance, theirs.extra_data, theirs.venue) == ("external", False, "ICLR 2018")
    leaderboard.build(folder)
    text = (folder / "index.md").read_text()
    assert "were not measured here" in text
    assert re.search(
        r"\| - \| Towards Deep Learning Models \| 87\.14 \| 44\.04 \| 43\.50 \| no \| no \| WideResNet-34-10 \| ICLR 2018 \|", text
    )


def test_a_claim_is_what_the_authors_reported_and_may_stand_alone(tmp_path):
    folder = board(tmp_path / "board", record("ours", 60))
    leaderboard.add(folder, card(tmp_path / "Linf"), kind="claimed")
    _, theirs = sections(folder)
    assert [r.robust for r in theirs.rows] == [0.4704]
    assert "not measured here" in theirs.heading


def test_a_record_of_others_names_its_source(tmp_path):
    folder, path = board(tmp_path / "board"), tmp_path / "record.json"
    path.write_text(json.dumps(record("theirs", 60)))
    with pytest.raises(UserError, match="give the link"):
        leaderboard.add(folder, path, kind="claimed")
    leaderboard.add(folder, path, kind="claimed", link="https://example.org/paper")
    (row,) = sections(folder)[0].rows
    assert (row.rank, row.provenance) == (None, "claimed")
    assert "https://example.org/paper" in row.links


def test_radii_that_look_alike_rank_apart_with_a_note(tmp_path):
    found = sections(board(tmp_path, record("a", 60, eps=(8 / 255,)), record("b", 70, eps=(0.031,)), record("c", 70, eps=(0.1,))))
    assert len(found) == 3
    notes = {s.rows[0].radius: s.facts for s in found}
    assert "(0.0313725) is not 0.031" in notes["8/255"]
    assert "is not 8/255" in notes["0.031"]
    assert "is not" not in notes["0.1"]


def test_the_norm_is_in_the_path(tmp_path):
    assert norm_of_path("x/Linf/a.json") == "linf"
    assert norm_of_path("x/L2/a.json") == "l2"
    assert norm_of_path("x/corruptions/a.json") is None
    with pytest.raises(UserError, match="give --norm"):
        norm_of_path(tmp_path / "a.json")


def test_export_has_their_keys(tmp_path):
    folder = board(tmp_path / "board", record("trades", 92, data__name="cifar10", eps=(8 / 255,)))
    about = tmp_path / "about.yaml"
    about.write_text("trades: {authors: Somebody, venue: here, link: 'https://example.org'}\n")
    (path,) = export_board(folder, tmp_path, about)
    assert path == tmp_path / "model_info" / "cifar10" / "Linf" / "trades.json"
    found = read_card(path)
    assert (found.clean_acc, found.autoattack_acc, found.eps) == ("93.75", "71.88", "8/255")
    assert (found.authors, found.venue, found.number_forward_passes) == ("Somebody", "here", 1)
    about.write_text("nobody: {authors: x}\n")
    with pytest.raises(UserError, match="nobody: not a model"):
        export_board(folder, tmp_path, about)


@pytest.mark.skipif(CHECKOUT is None, reason="set ROBUSTLAB_ROBUSTBENCH to a checkout of RobustBench")
class TestRobustBench:
    def test_all_their_files_are_read_without_loss(self):
        files = sorted(Path(CHECKOUT).glob("model_info/*/*/*.json"))
        assert len(files) >= 236
        for path in files:
            assert read_card(path).dump() == json.loads(path.read_text()), path
            claim_from_card(read_card(path), "external", None, norm_of_path(path))

    def test_their_script_renders_our_board(self, tmp_path):
        entries = [
            record("trades", 92, data__name="cifar10", eps=(8 / 255,)),
            record("awp", 80, data__name="cifar10", eps=(8 / 255,)),
        ]
        export_board(board(tmp_path / "board", *entries), tmp_path)
        theirs, package = Path(CHECKOUT) / "robustbench", tmp_path / "robustbench"  # without its models and their dependencies
        shutil.copytree(theirs / "leaderboard", package / "leaderboard")
        (package / "model_zoo").mkdir()
        for empty in (package / "__init__.py", package / "model_zoo" / "__init__.py"):
            empty.touch()
        shutil.copy(theirs / "model_zoo" / "enums.py", package / "model_zoo")
        source = (theirs / "utils.py").read_text()
        (fields,) = (
            ast.get_source_segment(source, node)
            for node in ast.parse(source).body
            if isinstance(node, ast.Assign) and node.targets[0].id == "ACC_FIELDS"
        )
        (package / "utils.py").write_text(f"from robustbench.model_zoo.enums import ThreatModel\n{fields}\n")
        command = [sys.executable, "-m", "robustbench.leaderboard.template", "--dataset", "cifar10", "--threat_model", "Linf"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        assert done.stdout.index("trades") < done.stdout.index("awp"), "sorted by robust accuracy"
        assert "71.88%" in done.stdout
