"""The board's page in a real browser: sort, filter and search by clicks; no network; readable on a phone and on a wide screen."""

import json
import sys
from pathlib import Path

import pytest
from browser import assert_fits, needs_browser, opened

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from test_leaderboard import board, record

from robustlab.commands import build_board
from robustlab.report.board_page import board_page
from robustlab.results import leaderboard

pytestmark = needs_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    names = {"standard": (0, 127), "pgd-at": (88, 120), "trades": (92, 115), "awp": (90, 121), '<b>bold</b> & "quoted"': (40, 110)}
    board(folder, *(record(name, k, clean=c) for name, (k, c) in names.items()), title="A `small` board", note="five models")
    claim = {
        "link": "https://example.org", "name": "A claim", "authors": "x", "additional_data": True, "number_forward_passes": 1,
        "dataset": "digits", "venue": "Somewhere 2026", "architecture": "net", "eps": "0.1", "clean_acc": "99",
        "autoattack_acc": "80",
    }  # fmt: skip
    (folder / "card.json").write_text(json.dumps(claim))
    leaderboard.add(folder, folder / "card.json", kind="external", norm="linf")
    build_board(folder)
    return folder / "index.html"


def models(p):
    return p.eval_on_selector_all("tbody tr", "rows => rows.filter(r => !r.hidden).map(r => r.children[1].textContent)")


def test_search_filter_and_sort(page):
    with opened(page) as p:
        everything = ["trades", "awp", "pgd-at", '<b>bold</b> & "quoted"', "standard", "A claim"]
        assert models(p) == everything
        assert p.inner_text("#shown") == "6 rows"
        p.fill("#search", "PGD")
        assert models(p) == ["pgd-at"]
        assert p.inner_text("#shown") == "1 of 6 rows"
        assert p.locator("svg g.row:visible").count() == 1
        p.fill("#search", "somewhere")
        assert models(p) == ["A claim"]
        p.fill("#search", "")
        p.select_option("#provenance", "ours")
        assert "A claim" not in models(p)
        p.select_option("#rank", "1")
        assert models(p) == ["trades", "awp", "pgd-at"]
        p.select_option("#rank", "")
        p.select_option("#provenance", "")
        p.click("th button:text-is('clean %')")
        assert models(p)[:3] == ["standard", "A claim", "awp"] or models(p)[:2] == ["standard", "A claim"]
        assert p.get_attribute("th:has(button:text-is('clean %'))", "aria-sort") == "descending"
        p.click("th button:text-is('clean %')")
        assert models(p)[0] == '<b>bold</b> & "quoted"'
        p.click("th button:text-is('model')")
        assert [m.lower() for m in models(p)] == sorted(m.lower() for m in everything)
        p.click("th button:text-is('rank')")
        p.click("th button:text-is('rank')")
        assert models(p)[-1] == "A claim", "what has no value stays at the end"


def test_sort_from_the_keyboard(page):
    with opened(page) as p:
        p.focus("th button:text-is('robust %')")
        p.keyboard.press("Enter")
        assert models(p)[0] == "A claim"


@pytest.mark.parametrize("width", [400, 1400])
def test_it_fits(page, width):
    with opened(page, width) as p:
        assert_fits(p)
        assert p.title() == "A `small` board"


def test_one_page_for_the_same_records(page):
    before = page.read_bytes()
    build_board(page.parent)
    assert page.read_bytes() == before


def test_an_empty_board():
    assert "0 rows" not in board_page({"title": "Nothing", "note": ""}, [], [], None)
