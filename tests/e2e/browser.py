"""A headless Chromium for tests of pages, where one is installed."""

import contextlib
import os
import shutil

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium found; Debian's package is called chromium")


@contextlib.contextmanager
def opened(path, width=1400, height=900):
    """A page of a local file. On leaving: no console message, no error, no request but for the file itself."""
    from playwright.sync_api import sync_playwright

    seen = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("console", lambda message: seen.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: seen.append(f"error: {error}"))
        page.on("request", lambda request: seen.append(request.url))
        page.goto(path.resolve().as_uri())
        yield page
        browser.close()
    assert [line for line in seen if not line.startswith("data:")] == [path.resolve().as_uri()]


def assert_fits(page):
    """Nothing is wider than the window, and no text is smaller than 11 px."""
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    small = """[...document.querySelectorAll("body *:not(svg *)")].filter(e => e.childElementCount == 0 && e.textContent.trim()
               && e.offsetParent !== null && parseFloat(getComputedStyle(e).fontSize) < 11).map(e => e.textContent.slice(0, 40))"""
    assert page.evaluate(small) == []
