"""The reliability report: each check on a model whose figure is known, its budget, and that it leaves no trace."""

import json

import pytest
import torch
from torch import nn

from robustlab import cli
from robustlab.evaluation.reliability import Report, examine
from robustlab.evaluation.reliability.checks import CHECKS, QUERIES, WHITE_BOX
from robustlab.evaluation.reliability.report import IMAGES, LEAST
from robustlab.evaluation.reliability.subject import Subject, random_search
from robustlab.evaluation.runner import evaluate
from robustlab.geometry import norm_of
from robustlab.report import console
from robustlab.results.record import read_record, record_from, write_record
from robustlab.types import Threat, UserError

LINF = Threat("linf", 0.1)
ALL = [c.name for c in CHECKS]
EACH = sum(c.cost for c in CHECKS) + WHITE_BOX


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx, x, by):
        ctx.by = by
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.by, None


class Net(nn.Module):
    """A linear net between two functions."""

    def __init__(self, before=None, after=None, classes=3):
        super().__init__()
        self.linear, self.before, self.after = nn.Linear(16, classes), before, after
        nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(1))
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        z = self.linear((x if self.before is None else self.before(x)).flatten(1))
        return z if self.after is None else self.after(z)


def images(n=20):
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def findings(f, n=20, threat=LINF, **options):
    x = images(n)
    f = f.eval()
    with torch.no_grad(), torch.random.fork_rng():
        labels = f(x).argmax(1)
    return {c.name: c for c in examine(f, x, labels, threat, **options).checks}


def figure(f, name, **options):
    return findings(f, **options)[name].figure


def with_grad(x):
    with torch.enable_grad():
        p = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(p.square().sum(), p)
    return x + 0 * g


def backward(x):
    with torch.enable_grad():
        p = x.detach().requires_grad_()
        p.square().sum().backward()
    return x + 0 * p.grad


def builds(x):
    with torch.enable_grad():
        return x * 1.0


# --------------------------------------------------------------------------------------------------- the model by itself


def test_a_linear_net_passes_everything():
    found = findings(Net(classes=2))
    assert list(found) == ALL
    assert {c.verdict for c in found.values()} == {"pass"}
    assert found["gradient_path"].figure < 1e-5
    for name in ("randomness", "batch_dependence", "probabilities", "inference_gradients", "gradients", "unbounded", "black_box"):
        assert found[name].figure == 0


@pytest.mark.parametrize("sigma", [1e-2, 1.0])
def test_a_random_model(sigma):
    found = findings(Net(after=lambda z: z + sigma * torch.randn_like(z)))
    assert found["randomness"].verdict == "fail"
    assert found["batch_dependence"].verdict != "fail"  # what repetition changes is not blamed on the batch


def test_a_model_that_looks_at_its_batch():
    found = findings(Net(before=lambda x: x - 0.7 * x.mean(0)))
    assert found["batch_dependence"].verdict == "fail"
    assert found["randomness"].figure == 0


@pytest.mark.parametrize(
    ("after", "share"),
    [(lambda z: z.softmax(-1), 1), (lambda z: z.log_softmax(-1), 0), (lambda z: z / 99, 0), (lambda z: z.sigmoid(), 0)],
)
def test_probabilities(after, share):
    assert figure(Net(after=after), "probabilities") == share


@pytest.mark.parametrize(("before", "found"), [(with_grad, 2), (backward, 2), (builds, 1), (lambda x: x * 1.0, 0)])
def test_gradients_at_inference(before, found):
    assert figure(Net(before=before), "inference_gradients") == found


# -------------------------------------------------------------------------------------------------------------- gradients


def test_the_share_of_images_without_gradient_is_exact():
    dead = images()[:, 0, 0, 0] > 0.5
    f = Net(before=lambda x: torch.where((x[:, :1, :1, :1] > 0.5), x.detach(), x))
    assert 0 < int(dead.sum()) < 20
    assert figure(f, "gradients") == pytest.approx(float(dead.double().mean()))


