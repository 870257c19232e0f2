"""Trainers side by side at equal data: each configuration is trained and scored, and one table is made of all of them.

    runs/<label>          the runs; from the second seed on runs/<label>-seed<s>
    evaluations/<label>   their best checkpoints under PGD and the suite: ledgers, and records that `leaderboard add` takes
    compare.md .csv .json the table; written again after every run

The first row is what the others are tested against, on the same test images. What is done is not repeated: with ``resume`` an
interrupted comparison goes on with the epoch, or the batch of the evaluation, that it was in. Two processes may share the work:
each compares a part of the configurations into the same folder, and a last call over all of them makes the table.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustlab import commands
from robustlab import config as configuration
from robustlab.config import Config, dump
from robustlab.files import atomic_write, sha256, write_json
from robustlab.reporting import Run, differences, read_run
from robustlab.types import Suite, UserError

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """One configuration with one seed: ``label`` is that of its row, ``folder`` that of its run, ``path`` the file."""

    label: str
    path: Path
    config: Config
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "best.safetensors"


def compare(
    paths: Sequence[Path],
    *,
    out: Path = Path("comparison"),
    seeds: int = 1,
    suite: str = "autoattack",
    pgd: str = "pgd-50-10",
    num_examples: int | None = None,
    batch_size: int = 128,
    settings: Sequence[str] = (),
    data_root: str | None = None,
    resume: bool = False,
    progress: Progress = lambda event: None,
) -> dict[str, Any]:
    """Train every configuration, score its best checkpoint, and write the table.

    Args:
        paths: configuration files; the first is what the others are tested against. A file that is given twice counts once.
        out: everything lies in this folder.
        seeds: how many for each: that of the file and the following ones. All files are trained with the first seed before any is
            with the second.
        suite: what robust accuracy is measured with: a name or a YAML file.
        pgd: a second, weaker suite, for the column beside it.
        num_examples: the first so many test images; None takes the suite's number, else all.
        batch_size: images per attack call.
        settings: ``key=value``, for all files.
        data_root: of the data sets' files.
        resume: go on with what is in ``out``.
        progress: takes the events of trainings and evaluations, and ``{"row": label, "seed", "number", "of", "doing", "probe",
            "eta", "whole"}`` when one of these begins: ``probe`` are the steps of the training's probe, ``eta`` is in seconds,
            and of the trainings alone (``whole`` is False) before the first evaluation.

    Returns:
        What ``compare.json`` holds; see :func:`table`.

    Raises:
        UserError: nothing to compare: a file with mistakes, different data sets or threat models, a suite without attacks, a folder
            with another comparison. Before the first step.
    """
    from robustlab.evaluation.threats import threats_of

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("compare: runs in one process; `robustlab train` and `evaluate` know torchrun")
    first = _read(paths, settings, out)
    _check_equal(first)
    suites = {"pgd": configuration.load_suite(pgd), "suite": configuration.load_suite(suite)}
    for name, plan in suites.items():
        if not threats_of(plan, first[0].config.threat):
            raise UserError(f"compare: --{name} {plan.name} has no attacks")
    jobs = [_with_seed(job, number) for number in range(seeds) for job in first]
    same = {**{name: dump(plan) for name, plan in suites.items()}, "num_examples": num_examples, "batch_size": batch_size}
    _begin(out, same, jobs, resume)
    costs = {job.label: _cost(job, out) for job in first}
    clock = _Clock(jobs, costs)
    found: dict[str, Any] = {}
    measured: list[Measured] = []
    for number, job in enumerate(jobs, 1):

        def begin(doing: str, number: int = number, job: Job = job) -> None:
            left = [j for j in jobs[number - 1 :] if not _done(j, suites, out)]
            event = {"row": job.label, "seed": job.config.seed, "number": number, "of": len(jobs), "doing": doing}
            steps = job.config.training.probe.steps
            progress({**event, "probe": steps, "eta": clock.left(left), "whole": clock.evaluated > 0})

        _train(job, begin, progress, clock)
        _evaluate(job, suites, same, data_root, out, begin, progress, clock)
        measured.append(measure(job, suites, out))
        found = table(measured, suites, costs, planned=len(jobs))
        _write(found, out)
    return found


# ------------------------------------------------------------------------------------------------------------ beforehand


def _read(paths: Sequence[Path], settings: Sequence[str], out: Path) -> list[Job]:
    """The files as jobs, each once; a label is the file's name, with its folder's where two files share one."""
    files = list({path.resolve(): path for path in paths}.values())
    stems = [path.stem for path in files]
    labels = [s if stems.count(s) == 1 else f"{p.resolve().parent.name}-{s}" for s, p in zip(stems, files, strict=True)]
    mistakes, jobs = [], []
    for label, path in zip(labels, files, strict=True):
        if labels.count(label) > 1:
            raise UserError(f"compare: {labels.count(label)} files would be called '{label}'; rename one")
        try:
            jobs.append(Job(label, path, configuration.load_config(path, settings), out / "runs" / label))
        except UserError as error:
            mistakes += error.lines
    if mistakes:
        raise UserError(*dict.fromkeys(mistakes))
    return jobs


def _check_equal(jobs: Sequence[Job]) -> None:
    """Refuse files whose data or threat models differ. Augmentation belongs to the method, a folder to the machine."""
    told = []
    for job in jobs:
        data = {k: v for k, v in dump(job.config.data).items() if k not in ("augment", "root")}
        told.append({"data": data, "threat": dump(job.config.threat)})
    for key, values in differences(told).items():
        other = next(i for i, v in enumerate(values) if v != values[0])
        raise UserError(
            f"compare: {key} is {values[0]!r} in {jobs[0].path} and {values[other]!r} in {jobs[other].path}: "
            "methods are compared at equal data under one threat model"
        )


def _with_seed(job: Job, number: int) -> Job:
    if number == 0:
        return job
    seed = job.config.seed + number
    folder = job.folder.with_name(f"{job.label}-seed{seed}")
    return dataclasses.replace(job, config=dataclasses.replace(job.config, seed=seed), folder=folder)


def _begin(out: Path, settings: Mapping[str, Any], jobs: Sequence[Job], resume: bool) -> None:
    """Refuse, before anything is done, what would be found out in an hour."""
    from robustlab.training.checkpointing import read_state_meta
    from robustlab.training.loop import check_same

    if len({job.folder for job in jobs}) < len(jobs):
        raise UserError("compare: a file is called as another one's second seed; rename it")
    path = out / "settings.json"
    if path.exists():
        if not resume:
            raise UserError(f"{out}: holds a comparison already; go on with it with --resume, or choose another --out")
        old = json.loads(path.read_text(encoding="utf-8"))
        for key, values in differences([old, dict(settings)]).items():
            raise UserError(
                f"{out}: a comparison with another {key}: {values[0]!r} there, {values[1]!r} here; choose another --out"
            )
    for job in jobs:
        if (state := job.folder / "state.safetensors").exists():
            check_same(commands.prepare(job.config)[0], read_state_meta(state)["config"], state)
    write_json(path, dict(settings))


def _cost(job: Job, out: Path) -> dict[str, Any]:
    """Counted passes and expected seconds of a configuration; kept, so that they are counted once."""
    path, told = out / "costs" / f"{job.label}.json", dump(job.config)
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["config"] == json.loads(json.dumps(told)):
            return dict(kept["cost"])
    plan = commands.dry_run(job.config)
    cost = {k: plan[k] for k in ("parameters", "images", "forwards", "backwards", "seconds")}
    write_json(path, {"config": told, "cost": cost})
    return cost


class _Clock:
    """How long is left: trainings by what was counted beforehand, evaluations by the mean of those that were done."""

    def __init__(self, jobs: Sequence[Job], costs: Mapping[str, Mapping[str, Any]]):
        self.expected = {job.folder: float(costs[job.label]["seconds"]) for job in jobs}
        self.trained = self.trained_expected = self.seconds = 0.0
        self.evaluated = 0

    def train(self, job: Job, seconds: float) -> None:
        self.trained, self.trained_expected = self.trained + seconds, self.trained_expected + self.expected[job.folder]

    def evaluate(self, seconds: float) -> None:
        self.seconds, self.evaluated = self.seconds + seconds, self.evaluated + 1

    def left(self, jobs: Sequence[Job]) -> float:
        ratio = self.trained / self.trained_expected if self.trained_expected else 1.0
        trainings = sum(self.expected[job.folder] for job in jobs if not ended(job))
        return ratio * trainings + len(jobs) * self.seconds / max(self.evaluated, 1)


# ------------------------------------------------------------------------------------------------------------- one run


def ended(job: Job) -> bool:
    """Whether the run has reached its last epoch, or a guard has stopped it."""
    from robustlab.training.loop import finished

    return finished(job.folder, job.config.training.epochs) or bool(_stopped(_run(job)))


def _run(job: Job) -> Run | None:
    try:
        return read_run(job.folder)
    except UserError:
        return None


def _stopped(run: Run | None) -> str:
    return str(run.epochs[-1].get("stopped", "")) if run is not None and run.epochs else ""


def _train(job: Job, begin: Callable[[str], None], progress: Progress, clock: _Clock) -> None:
    if ended(job):
        return
    begin("train")
    path, begun = None if job.path.is_absolute() else job.path.as_posix(), time.perf_counter()
    outcome = commands.train(job.config, job.folder, resume=True, progress=progress, config_path=path)
    if outcome.resumed is None:
        clock.train(job, time.perf_counter() - begun)


def _evaluate(
    job: Job,
    suites: Mapping[str, Suite],
    same: Mapping[str, Any],
    data_root: str | None,
    out: Path,
    begin: Callable[[str], None],
    progress: Progress,
    clock: _Clock,
) -> None:
    if not job.checkpoint.exists():  # stopped before its first probe
        return
    whole, begun = True, time.perf_counter()
    for name, plan in suites.items():
        if _record(job, plan, out) is not None:
            whole = False
            continue
        begin(plan.name)
        commands.evaluate_one(
            str(job.checkpoint),
            [plan],
            data_root=data_root,
            num_examples=same["num_examples"],
            batch_size=same["batch_size"],
            device=job.config.training.device,
            out=out / "evaluations",
            resume=True,
            reliability=name == "suite",
            progress=progress,
        )
    if whole:
        clock.evaluate(time.perf_counter() - begun)


def _record(job: Job, suite: Suite, out: Path) -> tuple[Any, Path] | None:
    """The finished evaluation of a run's best checkpoint under a suite, and its ledger."""
    from robustlab.results.record import read_record

    if not job.checkpoint.exists():
        return None
    resolved, digest = json.loads(json.dumps(dump(suite))), sha256(job.checkpoint)
    for path in sorted((out / "evaluations" / job.folder.name).glob("*/record.json")):
        record = read_record(path)
        if record.suite.name == suite.name and record.suite.resolved == resolved and record.model.checkpoint == digest:
            return record, path.with_name("ledger.jsonl")
    return None


