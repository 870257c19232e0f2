"""The evaluator: closed forms, attacks that cheat, exact costs, batch sizes, kills, and what the caller may hand over."""

import dataclasses
import json
import os
import re
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from robustlab import geometry
from robustlab.evaluation.cascade import unique
from robustlab.evaluation.counting import Counter
from robustlab.evaluation.ledger import Ledger, read
from robustlab.evaluation.runner import evaluate
from robustlab.evaluation.threats import threats_of
from robustlab.losses import cross_entropy
from robustlab.types import Attack, Corruption, Splits, Suite, Threat, UserError

EPS = 0.1
LINF = Threat("linf", EPS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyAttack(Attack):
    """Base of the attacks below: they work in every norm and take the threat that they are given."""

    norms = ("linf", "l2", "l1", "l0")
    norm: str | None = None
    eps: float | None = None


def attack(name, run, **extra):
    """An attack part from a function ``run(self, f, x, y, rng)``."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(type("Toy", (ToyAttack,), {"run": run, "name": name, **extra}))
    return cls()


def gradient(f, x, y):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(cross_entropy(f(x), y).sum(), x)[0]


def worst(self, f, x, y, rng):
    """The exact worst case of a linear two-class model."""
    return geometry.linear_max(gradient(f, x, y), x, self.norm, self.eps), {}


def noise(self, f, x, y, rng):
    """Random signs: what it finds depends on its draws only."""
    return x + self.eps * (rng.uniform(x.shape[1:]) - 0.5).sign(), {}


WORST, NOISE = attack("worst", worst), attack("noise", noise)


def make_suite(*attacks, **fields):
    cls = type("Toy", (Suite,), {"name": "toy"})
    return cls(attacks=attacks, **fields)


class Linear(nn.Module):
    """Logits (-s/2, s/2) with s = <w, x> + b."""

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = nn.Parameter(w), nn.Parameter(b)

    def forward(self, x):
        s = x.flatten(1) @ self.w + self.b
        return torch.stack([-s / 2, s / 2], 1)


@pytest.fixture
def linear():
    g = torch.Generator().manual_seed(1)
    w = torch.randn(12, generator=g)
    x = torch.rand(200, 3, 2, 2, generator=g)
    b = -(x.flatten(1) @ w).mean()
    margin = x.flatten(1) @ w + b
    y = (margin + 0.3 * torch.randn(200, generator=g) > 0).long()
    return Linear(w, b), x, y


def robust_of(f, x, y, norm, eps):
    """Closed form in float64: the margin that is left when every coordinate is used in order of its gain, box included."""
    w, sign = f.w.detach().double(), (2 * y - 1).double()[:, None]
    x = x.flatten(1).double()
    margin = sign[:, 0] * (x @ w + f.b.detach().double())
    room = torch.where(sign * w > 0, x, 1 - x)
    if norm == "linf":
        loss = (w.abs() * room.clamp(max=eps)).sum(1)
    else:
        size, order = w.abs().sort(descending=True)
        room = room[:, order]
        before = room.cumsum(1) - room
        loss = (size * torch.minimum(room, (eps - before).clamp(min=0))).sum(1)
    left = margin - loss
    assert float(left.abs().min()) > 1e-5, "a sample lies on the boundary: float32 cannot say"
    return left > 0


# ------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("linf", 0.1), ("l1", 0.3)])
def test_linear_model_matches_the_closed_form(linear, norm, eps):
    f, x, y = linear
    result = evaluate(f, (x, y), make_suite(NOISE, WORST), threat=Threat(norm, eps), batch_size=64)
    expected = robust_of(f, x, y, norm, eps)
    assert 0 < int(expected.sum()) < int(result.clean.sum()) < 200
    assert torch.equal(result.robust, expected)
    assert torch.equal(result.clean, f(x).argmax(1) == y)
    assert result.robust_accuracy == int(expected.sum()) / 200
    assert result.interval[0] < result.robust_accuracy < result.interval[1]
    table = result.per_attack
    assert table["worst"]["robust_accuracy"] == result.robust_accuracy
    assert table["noise"]["attacked"] == int(result.clean.sum())
    assert table["worst"]["attacked"] == table["noise"]["attacked"] - table["noise"]["broken"]
    assert table["worst"]["reached"] == pytest.approx(eps, rel=1e-5)


def test_zero_radius_and_no_attacks(linear):
    f, x, y = linear
    result = evaluate(f, (x, y), make_suite(NOISE, WORST), threat=Threat("linf", 0.0))
    assert torch.equal(result.robust, result.clean)
    assert result.per_attack["worst"]["broken"] == 0
    plain = evaluate(f, (x, y), make_suite())
    assert plain.robust_accuracy is plain.interval is plain.robust is None
    assert plain.clean_accuracy == result.clean_accuracy


def test_several_threats_and_repeated_names(linear):
    f, x, y = linear
    suite = make_suite(WORST, NOISE, WORST, norms=("linf", "l1"), eps=(0.02, 0.1))
    result = evaluate(f, (x, y), suite, batch_size=50)
    assert [(t["norm"], t["eps"]) for t in result.threats] == [("linf", 0.02), ("linf", 0.1), ("l1", 0.02), ("l1", 0.1)]
    for t, verdict in zip(result.threats, result.verdicts, strict=True):
        assert torch.equal(verdict, robust_of(f, x, y, t["norm"], t["eps"]))
        assert t["k"] == int(verdict.sum())
        assert list(t["per_attack"]) == ["worst", "noise", "worst#2"]
        assert t["per_attack"]["worst#2"]["broken"] == 0
    assert torch.equal(result.robust, result.verdicts[0])
    assert unique(["a", "b", "a", "a"]) == ["a", "b", "a#2", "a#3"]
    json.dumps(result.to_dict(), allow_nan=False)
    assert re.fullmatch(r"clean \d\d\.\d\d % \[.*\], robust .* % \[.*\] under toy \(linf 0\.02, n = 200\)", repr(result))


# ------------------------------------------------------------------------------------------------- attacks that cheat


def flip(self, f, x, y, rng):
    """Leaves the ball and the box: the opposite of the image, times ten."""
    return 10 * (1 - 2 * x), {}


def test_leaving_the_ball_gains_nothing(linear):
    f, x, y = linear

    def far(self, f, x, y, rng):
        return x + 5 * gradient(f, x, y).sign(), {}

    result = evaluate(f, (x, y), make_suite(attack("far", far)), threat=LINF)
    expected = robust_of(f, x, y, "linf", EPS)
    assert torch.equal(result.robust, expected)
    assert result.per_attack["far"]["outside"] == result.per_attack["far"]["attacked"] == int(result.clean.sum())
    assert result.per_attack["far"]["reached"] <= EPS * (1 + 1e-6)
    result = evaluate(f, (x, y), make_suite(attack("flip", flip)), threat=Threat("l2", 1e-9))
    assert torch.equal(result.robust, result.clean)


def test_writing_into_the_images_or_the_labels_gains_nothing(linear):
    f, x, y = linear
    before = x.clone()

    def tamper(self, f, x, y, rng):
        x.copy_(1 - x)
        y.zero_()
        return x, {"robust": False, "verdict": 0}

    result = evaluate(f, (x, y), make_suite(attack("tamper", tamper)), threat=Threat("linf", 0.0))
    assert torch.equal(result.robust, result.clean)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("returned", "line"),
    [
        (lambda x: torch.where(x == x[:1], torch.nan, x), "not finite for"),
        (lambda x: x / 0, "not finite for"),
        (lambda x: x[:-1], "must return images"),
        (lambda x: x.flatten(1), "must return images"),
        (lambda x: x.double(), "must return images"),
        (lambda x: x.to("meta"), "must return images"),
        (lambda x: None, "got a NoneType"),
    ],
)
def test_what_is_no_image_is_refused(linear, returned, line):
    f, x, y = linear
    bad = attack("bad", lambda self, f, x, y, rng: (returned(x), {}))
    with pytest.raises(UserError, match=f"the attack 'bad' .*{line}") as error:
        evaluate(f, (x, y), make_suite(bad), threat=LINF)
    assert len(error.value.lines) == 1


def test_a_misclassified_image_is_never_given_to_an_attack(linear):
    f, x, y = linear
    seen = []

    def spy(self, f, x, y, rng):
        seen.append((x.clone(), y.argmax(1), rng.tickets.clone()))
        return x, {}

    result = evaluate(f, (x, y), make_suite(WORST, attack("spy", spy)), threat=LINF, batch_size=64)
    rows = torch.cat([t for _, _, t in seen])
    assert torch.equal(rows, result.robust.nonzero().squeeze(1))
    assert torch.equal(torch.cat([x for x, _, _ in seen]), x[rows])
    assert torch.equal(torch.cat([y for _, y, _ in seen]), y[rows])


def test_weights_that_change_are_noticed(linear):
    f, x, y = linear

    def poison(self, f, x, y, rng):
        with torch.no_grad():
            f.module.w.mul_(1.5)
        return x, {}

    with pytest.raises(UserError, match="weights or buffers changed"):
        evaluate(f, (x, y), make_suite(attack("poison", poison)), threat=LINF)


def test_an_adversarial_image_without_an_answer_is_broken():
    def f(x):
        z = torch.stack([x.flatten(1).sum(1), -x.flatten(1).sum(1)], 1)
        return torch.where((x.flatten(1) > 0.9).any(1, keepdim=True), torch.nan, z)

    x, y = torch.full((4, 1, 2, 2), 0.85), torch.zeros(4, dtype=torch.long)
    up = attack("up", lambda self, f, x, y, rng: (x + 0.1, {}))
    result = evaluate(f, (x, y), make_suite(up), threat=LINF)
    assert result.clean_accuracy == 1.0
    assert result.robust_accuracy == 0.0


# ----------------------------------------------------------------------------------------------------- modes and draws


class Mode(nn.Module):
    """A linear layer behind dropout and BatchNorm: its answers depend on the mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3))

    def forward(self, x):
        return self.body(x)


