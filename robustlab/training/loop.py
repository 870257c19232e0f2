"""The loop over epochs: batches, steps, probes, guards, checkpoints. Resumed, it goes on as if nothing had happened.

Everything that a sample meets is keyed by its ticket, ``epoch * 2^40 + position``, and everything that couples a
batch by the global number of the micro-batch, so the state of a run is its tensors and its epoch."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlab.config import Config, Training, build, dump
from robustlab.files import sweep
from robustlab.outer import Outer, context_of
from robustlab.rng import Rng
from robustlab.training import distributed
from robustlab.training.checkpointing import load_state, read_state_meta, save_state
from robustlab.training.guards import (
    FINE,
    Act,
    Verdict,
    above_chance,
    catastrophic_overfitting,
    finite_loss,
    finite_weights,
)
from robustlab.training.refresh import refresh_statistics
from robustlab.training.step import check_shards, train_step
from robustlab.training.trackers import open_trackers
from robustlab.types import Splits, Trainer, UserError, View, Views, World, one_hot, with_threat

TICKETS_PER_EPOCH = 2**40
UNWATCHED = {"best": 0.0, "rolled_back": ""}  # of the guard against catastrophic overfitting

# fields of a configuration that may change between a run and its resumption
_FREE = (("training", "device"), ("training", "threads"), ("data", "root"), ("logging",), ("evaluation",))


@dataclass(frozen=True)
class Hooks:
    """What the loop is given from outside, since it knows neither attacks nor evaluation nor the screen.

    Attributes:
        probe: model -> named accuracies on the validation split; ``val_clean`` at least, ``val_robust`` where there is an attack.
        watch: model -> accuracy under PGD on training images; called where ``training.guards.overfitting`` is set.
        export: (path, model, metrics) writes a checkpoint from which the model can be rebuilt alone.
        progress: takes a dict at every step and at every event.
    """

    probe: Callable[[nn.Module], dict[str, float]]
    watch: Callable[[nn.Module], float]
    export: Callable[[Path, nn.Module, dict[str, Any]], None]
    progress: Callable[[dict[str, Any]], None] = lambda event: None


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        epochs: epochs trained in all.
        metrics: of the last probe.
        best: metrics of the best probe.
        stopped: why a guard ended the run, or "".
        rolled_back: why a guard went back and changed the attack, or "".
        resumed: the epoch at which this process took over, or None.
    """

    epochs: int
    metrics: dict[str, Any]
    best: dict[str, Any]
    stopped: str = ""
    rolled_back: str = ""
    resumed: int | None = None


