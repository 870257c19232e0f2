"""What the commands do, without the screen: training, attacks, evaluation and results brought together.

``cli`` prints and parses; this module is also the Python interface behind ``rl.train`` and ``rl.evaluate``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlab import config as configuration
from robustlab import registry
from robustlab.config import Config, dump
from robustlab.files import atomic_write, exclusive, sha256
from robustlab.modes import bn_mode, frozen
from robustlab.nodes import parse
from robustlab.outer import Outer, Precise, context_of
from robustlab.rng import Rng
from robustlab.types import (
    Alone,
    BoundSuite,
    Dataset,
    ImageSet,
    Model,
    Splits,
    Suite,
    Threat,
    Trainer,
    UserError,
    World,
    one_hot,
)

Progress = Callable[[dict[str, Any]], None]

# ----------------------------------------------------------------------------------------------------------- training


def torch_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device: '{name}' is not available here; expected auto, cpu, or cuda on a machine with a GPU") from None
    return device


def complete_model(model: Model, splits: Splits) -> Model:
    """The model with its open fields filled from the data.

    Raises:
        UserError: the model has another number of classes or channels than the data.
    """
    channels = splits.image_shape[0]
    for name, here in (("num_classes", splits.num_classes), ("in_channels", channels)):
        asked = getattr(model, name, None)
        if asked is not None and asked != here:
            raise UserError(f"model.{name}: the model has {asked}, the data {here}")
    known = {"num_classes": splits.num_classes, "in_channels": channels, "mean": splits.mean, "std": splits.std}
    own_statistics = any(f.name == "arch" for f in dataclasses.fields(model))
    fill = {
        f.name: known[f.name]
        for f in dataclasses.fields(model)
        if f.name in known and getattr(model, f.name) is None and not (own_statistics and f.name in ("mean", "std"))
    }
    return dataclasses.replace(model, **fill)


def prepare(config: Config) -> tuple[Config, Splits, nn.Module]:
    """Load the data and build the model, its weights drawn from the seed.

    Returns:
        The configuration with the model's open fields filled, the data, and the model on the CPU.
    """
    from robustlab.data.extra import with_extra

    splits = with_extra(config.data, config.data.load())
    for split in ("train", "validation"):
        if len(getattr(splits, split)) == 0:
            raise UserError(f"data: '{config.data.name}' has no {split} images here; they are needed to train")
    config = dataclasses.replace(config, model=complete_model(config.model, splits))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Rng(config.seed).child("init").key % 2**63)
        try:
            f = config.model.build()
            with torch.no_grad(), bn_mode(f, "eval"):
                z = f(torch.zeros(1, *splits.image_shape))
        except UserError:
            raise
        except (ValueError, RuntimeError) as error:
            shape = "x".join(map(str, splits.image_shape))
            raise UserError(f"model: {config.model.name} cannot take images of {shape}: {str(error).splitlines()[0]}") from None
    if z.shape != (1, splits.num_classes):
        raise UserError(f"model: gives {tuple(z.shape)} for one image; the data has {splits.num_classes} classes")
    return config, splits, f


def export_meta(
    config: Config, splits: Splits, trainer: Trainer, metrics: Mapping[str, Any], config_path: str | None, config_hash: str | None
) -> dict[str, Any]:
    """The metadata block of a checkpoint."""
    return {
        "model": dump(config.model),
        "image_shape": list(splits.image_shape),
        "num_classes": splits.num_classes,
        "class_names": list(splits.class_names),
        "threat": dump(config.threat),
        "trainer": trainer.name,
        "fidelity": trainer.fidelity,
        "config": dump(config),
        "config_path": config_path,
        "config_hash": config_hash,
        "metrics": dict(metrics),
        "epoch": metrics.get("epoch"),
    }


def probe(f: nn.Module, images: ImageSet, config: Config, num_classes: int, device: torch.device) -> dict[str, float]:
    """Clean accuracy on a split and accuracy under PGD on its first images."""
    p, threat = config.training.probe, config.threat
    attack = configuration.build("attack", "pgd", norm=threat.norm, eps=threat.eps, steps=p.steps) if threat.norm != "l0" else None
    right = robust = 0
    rows = torch.arange(len(images))
    callee = Precise(f, config.training.precision)
    with frozen(f), bn_mode(f, "eval"):
        for x, y, index in images.batches(rows.split(256), device):
            with torch.no_grad():
                right += int((callee(x).argmax(-1) == y).sum())
            few = index < p.num_examples
            if attack is None or not bool(few.any()):
                continue
            x, y, index = x[few], y[few], index[few]
            x_adv, _ = attack.run(callee, x, one_hot(y, num_classes, x.dtype), Rng(config.seed).child("probe").at(index))
            with torch.no_grad():
                robust += int((callee(x_adv).argmax(-1) == y).sum())
    out = {"val_clean": right / len(images)}
    return out | ({"val_robust": robust / min(p.num_examples, len(images))} if attack is not None else {})


def watch(f: nn.Module, images: ImageSet, config: Config, num_classes: int, device: torch.device) -> float:
    """Accuracy under PGD on the training images that the guard against catastrophic overfitting looks at."""
    rule, threat = config.training.guards.overfitting, config.threat
    assert rule is not None
    attack = configuration.build("attack", "pgd", norm=threat.norm, eps=threat.eps, steps=rule.steps)
    rng = Rng(config.seed).child("watch")
    rows = rng.permutation(len(images))[: rule.num_examples]
    callee, right = Precise(f, config.training.precision), 0
    with frozen(f), bn_mode(f, "eval"):
        for x, y, index in images.batches(rows.split(256), device):
            x_adv, _ = attack.run(callee, x, one_hot(y, num_classes, x.dtype), rng.at(index))
            with torch.no_grad():
                right += int((callee(x_adv).argmax(-1) == y).sum())
    return right / len(rows)


def default_out(path: Path) -> Path:
    """``runs/<folder>/<name>`` of a configuration file."""
    return Path("runs") / path.resolve().parent.name / path.stem


def train(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress = lambda event: None,
    config_path: str | None = None,
) -> Any:
    """Train as configured, into the folder ``out``.

    Args:
        config: the run.
        out: its folder; must be new, or hold this very run if ``resume``.
        resume: go on where the folder stands; a new folder is started.
        progress: takes a dict at every step and at the end of every epoch.
        config_path: where the configuration was read from, for provenance.

    Returns:
        ``training.loop.Outcome``.

    Raises:
        UserError: something asked for is impossible; nothing is left behind.
    """
    from robustlab.models.checkpoint import save_checkpoint
    from robustlab.training import distributed
    from robustlab.training.checkpointing import read_state_meta
    from robustlab.training.loop import Hooks, check_same, complete_trainer, fit

    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    device = distributed.local_device(torch_device(config.training.device))
    config, splits, f = prepare(config)
    digest = sha256(config_path) if config_path is not None and Path(config_path).is_file() else None
    state = out / "state.safetensors"
    if resume and state.exists():
        check_same(config, read_state_meta(state)["config"], state)
    elif not resume and (state.exists() or (out / "metrics.jsonl").exists()):
        raise UserError(f"{out}: holds a run already; add --resume to go on with it, or choose another --out")
    f, trainer = f.to(device), complete_trainer(config)

    def export(path: Path, model: nn.Module, metrics: dict[str, Any]) -> None:
        save_checkpoint(path, model, export_meta(config, splits, trainer, metrics, config_path, digest))

    hooks = Hooks(
        lambda model: probe(model, splits.validation, config, splits.num_classes, device),
        lambda model: watch(model, splits.train, config, splits.num_classes, device),
        export,
        progress,
    )
    with distributed.joined(device) as world, contextlib.ExitStack() as stack:
        if world.rank == 0:
            stack.enter_context(exclusive(out))
        fresh = not state.exists()
        try:
            if world.rank == 0 and fresh:
                atomic_write(out / "config.yaml", configuration.to_yaml(dump(config)))
            return fit(config, f, splits, out, hooks, world=world, device=device, resume=resume)
        except UserError:
            if world.rank == 0 and fresh and not state.exists():
                stack.callback(_forget, out)
            raise


def _forget(folder: Path) -> None:
    """Remove a folder that a run made before it turned out to be impossible."""
    for name in ("config.yaml", "metrics.jsonl", ".lock"):
        path = folder / name
        if path.is_file() and (name != "metrics.jsonl" or path.stat().st_size == 0):
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def dry_run(config: Config) -> dict[str, Any]:
    """What a run would be: parameters, passes per sample, and the time it would take by three timed steps.

    Returns:
        ``parameters``, ``images``, ``steps`` per epoch, ``forwards`` and ``backwards`` per sample and step, ``seconds`` in all.
    """
    from robustlab.training.loop import complete_trainer, loader, placed, plan_of, samples
    from robustlab.training.step import check_shards, train_step
    from robustlab.types import Alone

    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    device = torch_device(config.training.device)
    config, splits, f = prepare(config)
    f, t = f.to(device), config.training
    check_shards(config.trainer, t.accumulation)
    plan = plan_of(config, splits, Alone())
    trainer = complete_trainer(config).at(0, t.epochs)
    ctx = context_of(f, splits.num_classes, samples(splits), splits.image_shape, batch_size=plan.size)
    outer = placed(Outer(f, trainer, ctx, t.precision), t, device)
    optimizer = config.optimizer.build(outer.parameters())
    rng = Rng(config.seed)
    batches = loader(splits, plan, rng, 0, device, t.channels_last)
    forwards = backwards = rows = 0

    def forward_hook(module: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal forwards, backwards
        images = _images(out)
        forwards += images
        if out.requires_grad:

            def count(grad: Tensor) -> None:
                nonlocal backwards
                backwards += images

            out.register_hook(count)

    times = []
    for step in range(min(4, plan.steps)):
        micro = [next(batches) for _ in range(t.accumulation)]
        counted = step == min(1, plan.steps - 1)  # a first step may pay for more: a fit, for example
        handle = f.register_forward_hook(forward_hook) if counted else None
        begun = time.perf_counter()
        terms = train_step(outer, micro, trainer, optimizer, rng.child("step"), clip_grad=t.clip_grad)
        float(terms["loss"])  # a GPU has finished now
        times.append(time.perf_counter() - begun)
        if handle is not None:
            handle.remove()
            rows = plan.size
    warm = sorted(times[1:] or times)
    return {
        "parameters": sum(p.numel() for p in f.parameters()),
        "images": len(splits.train),
        "steps": plan.steps,
        "forwards": forwards / rows,
        "backwards": backwards / rows,
        "seconds": warm[len(warm) // 2] * plan.steps * trainer.replays * t.epochs,
        "device": str(device),
    }


def _images(z: Tensor) -> int:
    """The images behind a classifier's logits; under ``vmap``, where each looks like one alone, all of them."""
    inner, images = z, len(z)
    while torch._C._functorch.is_functorch_wrapped_tensor(inner):
        inner = torch._C._functorch.get_unwrapped(inner)
    return images * inner.numel() // z.numel()