@pytest.fixture
def net():
    f = Mode()
    with torch.no_grad():
        f.body[0].running_mean.fill_(0.4)
        f.body[0].running_var.fill_(0.2)
    g = torch.Generator().manual_seed(2)
    x = torch.rand(90, 1, 4, 4, generator=g)
    with torch.no_grad():
        y = f.eval()(x).argmax(1)
    y[::7] = (y[::7] + 1) % 3
    return f, x, y


def test_the_model_is_left_as_it_was(net):
    f, x, y = net
    f.train()
    f.body[2].eval()
    f.body[3].bias.requires_grad_(False)
    before = {k: v.clone() for k, v in f.state_dict().items()}
    state = torch.get_rng_state()

    def check(self, g, x, y, rng):
        assert not f.training
        assert not any(p.requires_grad for p in f.parameters())
        torch.rand(3)
        return worst(self, g, x, y, rng)

    evaluate(f, (x, y), make_suite(attack("check", check)), threat=LINF)
    assert f.training
    assert not f.body[2].training
    assert [p.requires_grad for p in f.parameters()] == [True, True, True, False]
    assert all(p.grad is None for p in f.parameters())
    assert all(torch.equal(v, before[k]) for k, v in f.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_an_attack_that_changes_the_mode_gains_nothing(net):
    """In train mode dropout and the batch's statistics would change most answers."""
    f, x, y = net

    def disturb(self, g, x, y, rng):
        f.train()
        return x, {}

    modes = []
    look = attack("look", lambda self, g, x, y, rng: (modes.append(f.training), (x, {}))[1])
    result = evaluate(f.eval(), (x, y), make_suite(attack("disturb", disturb), look), threat=LINF)
    assert torch.equal(result.robust, result.clean)
    assert modes == [False]
    assert not f.training
    f.train()
    before = {k: v.clone() for k, v in f.state_dict().items()}
    assert torch.equal(evaluate(f, (x, y), make_suite()).clean, result.clean)
    assert f.training
    assert all(torch.equal(v, before[k]) for k, v in f.state_dict().items())


def test_batch_size_changes_no_verdict(net):
    f, x, y = net
    suite = make_suite(NOISE, WORST)
    results = [evaluate(f, (x, y), suite, threat=LINF, batch_size=b, seed=3) for b in (1, 7, 32, 90, 1000)]
    assert results[0].per_attack["noise"]["broken"] > 0
    for r in results[1:]:
        assert torch.equal(r.robust, results[0].robust)
        assert torch.equal(r.clean, results[0].clean)
        assert r.fingerprint == results[0].fingerprint
        assert r.model_hash == results[0].model_hash
        assert [a["broken"] for a in r.per_attack.values()] == [a["broken"] for a in results[0].per_attack.values()]


def test_the_seed_counts_and_so_does_the_place_in_the_suite(net):
    f, x, y = net

    def broken(seed):
        draws = []

        def keep(self, f, x, y, rng):
            draws.append(rng.uniform(()))
            return x, {}

        evaluate(f, (x, y), make_suite(attack("keep", keep), attack("keep", keep)), threat=LINF, seed=seed)
        return draws

    a, b, c = broken(0), broken(0), broken(1)
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a[0], c[0])


