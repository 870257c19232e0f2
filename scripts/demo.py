"""The demo: four trainers on real handwritten digits, the official AutoAttack, corruptions, a leaderboard.

    python scripts/demo.py [--out runs/demo]

Trains small_cnn on 16 px digits against linf 0.1, scores 128 test images, and ends with the table. Interrupted and started again it
goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from robustlab.cli import run

TRAINERS = ("standard", "pgd-at", "trades", "awp")
SUITES = ("autoattack-reference", "corruptions-quick", "configs/suites/apgd-curve.yaml")


def step(*args: str | Path) -> None:
    """Run one command, show it, and stop the demo if it fails."""
    words = [str(a) for a in args]
    print("$ robustlab " + " ".join(words), flush=True)
    code = run(words)
    if code:
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything the demo writes")
    out = parser.parse_args().out
    begun = time.monotonic()
    for name in TRAINERS:
        step("train", f"configs/digits/{name}.yaml", "--out", out / name, "--resume")
    models = [out / name / "best.safetensors" for name in TRAINERS]
    suites = [word for suite in SUITES for word in ("--suite", suite)]
    step("evaluate", *models, *suites, "-n", "128", "--out", out / "evaluations", "--resume")
    step("leaderboard", "add", out / "evaluations", "--board", out / "leaderboard")
    step("leaderboard", "build", out / "leaderboard")
    print(f"demo done in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
