"""Trainers side by side, on a few digits: the table against the files it is made of, seeds, interruptions, refusals."""

import csv
import json
import math
import re

import pytest

from robustlab import commands, comparing
from robustlab.cli import run
from robustlab.evaluation.rederive import rederive
from robustlab.reporting import read_run
from robustlab.results.record import read_record

CONFIG = """
trainer: {name}
model: {{name: small_cnn, width: 4}}
data: {{name: digits, size: 8}}
threat: {{norm: linf, eps: 0.1}}
optimizer: {{name: sgd, lr: 0.1}}
training: {{epochs: 2, batch_size: 256, threads: 1, device: cpu, probe: {{num_examples: 32, steps: 2}}, guards: {{collapse: null}}}}
"""
N = 24
SMALL = ["--suite", "pgd-20", "--pgd", "weak.yaml", "-n", str(N)]


def write(folder, *names):
    for name in names:
        (folder / f"{name}.yaml").write_text(CONFIG.format(name=name))
    (folder / "weak.yaml").write_text("attacks: [{name: pgd, steps: 3}]\n")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "fast-at", "n-fgsm", "standard")
    return tmp_path


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of three trainers, two seeds each: its folder and what it found."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write(folder, "fast-at", "n-fgsm", "free-at")
        assert run(["compare", "fast-at.yaml", "n-fgsm.yaml", "free-at.yaml", "--seeds", "2", *SMALL, "--out", "c"]) == 0
    return folder, json.loads((folder / "c/compare.json").read_text())


def events(folder):
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file() and p.name in KEPT}


KEPT = ("state.safetensors", "best.safetensors", "metrics.jsonl", "ledger.jsonl", "record.json")


def fails(capsys, *args):
    capsys.readouterr()
    assert run(["compare", *args]) == 2
    return [line.removeprefix("robustlab: ") for line in capsys.readouterr().err.splitlines() if line.startswith("robustlab: ")]


def test_the_figures_are_those_of_the_records_the_metrics_and_the_ledgers(compared):
    folder, found = compared
    assert [row["label"] for row in found["rows"]] == ["fast-at", "n-fgsm", "free-at"]
    verdicts = {}
    for row in found["rows"]:
        for number, told in enumerate(row["runs"]):
            name = row["label"] + (f"-seed{number}" if number else "")
            assert (told["folder"], told["seed"]) == (name, number)
            strong = folder / "c/evaluations" / name / "pgd-20-linf-0.1"
            record = read_record(strong / "record.json")
            assert told["robust"]["k"] == record.metrics.robust.k
            assert told["clean"]["accuracy"] == record.metrics.clean.accuracy
            assert told["robust"]["n"] == N
            assert (
                told["pgd"]["k"] == read_record(next((folder / "c/evaluations" / name).glob("weak*/record.json"))).metrics.robust.k
            )
            verdicts[row["label"], number] = rederive(strong / "ledger.jsonl").robust.tolist()
            assert sum(verdicts[row["label"], number]) == told["robust"]["k"]
            trained = read_run(folder / "c/runs" / name)
            assert trained.config["seed"] == number
            assert told["gap"]["points"] == trained.gap()["points"]
            assert told["seconds"] == sum(e["seconds"] for e in trained.epochs)
            pairs = list(zip(verdicts["fast-at", number], verdicts[row["label"], number], strict=True))
            if row["label"] == "fast-at":
                assert told["paired"] is None
                continue
            b, c = pairs.count((True, False)), pairs.count((False, True))
            assert told["paired"]["difference"] == (c - b) / N
            p = min(1.0, 2 * sum(math.comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c))
            assert told["paired"]["p"] == pytest.approx(p)


def test_the_second_seed_is_another_run_and_the_mean_is_over_both(compared):
    folder, found = compared
    for row in found["rows"]:
        one, two = (r["robust"]["accuracy"] for r in row["runs"])
        half = 12.7062 * abs(one - two) / 2  # t_1 s / sqrt(2), s = |one - two| / sqrt(2)
        assert row["robust"]["mean"] == pytest.approx((one + two) / 2)
        assert row["robust"]["interval"] == pytest.approx([(one + two) / 2 - half, (one + two) / 2 + half], rel=1e-4)
        paths = [folder / "c/runs" / r["folder"] / "best.safetensors" for r in row["runs"]]
        assert paths[0].read_bytes() != paths[1].read_bytes()