@pytest.mark.parametrize(
    "before",
    [lambda x: x.detach(), lambda x: x.round(), lambda x: Scaled.apply(x, float("nan")), lambda x: Scaled.apply(x, 1e-38)],
    ids=["detached", "rounded", "nan", "underflow"],
)
def test_gradients_that_say_nothing(before):
    found = findings(Net(before=before))
    assert list(found) == ALL  # the attacks go on
    assert (found["gradients"].figure, found["gradients"].verdict) == (1, "fail")


@pytest.mark.parametrize("by", [0.5, 2.0, 0.0, -1.0])
def test_a_gradient_that_tells_half_the_change_or_twice(by):
    """The net is linear, so |change - by change| / max(change, by change) is known."""
    f = Net(before=lambda x: Scaled.apply(x, by), classes=2)
    assert figure(f, "gradient_path") == pytest.approx(abs(1 - by) / max(1, abs(by)), abs=1e-5)


def test_gradients_are_added_up_along_the_way():
    """Middles of pieces are exact for a quadratic; the gradient at one end is not."""
    assert figure(Net(before=lambda x: 2 * x * x, classes=2), "gradient_path", threat=Threat("linf", 0.4)) < 1e-4


def test_logits_that_are_no_numbers_are_no_answer():
    f, x = Net(before=lambda x: torch.where(x[:, :1, :1, :1] > 0.5, torch.nan, x)).eval(), images()
    margin = Subject.of(f, x, torch.zeros(20, dtype=torch.long), LINF, seed=0).margin(x)
    assert margin.isposinf().tolist() == (x[:, 0, 0, 0] > 0.5).tolist()


def test_a_gradient_that_points_the_wrong_way():
    found = findings(Net(before=lambda x: Scaled.apply(x, -1.0)), n=40)
    assert found["gradient_path"].verdict == found["unbounded"].verdict == "fail"
    assert found["black_box"].figure > 0


def test_a_model_that_no_attack_can_change():
    def constant(z):
        return 0 * z + torch.tensor([0.0, 1.0, 0.0])

    found = findings(Net(after=constant))
    assert (found["unbounded"].figure, found["unbounded"].verdict) == (1, "fail")


def test_more_steps_that_lose_what_one_gained():
    """Dither: the sign of the derivative is the cosine's, so that every step is a throw of a coin."""
    f = Net(before=lambda x: x + 0.01 * torch.sin(400 * x))
    assert figure(f, "steps", n=40) > figure(Net(), "steps", n=40) + 0.25


# ---------------------------------------------------------------------------------------------------------------- attacks


@pytest.mark.parametrize("threat", [LINF, Threat("l2", 0.5), Threat("l1", 2.0)])
def test_the_search_stays_in_the_ball_and_keeps_its_budget(threat):
    seen = []

    def record(x):
        seen.append(x.detach().clone())
        return x

    f, x = Net(before=record).eval(), images(30)
    labels = f(x).argmax(1)
    seen.clear()
    s = Subject.of(f, x, labels, threat, seed=0)
    margin = random_search(s, QUERIES)
    assert s.f.forwards == QUERIES * 30 + 30  # and the clean images, once
    assert s.f.backwards == 0
    for point in seen:
        assert float(norm_of(point - x, threat.norm).max()) <= threat.eps * (1 + 1e-5)
        assert 0 <= float(point.min()) <= float(point.max()) <= 1
    clean = s.margin(x)
    assert bool((margin >= torch.maximum(clean, s.margin(seen[0]))).all())
    assert float((margin - clean).mean()) > 0


def test_the_search_comes_close_to_the_optimum_on_a_linear_net():
    f, x = Net(classes=2).eval(), images(30)
    w = (f.linear.weight[1] - f.linear.weight[0]).detach()
    labels = f(x).argmax(1)
    s = Subject.of(f, x, labels, LINF, seed=0)
    toward = torch.where(labels == 0, 1.0, -1.0)[:, None] * w
    room = torch.where(toward > 0, (1 - x.flatten(1)).clamp_max(0.1), x.flatten(1).clamp_max(0.1))
    best = (toward.abs() * room).sum(1)
    gained = random_search(s, 200) - s.margin(x)
    assert float((gained / best).max()) <= 1 + 1e-5
    assert float((gained / best).mean()) > 0.85