def _done(job: Job, suites: Mapping[str, Suite], out: Path) -> bool:
    return ended(job) and (not job.checkpoint.exists() or all(_record(job, s, out) is not None for s in suites.values()))


# ----------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Measured:
    """A finished job: the figures of its run, and the suite's verdict on each test image; None where there is no checkpoint."""

    job: Job
    figures: dict[str, Any]
    verdict: list[bool] | None
    fingerprint: str | None


def table(
    measured: Sequence[Measured], suites: Mapping[str, Suite], costs: Mapping[str, Mapping[str, Any]], *, planned: int
) -> dict[str, Any]:
    """What finished jobs have shown, JSON-able.

    Returns:
        ``suite pgd threat data models n seeds done planned command commit``, ``bound`` (the suite gives upper bounds), and
        ``rows``, one for each label: ``label trainer fidelity model passes``; ``runs``, one for each seed, with ``clean pgd
        robust`` (``k n accuracy interval``, Wilson), ``seconds`` of the training, ``gap`` (``points`` that the last probe lies
        under the best one), ``paired`` (against the first row's run with the same number; None for the first row); and over the
        seeds ``clean pgd robust seconds gap difference``, each with ``mean``, ``interval`` (Student; of one seed: of its images,
        or None) and ``of``, how many.

    Raises:
        UserError: runs that were scored on different images.
    """
    scored = [m for m in measured if m.fingerprint is not None]
    for m in scored:
        if m.fingerprint != scored[0].fingerprint:
            raise UserError(f"compare: {m.job.folder.name} and {scored[0].job.folder.name} were scored on different test images")
    by_label: dict[str, list[Measured]] = {}
    for m in measured:
        by_label.setdefault(m.job.label, []).append(m)
    first, *others = by_label.values()
    rows = [_row(first, (), costs), *(_row(own, first, costs) for own in others)]
    config = measured[0].job.config
    return {
        "suite": suites["suite"].name,
        "pgd": suites["pgd"].name,
        "threat": dump(config.threat),
        "data": config.data.name,
        "models": sorted({m.job.config.model.name for m in measured}),
        "n": scored[0].figures["robust"]["n"] if scored else None,
        "bound": any(m.figures["bound"] for m in measured),
        "seeds": len(first),
        "done": len(measured),
        "planned": planned,
        "command": commands.command_line(),
        "commit": commands.commit(),
        "rows": rows,
    }


