"""What holds on every page: it can be read, in light and dark, on a phone, without a network."""

from __future__ import annotations

import pytest
from browser import Browser
from made_pages import ARMS, Pages

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


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", LEGENDS)
def test_it_can_be_read(browser: Browser, pages: Pages, name: str, width: int) -> None:
    page = getattr(pages, name)
    browser.open(page, width)
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.js("return innerWidth") == width
    assert browser.js("return document.documentElement.scrollWidth") <= width
    assert browser.js("return seen.outside()") == []

    plots = browser.js("return seen.plots()")
    assert {plot: found["legend"] for plot, found in plots.items()} == LEGENDS[name]
    for plot, found in plots.items():
        assert found["width"] > 0.3 * width and found["height"] >= 250, plot
        assert found["marks"] > 0, plot
        assert found["smallest"] >= 11, plot
        assert found["cut"] == [] and found["crossing"] == [], plot

    assert browser.js("return seen.readable()") > 20
    assert browser.js("return seen.brightness()") > 0.9
    assert browser.js("return seen.faint(4.5)") == []
    browser.prefer(dark=True)
    browser.until("return seen.brightness() < 0.05 && seen.drawn()")
    assert browser.js("return seen.faint(4.5)") == []

    assert browser.errors() == []
    assert browser.requests() == [page.as_uri()]


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("demo", ["h-table", "SUMMARY", "arm", "arm2", "layer", "head", "play", "step", "text"]),
        (
            "report",
            [
                *("A", "A", "SUMMARY", "h-table-0", "SUMMARY", "h-paired-0", "SUMMARY"),
                *("run-0", "problem-0", "left-0", "right-0", "SUMMARY", "left-text-0"),
                *("right-text-0", "SUMMARY", "h-table-1", "SUMMARY"),
            ],
        ),
        ("demand", ["h-layers"]),
        ("costs", ["h-layers", "budget"]),
    ],
)
def test_the_keyboard_reaches_everything(
    browser: Browser, pages: Pages, name: str, stops: list[str]
) -> None:
    browser.open(getattr(pages, name))
    found = []
    for _ in stops:
        browser.keys("\ue004")  # Tab
        found.append(browser.js("return seen.focused()"))
    assert found == [[stop, True] for stop in stops]