@pytest.mark.parametrize("threat", [Threat("l2", 0.5), Threat("l1", 2.0)])
def test_other_norms(threat):
    found = findings(Net(), threat=threat)
    assert list(found) == ALL
    assert {c.verdict for c in found.values()} == {"pass"}


@pytest.mark.parametrize("threat", [Threat("l0", 3), Threat("linf", 0.0)])
def test_where_pgd_does_not_go_the_model_alone_is_examined(threat):
    report = examine(Net().eval(), images(), Net()(images()).argmax(1), threat)
    assert [c.name for c in report.checks] == [c.name for c in CHECKS if not c.attack]
    assert set(report.skipped) == {c.name for c in CHECKS if c.attack}


# ----------------------------------------------------------------------------------------------------------------- budget


def test_the_costs_in_the_table_are_the_costs():
    report = examine(Net().eval(), images(), Net()(images()).argmax(1), LINF)
    assert report.forwards + report.backwards == 20 * EACH


@pytest.mark.parametrize("passes", [0, 10, 40, 200, 1000, 2000, 3500, 5000, 9000, 16 * EACH, 20 * EACH, 10**6])
def test_the_budget_is_kept(passes):
    x = images(60)
    report = examine(Net().eval(), x, Net()(x).argmax(1), LINF, passes=passes)
    assert report.forwards + report.backwards <= passes
    assert {c.name for c in report.checks} | set(report.skipped) == set(ALL)
    assert len(report.checks) + len(report.skipped) == len(ALL)
    if passes >= 20 * EACH:
        assert (report.n, report.skipped) == (min(IMAGES, passes // EACH), {})
    assert report.n == 0 or report.n >= LEAST
    assert (report.verdict is None) == (report.n == 0)


def test_too_few_images():
    x = images(3)
    report = examine(Net().eval(), x, Net()(x).argmax(1), LINF)
    assert report == Report(0, "linf", 0.1, (), dict.fromkeys(ALL, "too few images are classified correctly"), 0, 0)


# ----------------------------------------------------------------------------------------------------------- no side effects


class Messy(Net):
    """Random, with statistics that every forward changes, and modes that differ."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(1), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return super().forward(self.norm(x)) + 0.01 * torch.randn(len(x), 3)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails, monkeypatch):
    f = Messy().train()
    f.norm.eval()
    f.linear.bias.requires_grad_(False)
    x = images()
    labels = f(x).argmax(1)
    before = {k: v.clone() for k, v in f.state_dict().items()}
    modes, flags = [m.training for m in f.modules()], [p.requires_grad for p in f.parameters()]
    copies, state = (x.clone(), labels.clone()), torch.get_rng_state()
    if fails:
        monkeypatch.setattr(nn.Linear, "forward", lambda *_: (_ for _ in ()).throw(KeyError("broken")))
        with pytest.raises(KeyError):
            examine(f, x, labels, LINF)
    else:
        assert examine(f, x, labels, LINF).verdict == "fail"
    assert all(torch.equal(v, before[k]) for k, v in f.state_dict().items())
    assert [m.training for m in f.modules()] == modes
    assert [p.requires_grad for p in f.parameters()] == flags
    assert all(p.grad is None for p in f.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, copies[0])
    assert torch.equal(labels, copies[1])


def test_a_model_left_in_train_mode_is_examined_in_eval_mode():
    f, x = Net(before=nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5)), classes=2).train(), images()
    with torch.no_grad():
        labels = f.eval()(x).argmax(1)
    assert examine(f.train(), x, labels, LINF).verdict == "pass"


def test_same_seed_same_report():
    f, x = Messy().eval(), images()
    labels = f(x).argmax(1)
    first, again, other = (examine(f, x, labels, LINF, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_check_that_cannot_run_is_left_out_with_the_reason():
    def refuse(x):
        if len(x) < 20:
            raise RuntimeError("only batches of 20\nplease")
        return x

    report = examine(Net(before=refuse).eval(), images(), Net()(images()).argmax(1), LINF)
    assert report.skipped == {"batch_dependence": "only batches of 20"}
    assert len(report.checks) == len(ALL) - 1


# ------------------------------------------------------------------------------------- in results, records, on the screen


@pytest.fixture(scope="module")
def evaluated():
    f, x = Net().eval(), images(60)
    labels = f(x).argmax(1)
    labels[::3] = (labels[::3] + 1) % 3
    options = {"threat": Threat("linf", 0.01), "batch_size": 7, "seed": 3}
    return f, x, labels, {on: evaluate(f, (x, labels), "pgd-50-10", reliability=on, **options) for on in (False, True)}


def test_the_evaluator_hands_over_the_images_that_are_right(evaluated):
    f, x, labels, results = evaluated
    assert results[False].reliability is None
    right = f(x).argmax(1) == labels
    cost = sum(a["forwards"] + a["backwards"] for a in results[True].per_attack.values())
    direct = examine(f, x[right], labels[right], Threat("linf", 0.01), seed=3, passes=0.1 * cost)
    found = results[True].reliability
    assert found == direct.to_dict()
    assert 40 == int(right.sum()) > found["n"] >= 16  # from several batches of 7
    assert 0 < found["forwards"] + found["backwards"] <= 0.1 * cost
    costs = [{k: v for k, v in r.cost.items() if k != "seconds"} for r in results.values()]
    assert costs[0] == costs[1]


def test_without_attacks_there_is_no_report(evaluated):
    f, x, labels, _ = evaluated
    assert evaluate(f, (x, labels), "corruptions-quick", reliability=True, num_examples=5).reliability is None


def test_records_keep_it_and_old_ones_still_read(evaluated, tmp_path):
    result = evaluated[3][True]
    record = record_from(result, model={"name": "net"}, data={"name": "random"})
    path = write_record(tmp_path / "record.json", record)
    assert read_record(path) == record
    assert record.schema_version == 1
    assert record.reliability.model_dump() == result.reliability
    old = json.loads(path.read_text())
    del old["reliability"]
    path.write_text(json.dumps(old))
    assert read_record(path).reliability is None
    old["reliability"] = {**result.reliability, "verdict": "fine"}
    path.write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"reliability\.verdict: input should be 'pass', 'warn' or 'fail', got \"fine\""):
        read_record(path)


def lines_of(f, **options):
    x = images()
    with torch.random.fork_rng():
        labels = f(x).argmax(1)
    report = examine(f.eval(), x, labels, LINF, **options)
    shown = record_from_report(report)
    return console.reliability_lines(shown)


def record_from_report(report):
    from robustlab.results.record import ReliabilityInfo

    return ReliabilityInfo.model_validate(report.to_dict())


def test_the_screen_shows_the_verdict_and_what_did_not_pass():
    assert console.reliability_lines(None) == []
    assert lines_of(Net()) == ["  reliability  pass: 11 checks on 20 images"]
    assert lines_of(Net(), passes=0) == ["  reliability  not examined; 11 left out (the suite spends too few passes)"]
    first, *others = lines_of(Net(after=lambda z: z.softmax(-1)))
    assert first == "  reliability  fail: 11 checks on 20 images"
    assert others[0].startswith("    fail  probabilities: 1 (share of images whose outputs are probabilities). The model returns")


def digits_net():
    """For the command line: a net that rounds, on digits of 8 px."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 10)
    nn.init.normal_(linear.weight)

    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(((x * 4).round() / 4).flatten(1))

    return Rounded().eval()


def test_the_flag(tmp_path, monkeypatch, capsys):
    (tmp_path / "a_rounding_net.py").write_text("from tests.unit.test_reliability import digits_net\n")
    monkeypatch.syspath_prepend(tmp_path)
    args = ["evaluate", "a_rounding_net:digits_net", "--data", "{name: digits, size: 8}", "--suite", "pgd-20", "--eps", "0.1"]
    args += ["--norm", "linf", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert cli.run([*args, "--no-reliability"]) == 0
    assert "reliability" not in capsys.readouterr().out
    (path,) = (tmp_path / "out").rglob("record.json")
    assert read_record(path).reliability is None
    assert cli.run([*args, "--resume"]) == 0
    assert "fail  gradients: 1 (share of images whose gradient is zero" in capsys.readouterr().out
    kept = read_record(path)
    assert kept.reliability.verdict == "fail"
    assert cli.run([*args, "--resume", "--no-reliability"]) == 0
    assert read_record(path) == kept
