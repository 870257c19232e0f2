"""Gates and audits: who goes on, whose draws, what is bounded, and that kills, shards and batches change nothing.

The leading attack here is a stand-in that finds little and calls samples near at random, so that there is much to miss.
"""

from __future__ import annotations

import json
import random

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

import robustlab as rl
from robustlab import config
from robustlab.attacks.screen import Screen
from robustlab.evaluation import shards
from robustlab.evaluation.audit import Audit
from robustlab.evaluation.cascade import Gate, descend, gate_of, nearness_in, steps_of
from robustlab.evaluation.ledger import read
from robustlab.evaluation.rederive import rederive
from robustlab.evaluation.rescore import rescore
from robustlab.evaluation.runner import evaluate
from robustlab.evaluation.statistics import most_left
from robustlab.types import Threat, UserError

HERE = Threat("linf", 0.07)
N, K, BATCH = 40, 5, 7
BLIND = 1e-12  # a threshold that nothing is nearer than
ALL = 1e12


@pytest.fixture(scope="module")
def problem():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Screen, "run", weak)
        yield _problem()


def weak(self, f, x, y, rng):
    d = 0.3 * self.eps * rng.uniform(x.shape[1:], -1, 1, dtype=x.dtype)
    f(x)
    return (x + d).clamp(0, 1), {"nearness": rng.child("near").uniform((), dtype=x.dtype)}


