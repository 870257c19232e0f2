"""The command line. It parses, calls ``commands``, and prints; bad input is one line each and exit code 2."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from robustlab.types import UserError

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train, attack, score and rank robust image classifiers.",
)
board = typer.Typer(no_args_is_help=True, help="Leaderboards: folders of records, rendered as markdown and CSV.")
app.add_typer(board, name="leaderboard")

Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key: --set training.epochs=20")]
Out = Annotated[Path | None, typer.Option(help="Folder to write into.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the folder stands.")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder of the data sets' files; for cifar10 also one .npz file.")]

# ----------------------------------------------------------------------------------------------------------- training


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; `robustlab init` writes one.")],
    set_: Settings = None,
    out: Out = None,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the resolved run, its cost and its time; write nothing.")
    ] = False,
    data_root: DataRoot = None,
) -> None:
    """Train as a YAML file says. Writes last and best checkpoints, metrics and the state to resume from."""
    from robustlab import commands
    from robustlab.config import dump, load_config, to_yaml
    from robustlab.report import console

    settings = [*(set_ or []), *([f"data.root={json.dumps(str(data_root))}"] if data_root else [])]
    run = load_config(config, settings)
    if dry_run:
        plan = commands.dry_run(run)
        console.out.print(to_yaml(dump(run)), markup=False, end="")
        console.out.print(
            f"\n{console.run_text(run)}\n"
            f"{plan['parameters']:,} parameters; {plan['images']:,} training images, {plan['steps']} steps an epoch\n"
            f"{plan['forwards']:g} forward and {plan['backwards']:g} backward passes per image and step\n"
            f"about {console.duration(plan['seconds'])} for {run.training.epochs} epochs on {plan['device']} (from 3 timed steps)",
            markup=False,
        )
        return
    folder = out or commands.default_out(config)
    with console.TrainingScreen(run.training.probe.steps, f"{console.run_text(run)}; writes {folder}") as screen:
        outcome = commands.train(
            run,
            folder,
            resume=resume,
            progress=screen if _first_process() else lambda event: None,
            config_path=config.as_posix() if not config.is_absolute() else None,
        )
    if not _first_process():
        return
    if outcome.resumed is not None:
        done = "it was finished already" if outcome.resumed >= run.training.epochs else f"went on after epoch {outcome.resumed}"
        console.out.print(f"resumed: {done}", markup=False)
    if outcome.stopped:
        console.err.print(f"stopped: {outcome.stopped}", markup=False)
        raise typer.Exit(1)
    attack = f"val pgd-{run.training.probe.steps}"
    for label, metrics in (("best", outcome.best), ("last", outcome.metrics)):
        line = console.accuracies_text(metrics, attack)
        console.out.print(f"{label}  epoch {metrics['epoch']:>3}  {line}  {folder / label}.safetensors", markup=False)
    console.out.print(console.gap_text(outcome.best, outcome.metrics, attack), markup=False)
    console.err.print(f"next: robustlab evaluate {folder / 'best.safetensors'}", markup=False)


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


# --------------------------------------------------------------------------------------------------------- evaluation


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Checkpoints, timm:NAME, torchvision:NAME or package.module:callable.")],
    suite: Annotated[
        list[str] | None, typer.Option(help="A suite's name or YAML file; may be repeated. Default: what the run names.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Data set; default: the one of the training.")] = None,
    data_root: DataRoot = None,
    num_examples: Annotated[int | None, typer.Option("--num-examples", "-n", min=1, help="The first N test images.")] = None,
    norm: Annotated[str | None, typer.Option(help="linf, l2 or l1; default: the one of the training.")] = None,
    eps: Annotated[str | None, typer.Option(help="Radius in [0, 1] pixel units, such as 8/255; default: of the training.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of all draws; default: the suite's, else 0.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per attack call.")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[
        str,
        typer.Option(help="Of the attacks' search: fp32, bf16, or auto: bf16 where the hardware has it. Scores are in float32."),
    ] = "fp32",
    out: Annotated[Path, typer.Option(help="Folder for ledgers and records.")] = Path("evaluations"),
    resume: Resume = False,
    reliability: Annotated[
        bool, typer.Option(help="Examine whether the attacks' verdicts can be believed; at most 10 % of their passes more.")
    ] = True,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="One of N pieces, such as 2/5; then `robustlab merge`.")] = None,
    save_adversarial: Annotated[
        Path | None, typer.Option("--save-adversarial", help="Keep the adversarial images: a .npz or .safetensors file.")
    ] = None,
    audit: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="autoattack-fast and its like: give N random survivors the exact suite; 0: none."),
    ] = None,
    audit_bound: Annotated[
        float | None, typer.Option(min=0, max=100, metavar="P", help="Audit until at most P points can have been missed (95 %).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """Score models under suites of attacks and corruptions. Writes a per-sample ledger and a record for each.

    Under `torchrun` the processes share the batches; each writes its own ledger, the first puts them together.
    """
    from robustlab import commands
    from robustlab.config import load_suite
    from robustlab.report import console

    with commands.side_by_side() as world:
        suites = [load_suite(name) for name in suite or []]
        radius = read_radius(eps)
        if norm is not None and norm not in ("linf", "l2", "l1", "l0"):
            raise UserError(f"--norm {norm}: expected one of linf, l2, l1, l0")
        piece = read_shard(shard)
        if save_adversarial is not None and len(models) > 1:
            raise UserError(f"--save-adversarial {save_adversarial}: one model at a time, got {len(models)}")
        done = []
        for model in models:
            screen = console.EvaluationScreen(commands.model_label(model)) if world.rank == 0 else None
            with screen or contextlib.nullcontext():
                done += commands.evaluate_one(
                    model,
                    suites,
                    data=data,
                    data_root=str(data_root) if data_root else None,
                    norm=norm,
                    eps=radius,
                    seed=seed,
                    num_examples=num_examples,
                    batch_size=batch_size,
                    device=device,
                    precision=precision,
                    out=out,
                    resume=resume,
                    reliability=reliability,
                    shard=piece,
                    save_adversarial=save_adversarial,
                    audit=audit,
                    audit_bound=audit_bound,
                    progress=screen,
                    world=world,
                )
    if world.rank > 0:
        return
    if as_json:
        print(json.dumps([record.model_dump(mode="json") for record, _ in done], indent=2))
        return
    for record, path in done:
        console.out.print(console.record_text(record), markup=False)
        console.out.print(f"  {path}", markup=False, style="dim")


@app.command()
def audit(
    model: Annotated[str, typer.Argument(help="package.module:callable, a checkpoint, timm:NAME or torchvision:NAME.")],
    eps: Annotated[str | None, typer.Option(help="Radius in [0, 1] pixel units, such as 8/255.")] = None,
    norm: Annotated[str, typer.Option(help="linf, l2 or l1.")] = "linf",
    data: Annotated[str | None, typer.Option(help="Data set; default: the one of the training.")] = None,
    data_root: DataRoot = None,
    suite: Annotated[str, typer.Option(help="What the robust accuracy is measured with.")] = "autoattack",
    num_examples: Annotated[int, typer.Option("--num-examples", "-n", min=4, help="The first N test images.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of all draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per attack call.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("audits"),
    resume: Resume = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Say in one HTML report what the robustness of a model that you did not train is worth."""
    from robustlab import auditing, commands
    from robustlab.report import console

    radius = read_radius(eps)
    if radius is None:
        raise UserError("audit: give --eps, for example --eps 8/255")
    with console.AuditScreen(commands.model_label(model)) as screen:
        found, page = auditing.audit(
            model,
            data=data,
            data_root=str(data_root) if data_root else None,
            norm=norm,
            eps=radius,
            suite=suite,
            num_examples=num_examples,
            seed=seed,
            batch_size=batch_size,
            device=device,
            out=out,
            resume=resume,
            progress=screen,
        )
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console.out.print(found["verdict"]["text"], markup=False, style="bold")
    for reason in found["verdict"]["reasons"]:
        console.out.print(f"  {reason}", markup=False)
    console.out.print(f"  {page}", markup=False, style="dim")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of training runs.")],
    out: Annotated[Path | None, typer.Option(help="The page; default: report.html in the first run's folder.")] = None,
    data_root: DataRoot = None,
) -> None:
    """One HTML page on training runs: curves, guards, images under attack, the loss around images and weights."""
    from robustlab import reporting
    from robustlab.report import console

    page = out or runs[0] / "report.html"
    root = str(data_root) if data_root else None
    reporting.report(runs, page, data_root=root, progress=lambda text: console.err.print(text, markup=False, style="dim"))
    console.out.print(f"wrote {page}", markup=False)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="The folder of a run.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
    suite: Annotated[str, typer.Option(help="Attacks for the paired test.")] = "pgd-20",
    num_examples: Annotated[int, typer.Option("--num-examples", "-n", min=1, help="The first N test images.")] = 500,
    checkpoint: Annotated[str, typer.Option(help="best or last.")] = "best",
    data_root: DataRoot = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what differs as JSON.")] = False,
) -> None:
    """Say how two runs differ: configuration, metrics, and a paired test on the same test images."""
    from robustlab import reporting
    from robustlab.report import console

    if checkpoint not in reporting.CHECKPOINTS:
        raise UserError(f"--checkpoint {checkpoint}: expected best or last")
    root = str(data_root) if data_root else None
    found = reporting.compare_runs(first, second, suite=suite, num_examples=num_examples, data_root=root, checkpoint=checkpoint)
    if as_json:
        print(json.dumps(reporting.plain(found), indent=2))
        return
    console.out.print(console.diff_text(found), markup=False)


