"""Laws that no single part can keep by itself: tickets (5), precision (6), compilation (7), identities (8), shards (11), model
selection (12), files (14). Laws 2 to 4 and 13 are in test_trainers.py, law 10 in e2e/test_distributed.py.
"""

import ast
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from small import (
    CLASSES,
    COUPLED,
    THREAT,
    TRAINERS,
    Halt,
    Watch,
    assert_equal,
    batch,
    net,
    outer_of,
    run_config,
    sgd,
    snapshot,
    steps,
    trainer,
    weights,
)
from torch import nn

import robustlab
from robustlab import commands, config
from robustlab.models.checkpoint import load_model
from robustlab.modes import perturbed
from robustlab.outer import Forward, Outer, Precise, context_of
from robustlab.registry import FOLDERS, entries
from robustlab.rng import Rng
from robustlab.training.loop import Plan, complete_trainer, loader
from robustlab.training.step import check_shards, train_step
from robustlab.types import Alone, Objective, Regularizer, Splits, Stage, Tap, Term, Threat, UserError, View, with_threat

# ------------------------------------------------------------------------------------------- law 5: keyed by tickets


class Doubles:
    """Images in float64."""

    def __init__(self, images):
        self.images, self.labels = images, images.labels

    def __len__(self):
        return len(self.images)

    def batches(self, index_batches, device="cpu"):
        for x, y, index in self.images.batches(index_batches, device):
            yield x.double(), y, index


@pytest.mark.parametrize("augment", [(), ("flip-crop",)])
@pytest.mark.parametrize("name", [n for n in TRAINERS if n not in COUPLED])
def test_micro_batches_see_the_same_images(name, augment):
    """With 1, 2 or 4 micro-batches per step the augmented and adversarial images of two steps agree, and so do the weights."""
    run = run_config(name)
    splits = run.data.load()
    splits = dataclasses.replace(splits, train=Doubles(splits.train))
    model = dataclasses.replace(commands.complete_model(run.model, splits), norm="none")
    found = []
    for parts in (1, 2, 4):
        torch.manual_seed(0)
        f, seen = model.build().double(), []
        method = trainer(name)
        method = dataclasses.replace(
            method,
            inner=(*(config.build("stage", a) for a in augment), *method.inner),
            gradient=Watch(seen, method.gradient),
        )
        plan, rng = Plan(96, 32, parts, Alone()), Rng(2)
        batches = loader(splits, plan, rng, 0, torch.device("cpu"))
        outer = outer_of(f, method)
        optimizer = sgd(outer)
        for s in range(2):
            micro = [next(batches) for _ in range(parts)]
            train_step(outer, micro, method, optimizer, rng.child("step"), first=plan.first(s))
        views = [v for shards in seen for v, _ in shards]
        x = {to: torch.cat([v[to].x for v in views]) for to in views[0]}
        found.append((torch.cat([v["clean"].key for v in views]), x, snapshot(f)))
    for key, x, after in found:
        assert key.tolist() == list(range(64))  # tickets: positions in the epoch's order
        for to in x:
            torch.testing.assert_close(x[to], found[0][1][to], rtol=0, atol=1e-9)
        for p in after:
            torch.testing.assert_close(after[p], found[0][2][p], rtol=1e-8, atol=1e-10)


def test_no_two_samples_share_a_draw():
    """The same images with other tickets start their attacks elsewhere; so does every epoch."""
    f, method = net(bn=False), trainer("pgd-at", inner=[{"name": "craft", "attack": {"name": "pgd", "steps": 1, "step": 1e-9}}])
    found = []
    for first in (0, 8, 2**40):
        seen = []
        view = dataclasses.replace(batch()["clean"], key=torch.arange(8) + first)
        watching = dataclasses.replace(method, gradient=Watch(seen))
        with pytest.raises(Halt):
            train_step(outer_of(f, watching), [{"clean": view}], watching, sgd(outer_of(f, method)), Rng(0))
        found.append(seen[0][0][0]["adv"].x)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert len({tuple(row.flatten().tolist()) for row in torch.cat(found)}) == 24