def _problem():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        f = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Flatten(), nn.Linear(216, K))
        f(torch.rand(64, 1, 8, 8))
    f = f.double().eval()
    x = torch.rand(N, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = f(x.double()).argmax(1)
    y[::9] = (y[::9] + 1) % K
    return f, x, y


def toy(near=0.25, audit=0, **fields):
    """A screen before the attacks of pgd-20."""
    attacks = [{"name": "screen"}, {"name": "pgd", "steps": 20, "keep": "best"}]
    spec = {"name": "autoattack-fast", "exact": "pgd-20", "attacks": attacks, "near": near, "audit": audit}
    return config.build("suite", spec | fields)


def go(problem, suite, **options):
    f, x, y = problem
    return evaluate(f, (x, y), suite, **{"threat": HERE, "batch_size": BATCH, "seed": 3, **options})


@pytest.fixture(scope="module")
def truth(problem):
    """Verdicts: of the exact suite, and of the screen."""
    screen = toy(attacks=[{"name": "screen"}])
    return go(problem, "pgd-20").robust, go(problem, screen).robust


def test_the_problem_has_something_to_miss(truth):
    exact, screen = truth
    assert 3 < int((screen & ~exact).sum()) < int(screen.sum()) - 3


# ------------------------------------------------------------------------------------------------------------------ gates


def entry(verdict, nearness=None):
    return {"verdict": verdict} | ({} if nearness is None else {"nearness": nearness})


def test_the_gate_sends_on_what_is_near_or_cannot_be_told():
    seen = {}

    def attack(step, rows):
        seen[step.label] = rows.tolist()
        if step.label == "screen":
            return entry([1, 1, 0, 1, 1], [0.3, 0.05, 0.0, None, 0.1])
        return entry([0] * len(rows)) if step.label == "fab" else entry([1] * len(rows))

    suite = config.build("suite", "autoattack-fast")
    alive = torch.tensor([True, True, False, True, True, True])
    alive, spared = descend(alive, steps_of(suite), gate_of(suite), attack)
    assert seen == {"screen": [0, 1, 3, 4, 5], "apgd": [1, 4], "apgd-t": [1, 4], "fab": [1, 4], "square": []}
    assert alive.tolist() == [True, False, False, False, False, True]
    assert spared.tolist() == [True, False, False, False, False, True]


def test_a_leading_attack_that_tells_no_nearness_is_refused_in_one_line(problem):
    with pytest.raises(UserError, match="'pgd' cannot lead a suite") as caught:
        go(problem, toy(attacks=[{"name": "pgd", "steps": 1}, {"name": "pgd"}]))
    assert len(caught.value.lines) == 1
    assert Gate("x", 0.25).spares(entry([])) == []


def test_what_is_not_finite_is_null_in_the_ledger_and_floats_come_back_exactly():
    values = torch.tensor([0.1, torch.inf, torch.nan, 1 / 3])
    told = json.loads(json.dumps(nearness_in({"nearness": values})))["nearness"]
    assert told == [values[0].item(), None, None, values[3].item()]
    assert nearness_in({}) == {}


def test_behind_the_gate_attacks_and_draws_are_the_exact_suite_s():
    fast, quick, alone, exact = (config.build("suite", n) for n in ("autoattack-fast", "autoattack-quick", "screen", "autoattack"))
    assert steps_of(fast)[1:] == steps_of(exact)
    assert steps_of(quick)[1:] == steps_of(exact)[:2]
    assert [s.attack.name for s in steps_of(alone)] == ["screen"]
    assert (fast.near, fast.leading, fast.audit) == (0.1, 1, 60)
    assert (quick.near, quick.audit, alone.audit) == (0.1, 0, 0)
    assert gate_of(exact) is None
    assert gate_of(alone) is None
    assert (Screen().steps, Screen().targets) == (40, 4)


def test_who_gets_the_exact_attacks_gets_the_exact_verdict(problem, truth):
    exact, screen = truth
    assert torch.equal(go(problem, toy(near=ALL)).robust, exact & screen)
    nobody = go(problem, toy(near=BLIND))
    assert torch.equal(nobody.robust, screen)
    assert nobody.per_attack["pgd"]["attacked"] == 0
    some = go(problem, toy(near=0.3))
    near = some.per_attack["pgd"]["attacked"]
    assert 0 < near < int(screen.sum())
    assert some.audit["survivors"] == int(screen.sum()) - near
    rows = [some.per_attack[label] for label in ("screen", "pgd")]
    assert rows[0]["robust_accuracy"] == int(screen.sum()) / N
    assert rows[1]["robust_accuracy"] == some.robust_accuracy == int(screen.sum()) / N - rows[1]["broken"] / N


# ----------------------------------------------------------------------------------------------------------------- audits


def test_an_audit_of_all_survivors_finds_the_exact_verdicts(problem, truth):
    exact, screen = truth
    result = go(problem, toy(near=BLIND, audit=1000))
    assert torch.equal(result.robust, exact & screen)
    audit = result.audit
    assert audit["audited"] == audit["survivors"] == int(screen.sum())
    assert audit["misses"] == int((screen & ~exact).sum())
    assert (audit["left"], audit["points"]) == (0, 0.0)
    assert audit["suite"] == "pgd-20"


def test_what_is_audited_is_counted_as_broken_and_bounds_the_rest(problem, truth):
    exact, screen = truth
    missed = screen & ~exact
    draws = set()
    for seed in range(3):
        exact_here = go(problem, "pgd-20", seed=seed).robust
        base = go(problem, toy(near=BLIND), seed=seed).robust
        result = go(problem, toy(near=BLIND, audit=9), seed=seed)
        audit = result.audit
        gone = base & ~result.robust
        assert audit["misses"] == int(gone.sum())
        assert bool((gone <= ~exact_here).all())
        assert audit["left"] == most_left(int(base.sum()), 9, audit["misses"])
        assert audit["points"] == 100 * audit["left"] / N
        assert int((result.robust & ~exact_here).sum()) <= audit["left"]
        assert result.threats[0]["k"] == int(result.robust.sum())
        draws.add(tuple(gone.tolist()))
    assert len(draws) > 1 or not bool(missed.any())


def test_the_audit_s_cost_is_stated_apart_and_in_the_total(problem):
    plain, audited = (go(problem, toy(near=BLIND, audit=m)) for m in (0, 9))
    assert audited.threats[0]["cost"]["forwards"] == plain.threats[0]["cost"]["forwards"]
    assert audited.audit["forwards"] > 9
    assert audited.cost["forwards"] == plain.cost["forwards"] + audited.audit["forwards"]
    assert audited.cost["backwards"] == plain.cost["backwards"] + audited.audit["backwards"]


def test_samples_that_got_less_than_the_exact_suite_are_in_the_pool_too(problem, truth):
    """Without pgd behind the gate, those that went through it are no safer than the others."""
    both = [{"name": "screen"}, {"name": "apgd", "steps": 2}]
    result = go(problem, toy(near=0.3, attacks=both))
    assert result.per_attack["apgd"]["attacked"] > 0
    assert result.audit["survivors"] == int(result.robust.sum())
    everyone = go(problem, toy(near=0.3, attacks=both), audit=N)
    assert bool((everyone.robust <= truth[0]).all())


def test_an_audit_goes_on_until_its_bound_holds(problem, truth):
    exact, screen = truth
    for points in (40.0, 30.0, 10.0, 0.0):
        audit = go(problem, toy(near=BLIND), audit_bound=points).audit
        assert audit["points"] <= points
        assert 0 < audit["audited"] <= int(screen.sum())
    assert audit["audited"] == int(screen.sum())
    assert audit["misses"] == int((screen & ~exact).sum())
    some = go(problem, toy(near=BLIND), audit_bound=50.0).audit
    assert some["audited"] < int(screen.sum())


@pytest.mark.parametrize(("population", "bad", "points"), [(60, 1, 5.0), (60, 6, 10.0), (60, 20, 20.0), (200, 10, 3.0)])
def test_looking_again_and_again_leaves_the_bound_at_95_percent(population, bad, points):
    """Simulated: of 600 audits that stop when they like, at most 5 % claim too little."""
    wrong = looks = 0
    draw = random.Random(0)
    for seed in range(600):
        pool = list(range(population))
        broken = set(draw.sample(pool, bad))
        audit = Audit("exact", pool, population, seed, HERE, 0, points)
        for _, rows in audit.pieces(16, {}):
            audit.count(len(rows), len(broken.intersection(rows)))
        wrong += bad - audit.misses > audit.left
        looks += audit.looks
        assert audit.to_dict()["points"] <= points
    assert wrong <= 0.05 * 600 + 3 * (0.05 * 0.95 * 600) ** 0.5
    assert looks >= 600


def test_every_survivor_is_as_likely_to_be_audited():
    count = torch.zeros(20)
    for seed in range(800):
        audit = Audit("exact", list(range(0, 100, 5)), 100, seed, HERE, 5)
        for _, rows in audit.pieces(3, {}):
            count[torch.tensor(rows) // 5] += 1
            audit.count(len(rows), 0)
        assert (audit.audited, audit.looks) == (5, 0)
    assert float((count - 200).abs().max()) < 5 * (800 * 0.25 * 0.75) ** 0.5


def test_an_audit_that_cannot_be_is_one_line(problem):
    for options, line in [
        ({"suite": "pgd-20", "audit": 3}, "the suite 'pgd-20' spares no sample any attack"),
        ({"suite": toy(), "audit": -1}, "expected a number of images, 0 or more, got -1"),
        ({"suite": toy(), "audit_bound": 101.0}, "expected points of accuracy, 0 to 100, got 101"),
        ({"suite": toy(), "audit": 3, "shard": (1, 2)}, "merge the shards, then evaluate with --resume"),
    ]:
        with pytest.raises(UserError, match=line) as caught:
            go(problem, **options)
        assert len(caught.value.lines) == 1


class Once(IterableDataset):
    """Images that come a single time, or differ the second time."""

    def __init__(self, x, y, change):
        self.x, self.y, self.change, self.passes = x, y, change, 0

    def __iter__(self):
        self.passes += 1
        if self.passes > 1 and not self.change:
            return
        for i in range(len(self.x)):
            yield (self.x[i] if self.passes == 1 else 1 - self.x[i]), int(self.y[i])


@pytest.mark.parametrize(("change", "line"), [(False, "cannot be read twice"), (True, "changed between two passes")])
def test_images_that_do_not_come_again_as_they_were_are_refused(problem, change, line):
    f, x, y = problem
    with pytest.raises(UserError, match=line):
        evaluate(f, Once(x, y, change), toy(near=BLIND, audit=3), threat=HERE, batch_size=BATCH)
    evaluate(f, Once(x, y, change), toy(near=BLIND), threat=HERE, batch_size=BATCH)


# -------------------------------------------------------------------------------------------- kills, shards, batches, files


def timeless(path):
    return [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]


def bare(audit):
    return {k: v for k, v in audit.items() if k != "seconds"}


OPTIONS = [{"audit": 9}, {"audit_bound": 20.0}]


@pytest.mark.parametrize("asked", OPTIONS, ids=["number", "bound"])
def test_killed_anywhere_and_resumed_it_is_the_same(problem, tmp_path, asked):
    suite = toy(near=0.3)
    whole = go(problem, suite, out=tmp_path / "whole", **asked)
    lines = (tmp_path / "whole" / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    assert sum(b'"audit/pgd"' in line for line in lines) >= 2
    folder = tmp_path / "torn"
    folder.mkdir()
    for count in range(1, len(lines) + 1, 2):
        (folder / "ledger.jsonl").write_bytes(b"".join(lines[:count])[:-5])
        again = go(problem, suite, out=folder, resume=True, **asked)
        assert timeless(folder / "ledger.jsonl") == timeless(tmp_path / "whole" / "ledger.jsonl"), count
        assert torch.equal(again.robust, whole.robust)
        assert bare(again.audit) == bare(whole.audit)


def test_a_longer_audit_goes_on_where_a_shorter_one_ended(problem, tmp_path):
    suite = toy(near=BLIND)
    first = go(problem, suite, out=tmp_path / "a", audit=5)
    longer = go(problem, suite, out=tmp_path / "a", resume=True, audit=14)
    at_once = go(problem, suite, out=tmp_path / "b", audit=14)
    assert torch.equal(longer.robust, at_once.robust)
    assert bare(longer.audit) == bare(at_once.audit)
    assert first.audit["audited"] == 5
    shorter = go(problem, suite, out=tmp_path / "a", resume=True, audit=2)  # what is known stays known
    assert bare(shorter.audit) == bare(longer.audit)
    assert torch.equal(shorter.robust, longer.robust)


@pytest.mark.parametrize("n", [2, 5])
def test_merged_shards_audited_afterwards_are_the_single_run(problem, tmp_path, n):
    suite = toy(near=0.3, audit=9)
    whole = go(problem, suite, out=tmp_path / "whole")
    bases = [go(problem, suite, out=tmp_path / f"{i}", shard=(i, n)) for i in range(1, n + 1)]
    assert all(r.audit["audited"] == 0 for r in bases)
    header, entries = shards.merge([tmp_path / f"{i}" / "ledger.jsonl" for i in range(1, n + 1)])
    merged = shards.result_of(header, entries, fingerprint=whole.fingerprint)
    assert merged.audit["survivors"] == sum(r.audit["survivors"] for r in bases) == whole.audit["survivors"]
    assert (merged.audit["audited"], merged.audit["left"]) == (0, whole.audit["survivors"])
    shards.write(tmp_path / "all", header, entries)
    again = go(problem, suite, out=tmp_path / "all", resume=True)
    assert timeless(tmp_path / "all" / "ledger.jsonl") == timeless(tmp_path / "whole" / "ledger.jsonl")
    assert torch.equal(again.robust, whole.robust)
    assert bare(again.audit) == bare(whole.audit)


def test_nothing_depends_on_the_batch(problem):
    results = [go(problem, toy(near=0.3, audit=9), batch_size=b) for b in (BATCH, 1, N)]
    for other in results[1:]:
        assert torch.equal(other.robust, results[0].robust)
        assert bare(other.audit) == bare(results[0].audit)
        for label, row in results[0].per_attack.items():
            same = other.per_attack[label]
            keys = ("attacked", "broken", "forwards", "backwards", "robust_accuracy")
            assert [same[k] for k in keys] == [row[k] for k in keys]


def test_the_ledger_tells_every_nearness_and_every_audited_sample(problem, tmp_path):
    result = go(problem, toy(near=0.3, audit=9), out=tmp_path)
    _, entries = read(tmp_path / "ledger.jsonl")
    led = [e for e in entries if e["attack"] == "screen"]
    assert all(len(e["nearness"]) == len(e["index"]) for e in led)
    behind = [i for e in entries if e["attack"] == "pgd" for i in e["index"]]
    near = [i for e in led for i, v, d in zip(e["index"], e["verdict"], e["nearness"], strict=True) if v and d < 0.3]
    assert behind == near
    audited = [i for e in entries if e["attack"] == "audit/pgd" for i in e["index"]]
    assert len(set(audited)) == len(audited) == 9
    assert not set(audited) & set(behind)
    assert result.audit["seed"] == 3


def test_saved_images_show_what_screen_gate_and_audit_found(problem, tmp_path):
    f, x, y = problem
    file = tmp_path / "adv.npz"
    result = go(problem, toy(near=0.3), audit=9, out=tmp_path / "e", save_adversarial=file)
    assert result.audit["misses"] > 0
    scored = rescore(f, (x, y), file, threat=HERE)
    assert (scored.robust, scored.changed) == (int(result.robust.sum()), 0)
    go(problem, toy(near=0.3), audit=9, out=tmp_path / "e", save_adversarial=file, resume=True)
    with pytest.raises(UserError, match="made before this audit"):
        go(problem, toy(near=0.3), audit=30, out=tmp_path / "e", save_adversarial=file, resume=True)


def test_from_python(problem):
    f, x, y = problem
    result = rl.evaluate(f, (x, y), toy(near=BLIND), norm="linf", eps=0.07, audit=4, reliability=True)
    assert result.audit["audited"] == 4
    assert "robust at most" in repr(result)
    assert "(audit: by at most" in repr(result)
    assert result.reliability["forwards"] + result.reliability["backwards"] <= 0.1 * sum(
        result.threats[0]["cost"][k] for k in ("forwards", "backwards")
    )


@pytest.mark.parametrize("asked", [*OPTIONS, {}], ids=["number", "bound", "none"])
def test_the_ledger_alone_tells_the_result(problem, tmp_path, asked):
    result = go(problem, toy(near=0.3), out=tmp_path, **asked)
    told = rederive(tmp_path / "ledger.jsonl")
    assert torch.equal(told.robust, result.robust)
    assert told.audit == result.audit
    assert told.threats == result.threats
    assert told.cost == pytest.approx(result.cost)


def test_a_ledger_whose_audit_or_gate_was_changed_is_not_believed(problem, tmp_path):
    go(problem, toy(near=0.3), out=tmp_path, audit=9)
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    audit = next(i for i, line in enumerate(lines) if line.get("attack") == "audit/pgd")
    screen = next(i for i, line in enumerate(lines) if line.get("attack") == "screen")

    def changed(at, **fields):
        path = tmp_path / "changed.jsonl"
        path.write_text("".join(json.dumps(line | (fields if i == at else {})) + "\n" for i, line in enumerate(lines)))
        return path

    rederive(changed(None))
    others = [i for i in range(N) if i not in lines[audit]["index"]][: len(lines[audit]["index"])]
    with pytest.raises(UserError, match="not the samples that the seed draws"):
        rederive(changed(audit, index=others))
    with pytest.raises(UserError, match="not the"):
        rederive(changed(screen, nearness=[1.0] * len(lines[screen]["index"])))
