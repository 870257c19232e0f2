"""The demo: four trainers on real handwritten digits, the official AutoAttack, corruptions, a leaderboard.

    python scripts/demo.py [--out runs/demo]

Trains small_cnn on 16 px digits against linf 0.1, scores 128 test images, and ends with the table. Two models at a time, one
thread each, where there are two cores. Interrupted and started again it goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TRAINERS = ("trades", "awp", "pgd-at", "standard")  # the longest first
SUITES = ("autoattack-reference", "corruptions-quick", "configs/suites/apgd-curve.yaml")


def robustlab(*args: str | Path, label: str = "") -> None:
    """Run one command, its lines under a label; the demo ends if it fails."""
    words = [str(a) for a in args]
    print(f"{label}$ robustlab {' '.join(words)}", flush=True)
    command = [sys.executable, "-m", "robustlab", *words]
    if not label:
        code = subprocess.call(command)
    else:
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **threads}
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                print(f"{label}{line}", end="", flush=True)
        code = child.returncode
    if code:
        raise SystemExit(code)


def one_model(name: str, out: Path) -> None:
    """Train and score one trainer's model."""
    label = f"{name:>8} | "
    robustlab("train", f"configs/digits/{name}.yaml", "--out", out / name, "--resume", label=label)
    suites = [word for suite in SUITES for word in ("--suite", suite)]
    where = ("--out", out / "evaluations", "--resume")
    robustlab("evaluate", out / name / "best.safetensors", *suites, "-n", "128", *where, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything the demo writes")
    out = parser.parse_args().out
    begun = time.monotonic()
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        try:
            for done in [pool.submit(one_model, name, out) for name in TRAINERS]:
                done.result()
        except BaseException:  # Ctrl-C, or a command that failed: start nothing more
            pool.shutdown(cancel_futures=True)
            raise
    (out / "leaderboard").mkdir(exist_ok=True)
    shutil.copyfile("leaderboards/digits-linf/board.yaml", out / "leaderboard/board.yaml")
    robustlab("leaderboard", "add", out / "evaluations", "--board", out / "leaderboard")
    robustlab("leaderboard", "build", out / "leaderboard")
    print(f"demo done in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; `make demo` goes on from here")
