"""The evaluator: a classifier, labelled images and a suite in; per-sample verdicts and a result out.

    for each batch (cut at fixed positions):
        correct = argmax f(x) = y
        for each threat model, survivors = correct; for each attack in order (cascade):
            x' = project(attack(survivors));  survivors = argmax f(x') = y          f in eval mode and full precision
        for each corruption and severity: argmax f(corrupt(x)) = y, and if so asked f(x + delta) = y on those
    a random part of the survivors that were spared an attack gets the exact suite (audit)

Attacks search on a prepared copy of the model (``prepare``); where that is fooled and the model is not, the attack runs again on
the next better copy, last on the model itself: a false success saves no sample (``unverified`` in the ledger counts them).

It trusts nobody: an attack sees a copy of the images and may return what it likes; it is projected on ball and box and scored again
here. Draws are keyed by the image's position, never by its batch. Every verdict is in the ledger before the next is computed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import robustlab
from robustlab import geometry
from robustlab.evaluation.adversarial import Keeper
from robustlab.evaluation.audit import PREFIX, Audit, exact_suite, judged
from robustlab.evaluation.cascade import Step, descend, gate_of, nearness_in, steps_of, unique
from robustlab.evaluation.counting import Counter, per_sample
from robustlab.evaluation.ledger import Ledger, threat_name
from robustlab.evaluation.official import Official, clean_of, open_official
from robustlab.evaluation.prepare import prepare
from robustlab.evaluation.reliability.report import IMAGES, SHARE, examine
from robustlab.evaluation.result import Result, Tally, as_mask, assemble
from robustlab.evaluation.shards import check_shard, mine
from robustlab.evaluation.sources import Batch, Fingerprint, gathered, open_source
from robustlab.files import exclusive
from robustlab.modes import ambient, bn_mode, frozen, unwrap
from robustlab.rng import Rng
from robustlab.types import (
    Attack,
    BoundSuite,
    Classifier,
    Corruption,
    CorruptionSuite,
    Suite,
    Threat,
    UserError,
    one_hot,
    with_threat,
)

LEDGER = "ledger.jsonl"
SLACK = 1e-5  # relative and absolute: what float32 arithmetic may leave outside the ball


def evaluate(
    f: Classifier,
    data: Any,
    suite: str | Mapping[str, Any] | Suite,
    *,
    threat: Threat | None = None,
    seed: int | None = None,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    num_examples: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
    reliability: bool = False,
    shard: tuple[int, int] | None = None,
    save_adversarial: str | Path | None = None,
    audit: int | None = None,
    audit_bound: float | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Result:
    """Score a classifier under a suite.

    Args:
        f: the classifier; its modes and flags are as before afterwards.
        data: tensors ``(x, y)``, a ``types.ImageSet`` or ``Splits`` (its test part), a torch Dataset of (image tensor, label)
            or a DataLoader that does not shuffle. Images float in [0, 1] or uint8. One batch at a time is held.
        suite: a part, a name, or a mapping with a name and fields.
        threat: for suites that name no norms or no radii; what a suite names wins.
        seed: of all draws; None takes the suite's, else 0.
        batch_size: images per attack call. No verdict of an attack that is not ``coupled`` depends on it (in exact arithmetic).
        device: where to compute; a module is moved there. None: where its parameters are.
        precision: of the search. Scores are always in full precision, and a sample that only bfloat16 sees fooled is searched
            again in float32.
        num_examples: the first so many images; None takes the suite's number, else all.
        out: folder for ``ledger.jsonl``; this process holds the folder meanwhile.
        resume: go on with the ledger in ``out``, if there is one.
        progress: called after each line of the ledger with ``n done batch threat attack given correct seconds clean_accuracy
            robust_accuracy`` (accuracies of the batches finished so far; None before the first).
        reliability: examine, after the attacks, whether their verdicts can be believed, for at most 10 % of their passes more.
        shard: (i, n): only the batches of the i-th of n shards, i from 1; ``shards.merge`` puts their ledgers together. The result
            is of the shard's images; its fingerprint is of all of them.
        save_adversarial: a ``.npz`` or ``.safetensors`` file for the images: of each sample the one that broke it, else the last
            attack's, else (misclassified from the start) the clean one. For one threat model; see ``adversarial``.
        audit: for suites that stand in for an exact one: how many survivors that were spared its attacks get them, chosen at
            random; None takes the suite's number, none for a shard.
        audit_bound: audit on until at most so many points of accuracy can be left (95 %), or all of these survivors are audited.
        provenance: kept in the result.

    Raises:
        UserError: one line: bad images, labels, radius, batch size; a model whose logits do not fit the labels; an attack or a
            corruption that returns anything but images; a ledger that belongs to another evaluation, or cannot be written.
    """
    from robustlab import config

    plan: Suite = config.build("suite", suite)
    seed = seed if seed is not None else plan.seed if plan.seed is not None else 0
    limit = num_examples if num_examples is not None else plan.num_examples
    for what, value in (("num_examples", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{what} must be at least 1, got {value}")
    if precision not in ("fp32", "bf16"):
        raise UserError(f"unknown precision '{precision}'; expected fp32 or bf16")
    threats = threats_of(plan, threat)
    exact = exact_suite(plan, shard, audit, audit_bound)
    source = open_source(data)
    size = source.size if limit is None else min(limit, source.size or limit)
    if shard is not None:
        check_shard(shard, size, batch_size)
    where = _device(f, device)
    if device is not None and isinstance(f, nn.Module):
        f.to(where)
    resolved = {"name": plan.name, "resolved": config.dump(plan)}
    scoring = plan if isinstance(plan, CorruptionSuite) else None
    attacked = corruption_threat(scoring, threat) if scoring and scoring.attack else None
    official = None
    if scoring is not None and scoring.published and scoring.files is None:
        raise UserError(f"suite '{plan.name}': {scoring.published[0]} exists only as published files: give files, their folder")
    if scoring is not None and scoring.files is not None:
        labels = [*unique([c.name for c in plan.corruptions]), *scoring.published]
        official = open_official(scoring.files, labels, plan.severities, clean_of(source.data, size))
        resolved["resolved"]["files"] = official.fingerprint  # what they are, not where they lie
    header = {
        "ledger": 1,
        "model": model_hash(f),
        "data": source.fingerprint,
        "n": size,
        "suite": resolved,
        "threats": [{"norm": t.norm, "eps": t.eps} for t in threats],
        **({"corruption_threat": {"norm": attacked.norm, "eps": attacked.eps}} if attacked else {}),
        "seed": seed,
        "precision": precision,
        "batch_size": batch_size,
        "device": where.type,
        "versions": {name: _version(name) for name in ("torch", "pyautoattack")} | {"robustlab": robustlab.__version__},
        **({"shard": list(shard)} if shard else {}),
    }
    path = None if out is None else Path(out) / LEDGER
    keeper = None if save_adversarial is None else Keeper(save_adversarial, header, threats, resume=resume)
    with (
        contextlib.nullcontext() if out is None else exclusive(out),
        contextlib.closing(Ledger(path, header, resume=resume)) as ledger,
        frozen(f),
    ):
        if keeper is not None:
            keeper.open(begun=bool(ledger.done))
        own = size if shard is None or size is None else _own(size, batch_size, shard)
        run = _Run(f, plan, threats, seed, precision, where, source.num_classes, ledger, own, progress, keeper, official, attacked)
        for x, y in source.batches(batch_size, limit):
            if mine(run.batches, shard):
                run.batch(x, y)
            else:
                run.skip(x, y)
        if not run.rows:
            raise UserError("data: no images")
        if isinstance(plan, BoundSuite) and exact is not None:
            drawn = audit if audit is not None else 0 if shard else plan.audit
            run.audit(plan, exact, drawn, audit_bound, batch_size, lambda: source.batches(batch_size, limit))
        if model_hash(f) != header["model"]:
            raise UserError(
                "the model's weights or buffers changed during the evaluation: one of its attacks, or its own forward, wrote them"
            )
        report = run.reliability() if reliability and plan.attacks and run.rows else None
        run.keep()
    return run.result(
        suite=resolved,
        reliability=report,
        batch_size=batch_size,
        model_hash=header["model"],
        environment=environment(where),
        provenance=dict(provenance or {}),
        ledger=None if path is None else str(path),
    )


def threats_of(suite: Suite, threat: Threat | None) -> list[Threat]:
    """The threat models of a suite's attacks: its norms times its radii, else those that all its attacks name, else the caller's.

    Raises:
        UserError: there are attacks and no threat model, an attack that does not know the norm, or one that names another.
    """
    if not suite.attacks:
        return []
    norms = suite.norms or _common([a.norm for a in suite.attacks]) or ((threat.norm,) if threat else ())
    radii = suite.eps or _common([a.eps for a in suite.attacks]) or ((threat.eps,) if threat else ())
    if not norms or not radii:
        missing = " and ".join(name for name, given in (("norm", norms), ("eps", radii)) if not given)
        raise UserError(f"suite '{suite.name}': give {missing} of the threat model, for example --norm linf --eps 8/255")
    try:
        threats = [Threat(norm, eps) for norm in norms for eps in radii]
    except ValueError as error:
        raise UserError(f"suite '{suite.name}': {error}") from error
    for t in threats:
        for a in suite.attacks:
            if t.norm not in a.norms:
                raise UserError(f"the attack '{a.name}' does not work in {t.norm}; it works in {', '.join(a.norms)}")
            if a.norm not in (None, t.norm) or a.eps not in (None, t.eps):
                own = f"{a.norm or t.norm} {t.eps if a.eps is None else a.eps:g}"
                raise UserError(f"the attack '{a.name}' has its own threat model, {own}; the evaluation's is {t.norm} {t.eps:g}")
    return threats


def _common(values: list[Any]) -> tuple[Any, ...]:
    """The value, if all of them are that one; nothing if one is open or two differ."""
    return (values[0],) if values[0] is not None and all(v == values[0] for v in values) else ()


def model_hash(f: Any) -> str:
    """SHA-256 over the structure and every tensor of a module's state; for a plain callable, over its name."""
    module = unwrap(f)
    digest = hashlib.sha256()
    if not isinstance(module, nn.Module):
        named = module if hasattr(module, "__qualname__") else type(module)
        digest.update(f"{named.__module__}:{named.__qualname__}".encode())
        return digest.hexdigest()
    digest.update(str(module).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """What a number may depend on besides its inputs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "robustlab": robustlab.__version__,
        "pyautoattack": _version("pyautoattack"),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": name,
    }


class _Run:
    """One evaluation in progress: batch by batch, every verdict through the ledger."""

    def __init__(
        self,
        f: Classifier,
        suite: Suite,
        threats: list[Threat],
        seed: int,
        precision: str,
        device: torch.device,
        num_classes: int | None,
        ledger: Ledger,
        size: int | None,
        progress: Callable[[dict[str, Any]], None] | None,
        keeper: Keeper | None,
        official: Official | None = None,
        corruption_threat: Threat | None = None,
    ):
        self.f, self.suite, self.seed, self.precision, self.device = f, suite, seed, precision, device
        self.dtype = _dtype(f)
        self.ledger, self.size, self.progress = ledger, size, progress
        self.num_classes, self.keeper = num_classes, keeper
        self.prepared: dict[str, Classifier] = {}  # by precision: what attacks search on, made when first asked for
        self.steps, self.gate = steps_of(suite), gate_of(suite)
        self.corruptions: list[tuple[str, Corruption | None]] = [
            *zip(unique([c.name for c in suite.corruptions]), suite.corruptions, strict=True),
            *((name, None) for name in getattr(suite, "published", ())),
        ]
        self.scoring = suite if isinstance(suite, CorruptionSuite) else None
        self.official, self.corruption_threat = official, corruption_threat
        self.threats = threats
        self.fingerprint = Fingerprint()
        self.sample: list[tuple[Tensor, Tensor]] = []  # the first images that are classified correctly, for the reliability report
        self.seen = self.batches = 0
        self.rows, self.labels = list[int](), list[Tensor]()  # the images evaluated so far: their positions and labels
        self.clean, self.clean_rows = Tally(), list[int]()
        self.images, self.note = list[str](), dict[str, Any]()  # hashes of the batches; what else the ledger's lines say
        self.attacked = [{step.label: Tally() for step in self.steps} for _ in threats]
        self.robust_rows: list[list[int]] = [[] for _ in threats]
        self.spared_rows: list[list[int]] = [[] for _ in threats]
        self.audits: list[Audit | None] = [None for _ in threats]
        self.corrupted = {(label, s): Tally() for label, _ in self.corruptions for s in suite.severities}
        self.corrupted_attacked = {key: Tally() for key in self.corrupted if corruption_threat is not None}

    # ---------------------------------------------------------------------------------------------- one batch

    def batch(self, x: Tensor, y: Tensor) -> None:
        first, self.seen = self.seen, self.seen + len(x)
        index, self.shift = torch.arange(first, self.seen), len(self.rows) - first
        images = self.fingerprint.add(x, y)
        self.images.append(images)
        self.labels.append(y)
        x, y = x.to(self.device, self.dtype), y.to(self.device)
        if self.keeper is not None and self.ledger.get(None, "clean", self.batches) is None:
            self.keeper.put(index + self.shift, x)
        correct = self._clean(x, y, index, images)
        if (missing := IMAGES - sum(len(labels) for _, labels in self.sample)) > 0:
            rows = correct.nonzero().squeeze(1)[:missing].to(self.device)
            self.sample.append((x[rows], y[rows]))
        for number, threat in enumerate(self.threats):
            attack = functools.partial(self._attack, threat, self.attacked[number], x, y, index)
            alive, spared = descend(correct, self.steps, self.gate, attack)
            self.robust_rows[number] += index[alive].tolist()
            self.spared_rows[number] += index[spared].tolist()
        for label, corruption in self.corruptions:
            for severity in self.suite.severities:
                self._corrupt(label, corruption, severity, x, y, index)
        self.rows += index.tolist()
        self.shape, self.batches = tuple(x.shape[1:]), self.batches + 1

    def skip(self, x: Tensor, y: Tensor) -> None:
        """A batch of another shard."""
        self.images.append(self.fingerprint.add(x, y))
        self.seen, self.batches = self.seen + len(x), self.batches + 1

    def _clean(self, x: Tensor, y: Tensor, index: Tensor, images: str) -> Tensor:
        """Which rows are classified correctly, as a mask on the CPU."""
        old = self.ledger.get(None, "clean", self.batches)
        if old is not None and old.get("images") != images:
            raise UserError(
                f"{self.ledger.path}: the images or labels of batch {self.batches} are not those of the earlier run; "
                "the data changed, or its order is not fixed (a DataLoader that shuffles?)"
            )
        if old is None or self.num_classes is None or not self.rows:
            start = self._clock()
            z = self._logits(x) if self.rows else self._first_logits(x)
            seconds = self._clock() - start
            self._check_logits(z, y)
            if old is None:
                right = (z.argmax(1) == y).tolist()
                extra = {"images": images} | ({"confidence": confidence(z)} if self.scoring else {})
                old = self._write(None, "clean", index.tolist(), right, len(x), 0, seconds, extra)
        verdict = torch.tensor(old["verdict"], dtype=torch.bool)
        self.clean_rows += index[verdict].tolist()
        self._report(old, self.clean)
        return verdict

    def _attack(
        self, threat: Threat, tallies: dict[str, Tally], x: Tensor, y: Tensor, index: Tensor, step: Step, rows: Tensor
    ) -> dict[str, Any]:
        """Run one attack on some rows of the batch, or look up what it did."""
        entry = self.ledger.get(threat, step.label, self.batches)
        if entry is None:
            pick = rows.to(self.device)
            entry = self._search(threat, step.position, step.label, step.attack, x[pick], y[pick], index[rows])
        self._report(entry, tallies[step.label])
        return entry

    def _search(
        self, threat: Threat, position: int, label: str, attack: Attack, x: Tensor, y: Tensor, index: Tensor
    ) -> dict[str, Any]:
        if len(x) == 0:
            return self._write(threat, label, [], [], 0, 0, 0.0, {"reached": 0.0, "outside": 0, "unverified": 0, "flags": []})
        rng = Rng(self.seed).child("evaluate", threat.norm, repr(threat.eps), position, attack.name)
        rng = rng.split(1, first=self.batches)[0].at(index.to(self.device))
        start = self._clock()
        rows, x_adv, spent = torch.arange(len(x), device=x.device), x.clone(), torch.zeros(3, dtype=torch.long)
        verdict = torch.ones(len(x), dtype=torch.bool, device=x.device)
        reached, outside, flags, nearness = 0.0, 0, list[str](), dict[str, Tensor]()
        each: Tensor | None = torch.zeros(len(x), 2, dtype=torch.long)
        for f in self._searches(x):
            found, info, counter = self._once(f, threat, label, attack, x[rows], y[rows], rng.select(rows))
            found, far, out = trusted(found, x[rows], threat, label)
            z = self._logits(found)
            x_adv[rows], verdict[rows] = found, self._right(z, y[rows])
            reached, outside, flags = max(reached, far), outside + out, flags + [str(flag) for flag in info.get("flags", ())]
            told = per_sample(info, len(rows), counter)
            looked, false = self._false_successes(f, counter, found, y[rows], z)
            each = None if each is None or told is None else each.index_add(0, rows.cpu(), torch.tensor(told))
            if each is not None:
                each[rows[looked].cpu(), 0] += 1
            if "nearness" in info:
                nearness.setdefault("nearness", torch.zeros(len(x)).to(info["nearness"]))[rows] = info["nearness"]
            spent += torch.tensor([counter.forwards, counter.backwards, len(false)])
            if len(rows := rows[false]) == 0:
                break
        seconds = self._clock() - start
        if self.keeper is not None:
            self.keeper.put(index + self.shift, x_adv)
        if self.precision == "bf16" and self.prepared["bf16"] is self.f:
            flags.append("searched in float32: the model has no copy in bfloat16 to be trusted")
        forwards, backwards, unverified = spent.tolist()
        extra = {"reached": reached, "outside": outside, "unverified": unverified, "flags": list(dict.fromkeys(flags))}
        extra |= {} if each is None else {"passes": each.tolist()}
        extra |= nearness_in(nearness)
        return self._write(threat, label, index.tolist(), verdict.tolist(), forwards, backwards, seconds, extra)

    def _searches(self, x: Tensor) -> Iterator[Classifier]:
        """What an attack runs on, in turn, each for the false successes of the one before. The last is the classifier itself."""
        for precision in ("bf16", "fp32") if self.precision == "bf16" else ("fp32",):
            if precision not in self.prepared:
                self.prepared[precision] = prepare(self.f, x, precision)
            if self.prepared[precision] is not self.f:
                yield self.prepared[precision]
        yield self.f

    def _once(
        self, f: Classifier, threat: Threat, label: str, attack: Attack, x: Tensor, y: Tensor, rng: Rng
    ) -> tuple[Any, dict[str, Any], Counter]:
        """One run of an attack on a model to search on."""
        assert self.num_classes is not None
        counter, target = Counter(functools.partial(self._searching, f), unwrap(self.f)), one_hot(y, self.num_classes, self.dtype)
        try:
            with ambient(rng.batch_seed()), bn_mode(self.f, "eval"), torch.enable_grad():
                x_adv, info = with_threat(attack, threat).run(counter, x.clone(), target, rng)
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(f"the attack '{label}': {error}") from error
        return x_adv, dict(info), counter

    @torch.no_grad()
    def _false_successes(self, f: Classifier, counter: Counter, x_adv: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that ``f`` was asked about, and those that it believes fooled, or cannot tell, while the logits ``z`` are right.

        An attack leaves such a sample although it might be broken. In float32 only rows whose ``z`` are all but tied can be.
        """
        low = f is self.prepared.get("bf16")
        rows = (self._right(z, y) & (low | _tied(z, y, 1e-3))).nonzero().squeeze(1)
        if f is self.f or len(rows) == 0:
            return rows[:0], rows[:0]
        with bn_mode(self.f, "eval"):
            own = counter(x_adv[rows])
        return rows, rows[~self._right(own, y[rows]) | _tied(own, y[rows], 2.0**-8 if low else 1e-5)]

    # -------------------------------------------------------------------------------------------------- audit

    def audit(
        self,
        suite: BoundSuite,
        exact: Suite,
        size: int,
        points: float | None,
        batch_size: int,
        again: Callable[[], Iterator[Batch]],
    ) -> None:
        """Give the exact suite to survivors drawn at random, under each threat model; what breaks is broken."""
        steps = [Step(PREFIX + step.label, step.attack, step.position) for step in steps_of(exact)]
        for number, threat in enumerate(self.threats):
            pool = (self.spared_rows if judged(suite, exact) else self.robust_rows)[number]
            audit = self.audits[number] = Audit(suite.exact, pool, len(self.rows), self.seed, threat, size, points)
            name = threat_name(threat), steps[0].label
            known = {key[2]: len(entry["index"]) for key, entry in self.ledger.done.items() if key[:2] == name}
            for self.batches, rows in audit.pieces(batch_size, known):
                index = torch.tensor(rows)
                self.note = {"looks": audit.looks}
                images = functools.cache(functools.partial(self._gathered, index, again))
                attack = functools.partial(self._audit, threat, audit.tally, index, images)
                alive, _ = descend(torch.ones(len(rows), dtype=torch.bool), steps, None, attack)
                looks = self.ledger.done.get((*name, self.batches), {"looks": audit.looks})["looks"]
                audit.count(len(rows), int((~alive).sum()), looks)
                broken = set(index[~alive].tolist())
                self.robust_rows[number] = [row for row in self.robust_rows[number] if row not in broken]

    def _audit(
        self,
        threat: Threat,
        tally: Tally,
        index: Tensor,
        images: Callable[[], Batch],
        step: Step,
        rows: Tensor,
    ) -> dict[str, Any]:
        """Run one attack of the exact suite on some rows of a drawn piece, or look up what it did."""
        entry = self.ledger.get(threat, step.label, self.batches)
        if entry is None:
            if self.keeper is not None and self.keeper.finished:
                raise UserError(f"{self.keeper.path}: made before this audit, which goes further; start again in another --out")
            (x, y), pick = images(), rows.to(self.device)
            entry = self._search(threat, step.position, step.label, step.attack, x[pick], y[pick], index[rows])
        self._report(entry, tally)
        return entry

    def _gathered(self, index: Tensor, again: Callable[[], Iterator[Batch]]) -> Batch:
        x, y = gathered(index, again(), self.images)
        return x.to(self.device, self.dtype), y.to(self.device)

    def _corrupt(self, label: str, corruption: Corruption | None, severity: int, x: Tensor, y: Tensor, index: Tensor) -> None:
        name, attack = f"{label}/{severity}", self.scoring.attack if self.scoring else None
        entry = self.ledger.get(None, name, self.batches)
        under = None if attack is None else self.ledger.get(None, f"{name}+{attack.name}", self.batches)
        x_c = None
        if entry is None:
            start = self._clock()
            x_c = self._corrupted(name, corruption, severity, x, index)
            z = self._logits(x_c)
            extra = {"confidence": confidence(z)} if self.scoring else {}
            verdict = ((z.argmax(1) == y) & ~z.isnan().any(1)).tolist()
            entry = self._write(None, name, index.tolist(), verdict, len(x), 0, self._clock() - start, extra)
        self._report(entry, self.corrupted[label, severity])
        if attack is None or self.corruption_threat is None:
            return
        if under is None:
            if x_c is None:
                x_c = self._corrupted(name, corruption, severity, x, index)
            rows = torch.tensor(entry["verdict"], dtype=torch.bool).nonzero().squeeze(1)
            pick = rows.to(self.device)
            under = self._search_corrupted(f"{name}+{attack.name}", attack, x_c[pick], y[pick], index[rows])
        self._report(under, self.corrupted_attacked[label, severity])

    def _corrupted(self, name: str, corruption: Corruption | None, severity: int, x: Tensor, index: Tensor) -> Tensor:
        """A batch, corrupted: made here at the suite's size, or looked up in the published files."""
        if self.official is not None:
            return self.official.at(name.rpartition("/")[0], severity, index).to(self.device, self.dtype)
        assert corruption is not None
        rng = Rng(self.seed).child("corruption", corruption.name, severity).at(index.to(self.device))
        size = self.scoring.size if self.scoring else None
        with torch.no_grad(), ambient(rng.split(1, first=self.batches)[0].batch_seed()):
            given = x.clone() if size is None else enlarged(x, size)
            x_c = corruption(given, severity, rng)
        _check_returned(x_c, given, f"the corruption '{name}'")
        if float(x_c.amin()) < 0 or float(x_c.amax()) > 1:
            raise UserError(f"the corruption '{name}' returned values outside [0, 1]")
        return x_c if size is None else torch.nn.functional.avg_pool2d(x_c, size // x.shape[-1])

    def _search_corrupted(self, name: str, attack: Attack, x: Tensor, y: Tensor, index: Tensor) -> dict[str, Any]:
        """Attack corrupted images that are classified correctly; ball and box are those around the corrupted image."""
        threat = self.corruption_threat
        assert threat is not None
        assert self.num_classes is not None
        if len(x) == 0:
            return self._write(None, name, [], [], 0, 0, 0.0, {})
        rng = Rng(self.seed).child("evaluate", threat.norm, repr(threat.eps), name, attack.name)
        rng = rng.split(1, first=self.batches)[0].at(index.to(self.device))
        counter, start = Counter(functools.partial(self._searching, self.f), unwrap(self.f)), self._clock()
        try:
            with ambient(rng.batch_seed()), bn_mode(self.f, "eval"), torch.enable_grad():
                x_adv, _ = with_threat(attack, threat).run(counter, x.clone(), one_hot(y, self.num_classes, self.dtype), rng)
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(f"the attack '{name}': {error}") from error
        seconds = self._clock() - start
        x_adv, _, _ = trusted(x_adv, x, threat, name)
        verdict = self._correct(x_adv, y).tolist()
        return self._write(None, name, index.tolist(), verdict, counter.forwards, counter.backwards, seconds, {})

    # ------------------------------------------------------------------------------------------------ forwards

    @torch.no_grad()
    def _logits(self, x: Tensor) -> Tensor:
        """Full precision and eval mode, whatever the caller's autocast and whatever an attack did to the modes."""
        with torch.autocast(self.device.type, enabled=False), bn_mode(self.f, "eval"):
            return self.f(x)

    def _searching(self, f: Classifier, x: Tensor) -> Tensor:
        """What attacks query; a low precision is the business of ``f``."""
        with torch.autocast(self.device.type, enabled=False):
            return f(x).to(self.dtype)

    def _correct(self, x: Tensor, y: Tensor) -> Tensor:
        return self._right(self._logits(x), y)

    @staticmethod
    def _right(z: Tensor, y: Tensor) -> Tensor:
        """Whether each row of logits answers ``y``; logits that are not numbers are no answer."""
        return (z.argmax(1) == y) & ~z.isnan().any(1)

    def _first_logits(self, x: Tensor) -> Tensor:
        try:
            return self._logits(x)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"the model does not accept images of shape {tuple(x.shape[1:])}: {reason}") from error

    def _check_logits(self, z: Tensor, y: Tensor) -> None:
        if not isinstance(z, Tensor) or z.ndim != 2 or len(z) != len(y) or not z.is_floating_point():
            got = f"shape {tuple(z.shape)} of {z.dtype}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
            raise UserError(f"the model must return logits (N, K) for {len(y)} images, got {got}")
        if not bool(z.isfinite().all()):
            raise UserError(f"the model returns logits that are not finite numbers on clean images (batch {self.batches})")
        k = z.shape[1]
        if self.num_classes is not None and k != self.num_classes:
            raise UserError(f"the model has {k} logits, the data {self.num_classes} classes")
        self.num_classes = k
        if int(y.min()) < 0 or int(y.max()) >= k:
            raise UserError(f"data: labels must lie in 0..{k - 1} (the model has {k} logits), got {int(y.min())}..{int(y.max())}")

    # -------------------------------------------------------------------------------------------------- ledger

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _write(
        self,
        threat: Threat | None,
        attack: str,
        index: list[int],
        verdict: list[bool],
        forwards: int,
        backwards: int,
        seconds: float,
        extra: dict[str, Any],
    ) -> dict[str, Any]:
        entry = {
            "threat": None if threat is None else {"norm": threat.norm, "eps": threat.eps},
            "attack": attack,
            "batch": self.batches,
            "index": index,
            "verdict": [int(v) for v in verdict],
            "forwards": forwards,
            "backwards": backwards,
            **extra,
            **self.note,
            "seed": self.seed,
            "seconds": round(seconds, 6),
        }
        self.ledger.append(entry)
        return entry

    def _report(self, entry: dict[str, Any], tally: Tally) -> None:
        tally.add(entry)
        if self.progress is None:
            return
        done = len(self.rows)
        self.progress(
            {
                "n": self.size,
                "done": done,
                "batch": self.batches,
                "threat": entry["threat"],
                "attack": entry["attack"],
                "given": len(entry["verdict"]),
                "correct": sum(entry["verdict"]),
                "seconds": entry["seconds"],
                "clean_accuracy": self.clean.correct / self.clean.given,
                "robust_accuracy": len(self.robust_rows[0]) / done if self.threats and done else None,
            }
        )

    # -------------------------------------------------------------------------------------------------- result

    def reliability(self) -> dict[str, Any]:
        """The reliability report under the first threat model."""
        x, y = (torch.cat(parts) for parts in zip(*self.sample, strict=True))
        spent = sum(t.forwards + t.backwards for tallies in self.attacked for t in tallies.values())
        return examine(self.f, x, y, self.threats[0], seed=self.seed, passes=SHARE * spent).to_dict()

    def result(self, **known: Any) -> Result:
        masks = [as_mask(rows, self.seen)[self.rows] for rows in (self.clean_rows, *self.robust_rows)]
        return assemble(
            len(self.rows),
            self.clean,
            masks[0],
            [(t.norm, t.eps) for t in self.threats],
            self.attacked,
            masks[1:],
            self.corrupted,
            self.corrupted_attacked,
            None if self.corruption_threat is None else {"norm": self.corruption_threat.norm, "eps": self.corruption_threat.eps},
            [None if audit is None else audit.to_dict() for audit in self.audits],
            seed=self.seed,
            precision=self.precision,
            fingerprint=self.fingerprint.value(),
            **known,
        )

    def keep(self) -> None:
        """Make the file of adversarial images."""
        if self.keeper is not None:
            robust = as_mask(self.robust_rows[0], self.seen)[self.rows]
            self.keeper.finish(self.rows, torch.cat(self.labels), robust, self.shape)


def confidence(z: Tensor) -> list[float]:
    """The largest probability of each row of logits, to five digits; 0 where it is not a number."""
    return [round(c, 5) for c in z.double().softmax(1).amax(1).nan_to_num(0.0).tolist()]


def enlarged(x: Tensor, size: int) -> Tensor:
    """Images (N, C, H, W) with every pixel repeated, so that they have ``size`` pixels a side.

    Raises:
        UserError: they are not square, or ``size`` is no multiple of theirs.
    """
    h, w = x.shape[2:]
    if h != w or size % w:
        raise UserError(f"size: {size} is no multiple of the images' {h}x{w} px")
    return x.repeat_interleave(size // h, 2).repeat_interleave(size // w, 3)


def corruption_threat(suite: CorruptionSuite, threat: Threat | None) -> Threat:
    """The one threat model under which a suite attacks corrupted images.

    Raises:
        UserError: as :func:`threats_of`; or there are several.
    """
    assert suite.attack is not None
    found = threats_of(Suite(attacks=(suite.attack,), norms=suite.norms, eps=suite.eps), threat)
    if len(found) > 1:
        raise UserError(f"suite '{suite.name}': corrupted images are attacked under one threat model, got {len(found)}")
    return found[0]


def _tied(z: Tensor, y: Tensor, near: float) -> Tensor:
    """Whether the margin of the class ``y`` (N,) is at most ``near`` of the largest logit."""
    own = z.gather(1, y[:, None])
    return (own - z.scatter(1, y[:, None], -torch.inf)).amin(1) <= near * z.abs().amax(1)


def _own(size: int, batch_size: int, shard: tuple[int, int]) -> int:
    """How many of the images are a shard's."""
    return sum(min(batch_size, size - first) for b, first in enumerate(range(0, size, batch_size)) if mine(b, shard))


def trusted(x_adv: Any, x: Tensor, threat: Threat, label: str) -> tuple[Tensor, float, int]:
    """What an attack returned, made lawful: projected on ball and box.

    Returns:
        The images, the largest norm among them, and how many had left ball or box by more than rounding.

    Raises:
        UserError: not a tensor like ``x``, or values that are not finite.
    """
    _check_returned(x_adv, x, f"the attack '{label}'")
    raw = x_adv.detach()
    size = geometry.norm_of(raw - x, threat.norm)
    low, high = raw.flatten(1).amin(1), raw.flatten(1).amax(1)
    outside = (size > threat.eps * (1 + SLACK) + SLACK) | (low < -SLACK) | (high > 1 + SLACK)
    x_adv = geometry.project(raw, x, threat.norm, threat.eps).clamp(0.0, 1.0)
    return x_adv, float(geometry.norm_of(x_adv - x, threat.norm).max()), int(outside.sum())


def _check_returned(new: Any, x: Tensor, who: str) -> None:
    if not isinstance(new, Tensor) or new.shape != x.shape or new.dtype != x.dtype or new.device != x.device:
        got = f"{tuple(new.shape)} of {new.dtype} on {new.device}" if isinstance(new, Tensor) else f"a {type(new).__name__}"
        raise UserError(f"{who} must return images {tuple(x.shape)} of {x.dtype} on {x.device}, got {got}")
    finite = new.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise UserError(f"{who} returned values that are not finite for {int((~finite).sum())} of {len(x)} images")


def _dtype(f: Any) -> torch.dtype:
    module = unwrap(f)
    found = {p.dtype for p in module.parameters() if p.is_floating_point()} if isinstance(module, nn.Module) else set()
    if found - {torch.float32, torch.float64}:
        raise UserError(
            f"the model's weights are {', '.join(sorted(map(str, found)))}; scores need full precision: call model.float()"
        )
    return torch.float64 if torch.float64 in found else torch.float32


def _device(f: Any, device: torch.device | str | None) -> torch.device:
    if device is not None:
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise UserError(f"unknown device '{device}': {str(error).splitlines()[0]}") from error
    module = unwrap(f)
    first = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    return first.device if first is not None else torch.device("cpu")


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
