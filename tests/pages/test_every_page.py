"""What holds on every page: it can be read, in light and dark, on a phone, without a network."""

from __future__ import annotations

import pytest
from browser import Browser
from made_pages import ARMS, Pages
from selenium.webdriver.common.keys import Keys

WAVE = ["mean over heads", "most demanding head"]
#: Of every plot: texts of its legend.
LEGENDS = {
    "demo": {
        "by-budget": [*ARMS],
        "by-bytes": ["full cache", *ARMS],
        "wave": WAVE,
        "heads": [],
    },
    "report": {
        "by-budget-0": [
            *("rkv", "reasonalloc", "snapkv", "snapkv (paper)", "rkv (paper)"),
            *("pyramid-rkv (paper)", "reasonalloc (paper)"),
        ],
        "by-bytes-0": ["Pareto front", "rkv", "reasonalloc", "snapkv", "full cache"],
        "by-speed-0": ["Pareto front", "rkv", "reasonalloc", "snapkv", "full cache"],
        "wave-0": WAVE,
        "heads-0": [],
        "problems-0": [],
        "by-budget-1": [
            *("random", "snapkv (paper)", "rkv (paper)"),
            *("pyramid-rkv (paper)", "reasonalloc (paper)"),
        ],
        "by-bytes-1": ["Pareto front", "random"],
        "by-speed-1": ["Pareto front", "random"],
        "problems-1": [],
    },
    "demand": {"layers": ["each prompt", "largest head", "mean over heads"]},
    "costs": {"layers": ["budget 16", "budget 32", "budget 64"], "heads": []},
}


#: What the Tab key reaches, one after the other.
STOPS = {
    "demo": ["h-table", "SUMMARY", "arm", "arm2", "layer", "head", "play", "step", "text"],
    "report": [
        *("A", "A", "SUMMARY", "h-table-0", "SUMMARY", "h-paired-0", "h-endings-0"),
        *("SUMMARY", "run-0", "problem-0", "left-0", "right-0", "SUMMARY", "left-text-0"),
        *("right-text-0", "SUMMARY", "h-table-1", "SUMMARY"),
    ],
    "demand": ["h-layers"],
    "costs": ["h-layers", "budget"],
}


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", LEGENDS)
def test_it_can_be_read(browser: Browser, pages: Pages, name: str, width: int) -> None:
    page = getattr(pages, name)
    browser.open(page, width)
    check_focus(browser, STOPS[name])
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    check_width(browser, width)
    check_plots(browser, width, LEGENDS[name])
    assert browser.js("return seen.readable()") > 20
    assert browser.js("return seen.brightness()") > 0.9
    assert browser.js("return seen.faint(4.5)") == []
    browser.prefer(dark=True)
    browser.until("return seen.brightness() < 0.05")
    assert browser.settles("return seen.faint(4.5)", []) == []  # plots are drawn anew
    check_plots(browser, width, LEGENDS[name])
    assert browser.errors() == []
    assert browser.requests() == [page.as_uri()]


def check_focus(browser: Browser, stops: list[str]) -> None:
    found = []
    for _ in stops:
        browser.keys(Keys.TAB)
        found.append(browser.js("return seen.focused()"))
    assert found == [[stop, True] for stop in stops]


def check_width(browser: Browser, width: int) -> None:
    """Nothing makes the page scroll sideways; wide tables scroll in their own boxes."""
    assert browser.js("return innerWidth") == width
    assert browser.js("return document.documentElement.scrollWidth") <= width
    assert browser.js("return seen.outside()") == []


def check_plots(browser: Browser, width: int, legends: dict[str, list[str]]) -> None:
    """Every plot is drawn, and its texts can be told apart."""
    plots = browser.js("return seen.plots()")
    assert {plot: found["legend"] for plot, found in plots.items()} == legends
    for plot, found in plots.items():
        assert found["width"] > 0.3 * width and found["height"] >= 250, plot
        assert found["marks"] > 0, plot
        assert found["smallest"] >= 11, plot
        assert found["cut"] == [] and found["crossing"] == [], plot
