"""Boards: ranks, what ranks with what, joins, determinism, adding, and what the pictures show."""

import csv
import dataclasses
import io
import json
import os

import pytest

from robustlab.evaluation.statistics import wilson
from robustlab.report.figures import accuracy_curve, curves_of
from robustlab.report.tables import leaderboard_table
from robustlab.results import leaderboard
from robustlab.results.leaderboard import add, build, format_eps, rank_groups, sections
from robustlab.results.record import read_record
from robustlab.types import UserError

SUITE = {"name": "autoattack-reference", "attacks": [{"name": "autoattack-reference", "version": "standard"}]}


def record(label="trades", k=80, *, n=128, clean=120, eps=(0.1,), norm="linf", corruption=None, **changes):
    cost = {
        "forwards": 7000 * n,
        "backwards": 1800 * n,
        "seconds": 2.0 * n,
        "forwards_per_sample": 7000,
        "backwards_per_sample": 1800,
    }
    ks = k if isinstance(k, tuple) else (k,) * len(eps) if k is not None else ()
    attack = {key: 0 for key in ("robust_accuracy", "attacked", "broken", "forwards", "backwards", "seconds", "reached", "outside")}
    threats = [
        {
            "norm": norm,
            "eps": e,
            "k": j,
            "robust_accuracy": j / n,
            "interval": list(wilson(j, n)),
            "per_attack": {"autoattack-reference": attack},
            "cost": cost,
        }
        for e, j in zip(eps, ks, strict=False)
    ]
    raw = {
        "schema_version": 1,
        "model": {"name": f"runs/{label}", "label": label, "hash": f"{label}-hash", "trainer": label, "fidelity": "paper-verified"},
        "data": {"name": "digits", "split": "test", "n": n, "fingerprint": "f" * 64},
        "threat": {"norm": norm, "eps": eps[0]} if threats else None,
        "suite": {"name": "autoattack-reference", "resolved": SUITE} if threats else {"name": "corruptions-quick", "resolved": {}},
        "precision": "fp32",
        "seed": 0,
        "batch_size": 128,
        "metrics": {
            "clean": {"k": clean, "n": n, "accuracy": clean / n, "interval": list(wilson(clean, n))},
            "robust": {"k": ks[0], "n": n, "accuracy": ks[0] / n, "interval": list(wilson(ks[0], n))} if threats else None,
            "threats": threats,
            "corruptions": {} if corruption is None else {"contrast": {"1": corruption, "mean": corruption}},
            "corruption_accuracy": corruption,
        },
        "cost": cost,
        "environment": {},
        "provenance": {"date": "2026-01-02", "config": f"configs/digits/{label}.yaml"},
    }
    for path, value in changes.items():
        *above, last = path.split("__")
        place = raw
        for key in above:
            place = place[key]
        place[last] = value
    return raw


def board(folder, *records, **settings):
    (folder / "entries").mkdir(parents=True, exist_ok=True)
    for i, r in enumerate(records):
        (folder / "entries" / f"{i}.json").write_text(json.dumps(r))
    if settings:
        (folder / "board.yaml").write_text(json.dumps(settings))
    return folder


def rows(folder):
    return list(csv.DictReader(io.StringIO((folder / "index.csv").read_text())))


# -------------------------------------------------------------------------------------------------------------- ranks


def test_groups_start_with_their_best_and_take_what_overlaps_it():
    """0.75-0.85 overlaps the first; 0.65-0.74 overlaps only the second, so it starts a group: overlap is not passed on."""
    assert rank_groups([(0.8, 0.9), (0.75, 0.85), (0.7, 0.79), (0.6, 0.7), (0.1, 0.2)]) == [1, 1, 2, 2, 3]
    assert rank_groups([(0.5, 0.6), (0.4, 0.5)]) == [1, 1]
    assert rank_groups([]) == []


