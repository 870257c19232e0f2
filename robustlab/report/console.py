"""The screen: one progress line with the time left on a terminal, one plain line per epoch or batch elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from robustlab.results.leaderboard import format_eps

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

_FIGURES = {"lr", "loss", "seconds", "images_per_second", "val_clean", "val_robust", "train_robust"}
_NOT_TERMS = {"kind", "epoch", "step", "stopped", "rolled_back", *_FIGURES}


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} it/s" if task.speed else "", style="dim")


def bar() -> Progress:
    """A progress line that vanishes when done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        _Speed(),
        TextColumn("eta"),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]{task.fields[note]}"),
    )
    return Progress(*columns, console=err, transient=True)


def terms_text(event: dict[str, Any]) -> str:
    """``loss .93 (adv .71 robust .22)`` from an event's named terms."""
    terms = {k: float(v) for k, v in event.items() if k not in _NOT_TERMS and isinstance(v, int | float)}
    inner = f" ({' '.join(f'{k} {v:.3f}' for k, v in terms.items())})" if len(terms) > 1 else ""
    return f"loss {event['loss']:.3f}{inner}"


def accuracies_text(event: dict[str, Any], attack: str) -> str:
    parts = [f"val clean {event['val_clean']:.1%}"] if "val_clean" in event else []
    return "  ".join(parts + ([f"{attack} {event['val_robust']:.1%}"] if "val_robust" in event else []))


def gap_text(best: dict[str, Any], last: dict[str, Any], attack: str) -> str:
    """Robust overfitting in one line: what the last epoch has lost against the best one, by the probe."""
    name = "val_robust" if "val_robust" in last else "val_clean"
    lost = 100 * (best[name] - last[name])
    return f"robust overfitting: last is {lost:.1f} points under best ({attack if name == 'val_robust' else 'val clean'})"


class _Screen:
    """Holds the progress line: on a terminal while the context lasts, elsewhere there is none (``_bar`` is None)."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if err.is_terminal:
            self._bar = bar()
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class TrainingScreen(_Screen):
    """Shows a training run under its title; call it with the loop's events. Nothing is shown before the first one."""

    def __init__(self, probe_steps: int, title: str = ""):
        super().__init__()
        self._title = title
        self.attack = f"val pgd-{probe_steps}"
        self._begun = time.perf_counter()
        self._first: int | None = None
        self._total = 1
        self._terms = self._note = ""

    def __call__(self, event: dict[str, Any]) -> None:
        if self._title:
            (self._bar.console if self._bar else err).print(self._title, markup=False)
            self._title = ""
        if event["kind"] == "step":
            self._step(event)
        else:
            self._epoch(event)

    def _step(self, event: dict[str, Any]) -> None:
        done, total = event["epoch"] * event["steps"] + event["step"], event["epochs"] * event["steps"]
        self._first = done - 1 if self._first is None else self._first
        self._total = total
        if self._bar is None:
            return
        if self._task is None:
            self._task = self._bar.add_task("", total=total, completed=done - 1, note="")
        if event["step"] % 5 == 1:
            self._terms = terms_text({k: float(v) for k, v in event["terms"].items()})
        note = f"{self._terms}  {self._note}"
        self._bar.update(self._task, completed=done, description=f"epoch {event['epoch'] + 1}/{event['epochs']}", note=note)

    def _epoch(self, event: dict[str, Any]) -> None:
        accuracies = accuracies_text(event, self.attack)
        self._note = accuracies or self._note
        if "seconds" not in event:
            return
        line = f"epoch {event['epoch']:>3}  lr {event['lr']:.4f}  {terms_text(event)}"
        spent = time.perf_counter() - self._begun
        done = event["step"] - (self._first or 0)
        left = spent / max(done, 1) * (self._total - event["step"])
        line += f"  {accuracies}" if accuracies else ""
        if self._bar is None:
            err.print(f"{line}  {event['images_per_second']:.0f} img/s  eta {duration(left)}", markup=False)
        elif accuracies:
            self._bar.console.print(line, markup=False)
        if "rolled_back" in event:
            (self._bar.console if self._bar else err).print(f"rolled back: {event['rolled_back']}", markup=False)


