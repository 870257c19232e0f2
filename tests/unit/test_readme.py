"""The README says what the registry says."""

import re
from pathlib import Path

from robustlab.registry import entries, summary
from robustlab.report.explain import plain

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_table_of_trainers_is_what_list_prints():
    section = README.split("## Trainers\n")[1].split("\n### ")[0]
    rows = re.findall(r"^\| `.*$", section, re.MULTILINE)
    assert rows == [f"| `{n}` | {plain(summary(c))} | {c.passes} | {c.fidelity} |" for n, c in entries("trainer").items()]


def test_every_trainer_has_both_configurations_and_the_script_knows_it():
    script = (ROOT / "scripts/compare_digits.sh").read_text()
    listed = script.split("for name in ")[1].split("; do")[0].replace("\\\n", " ").split()
    assert sorted(listed) == list(entries("trainer"))
    assert f"| trainers | [{len(listed)}](#trainers)" in README
    assert f"for all {len(listed)} in two processes" in README
    for folder in ("cifar10", "digits"):
        assert {p.stem for p in (ROOT / "configs" / folder).glob("*.yaml")} >= set(listed)