def scramble(seed):
    """Global generators in another state, as in another process."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


class Dropped(nn.Module):
    """A classifier with dropout around another."""

    def __init__(self, f):
        super().__init__()
        self.drop, self.f = nn.Dropout(0.3), f

    def forward(self, x):
        return self.f(self.drop(x))


@pytest.mark.parametrize("name", TRAINERS)
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path, monkeypatch):
    """Dropout, augmentation, mixup, EMA and AdamW's clocks included; interrupted within the third epoch of four."""
    build = commands.prepare

    def with_dropout(run):
        run, splits, f = build(run)
        return run, splits, Dropped(f)

    monkeypatch.setattr(commands, "prepare", with_dropout)
    run = run_config(name, epochs=4, checkpoint_every=2, probe=config.Probe(every=1, num_examples=10, steps=1))
    method = dataclasses.replace(
        run.trainer, inner=(config.build("stage", "mixup"), *run.trainer.inner), averaging=config.build("averaging", "ema")
    )
    data = dataclasses.replace(run.data, augment=(config.build("stage", "flip-crop"),))
    run = dataclasses.replace(run, trainer=method, data=data, optimizer=config.build("optimizer", "adamw"))

    def stop(event):
        if event["kind"] == "step" and event["epoch"] == 2 and event["step"] == 2:
            raise Halt

    scramble(1)
    commands.train(run, tmp_path / "whole")
    scramble(2)
    with pytest.raises(Halt):
        commands.train(run, tmp_path / "cut", progress=stop)
    scramble(3)
    outcome = commands.train(run, tmp_path / "cut", resume=True)
    assert outcome.resumed == 2
    for file in ("last", "best"):
        assert (tmp_path / "whole" / f"{file}.safetensors").read_bytes() == (tmp_path / "cut" / f"{file}.safetensors").read_bytes()
    one, two = (tensors_of(tmp_path / d / "state.safetensors") for d in ("whole", "cut"))
    assert_equal(one, two)
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "cut")


def tensors_of(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


@pytest.mark.parametrize("name", TRAINERS)
def test_the_state_of_a_run_is_its_tensors_and_its_position(name, tmp_path):
    """No generator state in the checkpoint: weights, buffers, memory, the optimizer's slots, and numbers."""
    run = run_config(name, epochs=1)
    commands.train(run, tmp_path)
    f = dataclasses.replace(run.model, num_classes=10, in_channels=1).build()
    outer = Outer(f, run.trainer, commands.context_of(f, 10, 96, (1, 8, 8)))
    tensors = tensors_of(tmp_path / "state.safetensors")
    wanted = {f"outer.{k}" for k in outer.state_dict()}
    trained = [p for p in outer.parameters() if p.requires_grad]
    wanted |= {f"optimizer.{i}.momentum_buffer" for i, _ in enumerate(trained)}
    assert set(tensors) == wanted
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["robustlab"])
    assert set(meta) == {"format", "version", "optimizer", "epoch", "best", "metrics", "metrics_bytes", "watched", "config"}


# ------------------------------------------------------------------------------------------------ law 6: low precision


def test_perturbed_weights_count_under_an_autocast_cache():
    """Inside one autocast context the cast weights are cached; a perturbation must not be lost in that cache."""
    f, x = net(bn=False), batch()["clean"].x
    matrices = [p for p in f.parameters() if p.ndim > 1]  # the cache keeps casts of these
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
        before = f(x)
        with perturbed(matrices, [0.5 * p.detach() for p in matrices]):
            inside = f(x)
        after = f(x)
    assert torch.equal(before, after)
    assert float((inside - before).detach().abs().max()) > 0.1


@pytest.mark.parametrize("around", ["nothing", "autocast", "autocast off"])
def test_awp_has_an_effect_under_bf16(around):
    """gamma 0.5 changes the loss and the step, also when the caller has an autocast context of its own around the step."""
    found = {}
    for gamma in (0.0, 0.5):
        f = net(bn=False)
        method = trainer("awp", gradient={"name": "awp", "gamma": gamma})
        with torch.autocast("cpu", torch.bfloat16, enabled=around == "autocast") if around != "nothing" else Nothing():
            _, terms = steps(f, method, count=1, precision="bf16")
        found[gamma] = float(terms["loss"]), snapshot(f)
    assert abs(found[0.5][0] - found[0.0][0]) > 0.02
    moved = max(float((found[0.5][1][n] - found[0.0][1][n]).abs().max()) for n in weights(net(bn=False)))
    assert moved > 1e-3


class Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False


def test_the_forward_notices_new_weights_under_a_cache_of_the_caller():
    f, x = net(bn=False), batch()["clean"].x
    with torch.autocast("cpu", torch.bfloat16):
        callee = Precise(f, "bf16")
        before = callee(x)
        with torch.no_grad():
            f[-1].weight.mul_(2)
        assert not torch.equal(callee(x), before)
    assert before.dtype == torch.float32


@pytest.mark.parametrize("name", TRAINERS)
def test_bf16_trains_float32_weights(name):
    f = net()
    outer, terms = steps(f, trainer(name), precision="bf16")
    assert torch.isfinite(terms["loss"])
    assert {p.dtype for p in outer.parameters()} == {torch.float32}
    assert not torch.equal(f[0].weight, net()[0].weight)
    exact = steps(net(), trainer(name))[1]
    assert float(terms["loss"]) == pytest.approx(float(exact["loss"]), rel=0.1)


# ------------------------------------------------------------------------------------------------- law 7: compilation


@pytest.fixture
def compiled():
    """Compiles a module in place; the caches are emptied around it."""
    torch._dynamo.reset()

    def compile_(f, backend="aot_eager"):
        f.compile(backend=backend)
        return f

    yield compile_
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("site", ["input", "0", "features"])
def test_taps_act_on_a_compiled_model(site, backend, compiled):
    """Hooks on a compiled model are silently ignored; a tapped forward of the loss is not."""
    x = batch()["clean"]
    tap = Tap(site, lambda h: h + h.square())
    method = trainer("standard")
    found = []
    for f in (net(bn=False), compiled(net(bn=False), backend)):
        outer = outer_of(f, method)
        plain, _ = outer({"clean": x}, Rng(0), False)
        tapped, _ = outer({"clean": dataclasses.replace(x, taps=(tap,))}, Rng(0), False)
        again, _ = outer({"clean": x}, Rng(0), False)
        assert torch.equal(plain, again)
        found.append((plain, tapped))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)
    assert abs(float((found[1][0] - found[1][1]).detach())) > 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputGradient(Regularizer):
    """The squared norm of the gradient with respect to the images: a loss that is differentiated twice."""

    double_backward = True

    def __call__(self, forward, views):
        x = views["clean"].x.clone().requires_grad_(True)
        z = forward(dataclasses.replace(views["clean"], x=x))
        (g,) = torch.autograd.grad((z * views["clean"].y).sum(), x, create_graph=True)
        return {"input_gradient": Term(g.square().flatten(1).sum(1))}


def test_losses_that_are_differentiated_twice_run_on_a_compiled_model(compiled):
    method = dataclasses.replace(trainer("standard"), regularizers=(InputGradient(),))
    plain, fast = net(), compiled(net())
    steps(plain, method)
    steps(fast, method)
    assert_equal(snapshot(plain), snapshot(fast))


def test_attention_is_differentiated_twice():
    """Fused attention has no second derivative; the loss takes the plain formula by itself."""

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, CLASSES)

        def forward(self, x):
            q, k, v = self.qkv(x[:, 0]).chunk(3, -1)
            h = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])
            return self.head(h.mean((1, 2)))

    method = dataclasses.replace(trainer("standard"), regularizers=(InputGradient(),))
    _, terms = steps(Attends(), method, count=1)
    assert float(terms["input_gradient"]) > 0


@pytest.mark.parametrize("name", TRAINERS)
def test_a_compiled_model_trains_alike(name, compiled):
    method = trainer(name)
    plain, fast = net(), compiled(net(), "eager")
    steps(plain, method)
    steps(fast, method)
    assert_equal(snapshot(plain), snapshot(fast))


# ---------------------------------------------------------------------------------- law 8: degenerate settings do nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass(Stage):
    """Does nothing, in the place of a stage: an attack's draws are keyed by its position among the stages."""

    def __call__(self, f, views, rng):
        return views