# --------------------------------------------------------------------------------------------------------- evaluation


def command_line() -> str:
    """The command that is running, as one would type it."""
    program = Path(sys.argv[0]).name
    ours = program in ("robustlab", "__main__.py", "cli.py")
    return shlex.join(["robustlab" if ours else program, *sys.argv[1:]])


def commit() -> str | None:
    """The commit of the working tree that robustlab runs from, or None."""
    where = Path(__file__).parent
    if not (where.parent / ".git").exists():
        return None
    try:
        answer = subprocess.run(["git", "-C", str(where), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def model_label(spec: str) -> str:
    """What tables call a model: a run's folder for its best checkpoint, else the name in short."""
    path = Path(spec)
    if path.suffix != ".safetensors":
        return spec
    folder = path.resolve().parent.name
    return folder if path.stem == "best" else f"{folder}-{path.stem}"


def choose_data(name: str | None, meta: Mapping[str, Any] | None, root: str | None) -> Dataset:
    """The data set to evaluate on: the one named (``digits``, or YAML such as ``{name: digits, size: 8}``), else the training's.

    Raises:
        UserError: nothing is named and the model does not say; an unknown name or field.
    """
    trained: dict[str, Any] = dict((meta or {}).get("config", {}).get("data", {}))
    if name is None and not trained:
        raise UserError("this model does not say which data it is for: give --data, for example --data digits")
    spec = parse(name, "--data").plain() if name is not None else {"name": trained["name"]}
    spec = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(spec, dict):
        raise UserError(f"--data {name}: expected the name of a data set, or a mapping with one")
    if spec.get("name") == trained.get("name"):
        spec = {**trained, **spec}
    for key in ("augment", "extra"):
        spec.pop(key, None)
    return configuration.build("dataset", spec | ({"root": root} if root else {}))


def load_pair(
    spec: str, data: str | None, data_root: str | None, device: torch.device
) -> tuple[nn.Module, dict[str, Any] | None, Dataset, Splits]:
    """A model, what its checkpoint says, and the data set to score it on, loaded.

    Raises:
        UserError: either cannot be had, or they differ in their number of classes.
    """
    from robustlab.models.checkpoint import load_model

    f = load_model(spec, device)
    meta: dict[str, Any] | None = getattr(f, "robustlab_meta", None)
    part = choose_data(data, meta, data_root)
    splits = part.load()
    if meta is not None and splits.num_classes != meta["num_classes"]:
        raise UserError(f"{spec}: the model has {meta['num_classes']} classes, the data set '{part.name}' {splits.num_classes}")
    return f, meta, part, splits


def side_by_side() -> contextlib.AbstractContextManager[World]:
    """The processes of this run; see ``training.distributed``."""
    if "WORLD_SIZE" not in os.environ:
        return contextlib.nullcontext(Alone())
    from robustlab.training import distributed

    return distributed.side_by_side()


def evaluate_one(
    spec: str,
    suites: Sequence[Suite],
    *,
    data: str | None = None,
    data_root: str | None = None,
    norm: str | None = None,
    eps: float | None = None,
    seed: int | None = None,
    num_examples: int | None = None,
    batch_size: int = 128,
    device: str = "auto",
    precision: str = "fp32",
    out: Path = Path("evaluations"),
    resume: bool = False,
    reliability: bool = True,
    shard: tuple[int, int] | None = None,
    save_adversarial: Path | None = None,
    audit: int | None = None,
    audit_bound: float | None = None,
    progress: Progress | None = None,
    world: World | None = None,
) -> list[tuple[Any, Path]]:
    """Score one model under several suites; writes a ledger and a record for each below ``out``.

    Args:
        spec: a checkpoint, ``timm:NAME``, ``torchvision:NAME`` or ``package.module:callable``.
        suites: what to run; empty means what the model's own configuration names.
        data, data_root: see :func:`choose_data`.
        norm, eps: the threat model; None takes the one that the model was trained for.
        seed, num_examples, batch_size, precision, resume, reliability, save_adversarial, progress: as in
            ``evaluation.runner.evaluate``.
        device: ``auto``, ``cpu``, ``cuda``.
        audit, audit_bound: as there, for the suites that have audits; at least one has to.
        out: folder; a result lies in ``out/<model>/<suite>``.
        shard: (i, n), one of n pieces; it lies in ``shard-i-of-n`` there, and its record is called ``shard.json``.
        world: several processes share the batches: each does one shard, the first puts them together. ``out`` is a folder that all
            of them see. Of ``save_adversarial`` each writes its own file, ``NAME-i-of-n``.

    Returns:
        (record, its path) for each suite, in order; nothing in processes other than the first.

    Raises:
        UserError: anything that does not fit, before the first pass.
    """
    from robustlab.evaluation import shards
    from robustlab.evaluation.runner import evaluate
    from robustlab.evaluation.threats import threats_of
    from robustlab.results.record import record_from, write_record

    where, world = torch_device(device), world or Alone()
    if several := world.size > 1:
        from robustlab.training.distributed import local_device

        if shard is not None:
            raise UserError(f"--shard {shard[0]}/{shard[1]}: {world.size} processes share out the batches themselves")
        where, shard = local_device(where), (world.rank + 1, world.size)
    f, meta, part, splits = load_pair(spec, data, data_root, where)
    known = (meta or {}).get("config", {})
    if not suites:
        suites = [configuration.load_suite(name) for name in known.get("evaluation", {}).get("suites", [])]
    if not suites:
        raise UserError(f"{spec}: give --suite; there are: {', '.join(registry.entries('suite'))}")
    if save_adversarial is not None and len(suites) > 1:
        raise UserError(f"--save-adversarial {save_adversarial}: one suite at a time, got {', '.join(s.name for s in suites)}")
    asked = {"audit": audit, "audit_bound": audit_bound}
    if asked != dict.fromkeys(asked) and not any(isinstance(s, BoundSuite) for s in suites):
        raise UserError(f"--audit: {', '.join(s.name for s in suites)}: nothing is spared any attack here, so nothing to audit")
    trained = (meta or {}).get("threat", {})
    norm = norm or trained.get("norm")
    eps = eps if eps is not None else (trained.get("eps") if norm == trained.get("norm") else None)
    try:
        threat = Threat(norm, eps) if norm is not None and eps is not None else None  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"--eps: {error}") from None
    model = {
        "name": spec,
        "label": model_label(spec),
        "checkpoint": sha256(spec) if Path(spec).is_file() else None,
        "trainer": (meta or {}).get("trainer"),
        "fidelity": (meta or {}).get("fidelity"),
        "architecture": (meta or {}).get("model", {}).get("name"),
        "parameters": sum(p.numel() for p in f.parameters()),
    }
    n = len(splits.test)
    out_model, results = out / model_label(spec).replace(":", "-").replace("/", "-"), []
    for suite in suites:
        threats = threats_of(suite, threat)
        single = f"-{threats[0].norm}-{threats[0].eps:.6g}" if len(threats) == 1 else ""
        whole = out_model / f"{suite.name}{single}"
        folder = whole / shards.folder_of(shard) if shard else whole
        if several:
            shards.check_enough(world.size, min(num_examples or suite.num_examples or n, n), batch_size)
            shards.check_place(whole, world.size, resume=resume)
            world.gather(torch.zeros(1))  # nobody begins before all have looked
        shown = (lambda event, name=suite.name: progress({"suite": name, **event})) if progress else None
        result = evaluate(
            f,
            splits.test,
            suite,
            threat=threat,
            seed=seed,
            batch_size=batch_size,
            device=where,
            precision=precision,  # type: ignore[arg-type]
            num_examples=num_examples,
            out=folder,
            resume=resume,
            reliability=reliability and shard is None,  # a merge would drop it
            shard=shard,
            save_adversarial=save_adversarial if not several else _own_file(save_adversarial, shard),
            progress=shown,
            **(asked if isinstance(suite, BoundSuite) else {}),  # type: ignore[arg-type]
        )
        record = record_from(
            result,
            model=model,
            data={"name": part.name, "split": "test"},
            command=command_line(),
            config=(meta or {}).get("config_path"),
            config_hash=(meta or {}).get("config_hash"),
            commit=commit(),
        )
        path = folder / (SHARD_RECORD if shard else "record.json")
        if not (path.exists() and _same_but_time(path, record)):
            write_record(path, record)
        if several:
            world.gather(torch.zeros(1))  # all are done
            if world.rank > 0:
                continue
            own = [whole / shards.folder_of((i + 1, world.size)) for i in range(world.size)]
            examine = functools.partial(shards.reliability, f, splits.test, device=where)
            record, path = merge(own, again=resume, examine=examine if reliability else None)
        results.append((record, path))
    return results


def _own_file(path: Path | None, shard: tuple[int, int] | None) -> Path | None:
    """``adv.npz`` as ``adv-1-of-2.npz``."""
    return path if path is None or shard is None else path.with_stem(f"{path.stem}-{shard[0]}-of-{shard[1]}")


SHARD_RECORD = "shard.json"  # not record.json: a piece is no result, and boards collect results


def merge(
    ledgers: Sequence[Path],
    out: Path | None = None,
    *,
    again: bool = False,
    examine: Callable[[Any], dict[str, Any] | None] | None = None,
) -> tuple[Any, Path]:
    """Put the ledgers of all shards of an evaluation together; writes the ledger and record that a single run writes.

    Args:
        ledgers: of the shards, or the folders that hold them.
        out: the folder to write to; None is the folder that the shards' folders lie in.
        again: the folder may hold this very result already.
        examine: makes the reliability report of a result.

    Returns:
        The record and its path.

    Raises:
        UserError: shards that overlap, are missing, unfinished or of different evaluations; a result is there already.
    """
    from robustlab.evaluation import shards
    from robustlab.results.record import read_record, record_from, write_record

    paths = [path / "ledger.jsonl" if path.is_dir() else path for path in ledgers]
    header, entries = shards.merge(paths)
    records = [read_record(path.with_name(SHARD_RECORD)) for path in paths]
    for path, record in zip(paths, records, strict=True):
        if record.provenance.ledger != sha256(path):
            raise UserError(f"{path}: not the ledger that {path.with_name(SHARD_RECORD)} was made from; go on with it: --resume")
        if record.data.fingerprint != records[0].data.fingerprint:
            raise UserError(f"{path}: a shard of other images than {paths[0]}")
    folder = out or paths[0].parent.parent
    if out is None and not all(path.parent.name.startswith("shard-") and path.parent.parent == folder for path in paths):
        raise UserError("merge: these shards do not lie in one folder: give --out")
    first = records[0]
    ledger = shards.write(folder, header, entries, again=again)
    result = shards.result_of(
        header, entries, fingerprint=first.data.fingerprint, environment=first.environment, ledger=str(ledger)
    )
    if examine is not None:
        result = dataclasses.replace(result, reliability=examine(result))
    known = first.model.model_dump(exclude={"hash"})
    data = {"name": first.data.name, "split": first.data.split}
    record = record_from(
        result,
        model=known,
        data=data,
        command=command_line(),
        config=first.provenance.config,
        config_hash=first.provenance.config_hash,
        commit=first.provenance.commit,
    )
    path = folder / "record.json"
    if not (path.exists() and _same_but_time(path, record)):
        write_record(path, record)
    return record, path


def rescore(
    files: Sequence[Path],
    spec: str,
    *,
    data: str | None = None,
    data_root: str | None = None,
    norm: str | None = None,
    eps: float | None = None,
    batch_size: int = 128,
    device: str = "auto",
) -> Any:
    """Score a model on files of adversarial images (several: those of the shards of one evaluation).

    Args:
        files: ``.npz`` or ``.safetensors``; see ``evaluation.adversarial``.
        spec, data, data_root, batch_size, device: as in :func:`evaluate_one`.
        norm, eps: the threat model; None takes the one that the file names, else the one that the model was trained for.

    Returns:
        ``evaluation.rescore.Rescored``.

    Raises:
        UserError: a file that cannot be read, or does not fit the data.
    """
    from robustlab.evaluation.adversarial import Images
    from robustlab.evaluation.rescore import rescore

    where = torch_device(device)
    named = next(Images(file).threat() for file in files)
    f, meta, _, splits = load_pair(spec, data, data_root, where)
    threat = None  # each file's own
    if named is None or norm is not None or eps is not None:
        known = dump(named) if named is not None else (meta or {}).get("threat", {})
        norm = norm or known.get("norm")
        eps = eps if eps is not None else known.get("eps") if norm == known.get("norm") else None
        try:
            threat = Threat(norm, eps) if norm is not None and eps is not None else None  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"--eps: {error}") from None
        if threat is None:
            raise UserError(
                f"{files[0]}: give --norm and --eps; neither the file nor the model names a radius for {norm or 'a norm'}"
            )
    scored = [rescore(f, splits.test, file, threat=threat, batch_size=batch_size, device=where) for file in files]
    return functools.reduce(operator.add, scored)