@app.command()
def compare(
    configs: Annotated[list[Path], typer.Argument(help="YAML files; the first is what the others are tested against.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each: with the seed of its file and the following ones.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("comparison"),
    suite: Annotated[str, typer.Option(help="What robust accuracy is measured with: a suite's name or YAML file.")] = "autoattack",
    pgd: Annotated[str, typer.Option(help="A weaker suite, for the column beside it.")] = "pgd-50-10",
    num_examples: Annotated[int | None, typer.Option("--num-examples", "-n", min=1, help="The first N test images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per attack call.")] = 128,
    set_: Settings = None,
    data_root: DataRoot = None,
    resume: Resume = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Train configurations at equal data, score them, and print one table: accuracies, intervals, paired tests, passes, seconds."""
    from robustlab import comparing
    from robustlab.report import comparison, console

    settings = [*(set_ or []), *([f"data.root={json.dumps(str(data_root))}"] if data_root else [])]
    with console.ComparisonScreen() as screen:
        found = comparing.compare(
            configs,
            out=out,
            seeds=seeds,
            suite=suite,
            pgd=pgd,
            num_examples=num_examples,
            batch_size=batch_size,
            settings=settings,
            data_root=str(data_root) if data_root else None,
            resume=resume,
            progress=screen,
        )
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console.out.print(comparison.heading(found), markup=False, style="bold")
    console.show_rows(comparison.columns(found), comparison.cells(found))
    for note in comparison.notes(found):
        console.out.print(note, markup=False)
    console.out.print(f"  {out / 'compare.md'}", markup=False, style="dim")


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or a checkpoint.")],
    target: Annotated[str, typer.Argument(help="hf:user/name, or a local folder that gets the same files.")],
    record: Annotated[list[Path] | None, typer.Option(help="A record.json for the model card; may be repeated.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Of a repository that is made.")] = False,
) -> None:
    """Share a model: weights as safetensors, configuration and a model card with its measured results, in timm's hub layout."""
    from robustlab import commands
    from robustlab.report import console

    console.out.print(f"wrote {commands.push(run, target, records=record or [], private=private)}", markup=False)


@app.command()
def merge(
    ledgers: Annotated[list[Path], typer.Argument(help="The ledgers of all shards, or their folders.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write into; default: the one that holds the shards' folders.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Put the shards of an evaluation together: the ledger and record that a single run writes."""
    from robustlab import commands
    from robustlab.report import console

    record, path = commands.merge(ledgers, out)
    if as_json:
        print(json.dumps(record.model_dump(mode="json"), indent=2))
        return
    console.out.print(console.record_text(record), markup=False)
    console.out.print("  reliability  not examined: that needs the model, and a merge reads ledgers", markup=False)
    console.out.print(f"  {path}", markup=False, style="dim")


@app.command()
def rescore(
    files: Annotated[
        list[Path], typer.Argument(help="Adversarial images, .npz or .safetensors, as --save-adversarial writes them.")
    ],
    model: Annotated[str, typer.Option(help="A checkpoint, timm:NAME, torchvision:NAME or package.module:callable.")],
    data: Annotated[str | None, typer.Option(help="Data set; default: the one of the training.")] = None,
    data_root: DataRoot = None,
    norm: Annotated[str | None, typer.Option(help="linf, l2, l1 or l0; default: what the file says.")] = None,
    eps: Annotated[
        str | None, typer.Option(help="Radius in [0, 1] pixel units, such as 8/255; default: what the file says.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Score a model on saved adversarial images: projected on ball and box, in eval mode and float32."""
    from robustlab import commands
    from robustlab.report import console

    radius = read_radius(eps)
    if norm is not None and norm not in ("linf", "l2", "l1", "l0"):
        raise UserError(f"--norm {norm}: expected one of linf, l2, l1, l0")
    root = str(data_root) if data_root else None
    found = commands.rescore(files, model, data=data, data_root=root, norm=norm, eps=radius, batch_size=batch_size, device=device)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    console.out.print(console.rescored_text(found), markup=False)


@app.command()
def curve(
    records: Annotated[list[Path], typer.Argument(help="record.json files, or folders that hold some; of one suite.")],
    out: Annotated[Path, typer.Option(help="The figure; .png and .svg are written.")] = Path("cost"),
) -> None:
    """Draw robust accuracy against cost: what is left when the adversary may spend so many passes on each image."""
    from robustlab import commands
    from robustlab.report import console

    for path in commands.draw_cost(records, out):
        console.out.print(f"wrote {path}", markup=False)


@app.command()
def corrupt(
    image: Annotated[Path | None, typer.Argument(help="An image file; or give --data.")] = None,
    data: Annotated[str | None, typer.Option(help="A data set, whose first test image (--index) is taken.")] = None,
    data_root: DataRoot = None,
    index: Annotated[int, typer.Option(min=0, help="Which test image.")] = 0,
    suite: Annotated[str, typer.Option(help="A corruption suite: its corruptions, table, severities and size.")] = "cifar-c",
    size: Annotated[
        int | None, typer.Option(min=8, help="Pixels: an image file is cut to a square and brought to this size.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all draws.")] = 0,
    out: Annotated[Path, typer.Option(help="The figure; .png and .svg are written.")] = Path("corruptions"),
) -> None:
    """Draw one image under all corruptions of a suite, at all its severities."""
    from robustlab import commands
    from robustlab.config import load_suite
    from robustlab.report import console

    root = str(data_root) if data_root else None
    for path in commands.draw_corruptions(image, data, root, index, load_suite(suite), size, seed, out):
        console.out.print(f"wrote {path}", markup=False)


def read_shard(text: str | None) -> tuple[int, int] | None:
    """``2/5`` as (2, 5).

    Raises:
        UserError: anything else.
    """
    if text is None:
        return None
    first, _, last = text.partition("/")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"--shard {text}: expected i/n with 1 <= i <= n, such as 2/5")
    return int(first), int(last)


def read_radius(text: str | None) -> float | None:
    """``0.1`` or ``8/255`` as a number.

    Raises:
        UserError: neither.
    """
    from robustlab.hints import numbers

    if text is None:
        return None
    try:
        return float(numbers(text, float))
    except (TypeError, ValueError):
        raise UserError(f"--eps {text}: expected a number such as 0.1 or 8/255") from None


@board.command("build")
def build(folder: Annotated[Path, typer.Argument(help="The board: a folder with entries/*.json.")]) -> None:
    """Render a board: index.md, index.csv, and the curve of accuracy against eps where a suite has several radii."""
    import dataclasses

    from robustlab import commands
    from robustlab.report import console
    from robustlab.report.tables import leaderboard_table
    from robustlab.results import leaderboard

    written = commands.build_board(folder)
    shown = [section for section in leaderboard.sections(folder) if section.series is None]
    if shown:
        console.out.print(leaderboard_table(shown[0].heading, [dataclasses.asdict(row) for row in shown[0].rows]))
    for path in written:
        console.out.print(f"wrote {path}", markup=False, style="dim")


@board.command("add")
def add(
    records: Annotated[list[Path], typer.Argument(help="record.json files, or folders that hold some.")],
    folder: Annotated[Path, typer.Option("--board", help="The board to add to.")],
    claimed: Annotated[
        str | None,
        typer.Option(metavar="LINK", help="The model's authors say so, there; not measured here. Also for model_info files."),
    ] = None,
    external: Annotated[
        str | None, typer.Option(metavar="LINK", help="Others measured it, there. Also for RobustBench's model_info files.")
    ] = None,
    norm: Annotated[
        str | None, typer.Option(help="Of a model_info file outside of a folder Linf, L2 or corruptions: linf or l2.")
    ] = None,
) -> None:
    """Copy records, with their ledgers, into a board; then `leaderboard build`."""
    from robustlab.report import console
    from robustlab.results import leaderboard

    if claimed is not None and external is not None:
        raise UserError("leaderboard add: give --claimed or --external, not both")
    kind = "claimed" if claimed is not None else "external" if external is not None else "ours"
    pattern = "record.json" if kind == "ours" else "*.json"
    files = [found for path in records for found in (sorted(path.rglob(pattern)) if path.is_dir() else [path])]
    if not files:
        raise UserError(f"{records[0]}: holds no {pattern}")
    for path in files:
        added = leaderboard.add(folder, path, kind=kind, link=claimed or external, norm=norm)  # type: ignore[arg-type]
        console.out.print(f"added {added}", markup=False)


@board.command("diff")
def diff_boards(
    old: Annotated[Path, typer.Argument(help="A board.")],
    new: Annotated[Path, typer.Argument(help="Another version of it, or a record that may be added.")],
) -> None:
    """Say what a new entry, or a new version of a board, changes. Writes nothing."""
    from robustlab.report import console
    from robustlab.results.changes import changes

    found, heading = changes(old, new), None
    for change in found:
        if change.section != heading:
            heading = change.section
            console.out.print(heading, markup=False, style="bold")
        console.out.print(f"  {change}", markup=False)
    if not found:
        console.out.print("no change", markup=False)


@board.command("verify")
def verify_board(
    folders: Annotated[list[Path], typer.Argument(help="Boards.")],
    strict: Annotated[bool, typer.Option("--strict", help="Fail also where a checkpoint or configuration is not at hand.")] = False,
) -> None:
    """Derive every number of a board from its ledgers again and compare all hashes. Exit code 1 where something differs."""
    from robustlab.evaluation.rederive import rederive
    from robustlab.report import console
    from robustlab.results.verify import verify

    failed = False
    for folder in folders:
        derived, found = verify(folder, lambda path: rederive(path).to_dict())
        bad = [f for f in found if f.wrong or (strict and "nothing to derive" not in f.text)]
        for finding in bad:
            console.err.print(f"WRONG {folder / finding.entry}: {finding.text}", markup=False)
        for text in dict.fromkeys(f.text for f in found if f not in bad):
            console.out.print(f"note: {text}", markup=False, style="dim")
        console.out.print(f"{folder}: {derived} {'entry' if derived == 1 else 'entries'} derived again", markup=False)
        failed |= bool(bad)
    if failed:
        raise typer.Exit(1)


@board.command("export")
def export_board(
    folder: Annotated[Path, typer.Argument(help="The board.")],
    out: Annotated[Path, typer.Option(help="Folder to write model_info/<data>/<norm>/<model>.json into.")],
    about: Annotated[
        Path | None,
        typer.Option(help="YAML: for each model what a record does not know: name authors link venue additional_data ..."),
    ] = None,
) -> None:
    """Write the first table of a board as RobustBench's model_info files."""
    from robustlab import commands
    from robustlab.report import console

    for path in commands.export_board(folder, out, about):
        console.out.print(f"wrote {path}", markup=False, style="dim")


# -------------------------------------------------------------------------------------------------------- information


@app.command("list")
def list_(
    kind: Annotated[
        str | None, typer.Argument(help="attacks, trainers, models, datasets, suites, ...; default: the kinds.")
    ] = None,
) -> None:
    """List what there is of a kind, one line each."""
    from robustlab.registry import FOLDERS, entries, kind_of, plural, summary
    from robustlab.report import console
    from robustlab.report.explain import plain
    from robustlab.types import Trainer

    if kind is None:
        console.show_rows(["kind", "names"], [[plural(k), ", ".join(entries(k)) or "-"] for k in FOLDERS])
        return
    named = entries(kind_of(kind))
    if kind_of(kind) == "trainer":
        columns = ["name", "what it is", "passes per sample", "fidelity"]
        rows = [[n, plain(summary(c)), c.passes, c.fidelity] for n, c in named.items() if issubclass(c, Trainer)]
    else:
        columns, rows = ["name", "what it is", "source"], [[n, plain(summary(c)), c.cite] for n, c in named.items()]
    console.show_rows(columns, rows)


@app.command()
def explain(
    name: Annotated[str | None, typer.Argument(help="The name of anything that `list` shows.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Everything.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="With --all: write one page, with a search field.")] = None,
) -> None:
    """Explain a part: its formula, source, fields with units and defaults, and what a trainer is made of."""
    from robustlab.registry import FOLDERS, entries
    from robustlab.report import console
    from robustlab.report.explain import explain as text
    from robustlab.report.explain import find

    if (name is None) != every:
        raise UserError("explain: give a name, or --all" if name is None else f"explain: give '{name}' or --all, not both")
    if html is not None:
        from robustlab.files import atomic_write
        from robustlab.report.reference import reference_page

        if not every:
            raise UserError("explain: --html goes with --all")
        atomic_write(html, reference_page())
        console.out.print(f"wrote {html}", markup=False)
        return
    width = min(console.out.width, 100) if console.out.is_terminal else 100
    found = [cls for kind in FOLDERS for cls in entries(kind).values()] if name is None else find(name)
    console.out.print("\n\n\n".join(text(cls, width) for cls in found), markup=False)


@app.command()
def validate(
    paths: Annotated[list[Path] | None, typer.Argument(help="YAML files, or folders of them.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of configurations, for editors.")] = False,
) -> None:
    """Check YAML files: runs and suites. Reports every mistake with file, line and key."""
    from robustlab.config import json_schema, validate_file
    from robustlab.report import console

    if schema:
        print(json.dumps(json_schema(), indent=1))
        return
    if not paths:
        raise UserError("validate: give YAML files or folders, for example configs/")
    files: list[Path] = []
    for path in paths:
        found = sorted([*path.rglob("*.yaml"), *path.rglob("*.yml")]) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path}: no YAML files in this folder")
        files += found
    problems: list[str] = []
    for file in files:
        try:
            validate_file(file)
        except UserError as error:
            problems += error.lines
    if problems:
        raise UserError(*problems)
    console.out.print(f"{len(files)} file{'s' if len(files) > 1 else ''}: no mistakes", markup=False)


def templates() -> Path:
    """The folder of ready configurations, in a wheel or in a checkout."""
    inside = Path(str(resources.files("robustlab"))) / "_configs"
    return inside if inside.is_dir() else inside.parent.parent / "configs"


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="A ready configuration, such as digits/pgd-at.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; default: the name's last part.")] = None,
) -> None:
    """Write a ready configuration to start from."""
    from robustlab.files import atomic_write
    from robustlab.registry import nearest
    from robustlab.report import console

    known = {str(p.relative_to(templates()).with_suffix("").as_posix()): p for p in sorted(templates().rglob("*.yaml"))}
    wanted = name.removesuffix(".yaml")
    if wanted not in known:
        raise UserError(f"no ready configuration '{name}'{nearest(wanted, known)}; there are: {', '.join(known)}")
    target = out or Path(f"{wanted.rsplit('/', 1)[-1]}.yaml")
    if target.exists():
        raise UserError(f"{target}: exists already; choose another name with --out")
    atomic_write(target, known[wanted].read_text().replace(f"configs/{wanted}.yaml", str(target)))
    console.out.print(f"wrote {target}; next: robustlab train {target}", markup=False)


# ------------------------------------------------------------------------------------------------------------- errors


def main(args: list[str] | None = None) -> None:
    """The console script: runs a command and turns what the user can mend into one line each."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0 done, 1 stopped, 2 bad input, 130 interrupted."""
    lines: tuple[str, ...]
    try:
        result: Any = app(args=args, standalone_mode=False)
        if result == 130:  # typer's word for Ctrl-C
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        said = ("interrupted; what is written so far is whole: add --resume to go on",)
        lines, code = said if _first_process() else (), 130
    except UserError as error:
        lines, code = error.lines, 2
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG):
            raise
        lines, code = (f"{error.filename or 'output'}: {error.strerror}; what was written before is whole",), 2
    except Exception as error:  # click's own: a wrong option shows its usage, everything else is a bug
        if not hasattr(error, "show"):
            raise
        error.show()
        return 2
    for line in lines:
        print(f"robustlab: {printable(line)}", file=sys.stderr)
    return code


def printable(text: str) -> str:
    """The text with control characters and lone surrogates written as escapes, so that a file cannot steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    main()