def behind(name, stage):
    """A trainer with a further stage in front of its own."""
    method = trainer(name)
    return dataclasses.replace(method, inner=(stage, *method.inner))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boosted(Objective):
    """Boosted cross-entropy of the adversarial images; the clean pass is made for BatchNorm's sake."""

    on = ("clean", "adv")

    def __call__(self, forward, views):
        forward("clean")
        p, y = forward("adv").softmax(-1), views["adv"].y.bool()
        margin = -(1.0001 - p.masked_fill(y, 0).amax(-1)).log()
        return {"adv": Term(-(views["adv"].y * forward("adv").log_softmax(-1)).sum(-1)), "margin": Term(margin)}


def objective_views(name):
    """The views whose passes renew statistics and that the objective alone looks at."""
    method = trainer(name)
    seen = {v for field in ("on", "clean", "adv") for v in as_tuple(getattr(method.objective, field, ()))}
    return [v for v in method.bn_updates if v in seen]


def as_tuple(value):
    return (value,) if isinstance(value, str) else tuple(value)


def plain_of(name, **fields):
    """PGD training with the attack, passes and statistics of another trainer, and with other fields."""
    method = trainer(name)
    same = {
        "inner": method.inner[:1],
        "objective": method.objective,
        "attack_bn": method.attack_bn,
        "bn_updates": method.bn_updates,
    }
    return dataclasses.replace(trainer("pgd-at"), **same | fields)


def without_mixing(name):
    method = trainer(name)
    return dataclasses.replace(
        method, inner=tuple(dataclasses.replace(s, alpha=0.0) if s.mixes else s for s in method.inner)
    ), plain_of(name, objective=config.build("objective", "cross-entropy", on=["clean", "adv"]), bn_updates=("clean", "adv"))


def fgsm_training():
    craft = config.build("stage", {"name": "craft", "attack": {"name": "fgsm"}})
    return with_threat(plain_of("slat", inner=(craft,)), THREAT)


def augrmixat_without_mixing():
    """Its three kinds of images as they are."""
    method, still = trainer("augrmixat"), (config.build("stage", "mixup", alpha=0.0),)
    views = ("clean", "aug", "adv")
    return dataclasses.replace(
        method, inner=tuple(dataclasses.replace(s, stages=still) if s.mixes else s for s in method.inner)
    ), plain_of(
        "augrmixat", inner=method.inner[:2], objective=config.build("objective", "cross-entropy", on=views), bn_updates=views
    )