def _same_but_time(path: Path, record: Any) -> bool:
    """Whether the file holds this record already, made by an earlier command."""
    from robustlab.results.record import read_record

    try:
        old = read_record(path)
    except UserError:
        return False
    kept = record.reliability in (None, old.reliability)  # a report that nobody asked for this time stays
    return old.provenance.ledger == record.provenance.ledger and old.metrics == record.metrics and kept


def draw_cost(paths: Sequence[Path], out: Path) -> tuple[Path, Path]:
    """Draw robust accuracy against passes per image, from records or from the folders that hold them, to ``out`` .png and .svg.

    Raises:
        UserError: no record, or none with a curve, or several that do not belong in one figure.
    """
    from robustlab.report.figures import cost_curve
    from robustlab.results.record import read_record

    return cost_curve([read_record(p).model_dump(mode="json") for p in record_files(paths)], out)


def record_files(paths: Sequence[Path]) -> list[Path]:
    """The ``record.json`` files among these files and below these folders.

    Raises:
        UserError: there is none.
    """
    files = [found for path in paths for found in (sorted(path.rglob("record.json")) if path.is_dir() else [path])]
    if not files:
        raise UserError(f"{paths[0]}: holds no record.json")
    return files


def draw_corruptions(
    image: Path | None, data: str | None, data_root: str | None, index: int, suite: Suite, size: int | None, seed: int, out: Path
) -> tuple[Path, Path]:
    """Draw one image under all corruptions of a suite; see ``robustlab corrupt``.

    Raises:
        UserError: neither an image nor a data set, or both; a file that is no image; a suite without corruptions made here.
    """
    from robustlab.evaluation.corrupted import enlarged
    from robustlab.report.figures import corruption_grid

    if (image is None) == (data is None):
        raise UserError("corrupt: give an image file or --data, one of them")
    if not suite.corruptions or getattr(suite, "files", None):
        raise UserError(f"suite '{suite.name}': has no corruptions that are made here")
    if image is not None:
        x = _square(image, size or 224)
    else:
        test = choose_data(data, None, data_root).load().test
        if index >= len(test):
            raise UserError(f"--index {index}: the data set has {len(test)} test images")
        x = next(iter(test.batches([torch.tensor([index])])))[0]
    if (own := getattr(suite, "size", None)) is not None:
        x = enlarged(x, own)
    rows = []
    for c in suite.corruptions:
        images = [x, *(c(x, s, Rng(seed).child("corruption", c.name, s).at(torch.tensor([index]))) for s in suite.severities)]
        rows.append((c.name, [(i[0].permute(1, 2, 0).squeeze(-1) * 255).round().to(torch.uint8).numpy() for i in images]))
    return corruption_grid(rows, ["clean", *map(str, suite.severities)], out)


