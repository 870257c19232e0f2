"""The pictures of the README: a board, an audit and a run's report, as a headless Chromium shows them.

python scripts/screenshots.py BOARD/index.html AUDIT/report.html RUN/report.html --out leaderboards/pictures
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
from pathlib import Path

NAMES = ("board", "audit", "run")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs=3, metavar="PAGE", help="of a board, of an audit, of a run")
    parser.add_argument("--out", type=Path, default=Path("leaderboards/pictures"))
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--height", type=int, default=900, help="of the part that is shown")
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        parser.error("no Chromium found")
    from PIL import Image
    from playwright.sync_api import sync_playwright

    args.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        for name, path in zip(NAMES, args.pages, strict=True):
            page = chromium.new_page(viewport={"width": args.width, "height": args.height})
            page.goto(path.resolve().as_uri())
            shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(64)
            shot.save(args.out / f"{name}.png", optimize=True)
            print(f"wrote {args.out / name}.png")
        chromium.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