IDENTITIES = {
    "augrmixat, alpha 0 = three kinds of images": augrmixat_without_mixing,
    "iat, alpha 0 = clean and adversarial": lambda: without_mixing("iat"),
    "manifold-iat, alpha 0 = clean and adversarial": lambda: without_mixing("manifold-iat"),
    "advlc, lam 0 = pgd-at from x": lambda: (
        trainer("advlc", regularizers=[{"name": "logit-variation", "lam": 0.0}], bn_updates=["adv"]),
        plain_of("advlc", bn_updates=("adv",)),
    ),
    "slat, no sites = fgsm": lambda: (trainer("slat", inner=[{"name": "slat", "sites": [], "alpha": 1.0}]), fgsm_training()),
    "krylov-at, m 1 = fgsm": lambda: (
        trainer("krylov-at", inner={"craft": {"attack": {"m": 1, "steps": 1}}}, attack_bn="train-update"),
        fgsm_training(),
    ),
    "engm, no bound = pgd-at": lambda: (trainer("engm", gradient={"bound": None}), trainer("pgd-at")),
    "engm-approx, no bound = pgd-at": lambda: (trainer("engm-approx", gradient={"bound": None}), trainer("pgd-at")),
    "engm-approx, a fit at each step = engm": lambda: (trainer("engm-approx", gradient={"refit": 1}), trainer("engm")),
    "engm-approx, a fit at each step = engm, bound by a number": lambda: (
        trainer("engm-approx", gradient={"refit": 1, "bound": 0.5}),
        trainer("engm", gradient={"bound": 0.5}),
    ),
    "wt-awp, gamma 0 = pgd-at": lambda: (trainer("wt-awp", gradient={"gamma": 0.0}), trainer("pgd-at")),
    "wt-awp, lam 1 on all layers = awp": lambda: (trainer("wt-awp", gradient={"lam": 1.0, "last": True}), trainer("awp")),
    "trades-awp, gamma 0 = trades": lambda: (trainer("trades-awp", gradient={"gamma": 0.0}), trainer("trades")),
    "mart-awp, gamma 0 = mart": lambda: (trainer("mart-awp", gradient={"gamma": 0.0}), trainer("mart")),
    "rebuffi, alpha 0 = its attack alone": lambda: (
        dataclasses.replace(trainer("rebuffi"), inner=(config.build("stage", "cutmix", alpha=0.0), trainer("rebuffi").inner[1])),
        dataclasses.replace(trainer("rebuffi"), inner=(Pass(), trainer("rebuffi").inner[1])),
    ),
    "awp, gamma 0 = pgd-at": lambda: (trainer("awp", gradient={"name": "awp", "gamma": 0.0}), trainer("pgd-at")),
    "trades, beta 0 = standard": lambda: (
        trainer("trades", objective={"name": "trades", "beta": 0.0}, bn_updates=["clean"]),
        trainer("standard"),
    ),
    "mart, beta 0 = its cross-entropy alone": lambda: (
        trainer("mart", objective={"name": "mart", "beta": 0.0}),
        dataclasses.replace(trainer("mart"), objective=Boosted()),
    ),
    "backward-smoothing, beta 0 = standard": lambda: (
        trainer("backward-smoothing", objective={"name": "trades", "beta": 0.0}, bn_updates=["clean"]),
        trainer("standard"),
    ),
    "gradalign, lam 0 = fast-at from x": lambda: (
        trainer("gradalign", regularizers=[{"name": "gradient-alignment", "lam": 0.0, "reuse": True}]),
        trainer("fast-at", inner=[{"name": "craft", "attack": {"name": "pgd", "steps": 1, "rel_step": 1.25, "start": "zero"}}]),
    ),
    "n-fgsm without noise = training on fgsm": lambda: (
        trainer("n-fgsm", inner=[{"name": "n-fgsm", "noise": 0.0}]),
        trainer("fast-at", inner=[{"name": "craft", "attack": "fgsm"}]),
    ),
    "rice-at = pgd-at": lambda: (trainer("rice-at"), trainer("pgd-at")),
    "free-at, eps 0 = standard": lambda: (
        trainer("free-at", inner=[{"name": "free", "eps": 0.0}]),
        trainer("standard"),
    ),
    "pgd-at, eps 0 = standard": lambda: (
        trainer("pgd-at", inner=[{"name": "craft", "attack": {"name": "pgd", "eps": 0.0}}], attack_bn="eval"),
        trainer("standard"),
    ),
}
for _name in TRAINERS:
    IDENTITIES |= {
        f"{_name}: mixup, alpha 0": lambda name=_name: (
            behind(name, config.build("stage", "mixup", alpha=0.0)),
            behind(name, Pass()),
        ),
        f"{_name}: smoothing 0": lambda name=_name: (
            behind(name, config.build("stage", "label-smoothing", smoothing=0.0)),
            behind(name, Pass()),
        ),
    }
    if trainer(_name).inner and "logit-variation" not in [r.name for r in trainer(_name).regularizers]:
        IDENTITIES[f"{_name}: logit variation, lam 0"] = lambda name=_name: (
            dataclasses.replace(
                trainer(name), regularizers=(*trainer(name).regularizers, config.build("regularizer", "logit-variation", lam=0.0))
            ),
            trainer(name),
        )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("which", IDENTITIES)
def test_degenerate_settings_are_identities_bit_for_bit(which, dropout):
    """Weights and buffers after three steps."""
    one, other = (snapshot(steps(net(dropout=dropout), method, count=3)[0].f) for method in IDENTITIES[which]())
    assert_equal(one, other)


