"""Parts from another package: the one that the README shows, found by its entry point in a process of its own."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from robustlab.registry import entries

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("### Parts of your own")[1].split("\n## ")[0]
CONFIG = """
trainer: guess-at
model: {name: small_cnn, width: 4}
data: {name: digits, size: 8}
threat: {norm: linf, eps: 0.1}
training: {epochs: 1, batch_size: 256, threads: 1, device: cpu, probe: {num_examples: 32, steps: 2}, guards: {collapse: null}}
"""


def block(language):
    return re.search(rf"```{language}\n(.*?)```", SECTION, re.DOTALL).group(1)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package as an installer lays it out: the module, and beside it what pyproject.toml says."""
    folder = tmp_path_factory.mktemp("site")
    project = tomllib.loads(block("toml"))["project"]
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    (info / "RECORD").write_text("")
    groups = [f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for g, points in project["entry-points"].items()]
    (info / "entry_points.txt").write_text("\n".join(groups))
    (folder / "guessing.py").write_text(block("python"))
    return folder


def robustlab(site, folder, *commands):
    """Command lines, one after the other, in a new process that sees the package; the first that fails ends it."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    code = "import json, sys; from robustlab.cli import run; sys.exit(next(filter(None, map(run, json.loads(sys.argv[1]))), 0))"
    command = [sys.executable, "-c", code, json.dumps(commands)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, check=False)


def test_list_explain_train_and_evaluate_know_them(installed, tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG)
    (tmp_path / "guesses.yaml").write_text("attacks: [{name: guess, draws: 3}]\n")
    done = robustlab(
        installed,
        tmp_path,
        ["list", "attacks"],
        ["explain", "guess-at"],
        ["train", "c.yaml", "--out", "run", "--set", "trainer.inner.craft.attack.draws=2"],
        ["evaluate", "run/best.safetensors", "--suite", "guesses.yaml", "-n", "8", "--out", "e"],
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^guess +The worst of a few random points of the ball\.$", done.stdout, re.M)
    assert "guessing.GuessAt" in done.stdout
    assert re.search(r"^  fidelity +reconstructed$", done.stdout, re.M), "the label of the parent is not that of the child"
    assert "draws: 2" in (tmp_path / "run/config.yaml").read_text()
    record = json.loads(next((tmp_path / "e").rglob("record.json")).read_text())
    assert (record["model"]["trainer"], record["model"]["fidelity"]) == ("guess-at", "reconstructed")
    assert record["metrics"]["per_attack"]["guess"]["forwards"] >= 3
    assert record["metrics"]["per_attack"]["guess"]["outside"] == 0
    assert "guess-at" not in entries("trainer"), "without the package there is no such trainer"


def test_a_package_that_cannot_be_loaded_is_one_line(installed, tmp_path):
    for path in installed.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(installed)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    (tmp_path / "guessing.py").write_text("import nothing_of_this_name\n")
    done = robustlab(tmp_path, tmp_path, ["list", "attacks"])
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "robustlab: the plug-in 'guessing' (guessing) cannot be loaded: No module named 'nothing_of_this_name'"
    ]