def _square(path: Path, size: int) -> Tensor:
    """An image file (1, 3, size, size) in [0, 1]: the largest centred square, resized."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            fitted = ImageOps.fit(file.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: cannot read the image: {error}") from None
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None].float() / 255


def build_board(folder: Path) -> list[Path]:
    """Write a leaderboard's tables, its curve of accuracy against eps where a suite has several radii, and the accuracy matrices of
    its corruption suites."""
    from robustlab.report.figures import accuracy_curve, accuracy_matrix
    from robustlab.results import leaderboard
    from robustlab.results.record import Record

    written: list[Path] = []
    records = [r.model_dump(mode="json") for _, r in leaderboard.entries(folder) if isinstance(r, Record)]
    swept = [r for r in records if len(r["metrics"]["threats"]) > 1]
    if swept:
        first = swept[0]["suite"]["name"]
        written += accuracy_curve([r for r in swept if r["suite"]["name"] == first], folder / "curve")
    for section in leaderboard.sections(folder):
        if section.figure is not None:
            named = [(row.model, leaderboard.peek(folder / row.entry)) for row in section.rows if row.provenance != "claimed"]
            written += accuracy_matrix(named, folder / section.figure)
    return [*leaderboard.build(folder), write_board_page(folder), *written]


def write_board_page(folder: Path) -> Path:
    """Write a board's ``index.html``."""
    import dataclasses

    from robustlab.files import atomic_write
    from robustlab.report.board_page import board_page
    from robustlab.results import leaderboard

    found = leaderboard.sections(folder)
    shown = [
        {
            "heading": s.heading,
            "facts": s.facts,
            "figure": folder / s.figure if s.figure and (folder / s.figure).exists() else None,
            "rows": [dataclasses.asdict(r) | {"links": leaderboard.link_pairs(r.links)} for r in s.rows],
        }
        for s in found
        if s.series is None
    ]
    curve = folder / "curve.png"
    told = dataclasses.asdict(leaderboard.read_board(folder))
    text = board_page(told, shown, leaderboard.sweeps(found), curve if curve.exists() else None)
    atomic_write(folder / "index.html", text)
    return folder / "index.html"