def test_passes_are_counted_and_the_total_is_of_the_whole_training(compared):
    _, found = compared
    passes = {row["label"]: row["passes"] for row in found["rows"]}
    assert [(p["forwards"], p["backwards"]) for p in passes.values()] == [(2, 2), (2, 2), (1, 1)]
    assert [p["total"] for p in passes.values()] == [4 * 2, 4 * 2, 2 * passes["free-at"]["replays"] * 2]
    assert passes["free-at"]["replays"] == 8


def test_markdown_and_csv_hold_every_row(compared):
    folder, found = compared
    text = (folder / "c/compare.md").read_text()
    assert text.startswith(f"small_cnn on digits, linf 0.1; {N} test images, 2 seeds\n")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [re.findall(r"`([^`]+)`", line)[0] for line in rows] == ["fast-at", "n-fgsm", "free-at"]
    width = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(width) == 1
    mean = found["rows"][1]["robust"]["mean"]
    assert f"| {100 * mean:.1f} |" in rows[1]
    assert all(row["fidelity"] in line for row, line in zip(found["rows"], rows, strict=True))
    with open(folder / "c/compare.csv") as file:
        lines = list(csv.DictReader(file))
    assert [(line["label"], line["seed"]) for line in lines] == [(n, s) for n in ("fast-at", "n-fgsm", "free-at") for s in "01"]
    assert [float(line["robust"]) for line in lines] == [r["robust"]["accuracy"] for row in found["rows"] for r in row["runs"]]


