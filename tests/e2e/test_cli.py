"""The command line from end to end, in process, on a few digits."""

import json
import re
from pathlib import Path

import pytest
import typer.main
from safetensors.torch import load_file, save_file

from robustlab.cli import app, run
from robustlab.registry import FOLDERS, entries, plural

CONFIGS = Path(__file__).parents[2] / "configs"
GOOD = "trainer: pgd-at\nmodel: {name: small_cnn, width: 4}\ndata: {name: digits, size: 8}\nthreat: {norm: linf, eps: 0.1}\n"
QUICK = {
    "training.epochs": 2,
    "training.batch_size": 256,
    "training.threads": 1,
    "training.device": "cpu",
    "training.probe.num_examples": 32,
    "training.probe.steps": 2,
    "training.guards.collapse": "null",
    "trainer.inner.craft.attack.steps": 2,
}
SETS = [part for key, value in QUICK.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, with one configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(GOOD)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "c.yaml").write_text(GOOD)
    assert run(["train", str(folder / "c.yaml"), "--out", str(folder / "run"), *SETS]) == 0
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def timeless(value):
    """The value without what depends on the clock."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "seconds" not in k}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def fails(capsys, *args: str) -> list[str]:
    """The lines that a command prints which the user can mend: exit code 2, nothing on standard output."""
    capsys.readouterr()
    assert run(list(args)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    lines = shown.err.splitlines()
    return [line.removeprefix("robustlab: ") for line in lines if line.startswith("robustlab: ")] or lines


# -------------------------------------------------------------------------------------------------------------- train


def test_train_writes_a_run(here, capsys):
    assert run(["train", "c.yaml", *SETS, "--out", "run"]) == 0
    shown = capsys.readouterr()
    assert set(files(here)) == {"c.yaml"} | {
        f"run/{name}"
        for name in (".lock", "config.yaml", "metrics.jsonl", "best.safetensors", "last.safetensors", "state.safetensors")
    }
    lines = shown.err.splitlines()
    assert lines[0] == "pgd-at (paper-verified): small_cnn on digits, linf 0.1; writes run"
    assert [re.sub(r"\d+(\.\d+)?", "#", line) for line in lines[1:3]] == [
        "epoch   #  lr #  loss #  val clean #%  val pgd-# #%  # img/s  eta #s"
    ] * 2
    assert lines[3:] == ["next: robustlab evaluate run/best.safetensors"]
    best, last, gap = shown.out.splitlines()
    assert gap.startswith("robust overfitting: last is ")
    assert re.fullmatch(r"best  epoch   \d  val clean [\d.]+%  val pgd-2 [\d.]+%  run/best\.safetensors", best)
    assert re.fullmatch(r"last  epoch   2  val clean [\d.]+%  val pgd-2 [\d.]+%  run/last\.safetensors", last)
    metrics = [json.loads(line) for line in (here / "run/metrics.jsonl").read_text().splitlines()]
    assert [m["epoch"] for m in metrics] == [1, 2]
    assert run(["validate", "run/config.yaml"]) == 0


def test_the_written_configuration_is_the_run(here, trained, capsys):
    assert run(["train", str(trained / "run/config.yaml"), "--out", "again"]) == 0
    first, again = load_file(trained / "run/last.safetensors"), load_file(here / "again/last.safetensors")
    assert all(bool((first[name] == again[name]).all()) for name in first)


def test_the_default_folder_is_named_after_the_file(here):
    (here / "mine").mkdir()
    (here / "mine/try.yaml").write_text(GOOD)
    assert run(["train", "mine/try.yaml", *SETS, "--set", "training.epochs=1"]) == 0
    assert (here / "runs/mine/try/best.safetensors").is_file()


def test_a_dry_run_writes_nothing(here, capsys):
    before = files(here)
    assert run(["train", "c.yaml", *SETS, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert files(here) == before
    assert shown.err == ""
    assert "trainer:\n  name: pgd-at\n" in shown.out
    assert "    on: clean\n" in shown.out
    assert re.search(r"^[\d,]+ parameters; 1,097 training images, 4 steps an epoch$", shown.out, re.M)
    assert re.search(r"^3 forward and 3 backward passes per image and step$", shown.out, re.M)
    assert re.search(r"^about \d+s for 2 epochs on cpu \(from 3 timed steps\)$", shown.out, re.M)
    resolved = shown.out.split("\n\n")[0]
    (here / "resolved.yaml").write_text(resolved)
    assert run(["validate", "resolved.yaml"]) == 0


def test_a_finished_run_is_resumed_to_no_effect(trained, capsys):
    before = files(trained)
    assert run(["train", str(trained / "c.yaml"), "--out", str(trained / "run"), "--resume", *SETS]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == "resumed: it was finished already"
    assert files(trained) == before


def test_a_run_is_not_overwritten_and_not_mixed_with_another(trained, capsys):
    before = files(trained)
    where = ["train", str(trained / "c.yaml"), "--out", str(trained / "run"), *SETS]
    assert fails(capsys, *where) == [f"{trained}/run: holds a run already; add --resume to go on with it, or choose another --out"]
    assert fails(capsys, *where, "--resume", "--set", "optimizer.lr=0.2") == [
        f"{trained}/run: holds a run of another configuration: optimizer.lr is 0.1 there and 0.2 here; choose another --out"
    ]
    assert files(trained) == before


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("model.num_classes=7", "model.num_classes: the model has 7, the data 10"),
        ("model.in_channels=3", "model.in_channels: the model has 3, the data 1"),
        ("model.mean=[0.5,0.5]", "model: small_cnn cannot take images of 1x8x8: "),
        ("model.init=pretrained", "model: small_cnn cannot take images of 1x8x8: "),
        ("model.init=nowhere.safetensors", "nowhere.safetensors: "),
        ("training.device=tpu", "device: 'tpu' is not available here; expected auto, cpu, or cuda on a machine with a GPU"),
        ("training.device=meta", "device: 'meta' is not available here; "),
        ("training.accumulation=3", "training.batch_size: 256 images cannot be divided among 1 processes x 3 micro-batches"),
        ("data={name: npz, path: nowhere.npz}", ""),
        ("data={name: image-folder, root: nowhere}", ""),
        ("data={name: cifar10, root: nowhere, download: false}", ""),
    ],
)
def test_what_does_not_fit_together_is_one_line_and_leaves_nothing(change, line, here, capsys):
    before = files(here)
    for mode in (["--dry-run"], ["--out", "run"]):
        assert run(["train", "c.yaml", *SETS, "--set", change, *mode]) == 2
        shown = capsys.readouterr()
        errors = [text for text in shown.err.splitlines() if text.startswith("robustlab: ")]
        assert len(errors) == 1, shown.err
        assert errors[0].startswith(f"robustlab: {line}")
        assert "Traceback" not in shown.err
        assert files(here) == before
        assert not (here / "run").exists()


def test_a_batch_that_is_larger_than_the_data_is_the_whole_data(here):
    assert run(["train", "c.yaml", *SETS, "--set", "training.batch_size=5000", "--set", "training.epochs=1", "--out", "run"]) == 0


def test_a_loss_that_is_not_finite_stops_the_run_with_its_reason(here, capsys):
    assert run(["train", "c.yaml", *SETS, "--set", "optimizer.lr=1e30", "--out", "run"]) == 1
    err = capsys.readouterr().err
    assert re.search(r"^stopped: the loss is \w+ in epoch \d, step \d+: lower optimizer\.lr or set training\.clip_grad$", err, re.M)


# ----------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_a_run(here, trained, capsys):
    model = str(trained / "run/best.safetensors")
    assert run(["evaluate", model, "--suite", "pgd-20", "-n", "20", "--out", "e"]) == 0
    shown = capsys.readouterr()
    assert re.search(r"^run  pgd-20  digits, 20 images, seed 0, fp32$", shown.out, re.M)
    assert re.search(r"^  robust +[\d.]+%  \(95 %: [\d.]+% to [\d.]+%\)  linf 0\.1$", shown.out, re.M)
    (record,) = (here / "e").rglob("record.json")
    assert run(["evaluate", model, "--suite", "pgd-20", "-n", "20", "--out", "e2", "--json"]) == 0
    (printed,) = json.loads(capsys.readouterr().out)
    written = json.loads(record.read_text())
    for part in ("clean", "threats"):
        assert timeless(printed["metrics"][part]) == timeless(written["metrics"][part])


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--suite", "pgd-2"], "unknown suite 'pgd-2' (did you mean 'pgd-20'?); known: "),
        (["--suite", "nowhere.yaml"], "nowhere.yaml: cannot read: No such file or directory"),
        (
            ["--suite", "pgd-20", "--eps", "8"],
            "eps is in [0, 1] pixel units: for linf 8 is more than the whole range; did you mean 8/255?",
        ),
        (["--suite", "pgd-20", "--eps", "nine"], "--eps nine: expected a number such as 0.1 or 8/255"),
        (["--suite", "pgd-20", "--eps", "1/0"], "--eps 1/0: expected a number such as 0.1 or 8/255"),
        (["--suite", "pgd-20", "--eps", "nan"], "eps must be a finite number >= 0, got nan"),
        (["--suite", "pgd-20", "--norm", "l3"], "--norm l3: expected one of linf, l2, l1, l0"),
        (["--suite", "pgd-20", "--data", "mnst"], "unknown dataset 'mnst' (did you mean 'mnist'?)"),
        (["--suite", "pgd-20", "--precision", "fp8"], "unknown precision 'fp8'; expected fp32, bf16 or auto"),
        (["--suite", "pgd-20", "--device", "tpu"], "device: 'tpu' is not available here"),
    ],
)
def test_wrong_values_of_evaluate(args, line, here, trained, capsys):
    (found,) = fails(capsys, "evaluate", str(trained / "run/best.safetensors"), "-n", "4", *args, "--out", "e")
    assert line in found
    assert not list(here.glob("e/**/record.json"))


def damaged(trained: Path, folder: Path, how: str) -> Path:
    path, good = folder / "m.safetensors", (trained / "run/best.safetensors").read_bytes()
    if how == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a model\n" * 50)
    elif how == "foreign":
        save_file(load_file(trained / "run/best.safetensors"), path)
    elif how == "newer":
        from safetensors import safe_open

        with safe_open(trained / "run/best.safetensors", "pt") as file:
            meta = {k: json.loads(v) for k, v in file.metadata().items()}
        meta["robustlab"]["version"] = 999
        save_file(load_file(trained / "run/best.safetensors"), path, {k: json.dumps(v) for k, v in meta.items()})
    elif how == "pickle":
        import pickle

        path = folder / "m.pt"
        path.write_bytes(pickle.dumps({"f": print}))
    elif how == "state":
        path.write_bytes((trained / "run/state.safetensors").read_bytes())
    return path


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "foreign", "newer", "pickle", "state", "missing"])
def test_a_checkpoint_that_is_none(how, here, trained, capsys):
    path = damaged(trained, here, how)
    before = files(here)
    lines = fails(capsys, "evaluate", str(path), "--suite", "pgd-20", "-n", "4", "--data", "digits")
    assert len(lines) == 1
    assert str(path) in lines[0]
    assert {k: v for k, v in files(here).items() if not k.endswith(".lock")} == before


@pytest.mark.parametrize("model", ["nothing", "os:getcwd", "nowhere.models:net", "timm:no_such_net", "timm:", ":", "a:b:c"])
def test_a_model_that_is_none(model, here, capsys):
    before = files(here)
    assert (
        len(fails(capsys, "evaluate", model, "--suite", "pgd-20", "-n", "4", "--data", "digits", "--norm", "linf", "--eps", "0.1"))
        == 1
    )
    assert files(here) == before


def test_a_damaged_resume_state(here, trained, capsys):
    for name, content in files(trained / "run").items():
        (here / "run").mkdir(exist_ok=True)
        (here / "run" / name).write_bytes(content[:100] if name == "state.safetensors" else content)
    (line,) = fails(capsys, "train", "c.yaml", "--out", "run", "--resume", *SETS)
    assert line.startswith("run/state.safetensors: damaged resume state (")
    assert line.endswith("; delete it to start the run anew")


# -------------------------------------------------------------------------------------------------------- information


@pytest.mark.parametrize("kind", FOLDERS)
def test_list(kind, capsys):
    assert run(["list", plural(kind)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("name ")
    assert [line.split()[0] for line in lines[1:]] == list(entries(kind))
    column = lines[0].index("what it is")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines[1:])
    assert "``" not in "\n".join(lines)
    assert run(["list", kind]) == 0


def test_list_without_a_kind_shows_the_kinds(capsys):
    assert run(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [plural(kind) for kind in FOLDERS]
    assert re.search(r"^attacks .*\bpgd\b", "\n".join(lines), re.M)


def test_list_of_an_unknown_kind(capsys):
    (line,) = fails(capsys, "list", "atacks")
    assert line.startswith("unknown kind 'atacks' (did you mean 'attacks'?); expected one of attacks, ")


@pytest.mark.parametrize("name", sorted({name for kind in FOLDERS for name in entries(kind)}))
def test_explain(name, capsys):
    assert run(["explain", name]) == 0
    text = capsys.readouterr().out
    for kind in FOLDERS:
        if name in entries(kind):
            cls = entries(kind)[name]
            assert f"{cls.__module__}.{cls.__qualname__}\n" in text
            assert cls.cite in text


def test_explain_an_unknown_name(capsys):
    (line,) = fails(capsys, "explain", "pgdd")
    assert line.startswith("nothing is called 'pgdd' (did you mean 'pgd'?)")


def test_validate(here, capsys):
    assert run(["validate", str(CONFIGS)]) == 0
    count = len(list(CONFIGS.rglob("*.yaml")))
    assert capsys.readouterr().out == f"{count} files: no mistakes\n"
    (here / "bad.yml").write_text("trainer: pgd\n")
    assert len(fails(capsys, "validate", str(here))) == 3
    assert fails(capsys, "validate", "nowhere.yaml") == ["nowhere.yaml: cannot read: No such file or directory"]
    (here / "empty").mkdir()
    assert fails(capsys, "validate", "empty") == ["empty: no YAML files in this folder"]
    assert fails(capsys, "validate") == ["validate: give YAML files or folders, for example configs/"]


def test_the_schema_is_printed_as_json(capsys):
    assert run(["validate", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "robustlab configuration"


@pytest.mark.parametrize("name", [p.relative_to(CONFIGS).with_suffix("").as_posix() for p in sorted(CONFIGS.rglob("*.yaml"))])
def test_init_writes_a_configuration_that_is_valid(name, here, capsys):
    assert run(["init", name]) == 0
    target = f"{name.rsplit('/', 1)[-1]}.yaml"
    assert f"wrote {target}; next: robustlab " in capsys.readouterr().out
    assert run(["validate", target]) == 0
    assert f"configs/{name}" not in (here / target).read_text()
    before = files(here)
    assert fails(capsys, "init", name)[-1] == f"{target}: exists already; choose another name with --out"
    assert files(here) == before
    assert run(["init", f"{name}.yaml", "--out", "sub/other.yaml"]) == 0
    assert (here / "sub/other.yaml").is_file()


def test_init_of_an_unknown_name(here, capsys):
    (line,) = fails(capsys, "init", "digits/pgdat")
    assert line.startswith("no ready configuration 'digits/pgdat' (did you mean 'digits/pgd-at'?); there are: ")
    assert set(files(here)) == {"c.yaml"}


# --------------------------------------------------------------------------------------------------- commands, options


def commands(group=None, prefix=()):
    """Every command with its words."""
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


EVERY_COMMAND = list(commands())


@pytest.mark.parametrize(("words", "command"), EVERY_COMMAND, ids=[" ".join(w) for w, _ in EVERY_COMMAND])
def test_help_names_every_option_and_says_what_it_does(words, command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    assert run([*words, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert command.help.split("\n\n")[0].split(".")[0] in text
    for parameter in command.params:
        if parameter.name == "help":
            continue
        assert parameter.help, f"{' '.join(words)}: {parameter.name} has no help text"
        assert parameter.help.split(":")[0].split("`")[0].strip() in text, parameter.name
        for option in parameter.opts if parameter.param_type_name == "option" else ():
            assert option in text


@pytest.mark.parametrize(("words", "command"), EVERY_COMMAND, ids=[" ".join(w) for w, _ in EVERY_COMMAND])
def test_an_unknown_option_shows_the_usage(words, command, capsys):
    assert run([*words, "--no-such-option"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "--no-such-option" in shown.err
    assert "Usage: " in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    "args", [["trian"], ["train"], ["train", "c.yaml", "extra"], ["evaluate", "m", "-n", "0"], ["evaluate", "m", "-n", "x"]]
)
def test_wrong_arguments(args, here, capsys):
    assert run(args) == 2
    shown = capsys.readouterr()
    assert "Usage: " in shown.err
    assert "Traceback" not in shown.err
    assert set(files(here)) == {"c.yaml"}


@pytest.mark.parametrize("args", [[], ["leaderboard"], ["--help"], ["leaderboard", "--help"]])
def test_no_command_shows_the_commands(args, capsys):
    run(args)
    shown = capsys.readouterr()
    for words, _ in EVERY_COMMAND:
        if args[:1] == ["leaderboard"] and words[0] == "leaderboard":
            assert words[1] in shown.out + shown.err
        elif args[:1] != ["leaderboard"]:
            assert words[0] in shown.out + shown.err


def test_interrupting_says_that_nothing_is_lost(here, monkeypatch, capsys):
    from robustlab import commands as layer

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer, "train", interrupted)
    assert run(["train", "c.yaml"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "robustlab: interrupted; what is written so far is whole: add --resume to go on"
    )


def test_a_mistake_of_ours_is_not_hidden(here, monkeypatch):
    from robustlab import commands as layer

    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(layer, "train", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(["train", "c.yaml"])


def test_what_a_file_says_cannot_steer_the_terminal(here, capsys):
    (here / "c.yaml").write_text('trainer: "\\e[2Jpgd\\n\\ud800"\nmodel: small_cnn\ndata: digits\n')
    (line,) = fails(capsys, "validate", "c.yaml")
    assert line.startswith(r"c.yaml:1: trainer: unknown trainer '\x1b[2Jpgd\n\ud800'")