def test_an_attack_that_draws_from_the_global_generator_repeats_itself(net):
    f, x, y = net
    stray = attack("stray", lambda self, f, x, y, rng: (x + EPS * torch.randn_like(x).sign(), {}))
    first = evaluate(f, (x, y), make_suite(stray), threat=LINF)
    torch.manual_seed(99)
    assert torch.equal(first.robust, evaluate(f, (x, y), make_suite(stray), threat=LINF).robust)


def test_bf16_searches_low_and_scores_high(net):
    _, x, y = net
    torch.manual_seed(0)
    f = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    seen = []

    def look(self, f, x, y, rng):
        seen.append((torch.is_autocast_enabled("cpu"), f(x).dtype, f(x)))
        return worst(self, f, x, y, rng)

    low = evaluate(f, (x, y), make_suite(attack("look", look)), threat=LINF, precision="bf16", batch_size=90)
    first = seen[0]
    seen.clear()
    high = evaluate(f, (x, y), make_suite(attack("look", look)), threat=LINF, batch_size=90)
    assert low.precision == "bf16"
    assert first[:2] == seen[0][:2] == (False, torch.float32)
    gap = (first[2] - seen[0][2]).abs().max()
    assert 1e-5 < gap < 0.1, "the search must have run in bf16, and near enough"
    assert torch.equal(low.clean, high.clean)