def test_sorted_by_robust_accuracy_with_shared_ranks(tmp_path):
    records = [record("standard", 0, clean=127), record("pgd-at", 88), record("trades", 92), record("awp", 90), record("weak", 40)]
    build(board(tmp_path, *records))
    found = rows(tmp_path)
    assert [r["model"] for r in found] == ["trades", "awp", "pgd-at", "weak", "standard"]
    assert [r["rank"] for r in found] == ["1", "1", "1", "2", "3"]
    assert [float(r["robust"]) for r in found] == [92 / 128, 90 / 128, 88 / 128, 40 / 128, 0.0]
    low, high = wilson(92, 128)
    assert (float(found[0]["low"]), float(found[0]["high"])) == (low, high)
    text = (tmp_path / "index.md").read_text()
    assert f"| 1 | trades | 93.75 | 71.88 | {100 * low:.2f} - {100 * high:.2f} | 128 | 0.1 | trades | paper-verified |" in text
    assert "[record](entries/2.json)" in text


@pytest.mark.parametrize(
    "other",
    [
        record("b", 70, eps=(0.2,)),
        record("b", 70, norm="l2"),
        record("b", 70, n=200),
        record("b", 70, data__name="mnist"),
        record("b", 70, data__split="validation"),
        record("b", 70, data__fingerprint="0" * 64),
        record("b", 70, suite__resolved={"name": "other"}),
        record("b", 70, suite__name="pgd-20"),
        record("b", 70, precision="bf16"),
    ],
)
def test_only_like_ranks_with_like(tmp_path, other):
    found = sections(board(tmp_path, record("a", 60), other))
    assert [len(s.rows) for s in found] == [1, 1]
    assert [s.rows[0].rank for s in found] == [1, 1]
    same = sections(board(tmp_path / "same", record("a", 60), record("b", 70, seed=3, batch_size=7)))
    assert [len(s.rows) for s in same] == [2]


def test_bf16_is_marked_and_comes_after(tmp_path):
    build(board(tmp_path, record("a", 60, precision="bf16"), record("b", 50)))
    text = (tmp_path / "index.md").read_text()
    assert text.index("| b |") < text.index(", bf16") < text.index("| a |")
    assert "do not compare with full precision" in text


def test_several_radii_are_several_sections(tmp_path):
    found = sections(board(tmp_path, record("a", (90, 60), eps=(0.05, 0.1)), record("b", (95, 50), eps=(0.05, 0.1)), eps=0.1))
    assert [(s.rows[0].eps, [r.model for r in s.rows]) for s in found] == [(0.1, ["a", "b"]), (0.05, ["b", "a"])]


def test_the_boards_own_suite_comes_first(tmp_path):
    records = [record("a", 60, suite__name="a-suite"), record("a", 50, eps=(8 / 255,)), record("a", 50)]
    assert [s.rows[0].suite for s in sections(board(tmp_path, *records))] == [
        "a-suite",
        "autoattack-reference",
        "autoattack-reference",
    ]
    found = sections(
        board(tmp_path, *records, suite="autoattack-reference", norm="linf", eps="8/255", title="Mine", note="A | note")
    )
    assert (found[0].rows[0].suite, found[0].rows[0].eps) == ("autoattack-reference", 8 / 255)
    assert "8/255" in found[0].heading
    build(tmp_path)
    assert (tmp_path / "index.md").read_text().startswith("# Mine\n\nA | note\n")


def test_corruptions_join_the_same_model_on_the_same_images(tmp_path):
    build(
        board(
            tmp_path,
            record("a", 60),
            record("a", None, corruption=0.625),
            record("b", 61),
            record("b", None, corruption=0.5, data__fingerprint="0" * 64),
            record("c", 62),
            record("c", None, corruption=0.25, model__hash="another"),
        )
    )
    found = {(r["model"], r["data"], r["robust"] != ""): r for r in rows(tmp_path)}
    assert found["a", "digits/test", True]["corruption"] == "0.625"
    assert found["b", "digits/test", True]["corruption"] == ""
    assert found["c (c-hash)", "digits/test", True]["corruption"] == ""
    assert found["c (another)", "digits/test", False]["corruption"] == "0.25"
    assert found["c (another)", "digits/test", False]["rank"] == ""
    assert ("a", "digits/test", False) not in found


def test_of_several_runs_the_worst_counts(tmp_path):
    build(board(tmp_path, record("a", 60), record("a", 58, seed=1), record("a", 61, seed=2), record("b", 59)))
    assert [(r["model"], r["robust"], r["runs"]) for r in rows(tmp_path)] == [("b", str(59 / 128), "1"), ("a", str(58 / 128), "3")]