def fit(
    config: Config, f: nn.Module, splits: Splits, folder: Path, hooks: Hooks, *, world: World, device: torch.device, resume: bool
) -> Outcome:
    """Train ``f`` as configured; write ``metrics.jsonl``, ``last``, ``best`` and the resume state into ``folder``.

    Args:
        config: the run.
        f: the classifier, on its device.
        splits: the data; test is not touched.
        folder: the run's folder, held by this process.
        hooks: probe, export, progress.
        world: the processes.
        device: of the batches.
        resume: go on where the folder's state stands.

    Raises:
        UserError: the configuration asks for something impossible, or the folder holds another run.
    """
    t, rng = config.training, Rng(config.seed)
    trainer, safer = complete_trainer(config), safer_trainer(config)
    check_shards(trainer, world.size * t.accumulation)
    plan = plan_of(config, splits, world)
    length = {"batch_size": plan.size, "steps": plan.steps * t.epochs, "epochs": t.epochs}
    ctx = context_of(f, splits.num_classes, samples(splits), splits.image_shape, **length)
    outer = placed(Outer(f, trainer.at(0, t.epochs), ctx, t.precision, world), t, device)
    optimizer = config.optimizer.build(outer.parameters())
    state_path = folder / "state.safetensors"
    start, best, metrics, seen, watched = 0, {}, {}, 0, dict(UNWATCHED)
    if resume and state_path.exists():
        meta = load_state(state_path, outer, optimizer)
        check_same(config, meta["config"], state_path)
        start, best, metrics, seen, watched = (meta[k] for k in ("epoch", "best", "metrics", "metrics_bytes", "watched"))
    if world.rank == 0:
        sweep(folder)
    distributed.wrap(outer)
    if t.compile:
        f.compile()
    jsonl, others = open_trackers(config.logging, folder, dump(config), seen) if world.rank == 0 else (None, [])
    verdict, epoch = FINE, start
    with contextlib.ExitStack() as closing:
        for tracker in [*([jsonl] if jsonl else []), *others]:
            closing.callback(tracker.close)
        while epoch < t.epochs and verdict.act is not Act.STOP:
            method = safer if watched["rolled_back"] else trainer
            event, verdict = run_epoch(config, method, outer, optimizer, splits, plan, rng, epoch, hooks.progress, device)
            distributed.average_buffers(outer, world)
            if verdict.act is Act.CONTINUE:
                verdict = guard_epoch(config, outer, hooks, epoch, watched, event)
            last = epoch + 1 == t.epochs
            if verdict.act is Act.CONTINUE and (last or not (epoch + 1) % t.probe.every or not (epoch + 1) % t.checkpoint_every):
                refresh_average(config, method, outer, splits, plan, rng.child("refresh"), epoch, device)
            if verdict.act is Act.CONTINUE and (last or (epoch + 1) % t.probe.every == 0):
                with eager(config):
                    metrics = {"epoch": epoch + 1, **hooks.probe(outer.averaged())}
                verdict = above_chance(metrics["val_clean"], splits.num_classes, epoch, t.guards.collapse)
            event |= {k: v for k, v in metrics.items() if metrics.get("epoch") == epoch + 1}
            improved = metrics.get("epoch") == epoch + 1 and score(metrics) > score(best)
            best = metrics if improved else best
            if verdict.act is not Act.CONTINUE:
                event[{Act.STOP: "stopped", Act.ROLLBACK: "rolled_back"}[verdict.act]] = verdict.reason
            if world.rank == 0 and jsonl is not None:
                for tracker in (jsonl, *others):
                    tracker.log(event)
                if verdict.act is Act.CONTINUE:
                    if improved:
                        hooks.export(folder / "best.safetensors", outer.averaged(), metrics)
                    due = last or (epoch + 1) % t.checkpoint_every == 0
                    if due:
                        hooks.export(folder / "last.safetensors", outer.averaged(), metrics)
                    if due or (safer is not trainer and not watched["rolled_back"]):  # what a rollback returns to
                        position = {"epoch": epoch + 1, "best": best, "metrics": metrics, "metrics_bytes": jsonl.length}
                        save_state(state_path, outer, optimizer, {**position, "watched": watched, "config": dump(config)})
            hooks.progress(event)
            distributed.barrier(world)
            if verdict.act is Act.ROLLBACK:
                meta = load_state(state_path, outer, optimizer)
                epoch, watched = meta["epoch"], {**meta["watched"], "rolled_back": verdict.reason}
            else:
                epoch += 1
    return Outcome(epoch, metrics, best, verdict.reason, watched["rolled_back"], start if resume and start else None)


def eager(config: Config) -> contextlib.AbstractContextManager[Any]:
    """A compiled model runs as it is inside: a few looks do not pay for compiling its other modes and batch sizes."""
    return torch.compiler.set_stance("force_eager") if config.training.compile else contextlib.nullcontext()


def guard_epoch(config: Config, outer: Outer, hooks: Hooks, epoch: int, watched: dict[str, Any], event: dict[str, Any]) -> Verdict:
    """What the guards say after an epoch. ``watched`` keeps the best accuracy seen, ``event`` takes the present one."""
    guards = config.training.guards
    verdict = finite_weights(outer, epoch) if guards.nan else FINE
    if guards.overfitting is None or verdict.act is not Act.CONTINUE:
        return verdict
    with eager(config):
        now = event["train_robust"] = hooks.watch(outer.f)
    rule = guards.overfitting
    verdict = catastrophic_overfitting(now, watched["best"], rule.drop, epoch, rule.act, bool(watched["rolled_back"]))
    watched["best"] = max(watched["best"], now)
    return verdict


def complete_trainer(config: Config) -> Trainer:
    """The configured trainer: its open threat models filled, the data set's augmentation before everything else."""
    trainer = with_threat(config.trainer, config.threat)
    return dataclasses.replace(trainer, inner=(*config.data.augment, *trainer.inner))


def safer_trainer(config: Config) -> Trainer:
    """What trains after a rollback: the configured trainer, the guard's attack in place of its own.

    Raises:
        UserError: the trainer has no attack that could be replaced, or the threat model has no PGD to watch with.
    """
    rule = config.training.guards.overfitting
    if rule is not None and config.threat.norm == "l0":
        raise UserError("training.guards.overfitting: it looks with PGD, which knows linf, l2 and l1, not l0")
    if rule is None or rule.act != "rollback":
        return complete_trainer(config)
    attack = rule.attack or build("attack", "pgd", steps=10, rel_step=0.25)
    crafts = [stage.crafts for stage in config.trainer.inner]
    if not any(crafts):
        raise UserError(f"training.guards.overfitting: {config.trainer.name} has no attack that a rollback could replace")
    inner = tuple(
        build("stage", "craft", attack=attack, on=stage.on, to=stage.to) if craft else stage
        for stage, craft in zip(config.trainer.inner, crafts, strict=True)
    )
    return complete_trainer(dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, inner=inner)))


