"""The evaluator: a classifier, labelled images and a suite in; per-sample verdicts and a result out.

    for each batch (cut at fixed positions):
        correct = argmax f(x) = y
        for each threat model, survivors = correct; for each attack in order (cascade):
            x' = project(attack(survivors));  survivors = argmax f(x') = y          f in eval mode and full precision
        for each corruption and severity: argmax f(corrupt(x)) = y, and if so asked f(x + delta) = y on those
    a random part of the survivors that were spared an attack gets the exact suite (audit)

It trusts nobody: an attack sees a copy of the images and may return what it likes; it is projected on ball and box and scored again
(``judge``), whatever the faster copies of the model that it searched on say (``search``). Draws are keyed by the image's position,
never by its batch. Every verdict is in the ledger before the next is computed (``loop``). Here an evaluation is put together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

import robustlab
from robustlab.evaluation.adversarial import Keeper
from robustlab.evaluation.audit import exact_suite
from robustlab.evaluation.corrupted import Corrupted
from robustlab.evaluation.identity import environment, model_hash, version
from robustlab.evaluation.judge import Judge
from robustlab.evaluation.ledger import Ledger
from robustlab.evaluation.loop import Loop
from robustlab.evaluation.result import Result
from robustlab.evaluation.search import Search
from robustlab.evaluation.shards import LEDGER, check_shard, mine, share
from robustlab.evaluation.sources import open_source
from robustlab.evaluation.threats import threats_of
from robustlab.files import exclusive
from robustlab.modes import frozen, native_bf16
from robustlab.types import BoundSuite, Classifier, Suite, Threat, UserError


def evaluate(
    f: Classifier,
    data: Any,
    suite: str | Mapping[str, Any] | Suite,
    *,
    threat: Threat | None = None,
    seed: int | None = None,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    precision: Literal["fp32", "bf16", "auto"] = "fp32",
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
        precision: of the search; ``auto``: ``bf16`` where the hardware multiplies it itself, else ``fp32``. Scores are always in
            full precision, and a sample that only bfloat16 sees fooled is searched again in float32.
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
    if precision not in ("fp32", "bf16", "auto"):
        raise UserError(f"unknown precision '{precision}'; expected fp32, bf16 or auto")
    threats = threats_of(plan, threat)
    exact = exact_suite(plan, shard, audit, audit_bound)
    source = open_source(data)
    size = source.size if limit is None else min(limit, source.size or limit)
    if shard is not None:
        check_shard(shard, size, batch_size)
    judge = Judge(f, device, source.num_classes)
    if precision == "auto":
        precision = "bf16" if native_bf16(judge.device) else "fp32"
    corrupted = Corrupted(plan, threat, source.data, size, seed)
    resolved = config.dump(plan) | ({} if corrupted.official is None else {"files": corrupted.official.fingerprint})
    header = {
        "ledger": 1,
        "model": model_hash(f),
        "data": source.fingerprint,
        "n": size,
        "suite": {"name": plan.name, "resolved": resolved},
        "threats": [asdict(t) for t in threats],
        **({"corruption_threat": asdict(corrupted.threat)} if corrupted.threat else {}),
        "seed": seed,
        "precision": precision,
        "batch_size": batch_size,
        "device": judge.device.type,
        "versions": {name: version(name) for name in ("torch", "pyautoattack")} | {"robustlab": robustlab.__version__},
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
        own, search = share(shard, size, batch_size), Search(judge, precision, batch_size)
        loop = Loop(plan, threats, search, corrupted, seed, ledger, keeper, own, progress)
        for x, y in source.batches(batch_size, limit):
            (loop.batch if mine(loop.batches, shard) else loop.skip)(x, y)
        if not loop.rows:
            raise UserError("data: no images")
        if isinstance(plan, BoundSuite) and exact is not None:
            drawn = audit if audit is not None else 0 if shard else plan.audit
            loop.audit(plan, exact, drawn, audit_bound, batch_size, lambda: source.batches(batch_size, limit))
        if model_hash(f) != header["model"]:
            raise UserError(
                "the model's weights or buffers changed during the evaluation: one of its attacks, or its own forward, wrote them"
            )
        report = loop.reliability() if reliability and threats else None
        loop.keep()
    return loop.result(
        suite=header["suite"],
        reliability=report,
        precision=precision,
        batch_size=batch_size,
        model_hash=header["model"],
        environment=environment(judge.device),
        provenance=dict(provenance or {}),
        ledger=None if path is None else str(path),
    )