def test_links_reach_what_exists(tmp_path):
    (tmp_path / "configs" / "digits").mkdir(parents=True)
    (tmp_path / "configs" / "digits" / "trades.yaml").write_text("")
    folder = board(tmp_path / "leaderboards" / "mine", record("trades", 60), record("gone", 50))
    (folder / "ledgers").mkdir()
    (folder / "ledgers" / "0.jsonl").write_text("")
    build(folder)
    text = (folder / "index.md").read_text()
    assert "[record](entries/0.json) [config](../../configs/digits/trades.yaml) [ledger](ledgers/0.jsonl)" in text
    assert "[record](entries/1.json) `configs/digits/gone.yaml` |" in text


def test_the_same_records_give_the_same_bytes(tmp_path, monkeypatch):
    records = [record("a", 60), record("b", 60), record("c", None, corruption=0.5), record("d", 60, precision="bf16")]
    first, second = board(tmp_path / "one" / "x", *records), board(tmp_path / "two" / "x", *reversed(records))
    for i in range(4):
        os.rename(second / "entries" / f"{i}.json", second / "entries" / f"_{i}.json")
    for i in range(4):
        os.rename(second / "entries" / f"_{i}.json", second / "entries" / f"{3 - i}.json")
    build(first)
    monkeypatch.chdir(tmp_path / "two")
    build(second)
    for name in ("index.md", "index.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_text_cannot_break_the_table(tmp_path):
    build(board(tmp_path, record("a|b\n[x](http://y) <b>", 60)))
    line = next(t for t in (tmp_path / "index.md").read_text().splitlines() if "a\\|b" in t)
    assert "\\[x\\](http://y) \\<b\\>" in line
    assert len(line.replace("\\|", "").split("|")) == 16


@pytest.mark.parametrize(
    ("eps", "norm", "text"),
    [
        (8 / 255, "linf", "8/255"),
        (1 / 255, None, "1/255"),
        (0.1, "linf", "0.1"),
        (0.2, "linf", "0.2"),
        (0.5, "l2", "0.5"),
        (128 / 255, "l2", "128/255"),
        (0.0, "linf", "0"),
        (0.12345678, "linf", "0.123457"),
        (12.0, "l1", "12"),
        (10, "l0", "10"),
    ],
)
def test_radii_as_people_write_them(eps, norm, text):
    assert format_eps(eps, norm) == text


def test_an_empty_board(tmp_path):
    build(tmp_path)
    assert "No records yet" in (tmp_path / "index.md").read_text()
    with pytest.raises(UserError, match="no such folder"):
        build(tmp_path / "nowhere")


def test_every_bad_entry_is_named_and_nothing_is_written(tmp_path):
    folder = board(tmp_path, record("a", 60), {"schema_version": 9}, {"schema_version": 1})
    with pytest.raises(UserError) as error:
        build(folder)
    assert any("1.json: schema_version: 9 is newer" in line for line in error.value.lines)
    assert any("2.json: model: missing" in line for line in error.value.lines)
    assert not (folder / "index.md").exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("- a", "expected a mapping"),
        ("titel: x", "titel: unknown key"),
        ("eps: eight", "eps: expected a number such as 0.1 or 8/255, got 'eight'"),
        ("eps: 1/0", "eps: expected a number"),
        ("title: [a]", "title: .* wrong kind"),
        ("a: b: c", "not YAML"),
        ("!!python/object:os.system x", "not YAML"),
    ],
)
def test_a_bad_board_file_is_one_line(tmp_path, text, line):
    (tmp_path / "board.yaml").write_text(text)
    with pytest.raises(UserError, match=f"board.yaml: {line}") as error:
        build(tmp_path)
    assert len(str(error.value).splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------- adding


def test_add_copies_the_record_and_its_ledger(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "ledger.jsonl").write_text("{}\n")
    digest = "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
    (run / "record.json").write_text(json.dumps(record("my model/x", 60, eps=(8 / 255,), provenance__ledger=digest)))
    target = add(tmp_path / "board", run / "record.json")
    assert target.name == "my-model-x--autoattack-reference--digits--linf-8over255--n128.json"
    assert target.read_bytes() == (run / "record.json").read_bytes()
    assert (tmp_path / "board" / "ledgers" / target.with_suffix(".jsonl").name).read_text() == "{}\n"
    assert add(tmp_path / "board", run / "record.json") == target
    build(tmp_path / "board")
    assert "[ledger](ledgers/" in (tmp_path / "board" / "index.md").read_text()
    assert read_record(target).model.label == "my model/x"

    (run / "record.json").write_text(json.dumps(record("my model/x", 61, eps=(8 / 255,), provenance__ledger=digest)))
    before = target.read_bytes()
    with pytest.raises(UserError, match="holds another result"):
        add(tmp_path / "board", run / "record.json")
    assert target.read_bytes() == before
    (run / "record.json").write_text(json.dumps(record("my model/x", 61, seed=1, eps=(8 / 255,), provenance__ledger=digest)))
    assert add(tmp_path / "board", run / "record.json") != target

    (run / "ledger.jsonl").write_text("{}\n\n")
    with pytest.raises(UserError, match="not the ledger"):
        add(tmp_path / "board", run / "record.json")
    with pytest.raises(UserError, match="no such ledger"):
        add(tmp_path / "board", run / "record.json", run / "other.jsonl")


def test_add_refuses_what_is_no_record(tmp_path):
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(UserError, match="not a record"):
        add(tmp_path / "board", tmp_path / "record.json")
    assert not (tmp_path / "board").exists()


# ------------------------------------------------------------------------------------------------------------ pictures


def test_the_terminal_table_shows_the_rows(tmp_path):
    from rich.console import Console

    section = sections(board(tmp_path, record("a [bold]x[/]", 60), record("b", 0), record("b", None, corruption=0.5)))[0]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(leaderboard_table(section.heading, [dataclasses.asdict(r) for r in section.rows]))
    text = console.export_text()
    assert "a [bold]x[/]" in text
    assert "46.9" in text
    assert "50.0" in text
    assert text.index("a [bold]") < text.index(" b ")
    assert max(map(len, text.splitlines())) <= 80
    assert "..." not in text


def test_curves_start_at_the_clean_accuracy():
    records = [
        record("a", (90, 60), eps=(0.05, 0.1)),
        record("a", (20,), eps=(0.2,)),
        record("b", (128, 40), clean=128, eps=(0.0, 0.1)),
    ]
    norm, suite, curves = curves_of(records)
    assert (norm, suite) == ("linf", "autoattack-reference")
    assert [(p[0], p[1]) for p in curves["a"]] == [(0.0, 120 / 128), (0.05, 90 / 128), (0.1, 60 / 128), (0.2, 20 / 128)]
    assert [(p[0], p[1]) for p in curves["b"]] == [(0.0, 1.0), (0.1, 40 / 128)]
    assert curves["a"][1][2:] == wilson(90, 128)


def test_the_figure_is_the_same_every_time(tmp_path):
    records = [record("a", (90, 60), eps=(0.05, 0.1)), record("b", (80, 50), eps=(0.05, 0.1))]
    first = accuracy_curve(records, tmp_path / "one.png")
    second = accuracy_curve(records, tmp_path / "two.svg")
    assert [p.suffix for p in first] == [".png", ".svg"]
    for p, q in zip(first, second, strict=True):
        assert p.read_bytes() == q.read_bytes()
    other = accuracy_curve([record("a", (90, 61), eps=(0.05, 0.1)), records[1]], tmp_path / "three")
    assert other[1].read_bytes() != first[1].read_bytes()


def test_a_figure_of_nothing_or_of_a_mixture_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to draw"):
        accuracy_curve([record("a", None, corruption=0.5)], tmp_path / "x.png")
    with pytest.raises(UserError, match="one of the norms, the records have l2, linf"):
        accuracy_curve([record("a", 60), record("b", 60, norm="l2")], tmp_path / "x.png")
    with pytest.raises(UserError, match="one of the suites"):
        accuracy_curve([record("a", 60), record("b", 60, suite__name="pgd-20")], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_the_default_title_is_the_folders(tmp_path):
    assert leaderboard.read_board(tmp_path).title == f"Leaderboard: {tmp_path.name}"


def test_a_suite_with_several_radii_is_one_table_with_a_column_each(tmp_path):
    weak, strong = record("weak", (60, 10), eps=(0.05, 0.1)), record("strong", (90, 50), eps=(0.05, 0.1))
    folder = board(tmp_path, weak, strong, record("other", 70, suite__name="pgd-20"))
    found = sections(folder)
    (sweep,) = leaderboard.sweeps(found)
    assert sweep.radii == ["0.05", "0.1"]
    assert [(r.model, [c.robust for c in r.cells]) for r in sweep.rows] == [
        ("strong", [90 / 128, 50 / 128]),
        ("weak", [60 / 128, 10 / 128]),
    ]
    text = build(folder)[0].read_text()
    assert "| model | clean % | 0.05 | 0.1 |" in text
    assert text.count("| rank |") == 1  # the other suite has its own, ranked table
    assert "curve.png" not in text
    (folder / "curve.png").touch()
    assert "![accuracy against the radius](curve.png)" in build(folder)[0].read_text()


# ------------------------------------------------------------------------------------------------------------ upper bounds


def bound(label, k, audited, left, *, n=128, **changes):
    raw = record(label, k, n=n, **changes)
    raw["suite"] = {"name": "autoattack-fast", "resolved": {"name": "autoattack-fast", "exact": "autoattack"}}
    counts = {"survivors": 60, "audited": audited, "misses": 0, "left": left, "points": 100 * left / n, "looks": 0, "seed": 0}
    raw["metrics"]["threats"][0]["audit"] = {"suite": "autoattack", **counts, "forwards": 9, "backwards": 9, "seconds": 1.0}
    return raw


def test_upper_bounds_stand_apart_and_rank_by_what_their_audit_leaves(tmp_path):
    exact = record("exact", 80)
    folder = board(
        tmp_path, exact, bound("wide", 100, 5, 55), bound("sure", 99, 60, 0), bound("low", 60, 60, 0), bound("bare", 110, 0, 60)
    )
    found = {section.rows[0].suite: section for section in sections(folder)}
    assert [row.model for row in found["autoattack-reference"].rows] == ["exact"]
    assert found["autoattack-reference"].exact is None
    fast = found["autoattack-fast"]
    assert fast.exact == "autoattack"
    assert fast.heading.endswith("autoattack-fast: upper bounds")
    assert "no rank" in fast.facts
    # 100 of 128, but perhaps 55 fewer: not told apart from 60 of 128; without an audit: last and unranked
    assert [(row.model, row.rank) for row in fast.rows] == [("wide", 1), ("sure", 1), ("low", 1), ("bare", None)]
    build(folder)
    text = (folder / "index.md").read_text()
    heads = [line for line in text.splitlines() if line.startswith("| rank")]
    assert ["too high by %" in head for head in heads] == [True, False]  # not in the exact suite's table
    assert "at most 0.00" in next(line for line in text.splitlines() if line.startswith("| 1 | sure"))
    alone = board(tmp_path / "alone", bound("sure", 99, 60, 0), bound("low", 60, 60, 0))
    assert [row.rank for row in sections(alone)[0].rows] == [1, 2]


def test_an_audit_that_does_not_add_up_is_refused(tmp_path):
    raw = bound("x", 80, 10, 51)
    (tmp_path / "record.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"threats\.0\.audit"):
        read_record(tmp_path / "record.json")


def test_names_in_a_crowded_plot_stay_at_their_points():
    from robustlab.report.board_page import _plot

    row = {"clean": 0.99, "robust": 0.1, "low": 0.08, "high": 0.13, "provenance": "ours"}
    plot = _plot(0, [row | {"model": f"m{i}"} for i in range(20)])
    assert all(p["text_y"] - p["y"] <= 28 for p in plot["points"] if p["name"])
    assert [p["name"] for p in plot["points"]][:3] == ["m0", "m1", "m2"]
    assert not plot["points"][-1]["name"]
    assert "m19" in plot["points"][-1]["title"]