@pytest.mark.parametrize("setting", [("mixup", "alpha", 1.0), ("label-smoothing", "smoothing", 0.1)])
@pytest.mark.parametrize("name", TRAINERS)
def test_the_same_settings_above_zero_do_something(name, setting):
    stage, field, value = setting
    one, other = (steps(net(), behind(name, s))[0].f for s in (config.build("stage", stage, **{field: value}), Pass()))
    assert not torch.equal(one[0].weight, other[0].weight)


@pytest.mark.parametrize("name", TRAINERS)
def test_an_average_without_memory_is_the_live_model(name):
    f = net()
    outer, _ = steps(f, trainer(name, averaging={"name": "ema", "decay": 0.0}), count=3)
    assert_equal(snapshot(f), snapshot(outer.averaged()))
    assert_equal(snapshot(f), snapshot(steps(net(), trainer(name), count=3)[0].f))


# ----------------------------------------------------------------------------------------------------- law 11: shards


def _losses_and_stages():
    for kind in ("stage", "objective", "regularizer", "attack"):
        for name, cls in entries(kind).items():
            yield pytest.param(kind, cls, id=f"{kind}-{name}")


LOSSES_AND_STAGES = list(_losses_and_stages())


def part_of(kind, cls):
    if kind == "stage" and cls.name == "craft":
        return with_threat(config.build("stage", {"name": "craft", "attack": {"name": "pgd", "steps": 2}}), THREAT)
    threat = Threat(cls.norms[0], THREAT.eps) if kind == "attack" and THREAT.norm not in cls.norms else THREAT
    needed = {"corruption": {"corruption": "gaussian_noise"}} if kind == "stage" else {}
    return with_threat(config.build(kind, cls.name, **needed.get(cls.name, {})), threat)


def inside(kind, part):
    """A trainer that holds the part."""
    base = trainer("pgd-at")
    if kind == "stage":
        return dataclasses.replace(base, inner=(*base.inner, part) if part.taps else (part, *base.inner))
    if kind == "attack":
        return dataclasses.replace(base, inner=(dataclasses.replace(base.inner[0], attack=part),))
    return dataclasses.replace(base, **{kind: part} if kind == "objective" else {"regularizers": (part,)})


@pytest.mark.parametrize(("kind", "cls"), LOSSES_AND_STAGES)
def test_coupled_parts_refuse_shards(kind, cls):
    method = inside(kind, part_of(kind, cls))
    check_shards(method, 1)
    if not cls.coupled:
        return check_shards(method, 2)
    with pytest.raises(UserError, match=f"{cls.name}.* couples the samples.*allow_shards"):
        check_shards(method, 2)
    return check_shards(dataclasses.replace(method, allow_shards=True), 2)


@pytest.mark.parametrize(("kind", "cls"), [p for p in LOSSES_AND_STAGES if p.values[0] != "attack"])
def test_parts_that_do_not_say_coupled_are_not(kind, cls):
    """Two halves of a batch give what the whole gives, in float64 on a net without BatchNorm; coupled parts do not."""
    part, f = part_of(kind, cls), net(bn=False).double()
    view = batch(8, dtype=torch.float64)["clean"]
    halves = [View(x=view.x[s], y=view.y[s], key=view.key[s], index=view.index[s]) for s in (slice(4), slice(4, 8))]
    rng = Rng(1).split(1)[0]
    if kind == "stage":
        memory = (part.init_state(context_of(f, CLASSES, 64, (1, 8, 8))),) if hasattr(part, "init_state") else ()
        for buffer in [b for m in memory for b in m.buffers()]:
            buffer.uniform_(-0.1, 0.1)

        def result(v):
            out = part(Precise(f), {"clean": v, "adv": v}, rng, *memory)[part.to if hasattr(part, "to") else "clean"]
            return torch.cat([out.x.flatten(1), out.y], 1).detach()

        whole, parts = result(view), torch.cat([result(v) for v in halves])
    else:
        method = trainer("pgd-at")

        def result(v):
            moved = (v.key < 4).view(-1, 1, 1, 1)  # the two halves differ in how far the adversary went
            views = {"clean": v, "adv": dataclasses.replace(v, x=torch.where(moved, v.x.flip(3), v.x))}
            terms = part(Forward(Precise(f), views, rng, method, False), views)
            return sum(t.coef * t.value.mean() for t in terms.values()).detach()

        whole, parts = result(view), torch.stack([result(v) for v in halves]).mean()
    assert torch.allclose(whole, parts, rtol=1e-9, atol=1e-12) != cls.coupled