def _row(own: Sequence[Measured], first: Sequence[Measured], costs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    job = own[0].job
    method, cost, epochs = job.config.trainer, costs[job.label], job.config.training.epochs
    forwards, backwards = cost["forwards"], cost["backwards"]
    passes = {"told": method.passes, "forwards": forwards, "backwards": backwards, "replays": method.replays, "epochs": epochs}
    passes["total"] = (forwards + backwards) * method.replays * epochs
    runs = [{**m.figures, "paired": _paired(first[i : i + 1], m)} for i, m in enumerate(own)]
    told = {"label": job.label, "trainer": method.name, "fidelity": method.fidelity, "model": job.config.model.name}
    return {**told, "passes": passes, "runs": runs, **_over(runs)}


def measure(job: Job, suites: Mapping[str, Suite], out: Path) -> Measured:
    """What a finished job has shown."""
    from robustlab.evaluation.rederive import rederive

    run = _run(job)
    assert run is not None
    gap = run.gap()
    told: dict[str, Any] = {
        "seed": job.config.seed,
        "folder": job.folder.name,
        "seconds": sum(e.get("seconds", 0.0) for e in run.epochs),
        "gap": gap and {"points": gap["points"], "best": gap["best"]["epoch"], "last": gap["last"]["epoch"]},
        "stopped": _stopped(run),
        "rolled_back": next((e["rolled_back"] for e in run.epochs if "rolled_back" in e), ""),
        "bound": False,
        **dict.fromkeys(("clean", "pgd", "robust", "reliability")),
    }
    weak, strong = (_record(job, suites[name], out) for name in ("pgd", "suite"))
    if weak is None or strong is None:
        return Measured(job, told, None, None)
    record, ledger = strong
    figures = {"clean": record.metrics.clean, "pgd": weak[0].metrics.robust, "robust": record.metrics.robust}
    told |= {key: value.model_dump(mode="json") for key, value in figures.items()}
    told["bound"] = record.metrics.threats[0].audit is not None
    told["reliability"] = record.reliability.verdict if record.reliability is not None else None
    robust = rederive(ledger).robust
    assert robust is not None
    return Measured(job, told, robust.tolist(), record.data.fingerprint)


def _paired(first: Sequence[Measured], second: Measured) -> dict[str, Any] | None:
    """McNemar's test of a run against that of the first row."""
    from robustlab.evaluation.statistics import mcnemar

    if not first or first[0].verdict is None or second.verdict is None:
        return None
    paired = mcnemar(first[0].verdict, second.verdict)
    return dataclasses.asdict(paired) | {"difference": paired.difference}


def _over(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and intervals over the seeds; of a single one, the interval over its images."""
    from robustlab.evaluation.statistics import over_seeds

    def summary(key: str, of: str | None) -> dict[str, Any] | None:
        known = [run[key] for run in runs if run[key] is not None]
        if not known:
            return None
        mean, interval = over_seeds([v[of] if of else v for v in known])
        alone = known[0].get("interval") if of else None
        return {"mean": mean, "interval": list(interval) if len(known) > 1 else alone, "of": len(known)}

    shares = {key: summary(key, "accuracy") for key in ("clean", "pgd", "robust")}
    others = {"seconds": summary("seconds", None), "gap": summary("gap", "points")}
    return {**shares, **others, "difference": summary("paired", "difference")}


def _write(found: Mapping[str, Any], out: Path) -> None:
    from robustlab.report.comparison import csv_text, markdown

    write_json(out / "compare.json", found)
    atomic_write(out / "compare.md", markdown(found))
    atomic_write(out / "compare.csv", csv_text(found))
