"""Records: from a real evaluation to a file and back, and everything that a file can have wrong."""

import copy
import json

import pytest
import torch
from torch import nn

from robustlab import config
from robustlab.evaluation.runner import evaluate
from robustlab.files import sha256
from robustlab.registry import entries
from robustlab.results.record import Record, read_record, record_from, write_record
from robustlab.types import Threat, UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A linear model under two radii and under corruptions, with a ledger."""
    torch.manual_seed(0)
    f = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(40, 1, 4, 4)
    y = f(x).argmax(1)
    y[::9] = (y[::9] + 1) % 3
    out = tmp_path_factory.mktemp("run")
    suite = config.build(
        "suite",
        {
            "name": "pgd-20",
            "eps": [0.02, 0.1],
            "corruptions": ["gaussian_noise", "contrast"],
            "severities": [1, 5],
        },
    )
    result = evaluate(f, (x, y), suite, threat=Threat("linf", 0.1), out=out)
    return result, out


MODEL = {
    "name": "runs/trades/best.safetensors",
    "label": "trades",
    "checkpoint": "ab" * 32,
    "trainer": "trades",
    "fidelity": "paper-verified",
    "architecture": "small_cnn",
    "parameters": 51,
}
DATA = {"name": "digits", "split": "test"}


def record_of(run, **options):
    options = {"model": MODEL, "data": DATA, "config": "configs/digits/trades.yaml", "date": "2026-01-02T03:04:05+00:00"} | options
    return record_from(run[0], **options)


def test_a_record_says_what_the_result_says(run, tmp_path):
    result, out = run
    record = record_of(run, command="robustlab evaluate ...", commit="0" * 40)
    assert record.metrics.clean.k == int(result.clean.sum())
    assert record.metrics.robust.k == int(result.robust.sum())
    assert record.metrics.robust.accuracy == result.robust_accuracy
    assert record.metrics.robust.interval == result.interval
    assert [t.eps for t in record.metrics.threats] == [0.02, 0.1]
    assert (record.threat.norm, record.threat.eps) == ("linf", 0.02)
    assert record.metrics.corruptions == result.corruptions
    assert record.metrics.per_attack["pgd"].broken == result.per_attack["pgd"]["broken"]
    assert record.data.n == 40
    assert record.data.fingerprint == result.fingerprint
    assert record.model.hash == result.model_hash
    assert record.suite.resolved["attacks"][0]["steps"] == 20
    assert record.cost.forwards == result.cost["forwards"]
    assert record.provenance.ledger == sha256(out / "ledger.jsonl")
    path = write_record(tmp_path / "record.json", record)
    assert read_record(path) == record
    assert record_from(result.to_dict(), model=MODEL, data=DATA, date="x").metrics == record.metrics
    before = path.read_bytes()
    write_record(path, read_record(path))
    assert path.read_bytes() == before


def test_a_record_without_attacks_and_with_little_said(run):
    result = evaluate(
        nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (torch.rand(5, 1, 2, 2), torch.zeros(5).long()), "corruptions-quick"
    )
    record = record_from(result, model={"name": "package.module:f"}, data={"name": "mine"})
    assert record.metrics.robust is record.threat is None
    assert record.metrics.corruption_accuracy == result.corruption_accuracy
    assert record.model.label == "package.module:f"
    assert record.model.fidelity is None
    assert record.provenance.ledger is None
    assert len(record.metrics.corruptions) == 5


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda r: r.pop("seed"), "seed: missing"),
        (lambda r: r["model"].pop("hash"), r"model\.hash: missing"),
        (lambda r: r["model"].update(fidelty="x"), r"model\.fidelty: unknown key \(did you mean 'fidelity'\?\)"),
        (lambda r: r["metrics"]["threats"][0].update(rob=1), r"metrics\.threats\.0\.rob: unknown key"),
        (
            lambda r: r["metrics"]["threats"][1]["per_attack"]["pgd"].update(brokn=1),
            r"pgd\.brokn: unknown key \(did you mean 'broken'",
        ),
        (lambda r: r.update(seed="zero"), 'seed: .*integer.*got "zero"'),
        (lambda r: r["model"].update(fidelity="verified"), r"model\.fidelity: .*code-verified.*got \"verified\""),
        (lambda r: r.update(precision="fp16"), "precision: .*fp32"),
        (lambda r: r["threat"].update(eps=-1), r"threat\.eps: .*greater than or equal to 0, got -1"),
        (lambda r: r.update(cost=[]), "cost: .*got a list"),
        (lambda r: r["data"].update(n=0), r"data\.n: "),
        (lambda r: r["metrics"]["clean"].update(accuracy=1.0), r"metrics\.clean\.accuracy: 1\.0 is not"),
        (lambda r: r["data"].update(n=41), r"metrics\.clean: .* but data\.n is 41"),
        (lambda r: r["metrics"]["threats"][0].update(k=40, robust_accuracy=1.0), "does not fit"),
        (lambda r: r["metrics"]["robust"].update(k=0, accuracy=0.0), r"metrics\.robust: differs from the first"),
        (lambda r: r.update(threat=None), "threat: given together"),
        (lambda r: r.update(schema_version=2), r"schema_version: 2 is newer than this robustlab reads \(1\)"),
        (lambda r: r.update(schema_version=0), "schema_version: .*got 0"),
        (lambda r: r.pop("schema_version"), "schema_version: missing; this is not a record"),
    ],
)
def test_a_bad_record_is_one_line_with_file_and_key(run, tmp_path, change, line):
    raw = copy.deepcopy(record_of(run).model_dump(mode="json"))
    change(raw)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=line) as error:
        read_record(path)
    assert all(text.startswith(f"{path}: ") and "\n" not in text for text in error.value.lines)
    assert len(error.value.lines) == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "line 1: not JSON"),
        ('{\n"a": 1,\n}', "line 3: not JSON"),
        ("[]", "expected a record .* got a list"),
        ("null", "got null"),
        ("[" * 100_000, "bad.json"),
        ('{"schema_version": 1}', "model: missing"),
        (b"\xff\xfe\x00", "not JSON"),
    ],
)
def test_a_file_that_is_no_record(tmp_path, text, line):
    path = tmp_path / "bad.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=line):
        read_record(path)
    with pytest.raises(UserError, match="cannot read"):
        read_record(tmp_path / "none.json")


def test_nan_is_no_figure(run, tmp_path):
    raw = record_of(run).model_dump(mode="json")
    raw["cost"]["seconds"] = float("nan")
    (tmp_path / "bad.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"cost\.seconds"):
        read_record(tmp_path / "bad.json")


def test_unknown_keys_of_the_caller_are_refused(run):
    with pytest.raises(UserError, match=r"model\.trainr: unknown key \(did you mean 'trainer'\?\)"):
        record_of(run, model={**MODEL, "trainr": "x"})


def test_the_suites_are_what_they_are_called():
    suites = entries("suite")
    assert {"pgd-20", "pgd-50-10", "autoattack-reference", "corruptions-quick"} <= set(suites)
    pgd = config.build("suite", "pgd-20").attacks[0]
    assert (pgd.name, pgd.steps, pgd.restarts, pgd.norm, pgd.eps) == ("pgd", 20, 1, None, None)
    pgd = config.build("suite", "pgd-50-10").attacks[0]
    assert (pgd.steps, pgd.restarts) == (50, 10)
    assert [a.name for a in config.build("suite", "autoattack-reference").attacks] == ["autoattack-reference"]
    quick = config.build("suite", "corruptions-quick")
    assert not quick.attacks
    assert quick.severities == (1, 2, 3, 4, 5)
    assert {c.table for c in quick.corruptions if hasattr(c, "table")} == {"cifar"}
    assert len({c.name for c in quick.corruptions}) == 5
    for name in suites:
        assert config.dump(config.build("suite", config.dump(config.build("suite", name)))) == config.dump(
            config.build("suite", name)
        )


def test_the_reference_autoattack_through_the_evaluator():
    """On a linear model it reaches the closed form, and its passes are counted through the package's own autograd calls."""
    torch.manual_seed(0)
    f = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    x = torch.rand(6, 1, 4, 4)
    z = f(x)
    y = z.argmax(1)
    w = f[1].weight
    eps = 0.05
    room = torch.stack([(x.flatten(1) - eps).clamp(0, 1), (x.flatten(1) + eps).clamp(0, 1)])
    worst = torch.full((6,), torch.inf)
    for k in range(5):
        d = w[y] - w[k]
        low = torch.where(d > 0, room[0], room[1])
        margin = (low * d).sum(1) + f[1].bias[y] - f[1].bias[k]
        worst = torch.where(y == k, worst, torch.minimum(worst, margin))
    result = evaluate(f, (x, y), "autoattack-reference", threat=Threat("linf", eps), num_examples=6)
    assert torch.equal(result.robust, worst > 0)
    assert 0 < int(result.robust.sum()) < 6
    row = result.per_attack["autoattack-reference"]
    left = int(result.robust.sum())
    assert row["forwards"] > left * (102 + 5003)
    assert row["backwards"] > left * 101
    assert row["outside"] == 0


def test_record_is_documented_by_its_schema():
    assert Record.model_json_schema()["additionalProperties"] is False


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.15), ("l1", 1.0)])
def test_gaussians_agree_with_the_closed_form(norm, eps):
    """10,000 images, the Bayes classifier, PGD-20: clean and robust accuracy lie within the interval of the measurement."""
    part = config.build("dataset", "gaussians")
    splits = part.load()
    result = evaluate(part.bayes_classifier(), splits, "pgd-20", threat=Threat(norm, eps), batch_size=1000)
    assert result.n == 10_000
    assert result.clean_interval[0] <= part.bayes_robust_accuracy(norm, 0.0) <= result.clean_interval[1]
    assert result.interval[0] <= part.bayes_robust_accuracy(norm, eps) <= result.interval[1]
    assert 0.9 < result.robust_accuracy < 0.99