def test_a_run_with_shards_is_refused_before_it_starts(tmp_path):
    run = run_config("pgd-at", accumulation=2)
    mixed = dataclasses.replace(run.trainer, inner=(config.build("stage", "mixup"), *run.trainer.inner))
    with pytest.raises(UserError, match=r"mixup couples.*2 shards"):
        commands.train(dataclasses.replace(run, trainer=mixed), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    allowed = dataclasses.replace(mixed, allow_shards=True)
    commands.train(
        dataclasses.replace(run, trainer=allowed, training=dataclasses.replace(run.training, epochs=1)), tmp_path / "run"
    )


# -------------------------------------------------------------------------------------------- law 12: model selection


class Untouchable:
    """A test set that nobody may look at."""

    def __getattribute__(self, name):
        raise AssertionError(f"training looked at the test set: {name}")

    def __len__(self):
        raise AssertionError("training looked at the test set: len")


@pytest.mark.parametrize("name", TRAINERS)
def test_training_and_selection_never_see_the_test_set(name, tmp_path, monkeypatch):
    run = run_config(name)
    true_load = type(run.data).load
    loaded = []

    def load(self):
        loaded.append(dataclasses.replace(true_load(self), test=Untouchable()))
        return loaded[-1]

    monkeypatch.setattr(type(run.data), "load", load)
    outcome = commands.train(run, tmp_path / "run")
    assert isinstance(loaded[0], Splits)
    assert outcome.epochs == 2
    assert (tmp_path / "run" / "best.safetensors").exists()
    commands.dry_run(run)


# -------------------------------------------------------------------------------------------------------- law 14: files


def sources():
    return sorted(Path(robustlab.__file__).parent.rglob("*.py"))


def unsafe(tree):
    """What in a module could run code from a file."""
    forbidden = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        yield from (f"line {node.lineno}: imports {n}" for n in names if n.split(".")[0] in forbidden)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called.endswith("torch.load") and given.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if given.get("allow_pickle", "False") != "False":
            yield f"line {node.lineno}: {called} with allow_pickle"
        if called in ("torch.save", "eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load"):
            yield f"line {node.lineno}: {called}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(Path(robustlab.__file__).parent)))
def test_nothing_loads_a_pickle(path):
    assert list(unsafe(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import load",
        "import torch; torch.load('x.pt')",
        "import torch; torch.load('x.pt', weights_only=False)",
        "import numpy as np; np.load('x', allow_pickle=True)",
        "import yaml; yaml.load('x', Loader=yaml.Loader)",
    ],
)
def test_the_scan_sees_what_it_looks_for(line):
    assert list(unsafe(ast.parse(line)))


def test_every_file_of_a_run_is_text_or_safetensors(tmp_path):
    run = run_config("awp")
    run = dataclasses.replace(run, trainer=dataclasses.replace(run.trainer, averaging=config.build("averaging", "ema")))
    commands.train(run, tmp_path / "run")
    files = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert files == [".lock", "best.safetensors", "config.yaml", "last.safetensors", "metrics.jsonl", "state.safetensors"]
    for file in (tmp_path / "run").glob("*.safetensors"):
        assert tensors_of(file)
    assert (tmp_path / "run" / ".lock").read_bytes() == b""
    assert lines_of(tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["name"] == "awp"
    x = torch.rand(3, 1, 8, 8)
    assert load_model(tmp_path / "run" / "best.safetensors")(x).shape == (3, 10)


# ------------------------------------------------------------------------------------------------------ the data's part


def test_augmentation_stands_before_every_other_stage():
    run = run_config("pgd-at")
    flip = config.build("stage", "flip-crop")
    whole = complete_trainer(dataclasses.replace(run, data=dataclasses.replace(run.data, augment=(flip,))))
    assert [s.name for s in whole.inner] == ["flip-crop", "craft"]
    assert whole.inner[1].attack.eps == 0.1


def test_every_kind_has_a_part():
    for kind in FOLDERS:
        assert entries(kind), kind
