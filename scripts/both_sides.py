"""What the scripts that compare with pyautoattack share: the images, and AutoAttack as each side runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlab import config, registry
from robustlab.evaluation.counting import Counter
from robustlab.evaluation.runner import evaluate
from robustlab.models.checkpoint import read_meta
from robustlab.types import Suite, Threat

NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}
SUITES = {"standard": "autoattack", "plus": "autoattack-plus", "rand": "autoattack-rand"}
Run = dict[str, Any]  # clean, robust: (N,) lists of 0 and 1; components: {name: {given, forwards, backwards, seconds, kills}}


def image_fields(data: str, model: str | None) -> dict[str, int]:
    """The size and channels that a checkpoint was made for, where the data set comes in several."""
    if model is None or not Path(model).exists():
        return {}
    channels, size, _ = read_meta(model)["image_shape"]
    known = {field.name for field in dataclasses.fields(registry.lookup("dataset", data))}
    return {name: value for name, value in (("size", size), ("channels", channels)) if name in known}


def first_images(data: str | dict[str, Any], model: str | None, count: int) -> tuple[Tensor, Tensor]:
    """The first test images of a data set, as a checkpoint takes them, and their labels."""
    spec = {"name": data, **image_fields(data, model)} if isinstance(data, str) else data
    test = config.build("dataset", spec).load().test
    x, y, _ = next(iter(test.batches([torch.arange(min(count, len(test)))])))
    return x, y


def our_suite(version: str, steps: int = 100, queries: int = 5000) -> Suite:
    """The suite of a version, its budgets cut if asked for."""
    suite: Suite = config.build("suite", SUITES[version])
    cut = {"steps": steps, "queries": queries}
    attacks = (dataclasses.replace(a, **{k: v for k, v in cut.items() if hasattr(a, k)}) for a in suite.attacks)
    return dataclasses.replace(suite, attacks=tuple(attacks))


def run_ours(
    f: nn.Module, x: Tensor, y: Tensor, threat: Threat, suite: str | Suite, seed: int, batch_size: int, **options: Any
) -> Run:
    """A suite, by our evaluator."""
    result = evaluate(f, (x, y), suite, threat=threat, seed=seed, batch_size=batch_size, **options)
    assert result.robust is not None
    components = {}
    for name, row in result.per_attack.items():
        components[name] = {k: row[k] for k in ("forwards", "backwards", "seconds")}
        components[name] |= {"given": row["attacked"], "kills": row["broken"]}
    return {"clean": result.clean.int().tolist(), "robust": result.robust.int().tolist(), "components": components}


def reference(
    f: Any,
    num_classes: int,
    threat: Threat,
    version: str,
    seed: int,
    steps: int = 100,
    queries: int = 5000,
    device: torch.device | str = "cpu",
) -> Any:
    """The reference's own object, for any number of classes, its budgets cut if asked for."""
    from pyautoattack import AutoAttack

    run = AutoAttack(f, norm=NAMES[threat.norm], eps=threat.eps, seed=seed, version=version, device=device)
    for apgd in (run.apgd, run.apgd_targeted):
        apgd.n_iter = apgd.n_iter_orig = steps
        apgd.n_iter_2, apgd.size_decr, apgd.n_iter_min = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    run.fab.n_iter, run.square.n_queries = steps, queries
    for targeted in (run.apgd_targeted, run.fab):
        targeted.n_target_classes = min(targeted.n_target_classes, num_classes - 1)
    return run


def reference_component(run: Any, name: str) -> Any:
    """One attack of the reference, set as its own driver sets it."""
    if name in ("apgd-ce", "apgd-dlr"):
        run.apgd.loss = name.removeprefix("apgd-")
        return run.apgd
    if name in ("fab", "fab-t"):
        run.fab.targeted = name == "fab-t"
        run.fab.n_restarts = 1 if run.fab.targeted else run.fab.n_restarts
        return run.fab
    return {"apgd-t": run.apgd_targeted, "square": run.square}[name]


def run_reference(
    f: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    version: str,
    seed: int,
    batch_size: int,
    attacks: Sequence[str] = (),
    **budget: int,
) -> Run:
    """The version's attacks, or those of the given names, one after the other."""
    counter = Counter(f)
    with torch.no_grad():
        z = f(x)
    run = reference(counter, z.shape[1], threat, version, seed, **budget, device=x.device)
    clean = z.argmax(1) == y
    alive, components = clean.clone(), {}
    for name in attacks or run.attacks_to_run:
        part = reference_component(run, name)
        rows = alive.nonzero().squeeze(1)
        counter.forwards = counter.backwards = 0
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]), without_gradients_kept(f):
            for some in rows.split(batch_size):
                if len(some):
                    x_adv = part.perturb(x[some].clone(), y[some].clone())
                    with torch.no_grad():
                        alive[some] = f(x_adv).argmax(1) == y[some]
        kills = len(rows) - int(alive.sum())  # a GPU has finished now
        seconds = time.perf_counter() - start
        components[name] = {
            "given": len(rows),
            "forwards": counter.forwards,
            "backwards": counter.backwards,
            "seconds": seconds,
            "kills": kills,
        }
    return {"clean": clean.int().tolist(), "robust": alive.int().tolist(), "components": components}


@contextlib.contextmanager
def without_gradients_kept(f: nn.Module) -> Iterator[None]:
    """The reference fills the weights' gradients; they go afterwards."""
    try:
        yield
    finally:
        f.zero_grad(set_to_none=True)