class EvaluationScreen(_Screen):
    """Shows an evaluation; call it with the runner's events."""

    def __init__(self, label: str):
        super().__init__()
        self.label = label
        self._suite = ""

    def __call__(self, event: dict[str, Any]) -> None:
        threat = event["threat"]
        where = f" {threat['norm']} {format_eps(threat['eps'], threat['norm'])}" if threat else ""
        kept = f"{event['correct']} of {event['given']} remain" if threat else f"{event['correct']} of {event['given']} correct"
        text = f"{self.label}  {event['suite']}{where}  batch {event['batch'] + 1}  {event['attack']}: {kept}"
        if self._bar is None:
            if threat is None and event["seconds"] < 1:
                return
            err.print(f"{text}  {event['seconds']:.1f} s", markup=False)
            return
        if self._task is None or self._suite != event["suite"]:
            self._suite = event["suite"]
            self._task = self._bar.add_task("", total=event["n"], note="")
        self._bar.update(self._task, completed=event["done"], description=f"{self.label}  {event['suite']}", note=text)


class AuditScreen(EvaluationScreen):
    """Shows an audit: which of its parts runs, about how long it will take, and the progress of the suites inside."""

    def __init__(self, label: str):
        super().__init__(label)
        self._begun, self._told = time.perf_counter(), 0

    def __call__(self, event: dict[str, Any]) -> None:
        if "part" not in event:
            super().__call__(event)
            if self._bar is None and event["threat"] is not None and event["done"] > self._told:
                self._told = event["done"]
                left = (time.perf_counter() - self._begun) / self._told * (event["n"] - self._told)
                err.print(f"{self.label}  {self._told} of {event['n']} images done, eta {duration(left)}", markup=False)
            return
        self._begun, self._told = time.perf_counter(), 0
        about = f", about {duration(event['seconds'])}" if event.get("seconds") else ""
        text = f"{self.label}  part {event['number']} of {event['of']}: {event['part']}{about}"
        (self._bar.console if self._bar else err).print(text, markup=False, style="dim")


class ComparisonScreen:
    """Shows a comparison: which run of how many, how long is left, and the progress of what is done for it."""

    def __init__(self) -> None:
        self._inner: TrainingScreen | EvaluationScreen | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._inner is not None:
            self._inner.__exit__(*exc)
            self._inner = None

    def __call__(self, event: dict[str, Any]) -> None:
        if "row" in event:
            self.__exit__()
            left = f"eta {duration(event['eta'])}" + ("" if event["whole"] else " for the trainings")
            what = f"{event['number']} of {event['of']}: {event['row']}, seed {event['seed']}: {event['doing']}"
            err.print(f"{what}  {left}", markup=False, style="dim")
            self._inner = TrainingScreen(event["probe"]) if event["doing"] == "train" else EvaluationScreen(event["row"])
            self._inner.__enter__()
        elif err.is_terminal or event.get("kind") != "epoch" or "val_clean" in event:
            assert self._inner is not None
            self._inner(event)


def run_text(run: Any) -> str:
    """What a configuration trains, in one line."""
    what = f"{run.model.name} on {run.data.name}, {run.threat.norm} {format_eps(run.threat.eps, run.threat.norm)}"
    return f"{run.trainer.name} ({run.trainer.fidelity}): {what}"


def record_text(record: Any) -> str:
    """A record in one line per fact."""
    m, n = record.metrics, record.data.n
    lines = [f"{record.model.label}  {record.suite.name}  {record.data.name}, {n} images, seed {record.seed}, {record.precision}"]
    lines.append(f"  clean   {share(m.clean.accuracy, m.clean.interval)}")
    for t in m.threats:
        known = share(t.robust_accuracy, t.interval)
        lines.append(f"  robust  {known}  {t.norm} {format_eps(t.eps, t.norm)}{upper_bound(t.audit)}")
    for name, values in m.corruptions.items():
        severities = " ".join(f"{v:.1%}" for s, v in sorted(values.items()) if s != "mean")
        lines.append(f"  {name:<16}  {values['mean']:6.1%}  by severity {severities}")
    if m.corruption_scores is not None:
        lines += score_lines(m.corruption_scores)
    elif m.corruption_accuracy is not None:
        lines.append(f"  mean over corruptions {m.corruption_accuracy:.1%}")
    lines += reliability_lines(record.reliability)
    c = record.cost
    passes = f"{c.forwards_per_sample:,.0f} forwards, {c.backwards_per_sample:,.0f} backwards an image"
    lines.append(f"  cost    {passes}; {duration(c.seconds)}")
    return "\n".join(lines)


def score_lines(s: Any) -> list[str]:
    """What accuracies under corruptions come to, with the images' source and the names of the baselines."""
    lines = [f"  corruptions  {share(s.mean, s.interval)}  mean over all, {s.source}; unnormalised error {s.error:.1%}"]
    lines.append(f"    worst {s.worst.accuracy:.1%}: {s.worst.corruption}, severity {s.worst.severity}")
    for name, value in s.mce.items():
        lines.append(f"    mCE {value:.2%}, relative mCE {s.relative_mce[name]:.2%}  against {name}")
    if s.ece is not None:
        lines.append(f"    ECE {s.ece.mean:.2%} mean over corruptions, {s.ece.clean:.2%} on clean images")
    if s.robust is not None:
        where = f"{s.robust.norm} {format_eps(s.robust.eps, s.robust.norm)}"
        lines.append(f"    attacked {s.robust.mean:.1%}  mean over corruptions of what an attack leaves, {where}")
    return lines