def export_board(folder: Path, out: Path, about: Path | None = None) -> list[Path]:
    """Write the records of a board's first table, and its claims, in RobustBench's layout.

    Args:
        folder: the board.
        out: gets ``model_info/<data>/<Linf|L2|corruptions>/<model>.json``.
        about: YAML, model to what a record does not know (``name authors link venue additional_data footnote ...``).

    Raises:
        UserError: a bad board; a record that RobustBench has no place for; ``about`` names no model of the board.
    """
    from robustlab.files import write_json
    from robustlab.results import leaderboard
    from robustlab.results.claim import card_folder, card_from
    from robustlab.results.record import read_record

    found = [s for s in leaderboard.sections(folder) if s.series is None]
    told = parse(about.read_text(encoding="utf-8"), str(about)).plain() if about is not None else {}
    rows = [row for row in found[0].rows if row.provenance == "ours"] if found else []
    if not isinstance(told, dict) or (unknown := [name for name in told if name not in [row.model for row in rows]]):
        raise UserError(f"{about}: {unknown[0] if isinstance(told, dict) else 'not a mapping'}: not a model of {folder}")
    written = []
    for row in rows:
        record = read_record(folder / row.entry)
        path = out / "model_info" / card_folder(record) / f"{row.model.replace('/', '-').replace(':', '-')}.json"
        write_json(path, card_from(record, told.get(row.model)).dump())
        written.append(path)
    return written