def test_the_callers_autocast_reaches_neither_search_nor_score(net):
    f, x, y = net
    inside = []

    def watched(x):
        inside.append(torch.is_autocast_enabled("cpu"))
        return f.eval()(x)

    plain = evaluate(watched, (x, y), make_suite(WORST), threat=LINF)
    with torch.autocast("cpu", torch.bfloat16):
        under = evaluate(watched, (x, y), make_suite(WORST), threat=LINF)
    assert torch.equal(plain.robust, under.robust)
    assert not any(inside)
    inside.clear()
    low = evaluate(watched, (x, y), make_suite(WORST), threat=LINF, precision="bf16")
    assert inside == [False] * 3, "a bfloat16 input would lose perturbations: what cannot be prepared is searched in float32"
    assert "searched in float32" in low.per_attack["worst"]["flags"][0]


def test_a_float64_model_is_scored_in_float64(linear):
    f, x, y = linear
    double = Linear(f.w.detach().double(), f.b.detach().double())
    kinds = []
    look = attack("look", lambda self, f, x, y, rng: (kinds.append((x.dtype, f(x).dtype)), (x, {}))[1])
    assert torch.equal(evaluate(double, (x, y), make_suite(look), threat=LINF).robust, f(x).argmax(1) == y)
    assert set(kinds) == {(torch.float64, torch.float64)}
    with pytest.raises(UserError, match=r"torch\.bfloat16.*model\.float"):
        evaluate(Linear(f.w.detach().bfloat16(), f.b.detach()), (x, y), make_suite(look), threat=LINF)


# --------------------------------------------------------------------------------------------------------------- cost