def upper_bound(audit: Any) -> str:
    """What stands behind an accuracy that is only a bound: nothing for exact suites."""
    if audit is None:
        return ""
    text = ": an upper bound on robust accuracy\n  audit   "
    if not audit.survivors:
        return f"{text}no need: all survivors were given all of {audit.suite}"
    if not audit.audited:
        return f"{text}none; {audit.survivors} survivors were not given all of {audit.suite}"
    passes = f"{audit.forwards + audit.backwards:,} passes, {duration(audit.seconds)}, seed {audit.seed}"
    return (
        f"{text}{audit.audited} of {audit.survivors} survivors that were not given all of {audit.suite}: {audit.misses} broken; "
        f"of the others it breaks at most {audit.left}, {audit.points:.2f} points (one-sided, 95 %); {passes}"
    )


def reliability_lines(report: Any) -> list[str]:
    """The verdict in one line, and one line for each check that did not pass."""
    if report is None:
        return []
    left_out = f"; {len(report.skipped)} left out ({'; '.join(dict.fromkeys(report.skipped.values()))})" if report.skipped else ""
    if report.verdict is None:
        return [f"  reliability  not examined{left_out}"]
    lines = [f"  reliability  {report.verdict}: {len(report.checks)} checks on {report.n} images{left_out}"]
    for check in report.checks:
        if check.verdict != "pass":
            figure = "no number" if check.figure is None else f"{check.figure:.3g}"
            lines.append(f"    {check.verdict}  {check.name}: {figure} ({check.measure}). {check.advice}")
    return lines


def rescored_text(found: Any) -> str:
    """What saved adversarial images show, in one line per fact."""
    norm, eps = found.threat.norm, found.threat.eps
    lines = [f"{found.n} images, {found.clean} of them classified correctly when clean"]
    lines.append(f"  robust  {share(found.robust_accuracy, found.interval)}  {norm} {format_eps(eps, norm)}")
    if found.outside:
        lines.append(f"  {found.outside} lay outside ball or box and were projected before they were scored")
    if found.changed:
        lines.append(f"  {found.changed} verdicts differ from those in the file")
    return "\n".join(lines)


def diff_text(found: dict[str, Any]) -> str:
    """How two runs differ, in one line per fact."""
    first, second = found["names"]
    lines = [f"{first} against {second}, {found['n']} test images"]
    lines += [f"  {key}: {a} -> {b}" for key, (a, b) in found["config"].items()]
    for name, gap in zip(found["names"], found["gaps"], strict=True):
        if gap is not None:
            best, last = (f"{gap[k]['val_robust']:.1%} (epoch {gap[k]['epoch']})" for k in ("best", "last"))
            lines.append(f"  {name}: best probe {best}, last {last}, robust overfitting {gap['points']:.1f} points")
    for what, p in found["paired"].items():
        a, b = ((p.first_only + p.both) / found["n"], (p.second_only + p.both) / found["n"])
        told = "told apart" if p.p < 0.05 else "not told apart"
        lines.append(
            f"  {what}: {a:.1%} -> {b:.1%}, difference {100 * p.difference:+.1f} points; only the first {p.first_only}, only the "
            f"second {p.second_only}; McNemar p = {p.p:.3g}: {told}"
        )
    return "\n".join(lines)


def share(value: float, interval: Sequence[float]) -> str:
    return f"{value:6.1%}  (95 %: {interval[0]:.1%} to {interval[1]:.1%})"


def duration(seconds: float) -> str:
    """``1h02``, ``3m20`` or ``12s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}"
    return f"{whole // 60}m{whole % 60:02d}" if whole >= 60 else f"{whole}s"


def columns(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text, one line a row and never folded: for files and pipes, where :func:`table` would fold at an assumed width."""
    grid = [names, *rows]
    widths = [max(len(row[i]) for row in grid) for i in range(len(names))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in grid)


def show_rows(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: folded to the width of a terminal, one line a row elsewhere."""
    out.print(table("", names, rows) if out.is_terminal else columns(names, rows), markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Table:
    """A table of strings; the columns numbered in ``right`` are right-aligned."""
    grid = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        grid.add_column(name, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*[Text(str(cell)) for cell in row])
    return grid