def push(run: Path, target: str, *, records: Sequence[Path] = (), private: bool = False) -> str:
    """Share a run's best checkpoint, in timm's hub layout with a model card.

    Args:
        run: the run's folder, or a checkpoint.
        target: ``hf:user/name``, or a local folder that gets the same files.
        records: results to put on the card; those of other weights are refused. Empty: those found below the run's folder.
        private: of a repository that is made.

    Returns:
        The repository's address, or the folder.

    Raises:
        UserError: no checkpoint, a record of another model, or the hub refuses.
    """
    import tempfile

    from robustlab.models import hub
    from robustlab.models.checkpoint import read_meta
    from robustlab.report.card import model_card
    from robustlab.results.record import read_record

    checkpoint = run / "best.safetensors" if run.is_dir() else run
    meta, digest = read_meta(checkpoint), sha256(checkpoint)
    found = [read_record(path) for path in (records or sorted(checkpoint.parent.rglob("record.json")))]
    if records and (other := [str(p) for p, r in zip(records, found, strict=True) if r.model.checkpoint != digest]):
        raise UserError(f"{other[0]}: a result of other weights than {checkpoint}")
    rows = [r.model_dump(mode="json") for r in found if r.model.checkpoint == digest]
    if not target.startswith(hub.PREFIX):
        return str(hub.write_folder(checkpoint, target, model_card(meta, rows, target)))
    with tempfile.TemporaryDirectory() as folder:
        hub.write_folder(checkpoint, folder, model_card(meta, rows, target))
        return hub.upload(folder, target, private=private)