def test_cost_is_exact_for_a_known_attack(linear):
    f, x, y = linear

    def spend(self, f, x, y, rng):
        """5 forwards and 3 backwards for each row, then 2 and 1 for half of them (rounded down)."""
        with torch.no_grad():
            f(x), f(x)
        z = x.clone().requires_grad_()
        out = f(z)
        for k in range(2):
            torch.autograd.grad(out[:, k].sum(), z, retain_graph=True)
        gradient(f, x, y)
        f(x.requires_grad_())
        half = len(x) // 2
        if half:
            f(x.detach()[:half])
            gradient(f, x[:half], y[:half])
        return x.detach(), {}

    result = evaluate(f, (x, y), make_suite(attack("spend", spend)), threat=LINF, batch_size=64)
    alive = [int(c.sum()) for c in result.clean.split(64)]
    row = result.per_attack["spend"]
    assert row["forwards"] == sum(5 * a + 2 * (a // 2) for a in alive)
    assert row["backwards"] == sum(3 * a + a // 2 for a in alive)
    assert result.cost["forwards"] == 200 + row["forwards"]
    assert result.cost["backwards"] == row["backwards"]
    assert result.cost["forwards_per_sample"] == result.cost["forwards"] / 200
    assert result.cost["seconds"] >= row["seconds"] > 0


def test_counter_counts_rows_for_any_callable():
    w = torch.randn(12, 3)
    f = Counter(lambda x: x.flatten(1) @ w)
    x = torch.rand(5, 3, 2, 2, requires_grad=True)
    f(x.detach())
    z = f(x)
    assert (f.forwards, f.backwards) == (10, 0)
    g = torch.autograd.grad(z.pow(2).sum(), x, create_graph=True)[0]
    assert (f.forwards, f.backwards) == (10, 5)
    torch.autograd.grad(g.pow(2).sum(), x)
    assert f.backwards == 10, "the double backward comes through the logits again"


@pytest.mark.parametrize(
    ("name", "forwards", "backwards"),
    [("apgd", 102, 101), ("apgd_targeted", 919, 909), ("fab", 1828, 900), ("square", 5003, 0)],
)
def test_counts_of_the_real_autoattack(name, forwards, backwards):
    """Passes for one sample that nothing breaks (10 classes, linf), as its standard version runs each component."""
    from pyautoattack import AutoAttack

    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 10)).requires_grad_(False)
    net[1].bias[3] = 50.0
    f = Counter(net)
    component = getattr(AutoAttack(f, norm="Linf", eps=1e-3, seed=0, version="standard"), name)
    x, y = torch.rand(1, 1, 4, 4), torch.tensor([3])
    component.targeted = name in ("apgd_targeted", "fab")
    component.perturb(x, y)
    assert (f.forwards, f.backwards) == (forwards, backwards)


# ----------------------------------------------------------------------------------------------------------- corruptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Darken(Corruption):
    """Subtract 0.02 per severity, with keyed noise."""

    name = "darken"
    amount: float = 0.02

    def __call__(self, x, severity, rng):
        assert not torch.is_grad_enabled()
        return (x - self.amount * severity * (1 + rng.uniform(x.shape[1:]))).clamp(0, 1)


def test_corruptions_are_scored_one_by_one(net):
    f, x, y = net
    suite = make_suite(corruptions=(Darken(), Darken(amount=0.1)), severities=(1, 3, 5))
    a = evaluate(f, (x, y), suite, batch_size=13)
    b = evaluate(f, (x, y), suite, batch_size=90)
    assert a.corruptions == b.corruptions
    assert list(a.corruptions) == ["darken", "darken#2"]
    row = a.corruptions["darken"]
    assert list(row) == ["1", "3", "5", "mean"]
    assert row["mean"] == pytest.approx((row["1"] + row["3"] + row["5"]) / 3)
    assert a.corruption_accuracy == pytest.approx((row["mean"] + a.corruptions["darken#2"]["mean"]) / 2)
    assert a.corruptions["darken#2"]["5"] < a.clean_accuracy
    none = evaluate(f, (x, y), make_suite(corruptions=(Darken(amount=0.0),)))
    assert set(none.corruptions["darken"].values()) == {none.clean_accuracy}


def test_a_corruption_that_leaves_the_box_is_refused(net):
    f, x, y = net
    bad = dataclasses.dataclass(frozen=True, kw_only=True)(type("Bad", (Darken,), {"__call__": lambda *a: a[1] - 1}))
    with pytest.raises(UserError, match=r"the corruption 'darken/1' returned values outside \[0, 1\]"):
        evaluate(f, (x, y), make_suite(corruptions=(bad(),)))


# ------------------------------------------------------------------------------------------------------ kill and resume

RUN = {"threat": LINF, "batch_size": 40, "seed": 5}


def timeless(path):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


def small(linear):
    f, x, y = linear
    suite = make_suite(NOISE, WORST, corruptions=(Darken(),), severities=(2,))
    return f, (x[:90], y[:90]), suite


def test_the_ledger_says_everything(linear, tmp_path):
    f, data, suite = small(linear)
    result = evaluate(f, data, suite, out=tmp_path, **RUN)
    header, entries = read(tmp_path / "ledger.jsonl")
    assert header["n"] == 90
    assert header["model"] == result.model_hash
    assert [(e["attack"], e["batch"]) for e in entries[:5]] == [
        ("clean", 0),
        ("noise", 0),
        ("worst", 0),
        ("darken/2", 0),
        ("clean", 1),
    ]
    robust = torch.zeros(90, dtype=torch.bool)
    for e in entries:
        if e["attack"] == "worst":
            robust[torch.tensor(e["index"])] = torch.tensor(e["verdict"]).bool()
    assert torch.equal(robust, result.robust)
    assert sum(e["forwards"] for e in entries) == result.cost["forwards"]


def test_a_kill_anywhere_then_resume_gives_the_same_ledger_and_result(linear, tmp_path):
    """Before, inside and after each line: cuts at and around every line's end, and at every byte of the last line."""
    f, data, suite = small(linear)
    whole = evaluate(f, data, suite, out=tmp_path / "whole", **RUN)
    raw = (tmp_path / "whole" / "ledger.jsonl").read_bytes()
    ends = [i + 1 for i, c in enumerate(raw) if c == 10]
    cuts = sorted({0, 1, *(e + d for e in ends for d in (-40, -1, 0, 1) if e + d <= len(raw)), *range(ends[-2], ends[-1], 3)})
    folder = tmp_path / "torn"
    folder.mkdir()
    for cut in cuts:
        (folder / "ledger.jsonl").write_bytes(raw[:cut])
        again = evaluate(f, data, suite, out=folder, resume=True, **RUN)
        assert timeless(folder / "ledger.jsonl") == timeless(tmp_path / "whole" / "ledger.jsonl"), f"cut at byte {cut}"
        assert torch.equal(again.robust, whole.robust)
        assert torch.equal(again.clean, whole.clean)
        assert again.corruptions == whole.corruptions
        assert (again.cost["forwards"], again.cost["backwards"]) == (whole.cost["forwards"], whole.cost["backwards"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sigkill_before_during_and_after_every_line(linear, tmp_path, monkeypatch):
    """A child process is killed at its first new line, in three ways in turn; the next child resumes, until nothing is left."""
    f, data, suite = small(linear)
    whole = evaluate(f, data, suite, out=tmp_path / "whole", **RUN)
    lines = len(timeless(tmp_path / "whole" / "ledger.jsonl"))
    write = Ledger._write
    folder, kills = tmp_path / "killed", 0

    def dying(moment):
        def _write(self, value):
            if moment == "during":
                half = json.dumps(value, separators=(",", ":")).encode()
                self._file.write(half[: len(half) // 2])
            if moment == "after":
                write(self, value)
            os.kill(os.getpid(), signal.SIGKILL)

        return _write

    for line in range(lines):
        for moment in ("before", "during", "after"):
            child = os.fork()
            if child == 0:
                monkeypatch.setattr(Ledger, "_write", dying(moment))
                try:
                    evaluate(f, data, suite, out=folder, resume=True, **RUN)
                finally:
                    os._exit(1)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status)
            assert os.WTERMSIG(status) == signal.SIGKILL
            kills += 1
        assert timeless(folder / "ledger.jsonl") == timeless(tmp_path / "whole" / "ledger.jsonl")[: line + 1]
    again = evaluate(f, data, suite, out=folder, resume=True, **RUN)
    assert kills == 3 * lines == 39
    assert timeless(folder / "ledger.jsonl") == timeless(tmp_path / "whole" / "ledger.jsonl")
    assert torch.equal(again.robust, whole.robust)
    assert again.per_attack.keys() == whole.per_attack.keys()


def test_what_is_done_is_not_done_again(linear, tmp_path):
    f, data, suite = small(linear)

    def stop(event):
        if event["attack"] == "worst" and event["batch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(f, data, suite, out=tmp_path, progress=stop, **RUN)
    lines = len((tmp_path / "ledger.jsonl").read_text().splitlines())
    calls = Counter(f, f)
    events = []
    evaluate(calls, data, suite, out=tmp_path, resume=True, progress=events.append, **RUN)
    assert len(events) + 1 == len((tmp_path / "ledger.jsonl").read_text().splitlines()) > lines
    fresh = Counter(f, f)
    evaluate(fresh, data, suite, **RUN)
    assert calls.forwards < fresh.forwards / 2
    assert events[0]["robust_accuracy"] is None
    assert events[-1]["done"] == 80
    assert 0 < events[-1]["robust_accuracy"] < events[-1]["clean_accuracy"] < 1


def test_another_model_data_or_setting_is_refused(linear, tmp_path):
    f, (x, y), suite = small(linear)
    evaluate(f, (x, y), suite, out=tmp_path, **RUN)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    go = {"out": tmp_path, "resume": True, **RUN}
    with pytest.raises(UserError, match="--resume or choose another --out"):
        evaluate(f, (x, y), suite, **{**go, "resume": False})
    for change, line in [
        ({"seed": 6}, "seed is 5 there and 6 here"),
        ({"batch_size": 41}, "batch_size is 40 there and 41 here"),
        ({"threat": Threat("linf", 0.2)}, r"threats\[0\]\.eps is 0\.1 there and 0\.2 here"),
        ({"precision": "bf16"}, "precision is"),
        ({"num_examples": 50}, "n is 90 there and 50 here"),
    ]:
        with pytest.raises(UserError, match=line):
            evaluate(f, (x, y), suite, **{**go, **change})
    with pytest.raises(UserError, match="model is"):
        evaluate(Linear(f.w.detach() * 1.01, f.b.detach()), (x, y), suite, **go)
    with pytest.raises(UserError, match="images or labels of batch 1"):
        evaluate(f, (x, torch.cat([y[:50], 1 - y[50:]])), suite, **go)
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


# ------------------------------------------------------------------------------------------------------- kinds of data


class Items(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


class Stream(IterableDataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return iter(zip(self.x, self.y.tolist(), strict=True))


class Images:
    """A ``types.ImageSet`` that never hands out more than a batch."""

    def __init__(self, x, y):
        self.x, self.labels, self.largest = x, y, 0

    def __len__(self):
        return len(self.x)

    def batches(self, index_batches, device="cpu"):
        for i in index_batches:
            self.largest = max(self.largest, len(i))
            yield self.x[i].to(device), self.labels[i].to(device), i


def splits(x, y, names=("a", "b")):
    images = Images(x, y)
    return Splits(images, images, images, tuple(names), tuple(x.shape[1:]), (0.5,) * 3, (0.2,) * 3, "f" * 8)


KINDS = {
    "tensors": lambda x, y: (x, y),
    "dataset": Items,
    "tensor dataset": TensorDataset,
    "loader": lambda x, y: DataLoader(Items(x, y), batch_size=30),
    "uneven loader": lambda x, y: DataLoader(Items(x, y), batch_size=7),
    "stream": Stream,
    "stream loader": lambda x, y: DataLoader(Stream(x, y), batch_size=11),
    "image set": Images,
    "splits": splits,
    "uint8": lambda x, y: ((x * 255).round().byte(), y),
    "uint8 items": lambda x, y: Items((x * 255).round().byte(), y),
    "numpy": lambda x, y: Items(x.numpy(), y),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [None, 45, 500])
def test_every_kind_of_data_gives_the_same(linear, kind, limit):
    f, x, y = linear
    x, y = (x[:100] * 255).round() / 255, y[:100]
    base = evaluate(f, (x, y), make_suite(NOISE), threat=LINF, batch_size=30, num_examples=limit)
    assert base.n == min(limit or 100, 100)
    state = torch.get_rng_state()
    result = evaluate(f, KINDS[kind](x, y), make_suite(NOISE), threat=LINF, batch_size=30, num_examples=limit)
    assert torch.equal(result.robust, base.robust)
    assert result.fingerprint == base.fingerprint
    assert torch.equal(state, torch.get_rng_state())


def test_memory_is_bounded_by_the_batch(linear):
    f, x, y = linear
    images = Images(x, y)
    evaluate(f, images, make_suite(), batch_size=16)
    assert images.largest == 16


def test_the_suites_own_numbers(linear):
    f, x, y = linear
    suite = make_suite(WORST, num_examples=30, seed=7)
    result = evaluate(f, (x, y), suite, threat=LINF)
    assert (result.n, result.seed) == (30, 7)
    result = evaluate(f, (x, y), suite, threat=LINF, num_examples=20, seed=0)
    assert (result.n, result.seed) == (20, 0)


# ---------------------------------------------------------------------------------------------------------- bad input


def one_line(match, f, data, suite=None, **options):
    with pytest.raises(UserError, match=match) as error:
        evaluate(f, data, suite or make_suite(WORST), **{"threat": LINF, **options})
    assert len(error.value.lines) == 1
    assert "\n" not in str(error.value)


def test_bad_data_is_one_line(linear):
    f, x, y = linear
    one_line(r"in \[0, 1\].*divide by 255", f, (x * 255, y))
    one_line(r"in \[0, 1\].*normalisation", f, (x - 0.5, y))
    one_line(r"in \[0, 1\]", f, (torch.where(x > 0.9, torch.nan, x), y))
    one_line(r"\(N, C, H, W\), got \(128, 12\)", f, (x.flatten(1), y))
    one_line("does not accept images of shape", f, (x[:, :1], y))
    one_line(r"labels must lie in 0\.\.1 \(the model has 2 logits\), got 0\.\.5", f, (x, torch.where(y > 0, 5, y)))
    one_line(r"got -1\.\.1", f, (x, torch.where(y > 0, y, -1)))
    one_line("whole numbers", f, (x, y.float()))
    one_line("200 images but 199 labels", f, (x, y[:-1]))
    one_line("no images", f, (x[:0], y[:0]))
    one_line("no images", f, Stream(x[:0], y[:0]))
    one_line("2 logits, the data 3 classes", f, splits(x, y, ("a", "b", "c")))
    one_line("expected tensors", f, 7)
    one_line("expected two tensors", f, (x, [1, 2]))
    one_line("expected items", f, DataLoader(x))
    one_line("shuffle=False", f, DataLoader(Items(x, y), shuffle=True))
    one_line("expected an image tensor", f, Items(["a.png"], y))
    one_line("different shapes", f, Items([x[0], x[1, :, :1]], y))


def test_bad_models_are_one_line(linear):
    f, x, y = linear
    one_line("not finite numbers on clean images", lambda x: f(x) * torch.nan, (x, y))
    one_line(r"logits \(N, K\) for 128 images, got shape \(128,\)", lambda x: f(x)[:, 0], (x, y))
    one_line("got a tuple", lambda x: (f(x),), (x, y))
    one_line("got shape", lambda x: f(x).argmax(1, keepdim=True), (x, y))


def test_bad_settings_are_one_line(linear):
    f, x, y = linear
    one_line("num_examples must be at least 1", f, (x, y), num_examples=0)
    one_line("batch_size must be at least 1", f, (x, y), batch_size=0)
    one_line("expected fp32, bf16 or auto", f, (x, y), precision="fp16")
    one_line("unknown device 'gpu'", f, (x, y), device="gpu")
    one_line("suite 'toy': give norm and eps", f, (x, y), threat=None)
    one_line("give norm of", f, (x, y), make_suite(WORST, eps=(0.1,)), threat=None)
    one_line("did you mean 8/255", f, (x, y), make_suite(WORST, norms=("linf",), eps=(8.0,)), threat=None)
    only = attack("only", worst, norms=("l2",))
    one_line("the attack 'only' does not work in linf; it works in l2", f, (x, y), make_suite(only))


def test_the_threat_may_come_from_the_attacks():
    given = dataclasses.replace(WORST, norm="l1", eps=0.25)
    assert threats_of(make_suite(given, given), None) == [Threat("l1", 0.25)]
    assert threats_of(make_suite(given, given), LINF) == [Threat("l1", 0.25)]
    assert threats_of(make_suite(given, WORST), Threat("l1", 0.25)) == [Threat("l1", 0.25)]
    with pytest.raises(UserError, match=r"'worst' has its own threat model, l1 0\.25; the evaluation's is linf 0\.1"):
        threats_of(make_suite(WORST, given), LINF)
    with pytest.raises(UserError, match=r"own threat model, linf 0\.2; the evaluation's is linf 0\.1"):
        threats_of(make_suite(dataclasses.replace(WORST, eps=0.2), WORST), LINF)
    assert threats_of(make_suite(dataclasses.replace(WORST, eps=0.2)), LINF) == [Threat("linf", 0.2)]
    assert threats_of(make_suite(WORST, eps=(0.1, 0.2)), Threat("l2", 3.0)) == [Threat("l2", 0.1), Threat("l2", 0.2)]
    with pytest.raises(UserError, match="give norm and eps"):
        threats_of(make_suite(given, WORST), None)