def test_nothing_is_done_twice(compared, monkeypatch, capsys):
    folder, found = compared
    monkeypatch.chdir(folder)
    before = events(folder / "c")
    assert len(before) == 6 * 3 + 12 * 2

    def never(*args, **kwargs):
        raise AssertionError("done again")

    monkeypatch.setattr(commands, "train", never)
    monkeypatch.setattr(commands, "evaluate_one", never)
    monkeypatch.setattr(commands, "dry_run", never)
    files = ["fast-at.yaml", "n-fgsm.yaml", "./fast-at.yaml", "free-at.yaml"]  # a file given twice counts once
    assert run(["compare", *files, "--seeds", "2", *SMALL, "--out", "c", "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == found["rows"]
    assert events(folder / "c") == before
    assert run(["compare", "n-fgsm.yaml", "fast-at.yaml", *SMALL, "--out", "c", "--resume", "--json"]) == 0
    turned = json.loads(capsys.readouterr().out)["rows"]
    assert [row["label"] for row in turned] == ["n-fgsm", "fast-at"]
    a, b = turned[1]["runs"][0]["paired"], found["rows"][1]["runs"][0]["paired"]
    assert (a["first_only"], a["second_only"], a["p"]) == (b["second_only"], b["first_only"], b["p"])


def test_the_records_go_to_a_board(compared, tmp_path, capsys):
    folder, _ = compared
    assert run(["leaderboard", "add", str(folder / "c/evaluations"), "--board", str(tmp_path / "b")]) == 0
    assert run(["leaderboard", "build", str(tmp_path / "b")]) == 0
    assert run(["leaderboard", "verify", str(tmp_path / "b")]) == 0
    assert "12 entries derived again" in capsys.readouterr().out
    assert "fast-at-seed1" in (tmp_path / "b/index.md").read_text()


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_an_interrupted_comparison_goes_on(where, here, monkeypatch, capsys):
    """The second configuration is interrupted; what the first one has left stays as it is, and the result is the same."""
    files = ["fast-at.yaml", "n-fgsm.yaml"]
    assert run(["compare", *files, *SMALL, "--out", "whole"]) == 0
    name, count = {"training": "train", "evaluation": "evaluate_one"}[where], {"training": 2, "evaluation": 4}[where]
    real, calls = getattr(commands, name), []

    def interrupted(*args, progress, **kwargs):
        calls.append(args)

        def told(event):
            progress(event)
            if len(calls) == count and event.get("kind", "ledger") != "step":
                raise KeyboardInterrupt

        return real(*args, progress=told, **kwargs)

    with monkeypatch.context() as broken:
        broken.setattr(commands, name, interrupted)
        assert run(["compare", *files, *SMALL, "--out", "c"]) == 130
    assert "--resume" in capsys.readouterr().err
    partial = json.loads((here / "c/compare.json").read_text())
    assert [row["label"] for row in partial["rows"]] == ["fast-at"]
    assert "Not finished: 1 of 2 runs." in (here / "c/compare.md").read_text()
    before = events(here / "c/runs/fast-at") | events(here / "c/evaluations/fast-at")
    assert fails(capsys, *files, *SMALL, "--out", "c") == [
        "c: holds a comparison already; go on with it with --resume, or choose another --out"
    ]
    assert run(["compare", *files, *SMALL, "--out", "c", "--resume"]) == 0
    assert events(here / "c/runs/fast-at") | events(here / "c/evaluations/fast-at") == before
    one, two = (json.loads((here / f"{folder}/compare.json").read_text()) for folder in ("whole", "c"))
    for row in [*one["rows"], *two["rows"]]:
        for told in (row, *row["runs"]):
            told.pop("seconds")
    assert one["rows"] == two["rows"]


def test_a_run_that_a_guard_stops_is_a_row_that_says_so(here, capsys, monkeypatch):
    arguments = ["standard.yaml", "fast-at.yaml", *SMALL, "--set", "optimizer.lr=1e30", "--out", "c"]
    assert run(["compare", *arguments]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^fast-at, seed 0: stopped: the loss is \w+ in epoch \d", shown, re.M)
    assert re.search(r"^fast-at +code-verified +- +- ", shown, re.M)
    monkeypatch.setattr(commands, "train", None)
    assert run(["compare", *arguments, "--resume"]) == 0, "it is not trained again"


def test_progress_says_which_run_and_how_long(here):
    told = []
    paths = [here / "fast-at.yaml", here / "n-fgsm.yaml"]
    comparing.compare(paths, out=here / "c", suite="pgd-20", pgd="weak.yaml", num_examples=N, progress=told.append)
    rows = [e for e in told if "row" in e]
    doing = ["train", "weak", "pgd-20"]
    assert [(e["row"], e["number"], e["of"], e["doing"]) for e in rows] == [
        (name, i, 2, what) for i, name in enumerate(("fast-at", "n-fgsm"), 1) for what in doing
    ]
    assert all(e["eta"] >= 0 for e in rows)
    assert [e["whole"] for e in rows] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            ["fast-at.yaml", "other.yaml"],
            "compare: data.size is 8 in fast-at.yaml and 16 in other.yaml: methods are compared at equal ",
        ),
        (
            ["fast-at.yaml", "far.yaml"],
            "compare: threat.eps is 0.1 in fast-at.yaml and 0.2 in far.yaml: methods are compared at equal ",
        ),
        (
            ["fast-at.yaml", "sub/fast-at.yaml", "sub/sub/fast-at.yaml"],
            "compare: 2 files would be called 'sub-fast-at'; rename one",
        ),
        (["fast-at.yaml", "nowhere.yaml"], "nowhere.yaml: cannot read: No such file or directory"),
        (["fast-at.yaml", "--suite", "pgd-2"], "unknown suite 'pgd-2' (did you mean 'pgd-20'?)"),
        (["fast-at.yaml", "--suite", "corruptions-quick"], "compare: --suite corruptions-quick has no attacks"),
        (["fast-at.yaml", "--set", "training.epoch=1"], "--set training.epoch=1: training.epoch: unknown key"),
        (
            ["fast-at.yaml", "fast-at-seed1.yaml", "--seeds", "2"],
            "compare: a file is called as another one's second seed; rename it",
        ),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_leaves_nothing(args, line, here, capsys):
    (here / "other.yaml").write_text(CONFIG.format(name="n-fgsm").replace("size: 8", "size: 16"))
    (here / "far.yaml").write_text(CONFIG.format(name="n-fgsm").replace("eps: 0.1", "eps: 0.2"))
    (here / "fast-at-seed1.yaml").write_text(CONFIG.format(name="fast-at"))
    for folder in (here / "sub", here / "sub/sub"):
        folder.mkdir()
        (folder / "fast-at.yaml").write_text(CONFIG.format(name="fast-at"))
    (found,) = fails(capsys, *SMALL, *args, "--out", "c")
    assert found.startswith(line)
    assert not (here / "c").exists()


def test_another_setting_or_configuration_needs_another_folder(here, capsys):
    assert run(["compare", "fast-at.yaml", *SMALL, "--out", "c", "--set", "training.epochs=1"]) == 0
    assert fails(capsys, "fast-at.yaml", *SMALL, "-n", "8", "--out", "c", "--resume") == [
        "c: a comparison with another num_examples: 24 there, 8 here; choose another --out"
    ]
    (line,) = fails(capsys, "fast-at.yaml", *SMALL, "--out", "c", "--resume")
    assert "training.epochs is 1 there and 2 here" in line


def test_augmentation_is_the_methods_own(here):
    (here / "aug.yaml").write_text(
        CONFIG.format(name="fast-at").replace("size: 8", "size: 8, augment: [{name: flip-crop, padding: 1}]")
    )
    jobs = comparing._read([here / "fast-at.yaml", here / "aug.yaml"], [], here / "c")
    comparing._check_equal(jobs)