def score(metrics: dict[str, Any]) -> tuple[float, float]:
    """What ``best`` means: robust accuracy on the validation split, then clean accuracy."""
    return (metrics.get("val_robust", -1.0), metrics.get("val_clean", -1.0))


def check_same(config: Config, saved: dict[str, Any], path: Path) -> None:
    """Refuse to go on with a run of another configuration; the line names the first key that differs.

    Raises:
        UserError: they differ in something that matters.
    """
    new, old = _flat(dump(config)), _flat(saved)
    for key in sorted(new.keys() | old.keys()):
        if any(key.split(".")[: len(free)] == list(free) for free in _FREE):
            continue
        if new.get(key) != old.get(key):
            raise UserError(
                f"{path.parent}: holds a run of another configuration: {key} is {old.get(key)!r} there and {new.get(key)!r} here; "
                "choose another --out"
            )


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        out = {at: f"{type(value).__name__} of {len(value)}"} if not isinstance(value, dict) else {}
        for k, v in items:
            out |= _flat(v, f"{at}.{k}" if at else str(k))
        return out
    return {at: value}


class Plan:
    """Which positions of an epoch's random order each micro-batch of this process gets.

    Args:
        count: training images.
        batch_size: images of a step, over all processes and micro-batches.
        accumulation: micro-batches per step.
        world: the processes.
        ratio: share of each batch that is extra data. Its places are spread evenly over the batch, and so over the shards; an epoch
            has as many steps as without, and sees that much less of the training images.

    Raises:
        UserError: the batch size cannot be divided.
    """

    def __init__(self, count: int, batch_size: int, accumulation: int, world: World, ratio: float = 0.0):
        self.size = min(batch_size, count)
        parts = accumulation * world.size
        if self.size % parts:
            raise UserError(
                f"training.batch_size: {self.size} images cannot be divided among {world.size} processes"
                f" x {accumulation} micro-batches"
            )
        self.steps = count // self.size
        self.count, self.accumulation, self.world = count, accumulation, world
        self.micro = self.size // parts
        self.extra = round(ratio * self.size)

    def micro_batches(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(positions in the epoch, indices into the data, -1 for extra data) of this process's micro-batches, through one epoch."""
        for step in range(self.steps):
            for a in range(self.accumulation):
                place = (a * self.world.size + self.world.rank) * self.micro + torch.arange(self.micro)
                before = place * self.extra // self.size  # extra images at earlier places of the batch
                is_extra = (place + 1) * self.extra // self.size > before
                real = step * (self.size - self.extra) + place - before
                yield step * self.size + place, order[real.masked_fill(is_extra, 0)].masked_fill(is_extra, -1)

    def first(self, step: int) -> int:
        """The global number of this process's first micro-batch of a step, counted over the whole run."""
        return step * self.accumulation * self.world.size + self.world.rank


def plan_of(config: Config, splits: Splits, world: World) -> Plan:
    """The plan of a configuration's epochs."""
    ratio = config.data.extra.ratio if config.data.extra and splits.extra is not None else 0.0
    return Plan(len(splits.train), config.training.batch_size, config.training.accumulation, world, ratio)


def samples(splits: Splits) -> int:
    """How many images a run can meet: those for training, then the extra ones."""
    return len(splits.train) + (len(splits.extra) if splits.extra is not None else 0)


def placed(outer: Outer, t: Training, device: torch.device) -> Outer:
    """The classifier and all that learns with it, on the device and in the memory format that was asked for."""
    layout = torch.channels_last if t.channels_last else torch.preserve_format
    return outer.to(device, memory_format=layout)  # type: ignore[call-overload,no-any-return]


def loader(splits: Splits, plan: Plan, rng: Rng, epoch: int, device: torch.device, channels_last: bool = False) -> Iterator[Views]:
    """The epoch's micro-batches as views ``clean``. In ``index`` the extra images come after the training images."""
    order = rng.child("order", epoch).permutation(plan.count)
    pairs = [(epoch * TICKETS_PER_EPOCH + positions, index) for positions, index in plan.micro_batches(order)]
    keys = torch.stack([key for key, _ in pairs]).to(device) if pairs else ()  # at once: each transfer waits for the device
    wanted = (i[i >= 0] for _, i in pairs)
    real = ((x, checked_one_hot(y, splits.num_classes, x), i) for x, y, i in splits.train.batches(filter(len, wanted), device))
    extra: Iterator[tuple[Tensor, Tensor, Tensor]] = iter(())
    if plan.extra and splits.extra is not None:
        drawn = (with_replacement(rng.child("extra").at(key[i < 0]), len(splits.extra)) for key, i in pairs)
        extra = ((x, y, i + plan.count) for x, y, i in splits.extra.batches(filter(len, drawn), device))
    for (_, index), key in zip(pairs, keys, strict=True):
        is_extra = (index < 0).long()
        found = [next(images) for images, there in ((real, 1 - is_extra), (extra, is_extra)) if there.any()]
        if len(found) == 2:
            place = is_extra.argsort(stable=True).argsort().to(device)
            found = [tuple(torch.cat(v)[place] for v in zip(*found, strict=True))]  # type: ignore[list-item]
        x, y, i = found[0]
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        yield {"clean": View(x=x, y=y, key=key, index=i)}


def checked_one_hot(y: Tensor, num_classes: int, like: Tensor) -> Tensor:
    """Labels (N,) as probabilities (N, K). Data sets check their labels; to check each batch again would wait for a GPU."""
    return one_hot(y, num_classes, like.dtype) if y.device.type == "cpu" else F.one_hot(y, num_classes).to(like.dtype)


def with_replacement(rng: Rng, count: int) -> Tensor:
    """A position below ``count`` (up to 2^48) for each ticket."""
    u = rng.uniform((2,), dtype=torch.float64)
    return ((u[:, 0] + u[:, 1] * 2.0**-24) * count).long()


def looks_after(device: torch.device) -> int:
    """Steps between two looks at the losses: a GPU runs dry for each."""
    return 1 if device.type == "cpu" else 20


def run_epoch(
    config: Config,
    trainer: Trainer,
    outer: Outer,
    optimizer: torch.optim.Optimizer,
    splits: Splits,
    plan: Plan,
    rng: Rng,
    epoch: int,
    progress: Callable[[dict[str, Any]], None],
    device: torch.device,
) -> tuple[dict[str, Any], Verdict]:
    """One epoch of steps: its event (mean terms, learning rate, seconds) and the guards' verdict."""
    t, begun = config.training, time.perf_counter()
    batches = loader(splits, plan, rng, epoch, device, t.channels_last)
    sums: dict[str, Tensor] = {}
    lr, recent = 0.0, list[tuple[int, Tensor]]()
    patience = looks_after(device)
    for s in range(plan.steps):
        micro = [next(batches) for _ in range(plan.accumulation)]
        number = epoch * plan.steps + s
        for replay in range(trainer.replays):
            now = epoch + (s + replay / trainer.replays) / plan.steps
            lr = config.optimizer.lr * config.schedule.at(now, t.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            terms = train_step(
                outer,
                micro,
                trainer.at(now, t.epochs),
                optimizer,
                rng.child("step"),
                first=plan.first(number),
                stride=plan.world.size,
                clip_grad=t.clip_grad,
            )
            plan.world.mean_([v for v in terms.values()])
            for name, value in terms.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
            recent += [(s, terms["loss"])] if t.guards.nan else []
            if recent and (len(recent) >= patience or s + 1 == plan.steps):
                for step, loss in zip([k for k, _ in recent], torch.stack([v for _, v in recent]).tolist(), strict=True):
                    verdict = finite_loss(loss, epoch, step)
                    if verdict.act is Act.STOP:
                        event = {"kind": "epoch", "epoch": epoch + 1, "step": epoch * plan.steps + step + 1, "loss": loss}
                        return event, verdict
                recent.clear()
        progress({"kind": "step", "epoch": epoch, "epochs": t.epochs, "step": s + 1, "steps": plan.steps, "terms": terms})
    seconds = time.perf_counter() - begun
    means = {name: float(value) / (plan.steps * trainer.replays) for name, value in sums.items()}
    speed = plan.steps * plan.size * trainer.replays / seconds
    event = {"kind": "epoch", "epoch": epoch + 1, "step": (epoch + 1) * plan.steps, "lr": lr, **means}
    return event | {"seconds": round(seconds, 3), "images_per_second": round(speed, 1)}, FINE


def refresh_average(
    config: Config, trainer: Trainer, outer: Outer, splits: Splits, plan: Plan, rng: Rng, epoch: int, device: torch.device
) -> None:
    """Give the averaged weights BatchNorm statistics of their own, if they ask for it."""
    t = config.training
    count = getattr(trainer.averaging, "refresh", 0) * t.accumulation
    if count:
        batches = itertools.islice(loader(splits, plan, rng, epoch, device, t.channels_last), count)
        first = plan.first(epoch * plan.steps)
        refresh_statistics(outer, batches, trainer.at(epoch + 1, t.epochs), rng.child("step"), first, plan.world.size)
        distributed.average_buffers(outer, plan.world)


def finished(folder: Path, epochs: int) -> bool:
    """Whether the folder's run has reached its last epoch."""
    path = folder / "state.safetensors"
    return path.exists() and read_state_meta(path)["epoch"] >= epochs
